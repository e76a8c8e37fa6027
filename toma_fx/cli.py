"""The command line, ``toma-fx``.

A command imports what it runs when it runs, so that help takes no seconds.
"""

import argparse
import json
import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

import toma_fx
from toma_fx.app.command import add_app
from toma_fx.bench.cli import add_bench
from toma_fx.choices import DTYPE_NAMES, MODEL_NAMES, PROMPT
from toma_fx.early import check_counts, check_out
from toma_fx.errors import ConfigError, TomaError
from toma_fx.lab.cli import add_commands
from toma_fx.parser import Parser
from toma_fx.progress import progress
from toma_fx.quiet import hush_libraries
from toma_fx.setting import add_setting, config_of, given_in

MODEL = (
    "sdxl, flux, flux2-dev, qwen-image, wan2.1-14b or another of docs/families.md (random weights, "
    "real size), or a folder or hub name that diffusers can load"
)
INTERRUPTED = 130
"""The exit status of a process that Ctrl-C ended, as shells have it."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Returns:
        the exit status: 0, or 1 without memory or reader, 2 after a mistake, 130 after Ctrl-C.
    """
    options = _parser().parse_args(arguments)
    given = sys.argv[1:] if arguments is None else arguments
    options.command = shlex.join(["toma-fx", *given])
    try:
        options.run(options)
        sys.stdout.flush()
    except TomaError as error:
        return _said(" ".join(str(error).split()), 2)
    except KeyboardInterrupt:
        return _said("interrupted", INTERRUPTED)
    except BrokenPipeError:  # whoever read the output has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:
        if error.filename is None:
            raise
        return _said(f"{error.filename}: {error.strerror}", 1)
    except (MemoryError, RuntimeError) as error:
        if not _is_about_memory(error):
            raise
        return _said(
            f"out of memory ({str(error).strip().partition(chr(10))[0] or 'on the CPU'}); take "
            "a smaller --height and --width, fewer images, or fewer --blocks where there are any",
            1,
        )
    return 0


def _said(message: str, status: int) -> int:
    print(f"toma-fx: {message}", file=sys.stderr)
    return status


def _is_about_memory(error: Exception) -> bool:
    """Whether memory ran out; torch has one class for GPUs, and words alone for the CPU."""
    classes = {cls.__name__ for cls in type(error).__mro__}
    known = {"MemoryError", "OutOfMemoryError"}
    return bool(classes & known) or "can't allocate memory" in str(error)


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="toma-fx",
        description="Merge tokens in diffusers models: see where, time it, and measure the images.",
    )
    parser.add_argument("--version", action="version", version=toma_fx.__version__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    usage = "%(prog)s [options] MODEL"
    about = "Show where a model would merge tokens and how much arithmetic that saves."
    _add_report(commands.add_parser("report", help=about, description=about, usage=usage))
    add_bench(commands, MODEL)
    usage = "%(prog)s [options]"
    about = "Draw images side by side, then show the report, graphs and times of SDXL and Flux."
    _add_demo(commands.add_parser("demo", help=about, description=about, usage=usage))
    add_commands(commands)
    add_app(commands)
    return parser


def _add_report(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("model", help=MODEL)
    add(
        "--speedup",
        type=float,
        metavar="X",
        help="choose the ratio that makes the arithmetic X times less",
    )
    add("--height", type=int, metavar="PIXELS", help="image height (default: the model's own)")
    add("--width", type=int, metavar="PIXELS", help="image width (default: the height)")
    add("--frames", type=int, metavar="N", help="video frames (default: the model's own)")
    add("--batch", type=int, default=1, metavar="N", help="images in a call (default: 1)")
    add(
        "--steps",
        type=int,
        default=25,
        metavar="N",
        help="denoising steps over which the arithmetic is averaged (default: 25)",
    )
    add(
        "--dtype",
        choices=DTYPE_NAMES,
        default="bfloat16",
        help="dtype of the weights (default: bfloat16)",
    )
    add(
        "--out",
        type=Path,
        metavar="FILE",
        help="also write the report to a file, as JSON if its name ends in .json",
    )
    add("--json", action="store_true", help="print the report as one JSON object")
    add_setting(parser)
    parser.set_defaults(run=_report)


def _add_demo(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--model", help=f"only this model: {MODEL}")
    add("--quick", action="store_true", help="time 512 x 512 pixels and one call: two minutes")
    add("--prompt", default=PROMPT, metavar="TEXT", help="prompt of the images")
    add(
        "--steps",
        type=int,
        default=25,
        metavar="N",
        help="denoising steps of the images (default: 25)",
    )
    add(
        "--out",
        type=Path,
        default=Path("demo"),
        metavar="DIR",
        help="folder of the pictures (default: demo)",
    )
    add_setting(parser, leave_out=("calibration",))
    parser.set_defaults(run=_demo)


def _demo(options: argparse.Namespace) -> None:
    from toma_fx.hub import check_there

    check_counts(options, "steps")
    check_out(options.out, folder=True)
    if options.model is not None:
        check_there(options.model, MODEL_NAMES)
    given = given_in(options)
    config_of(given)  # before loading, which can take minutes
    from toma_fx.demo import demo

    hush_libraries()
    names = ("model", "quick", "prompt", "steps", "out")
    demo(given, **{name: getattr(options, name) for name in names})


def _report(options: argparse.Namespace) -> None:
    from toma_fx.hub import check_there

    check_counts(options, "height", "width", "frames", "batch", "steps")
    check_out(options.out, folder=False)
    check_there(options.model, MODEL_NAMES)
    given = given_in(options)
    if options.speedup is not None and {"ratio", "calibration"} & given.keys():
        raise ConfigError(
            f"speedup={options.speedup:g} chooses the ratio; leave --ratio and --calibration out"
        )
    config = config_of(given)  # before loading, which can take minutes
    from toma_fx.checkpoints import DTYPES, architecture

    hush_libraries()
    with progress(f"load {options.model}"):
        model = architecture(options.model, DTYPES[options.dtype])
    with progress("count arithmetic"):
        transformed = toma_fx.transform(model, config, speedup=options.speedup)
        names = ("height", "width", "frames", "batch", "steps")
        found = toma_fx.report(transformed, **{name: getattr(options, name) for name in names})
    as_json = json.dumps(found.as_dict())
    if options.out is not None:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(f"{as_json if options.out.suffix == '.json' else found.text()}\n")
    print(as_json if options.json else found.text())
