"""``toma-fx bench``: its options."""

import argparse
from pathlib import Path
from typing import Any

from toma_fx.choices import BENCH_MINUTES, BENCH_PRESETS, DTYPE_NAMES, LEVELS


def add_bench(commands: Any, model_help: str) -> None:
    """Add the command to those of ``toma-fx``."""
    parser = commands.add_parser(
        "bench",
        help="Time a merging model beside the untouched one and other methods.",
        description="Time contenders in turn in one process. Ratios are against the faster of the "
        "untouched model, eager and compiled.",
    )
    add = parser.add_argument
    add(
        "model",
        nargs="?",
        default="sdxl",
        help=f"{model_help} (sdxl); other published models go by names such as qwen-image",
    )
    add("--level", choices=LEVELS, default="model", help="what one call is (model)")
    add("--ratio", type=float, nargs="+", default=[0.5], help="one or more, such as 0.25 0.5 0.75")
    add(
        "--variants",
        nargs="+",
        metavar="NAME",
        help="presets such as toma or toma:region=stripe, tomesd, or all (lower_bound default)",
    )
    add("--rival", type=Path, nargs="+", default=[], metavar="FILE", help="Python files with more")
    add("--size", "--height", type=int, dest="height", help="in pixels (the model's own)")
    add("--width", type=int, help="in pixels (like the height)")
    add("--frames", type=int, nargs="+", default=[None], help="of videos, one or more numbers")
    add("--batch", type=int, nargs="+", default=[1], help="images, one or more numbers (1)")
    add("--dtype", choices=DTYPE_NAMES, default="bfloat16")
    add(
        "--blocks",
        type=int,
        nargs="+",
        metavar="N",
        help="for random weights, of each list in turn, such as double- and single-stream ones, or "
        "one number for all (all, or one where they do not fit into memory)",
    )
    add("--repeats", type=int, default=3, help="counted calls of each (3)")
    add("--steps", type=int, default=4, help="of denoising, at the level of images (4)")
    add("--eager", action="store_true", help="do not compile")
    add("--cpu-time", action="store_true", help="count CPU time, where others use the machine too")
    add("--no-memory", action="store_true", help="do not measure peak memory")
    add("--tokens", type=int, nargs="+", help="of the operators (those of 1024 x 1024 pixels)")
    add("--channels", type=int, help="width of the tokens, with --tokens")
    add("--region-tokens", type=int, nargs="+", default=[64], help="of the operators (64)")
    add(
        "--one-by-one",
        action="store_true",
        help="vary tokens, ratio, batch and region of the operators one at a time, from the first",
    )
    add("--stack", action="store_true", help="merging with what else makes a model faster")
    add("--cold", action="store_true", help="first calls, each in a new process, nothing cached")
    add(
        "--preset",
        choices=BENCH_PRESETS,
        help="tables of docs/speed.md, or a GPU's",
    )
    add(
        "--minutes",
        type=float,
        default=BENCH_MINUTES,
        help=f"to start parts of a preset ({BENCH_MINUTES:g})",
    )
    add("--tiny", action="store_true", help="models of a test, to try a command out")
    add("--out", type=Path, metavar="DIR", help="folder for CSV, JSON and Markdown")
    parser.set_defaults(run=_bench)


def _bench(options: argparse.Namespace) -> None:
    from toma_fx.bench.command import run

    run(options)
