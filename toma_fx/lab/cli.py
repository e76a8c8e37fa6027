"""The lab's commands: ``toma-fx eval``, ``study``, ``calibrate``, ``plot`` and ``show``.

What they run is imported when they run, so that help is quick, and the other commands need nothing
of the lab's packages.
"""

import argparse
import json
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from toma_fx.choices import DTYPE_NAMES
from toma_fx.errors import ConfigError
from toma_fx.lab import small_models
from toma_fx.lab.measures import MEASURES
from toma_fx.lab.studies import STUDIES, Study
from toma_fx.quiet import hush_libraries

PACKAGES = ("matplotlib", "torchmetrics")
MODEL = "folder or hub name of a diffusers pipeline"


def add_commands(commands: Any) -> None:
    """Add the lab's commands to those of ``toma-fx``."""
    _add_eval(
        commands.add_parser("eval", help="Draw images with several variants and measure them.")
    )
    _add_study(
        commands.add_parser(
            "study",
            help="Make a table of the paper, or one of ours, with the paper's figures beside it.",
            epilog="\n".join(f"{name:13} {_about(study)}" for name, study in STUDIES.items()),
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
    )
    _add_calibrate(
        commands.add_parser(
            "calibrate", help="Find the ratio of each block that changes images least."
        )
    )
    _add_plot(
        commands.add_parser("plot", help="Plot the quality that eval measured against its cost.")
    )
    _add_show(
        commands.add_parser("show", help="Draw pictures of what merging does inside a model.")
    )


def _add_eval(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", help=MODEL)
    add = parser.add_argument
    add("--ratio", type=float, nargs="+", default=[0.25, 0.5, 0.75], help="(0.25 0.5 0.75)")
    add(
        "--variants",
        nargs="+",
        default=["default", "steps"],
        metavar="NAME",
        help="presets such as toma or toma:region=stripe, steps, steps=18, tomesd, and the "
        "repository's todo and tofu (default steps)",
    )
    add("--rival", type=Path, nargs="+", default=[], metavar="FILE", help="Python files with more")
    add("--schedule", metavar="A/B", help="select every A and weigh every B steps, as in 10/5")
    _add_measuring(parser, default="all")
    parser.set_defaults(run=_eval)


def _add_study(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("name", choices=tuple(STUDIES), metavar="NAME", help=f"one of {', '.join(STUDIES)}")
    add("model", nargs="?", help=f"{MODEL} (the study's small one)")
    add("--ratio", type=float, nargs="+", default=[], help="(the study's own)")
    _add_measuring(parser, default="mse psnr ssim, and those whose network is named")
    parser.set_defaults(run=_study)


def _add_calibrate(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("model", help=MODEL)
    add("--ratio", type=float, nargs="+", default=[0.25, 0.5, 0.75], help="to show (0.25 0.5 0.75)")
    add("--variant", default="default", help="all options that are not allotted (default)")
    _add_prompts(parser)
    add("--out", type=Path, required=True, metavar="FILE.json", help="a variant for eval")
    _add_drawing(parser)
    parser.set_defaults(run=_calibrate, default_prompts=small_models.CALIBRATION)


def _add_prompts(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--prompts", type=Path, metavar="FILE", help=".txt, .csv, .tsv or .json(l)")
    add("--template", metavar="TEXT", help="what each prompt is put into: 'a photo of a {}'")
    add("--limit", type=int, metavar="N", help="only the first N prompts")
    add("--seeds", type=int, default=1, metavar="N", help="images of each prompt (1)")


def _add_measuring(parser: argparse.ArgumentParser, *, default: str) -> None:
    add = parser.add_argument
    _add_prompts(parser)
    parser.set_defaults(default_prompts=small_models.PROMPTS)
    add(
        "--measures",
        nargs="+",
        choices=tuple(MEASURES),
        metavar="NAME",
        help=f"some of {', '.join(MEASURES)} ({default})",
    )
    add("--reference", type=Path, metavar="DIR", help="real images for FID (untouched ones)")
    for name in ("clip", "dino", "fid"):
        add(f"--{name}", metavar="NAME", help=f"folder or hub name of the network of {name}")
    add("--lpips", choices=("alex", "vgg", "squeeze"), help="the network of lpips (alex)")
    add("--out", type=Path, required=True, metavar="DIR", help="new, or of an earlier run")
    _add_drawing(parser)


def _add_plot(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "results",
        type=Path,
        metavar="RESULTS",
        help="the --out of toma-fx eval, or a study's table such as DIR/variants.csv",
    )
    parser.add_argument("--x", choices=("arithmetic", "seconds"), default="arithmetic")
    parser.add_argument(
        "--y", nargs="+", choices=tuple(MEASURES), default=["psnr"], help="a panel each (psnr)"
    )
    parser.add_argument("--out", type=Path, metavar="FILE", help="(psnr_arithmetic.png there)")
    parser.set_defaults(run=_plot)


def _add_show(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", help=MODEL)
    parser.add_argument("--prompt", required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--variant", default="default", help="how destinations are chosen")
    parser.add_argument("--ratio", type=float, default=0.5, help="share merged away (0.5)")
    parser.add_argument("--layers", type=int, default=6, help="layers in the pictures (6)")
    parser.add_argument("--columns", type=int, default=5, help="steps in the pictures (5)")
    parser.add_argument("--clusters", type=int, default=12, help="of k-means (12)")
    parser.add_argument("--interval", type=int, default=10, help="steps of the overlap (10)")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR")
    _add_drawing(parser)
    parser.set_defaults(run=_show)


def _add_drawing(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--steps", type=int, default=25, help="of denoising (25)")
    parser.add_argument("--guidance", type=float, help="guidance scale (the pipeline's own)")
    parser.add_argument("--height", type=int, help="in pixels (the pipeline's own)")
    parser.add_argument("--width", type=int, help="in pixels (the pipeline's own)")
    parser.add_argument("--dtype", choices=DTYPE_NAMES, help="(bfloat16 on a GPU)")
    parser.add_argument(
        "--argument",
        nargs="+",
        default=[],
        metavar="NAME=VALUE",
        help="others of the pipeline's call: true_cfg_scale=4 max_sequence_length=256",
    )


def _eval(options: argparse.Namespace) -> None:
    _need_packages()
    from toma_fx.lab.evaluate import evaluate
    from toma_fx.lab.rivals import load_rival, named_variant
    from toma_fx.lab.variants import parse_schedule

    schedule = None if options.schedule is None else parse_schedule(options.schedule)
    variants = [named_variant(name, schedule=schedule) for name in options.variants]
    variants += map(load_rival, options.rival)
    plan = _plan(options, variants, tuple(MEASURES))
    _print(evaluate(_task(options, _prompts(options)), plan, options.out))


def _study(options: argparse.Namespace) -> None:
    _need_packages()
    from toma_fx.lab.study import run_study

    if options.model is None:
        options.model = str(small_models.FOLDER / STUDIES[options.name].model)
    default = {"mse", "psnr", "ssim", *_networks(options)}
    default |= {"clip_image"} if options.clip else set()
    plan = _plan(options, (), tuple(name for name in MEASURES if name in default))
    _print(run_study(options.name, _task(options, _prompts(options)), plan, options.out))


def _calibrate(options: argparse.Namespace) -> None:
    from toma_fx.lab.calibration import as_text, calibrate_to_file
    from toma_fx.lab.variants import Allotted

    variant = _merging(options.variant)
    if isinstance(variant, Allotted):
        raise ConfigError(f"variant={options.variant!r} is allotted already; name a preset")
    task = _task(options, _prompts(options))
    found = calibrate_to_file(task, variant.config(0.5), options.out)
    print(as_text(found, options.ratio))


def _plot(options: argparse.Namespace) -> None:
    _need_packages()
    from toma_fx.lab.plot import plot

    print(plot(options.results, x=options.x, ys=tuple(options.y), file=options.out))


def _show(options: argparse.Namespace) -> None:
    _need_packages()
    from toma_fx.lab.prompts import Prompt
    from toma_fx.lab.show import Look, show

    variant = _merging(options.variant)
    task = _task(options, (Prompt(text=options.prompt),))
    look = Look(
        config=variant.config(options.ratio),
        seed=options.seed,
        layers=options.layers,
        columns=options.columns,
        clusters=options.clusters,
        interval=options.interval,
    )
    for file in show(task, look, options.out):
        print(file)


def _merging(text: str) -> Any:
    from toma_fx.lab.variants import Merging, parse_variant

    variant = parse_variant(text)
    if not isinstance(variant, Merging):
        raise ConfigError(f"variant={text!r} merges nothing; use a preset")
    return variant


def _plan(options: argparse.Namespace, variants: Sequence[Any], measures: tuple[str, ...]) -> Any:
    from toma_fx.lab.evaluate import Plan
    from toma_fx.lab.networks import Networks

    chosen = options.measures or measures
    return Plan(
        variants=tuple(variants),
        ratios=tuple(options.ratio),
        measures=tuple(name for name in MEASURES if name in chosen),
        networks=Networks(**_networks(options)),
        reference=options.reference,
    )


def _networks(options: argparse.Namespace) -> dict[str, str]:
    names = {name: getattr(options, name) for name in ("clip", "dino", "fid", "lpips")}
    return {name: given for name, given in names.items() if given is not None}


def _task(options: argparse.Namespace, prompts: tuple[Any, ...]) -> Any:
    """The task of the options, and of the model's card where it is one of the repository's own."""
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


def _prompts(options: argparse.Namespace) -> tuple[Any, ...]:
    from toma_fx.lab.prompts import load_prompts

    file = options.prompts
    if file is None:
        if not small_models.own_settings(options.model):
            raise ConfigError(f"model={options.model!r} needs --prompts FILE, a prompt a line")
        file = options.default_prompts
    return load_prompts(file, template=options.template, limit=options.limit)


def _about(study: Study) -> str:
    return f"{study.title} ({study.paper.table})" if study.paper else study.title


def _print(text: str) -> None:
    if text:  # the first of several processes alone has one
        print(text)


def _need_packages() -> None:
    missing = [name for name in PACKAGES if find_spec(name) is None]
    if missing:
        raise ConfigError(f"this command needs {' and '.join(missing)}: pip install 'toma-fx[lab]'")
