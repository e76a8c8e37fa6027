"""The lab's commands: ``toma-fx eval``, ``plot`` and ``show``.

What they run is imported when they run, so that the other commands stay quick and need nothing of
the lab's packages.
"""

import argparse
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from toma_fx.errors import ConfigError
from toma_fx.lab.measures import MEASURES

PACKAGES = ("matplotlib", "torchmetrics")
MODEL = "folder or hub name of a diffusers pipeline"


def add_commands(commands: Any) -> None:
    """Add the lab's commands to those of ``toma-fx``."""
    _add_eval(commands.add_parser("eval", help="draw with contenders and measure their images"))
    _add_plot(commands.add_parser("plot", help="plot what eval measured"))
    _add_show(commands.add_parser("show", help="pictures of what merging does inside a model"))


def _add_eval(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", help=MODEL)
    add = parser.add_argument
    add("--prompts", type=Path, required=True, metavar="FILE", help=".txt, .csv, .tsv or .json(l)")
    add("--template", metavar="TEXT", help="what each prompt is put into: 'a photo of a {}'")
    add("--limit", type=int, metavar="N", help="only the first N prompts")
    add("--seeds", type=int, default=1, metavar="N", help="images of each prompt (1)")
    add("--ratio", type=float, nargs="+", default=[0.25, 0.5, 0.75], help="(0.25 0.5 0.75)")
    add(
        "--variants",
        nargs="+",
        default=["default", "steps"],
        metavar="NAME",
        help="presets such as toma or toma:region=stripe, steps, steps=18, tomesd (default steps)",
    )
    add("--rival", type=Path, nargs="+", default=[], metavar="FILE", help="Python files with more")
    add("--schedule", metavar="A/B", help="select every A and weigh every B steps, as in 10/5")
    add(
        "--measures",
        nargs="+",
        choices=tuple(MEASURES),
        default=tuple(MEASURES),
        metavar="NAME",
        help=f"some of {', '.join(MEASURES)} (all)",
    )
    add("--reference", type=Path, metavar="DIR", help="real images for FID (untouched ones)")
    for name in ("clip", "dino", "fid"):
        add(f"--{name}", metavar="NAME", help=f"folder or hub name of the network of {name}")
    add("--lpips", choices=("alex", "vgg", "squeeze"), help="the network of lpips (alex)")
    add("--out", type=Path, required=True, metavar="DIR", help="new, or of an earlier run")
    _add_drawing(parser)
    parser.set_defaults(run=_eval)


def _add_plot(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", type=Path, metavar="DIR", help="the --out of toma-fx eval")
    parser.add_argument("--x", choices=("arithmetic", "seconds"), default="arithmetic")
    parser.add_argument(
        "--y", nargs="+", choices=tuple(MEASURES), default=["psnr"], help="a panel each (psnr)"
    )
    parser.add_argument("--out", type=Path, metavar="FILE", help="(DIR/psnr_arithmetic.png)")
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
    parser.add_argument(
        "--dtype", choices=("bfloat16", "float16", "float32"), help="(bfloat16 on a GPU)"
    )


def _eval(options: argparse.Namespace) -> None:
    _need_packages()
    from toma_fx.lab.draw import Task, default_dtype
    from toma_fx.lab.evaluate import Plan, evaluate
    from toma_fx.lab.networks import Networks
    from toma_fx.lab.prompts import load_prompts
    from toma_fx.lab.rivals import TOMESD, load_rival, tomesd
    from toma_fx.lab.variants import parse_schedule, parse_variant

    schedule = None if options.schedule is None else parse_schedule(options.schedule)
    variants = [
        tomesd() if name == TOMESD else parse_variant(name, schedule=schedule)
        for name in options.variants
    ]
    names = {name: getattr(options, name) for name in ("clip", "dino", "fid", "lpips")}
    plan = Plan(
        variants=(*variants, *map(load_rival, options.rival)),
        ratios=tuple(options.ratio),
        measures=tuple(name for name in MEASURES if name in options.measures),
        networks=Networks(**{name: given for name, given in names.items() if given is not None}),
        reference=options.reference,
    )
    task = Task(
        model=options.model,
        prompts=load_prompts(options.prompts, template=options.template, limit=options.limit),
        seeds=options.seeds,
        steps=options.steps,
        guidance=options.guidance,
        height=options.height,
        width=options.width,
        dtype=options.dtype or default_dtype(),
    )
    text = evaluate(task, plan, options.out)
    if text:
        print(text)


def _plot(options: argparse.Namespace) -> None:
    _need_packages()
    from toma_fx.lab.plot import plot

    print(plot(options.folder, x=options.x, ys=tuple(options.y), file=options.out))


def _show(options: argparse.Namespace) -> None:
    _need_packages()
    from toma_fx.lab.draw import Task, default_dtype
    from toma_fx.lab.prompts import Prompt
    from toma_fx.lab.show import Look, show
    from toma_fx.lab.variants import Merging, parse_variant

    variant = parse_variant(options.variant)
    if not isinstance(variant, Merging):
        raise ConfigError(f"variant={options.variant!r} chooses no destinations; use a preset")
    task = Task(
        model=options.model,
        prompts=(Prompt(text=options.prompt),),
        steps=options.steps,
        guidance=options.guidance,
        height=options.height,
        width=options.width,
        dtype=options.dtype or default_dtype(),
    )
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


def _need_packages() -> None:
    missing = [name for name in PACKAGES if find_spec(name) is None]
    if missing:
        raise ConfigError(f"this command needs {' and '.join(missing)}: pip install 'toma-fx[lab]'")
