"""The lab's commands: ``toma-fx eval`` and ``calibrate``.

A command imports its code only when it runs. So help is quick, and the other commands need none of
the lab's packages.
"""

import argparse
import json
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from toma_fx.choices import DTYPE_NAMES
from toma_fx.early import check_out
from toma_fx.errors import ConfigError
from toma_fx.lab import small_models
from toma_fx.lab.measures import MEASURES, OF_SMALL_MODELS
from toma_fx.quiet import hush_libraries
from toma_fx.setting import OF_MEMORY, add_setting, add_variants, config_of, given_in

MODEL = "folder or hub name of a diffusers pipeline"


def add_commands(commands: Any) -> None:
    """Add the lab's commands to those of ``toma-fx``."""
    usage = "%(prog)s [options] MODEL"
    about = "Draw images with several settings and measure them."
    _add_eval(commands.add_parser("eval", help=about, description=about, usage=usage))
    about = "Find the ratio of each block that changes images least."
    _add_calibrate(commands.add_parser("calibrate", help=about, description=about, usage=usage))


def _add_eval(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", help=MODEL)
    _add_ratios(parser, "share of tokens merged away, one or more")
    more = "; steps, or steps=18, merges nothing"
    add_variants(parser, ("default", "steps"), more=more)
    add_measuring(parser, default="all")
    parser.set_defaults(run=_eval)


def _add_calibrate(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("model", help=MODEL)
    _add_ratios(parser, "ratios to show")
    add_prompts(parser)
    add(
        "--out",
        type=Path,
        required=True,
        metavar="FILE.json",
        help="the file to write, which --variant takes",
    )
    add_drawing(parser)
    add_setting(parser, leave_out=("ratio", "block_ratios", "calibration", "memory", *OF_MEMORY))
    parser.set_defaults(run=_calibrate, default_prompts=small_models.CALIBRATION)


def _add_ratios(parser: argparse.ArgumentParser, about: str) -> None:
    how: dict[str, Any] = {"type": float, "nargs": "+", "default": [0.25, 0.5, 0.75]}
    about = f"{about} (default: {' '.join(map(str, how['default']))})"
    parser.add_argument("--ratio", **how, metavar="R", help=about)


def add_prompts(parser: argparse.ArgumentParser) -> None:
    """Add the options that choose prompts; `prompts_of` reads them."""
    add = parser.add_argument
    add(
        "--prompts",
        type=Path,
        metavar="FILE",
        help="text file with one prompt per line, or a .csv table",
    )
    add("--limit", type=int, metavar="N", help="only the first N prompts")
    add("--seeds", type=int, default=1, metavar="N", help="images of each prompt (default: 1)")


def add_measuring(parser: argparse.ArgumentParser, *, default: str) -> None:
    """Add the options of measuring, of drawing and of the output."""
    add = parser.add_argument
    add_prompts(parser)
    parser.set_defaults(default_prompts=small_models.PROMPTS)
    add(
        "--measures",
        nargs="+",
        choices=tuple(MEASURES),
        metavar="NAME",
        help=f"some of {', '.join(MEASURES)} (default: {default})",
    )
    add(
        "--reference",
        type=Path,
        metavar="DIR",
        help="folder of real images for FID (default: the untouched images)",
    )
    for name in ("clip", "dino", "fid"):
        add(f"--{name}", metavar="NAME", help=f"folder or hub name of the network of {name}")
    add("--lpips", choices=("alex", "vgg", "squeeze"), help="network of lpips (default: alex)")
    add(
        "--out",
        type=Path,
        required=True,
        metavar="DIR",
        help="a new folder, or that of an earlier run",
    )
    add_drawing(parser)


def add_drawing(parser: argparse.ArgumentParser) -> None:
    """Add the options of drawing; `task_of` reads them."""
    add = parser.add_argument
    add("--steps", type=int, default=25, metavar="N", help="denoising steps (default: 25)")
    add("--guidance", type=float, metavar="X", help="guidance scale (default: the pipeline's own)")
    add("--height", type=int, metavar="PIXELS", help="image height (default: the pipeline's own)")
    add("--width", type=int, metavar="PIXELS", help="image width (default: the pipeline's own)")
    add(
        "--dtype",
        choices=DTYPE_NAMES,
        help="dtype of the weights (default: bfloat16 on a GPU, float32 on a CPU)",
    )
    add(
        "--argument",
        nargs="+",
        default=[],
        metavar="NAME=VALUE",
        help="other arguments of the pipeline: true_cfg_scale=4 max_sequence_length=256",
    )


def _eval(options: argparse.Namespace) -> None:
    from toma_fx.hub import check_there

    need_packages("torchmetrics")
    check_out(options.out, folder=True)
    check_there(options.model)
    from toma_fx.lab.evaluate import evaluate
    from toma_fx.variants import check_ratios, parse_variant

    variants = [parse_variant(text) for text in options.variant]
    check_ratios(variants, options.ratio)
    plan = plan_of(options, variants, usual_measures(options.model))
    text = evaluate(task_of(options, prompts_of(options)), plan, options.out)
    if text:  # the first of several processes alone has one
        print(text)


def _calibrate(options: argparse.Namespace) -> None:
    from toma_fx.hub import check_there

    check_out(options.out, folder=False)
    check_there(options.model)
    from toma_fx.lab.calibration import as_table, calibrate_to_file

    given = given_in(options)
    del given["ratio"]  # the ratios to show, not one to merge at
    config = config_of(given)
    task = task_of(options, prompts_of(options))
    found = calibrate_to_file(task, config, options.out)
    print(as_table(found, options.ratio).text())


def plan_of(options: argparse.Namespace, variants: Sequence[Any], measures: tuple[str, ...]) -> Any:
    """The comparison that the options ask for, with its measures."""
    from toma_fx.lab.evaluate import Plan
    from toma_fx.lab.networks import Networks

    chosen = options.measures or measures
    return Plan(
        variants=tuple(variants),
        ratios=tuple(options.ratio),
        measures=tuple(name for name in MEASURES if name in chosen),
        networks=Networks(**networks_of(options)),
        reference=options.reference,
    )


def usual_measures(model: str) -> tuple[str, ...]:
    """The names of all measures that a model can have, by its hub name or folder."""
    is_small = bool(small_models.own_settings(model))
    return tuple(name for name in MEASURES if is_small or name not in OF_SMALL_MODELS)


def networks_of(options: argparse.Namespace) -> dict[str, str]:
    """The networks that were named, by measure."""
    names = {name: getattr(options, name) for name in ("clip", "dino", "fid", "lpips")}
    return {name: given for name, given in names.items() if given is not None}


def task_of(options: argparse.Namespace, prompts: tuple[Any, ...]) -> Any:
    """The task of the options; the repository's own models add settings of their cards."""
    from toma_fx.lab.draw import Task, default_dtype

    hush_libraries()
    own = small_models.own_settings(options.model)
    names = ("guidance", "height", "width", "dtype")
    given = {name: getattr(options, name) for name in names if getattr(options, name) is not None}
    settings = {"dtype": default_dtype(), **own, **given}
    settings["arguments"] = own.get("arguments", {}) | dict(map(_argument, options.argument))
    return Task(
        model=options.model,
        prompts=prompts,
        seeds=getattr(options, "seeds", 1),
        steps=options.steps,
        **settings,
    )


def _argument(text: str) -> tuple[str, Any]:
    name, equals, value = text.partition("=")
    if not equals:
        raise ConfigError(f"argument={text!r} must be NAME=VALUE, such as true_cfg_scale=4")
    try:
        return name, json.loads(value)
    except json.JSONDecodeError:
        return name, value


def prompts_of(options: argparse.Namespace) -> tuple[Any, ...]:
    """The prompts of ``--prompts``; the repository's own models have a file of prompts."""
    from toma_fx.lab.prompts import load_prompts

    file = options.prompts
    if file is None:
        if not small_models.own_settings(options.model):
            raise ConfigError(f"model={options.model!r} needs --prompts FILE, a prompt a line")
        file = options.default_prompts
    return load_prompts(file, limit=options.limit)


def need_packages(*names: str) -> None:
    """Stop when packages of the ``lab`` extra are missing.

    Raises:
        ConfigError: when one is missing.
    """
    missing = [name for name in names if find_spec(name) is None]
    if missing:
        raise ConfigError(f"this command needs {' and '.join(missing)}: pip install 'toma-fx[lab]'")
