"""The command line, ``toma-fx``.

A command imports what it runs when it runs, so that help takes no seconds.
"""

import argparse
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import get_args

import toma_fx
from toma_fx.app.command import add_app
from toma_fx.bench.cli import add_bench
from toma_fx.choices import DTYPE_NAMES, PROMPT
from toma_fx.config import PRESETS, Component, MergeConfig, Placement, Region, Tokens
from toma_fx.errors import TomaError
from toma_fx.lab.cli import add_commands
from toma_fx.quiet import hush_libraries
from toma_fx.schedule import Memory

MODEL = (
    "sdxl, flux, flux2-dev, qwen-image, wan2.1-14b or another of docs/families.md (random weights, "
    "real size), or a folder or hub name that diffusers can load"
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    options = _parser().parse_args(arguments)
    given = sys.argv[1:] if arguments is None else arguments
    options.command = shlex.join(["toma-fx", *given])
    try:
        options.run(options)
    except TomaError as error:
        print(f"toma-fx: {error}", file=sys.stderr)
        return 2
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="toma-fx",
        description="Merge tokens in diffusers models: see where, time it, and measure the images.",
    )
    parser.add_argument("--version", action="version", version=toma_fx.__version__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    report = commands.add_parser(
        "report", help="Show where a model would merge tokens and how much arithmetic that saves."
    )
    report.add_argument("model", help=MODEL)
    report.add_argument(
        "--ratio", type=float, default=0.5, help="share of tokens merged away (0.5)"
    )
    _add_config(report)
    _add_size(report)
    report.set_defaults(run=_report)

    add_bench(commands, MODEL)

    show = commands.add_parser(
        "demo",
        help="Draw images side by side, then show the report, graphs and times of SDXL and Flux at "
        "their real sizes.",
    )
    show.add_argument("--model", help=f"only this model: {MODEL}")
    show.add_argument("--ratio", type=float, default=0.5, help="share of tokens merged away (0.5)")
    show.add_argument("--quick", action="store_true", help="512 x 512 pixels, one counted call")
    show.add_argument("--prompt", default=PROMPT, help="of the images")
    show.add_argument("--steps", type=int, default=25, help="of denoising (25)")
    show.add_argument("--output", type=Path, default=Path("demo"), help="of the pictures (demo)")
    show.set_defaults(run=_demo)
    add_commands(commands)
    add_app(commands)
    return parser


def _add_config(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--preset", choices=tuple(PRESETS), default="default")
    parser.add_argument(
        "--tokens",
        choices=get_args(Tokens),
        help="all, or those of the images that an edit model takes (all)",
    )
    parser.add_argument("--placement", choices=get_args(Placement))
    parser.add_argument("--components", nargs="+", choices=get_args(Component))
    parser.add_argument("--region", choices=get_args(Region))
    parser.add_argument("--region-tokens", type=int, metavar="N", help="tokens of a region")
    parser.add_argument("--memory", type=int, metavar="N", help="run every Nth step in full")
    parser.add_argument("--merge-below", type=float, metavar="LEVEL", help="noise level (1)")
    parser.add_argument("--skip", nargs="*", metavar="PATTERN", help="blocks to leave unmerged")
    parser.add_argument("--dtype", choices=DTYPE_NAMES, default="bfloat16")


def _add_size(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--height", type=int, help="of the image, in pixels (the model's own)")
    parser.add_argument("--width", type=int, help="of the image, in pixels (like the height)")
    parser.add_argument("--frames", type=int, help="of a video (the model's own)")


def _config(options: argparse.Namespace, ratio: float) -> MergeConfig:
    names = ("tokens", "placement", "components", "region", "region_tokens", "merge_below", "skip")
    given = {name: getattr(options, name) for name in names if getattr(options, name) is not None}
    if options.memory is not None:
        given["memory"] = Memory(every=options.memory)
    return MergeConfig.preset(options.preset, ratio=ratio, **given)


def _demo(options: argparse.Namespace) -> None:
    from toma_fx.demo import demo

    hush_libraries()
    names = ("model", "ratio", "quick", "prompt", "steps", "output")
    demo(**{name: getattr(options, name) for name in names})


def _report(options: argparse.Namespace) -> None:
    config = _config(options, options.ratio)  # before loading, which can take minutes
    from toma_fx.checkpoints import DTYPES, RANDOM, architecture, load_model

    hush_libraries()
    if options.model in RANDOM:
        model = architecture(options.model)
    else:
        model = load_model(options.model, dtype=DTYPES[options.dtype])
    transformed = toma_fx.transform(model, config)
    size = {name: getattr(options, name) for name in ("height", "width", "frames")}
    print(toma_fx.report(transformed, **size))
