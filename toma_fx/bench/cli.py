"""``toma-fx bench``: its options."""

import argparse
from pathlib import Path
from typing import Any

from toma_fx.choices import DTYPE_NAMES

KINDS = {
    "model": "Time one forward of a whole model.",
    "block": "Time one block of each kind of SDXL or Flux.",
    "image": "Time whole images, and measure how far they differ.",
}


def add_bench(commands: Any, model_help: str) -> None:
    """Add the command to those of ``toma-fx``."""
    parser = commands.add_parser(
        "bench",
        help="Time a merging model beside the untouched one.",
        description="Time models in turn in one process. Ratios are against the faster of the "
        "untouched model, eager and compiled.",
    )
    kinds = parser.add_subparsers(required=True, metavar="KIND", dest="kind")
    for kind, about in KINDS.items():
        each = kinds.add_parser(kind, help=about, description=about)
        each.add_argument("model", help=model_help)
        add_timing(each)
        if kind == "image":
            each.add_argument("--steps", type=int, default=4, help="of denoising (4)")
        else:
            frames = "of videos, one number or more"
            each.add_argument("--frames", type=int, nargs="+", default=[None], help=frames)
        each.set_defaults(run=_bench)


def add_timing(parser: argparse.ArgumentParser) -> None:
    """Add what is timed, and how; `toma_fx.bench.command.setting_of` reads it."""
    add = parser.add_argument
    add("--ratio", type=float, nargs="+", default=[0.5], help="one or more, such as 0.25 0.5 0.75")
    add(
        "--variant",
        nargs="+",
        metavar="NAME",
        default=["lower_bound", "default"],
        help="presets such as toma or toma:region=stripe (lower_bound default)",
    )
    add("--height", type=int, help="in pixels (the model's own)")
    add("--width", type=int, help="in pixels (like the height)")
    add("--batch", type=int, nargs="+", default=[1], help="images, one number or more (1)")
    add("--dtype", choices=DTYPE_NAMES, default="bfloat16")
    add(
        "--blocks",
        type=int,
        nargs="+",
        metavar="N",
        help="of each list of blocks of random weights, or one number for all (all, or one where "
        "they do not fit into memory)",
    )
    add("--repeats", type=int, default=3, help="counted calls of each (3)")
    add("--eager", action="store_true", help="do not compile")
    add("--cpu-time", action="store_true", help="count CPU time, where others use the machine too")
    add("--out", type=Path, metavar="DIR", help="folder for CSV, JSON and Markdown")


def _bench(options: argparse.Namespace) -> None:
    from toma_fx.bench.command import run

    run(options)
