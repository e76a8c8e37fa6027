"""``toma-fx bench``: its options."""

import argparse
from pathlib import Path
from typing import Any

from toma_fx.choices import DTYPE_NAMES, MODEL_NAMES
from toma_fx.early import check_counts, check_out
from toma_fx.errors import ConfigError
from toma_fx.setting import add_variants

BLOCK_MODELS = ("sdxl", "flux")
"""Published models whose blocks can be called alone."""
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
    kinds = parser.add_subparsers(required=True, metavar="model|block|image", dest="kind")
    for kind, about in KINDS.items():
        usage = "%(prog)s [options] MODEL"
        each = kinds.add_parser(kind, help=about, description=about, usage=usage)
        each.add_argument("model", help=model_help)
        add_timing(each)
        if kind == "image":
            each.add_argument(
                "--steps", type=int, default=4, metavar="N", help="denoising steps (default: 4)"
            )
        elif kind == "model":
            each.add_argument(
                "--cuda-graphs",
                action="store_true",
                help="replay calls from CUDA graphs, which leaves out the host's work",
            )
            each.add_argument(
                "--frames",
                type=int,
                nargs="+",
                default=[None],
                metavar="N",
                help="frames of a video, one or more numbers (default: the model's own)",
            )
        each.set_defaults(run=_bench)


def add_timing(parser: argparse.ArgumentParser) -> None:
    """Add the options of timing; `toma_fx.bench.command.setting_of` reads them."""
    add = parser.add_argument
    add(
        "--ratio",
        type=float,
        nargs="+",
        default=[0.5],
        metavar="R",
        help="share of tokens merged away, one or more (default: 0.5)",
    )
    add_variants(parser, ("lower_bound", "default"))
    add("--height", type=int, metavar="PIXELS", help="image height (default: the model's own)")
    add("--width", type=int, metavar="PIXELS", help="image width (default: the height)")
    add(
        "--batch",
        type=int,
        nargs="+",
        default=[1],
        metavar="N",
        help="images in a call, one or more numbers (default: 1)",
    )
    add(
        "--dtype",
        choices=DTYPE_NAMES,
        default="bfloat16",
        help="dtype of the weights (default: bfloat16)",
    )
    add(
        "--blocks",
        type=int,
        nargs="+",
        metavar="N",
        help="with random weights: blocks in each list, or one number for all lists (default: all "
        "blocks, or one of each list where all do not fit into memory)",
    )
    add(
        "--repeats",
        type=int,
        default=3,
        metavar="N",
        help="timed calls of each contender (default: 3)",
    )
    add("--eager", action="store_true", help="do not compile")
    add("--cpu-time", action="store_true", help="count CPU time, for a machine that others use too")
    add("--out", type=Path, metavar="DIR", help="folder for CSV, JSON and Markdown")
    add("--json", action="store_true", help="print the result as one JSON object")


def _bench(options: argparse.Namespace) -> None:
    from toma_fx.hub import check_there

    check_counts(options, "repeats", "batch", "height", "width", "frames", "steps")
    check_out(options.out, folder=True)
    if options.kind == "block" and options.model in set(MODEL_NAMES) - set(BLOCK_MODELS):
        raise ConfigError(
            f"blocks of {options.model} run only in a call of their model; time one of each list "
            "with toma-fx bench model --blocks 1"
        )
    check_there(options.model, MODEL_NAMES)
    from toma_fx.bench.command import run

    run(options)
