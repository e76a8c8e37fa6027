"""``toma-fx bench``: what its options run."""

import argparse
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import replace
from importlib.util import find_spec
from typing import Any

import torch

from toma_fx.bench.cold_start import cold_starts
from toma_fx.bench.compare import compare, planning_seconds, table
from toma_fx.bench.contenders import Setting, fitted, load
from toma_fx.bench.image import images
from toma_fx.bench.levels import blocks, models, stages
from toma_fx.bench.operators import SHAPES, Shape, operators
from toma_fx.bench.presets import run_preset
from toma_fx.bench.record import Record, Table, beside, machine
from toma_fx.bench.stack import stacked
from toma_fx.bench.timing import CPU, WALL
from toma_fx.checkpoints import DTYPES
from toma_fx.errors import ConfigError
from toma_fx.lab.rivals import TOMESD, load_rival, tomesd
from toma_fx.lab.variants import Merging, Rival, parse_variant
from toma_fx.quiet import hush_libraries

OURS = ("lower_bound", "default", "toma", "toma_tile", "toma_stripe", "toma_once")
WIDTHS = {model: shapes[0][1] for model, shapes in SHAPES.items()}


def run(options: argparse.Namespace) -> None:
    """Time what the options of `toma_fx.bench.cli` say, print the tables and keep them.

    Raises:
        ConfigError: when options contradict one another, or a part of a preset fails.
    """
    _check(options)
    hush_libraries()
    record = Record(command=options.command, folder=options.out)
    failed = False
    if options.cold:
        (batch,) = options.batch
        print(table(cold_starts(replace(fitted(_setting(options)), batch=batch))))
    elif options.preset is not None:
        how = {"tiny": options.tiny, "compiled": not options.eager, "minutes": options.minutes}
        for each in run_preset(options.preset, record, **how):
            print(f"{each.text()}\n", flush=True)
            failed |= [*each.rows[0]] == ["part", "failure"]
    else:
        for each in _tables(options):
            record.add(each)
            print(f"{each.text()}\n", flush=True)
    print(machine())
    for file in record.files:
        print(f"wrote {file}")
    if options.level == "op" and options.out is not None and options.preset is None:
        _plot(record)
    if failed:
        raise ConfigError("some parts of the preset were not measured; see the rows above")


def _check(options: argparse.Namespace) -> None:
    for name in ("repeats", "steps"):
        if getattr(options, name) < 1:
            raise ConfigError(f"{name}={getattr(options, name)} must be at least 1")
    for name in ("batch", "frames", "tokens", "region_tokens"):
        if any(value is not None and value < 1 for value in getattr(options, name) or ()):
            raise ConfigError(f"{name}={getattr(options, name)} must be at least 1")
    if options.cpu_time and (options.cold or options.preset or torch.cuda.is_available()):
        raise ConfigError(
            "--cpu-time sees nothing of a GPU or of other processes, and presets have a clock of "
            "their own; leave it out with --preset, with --cold, and where there is a GPU"
        )
    if options.cold:
        _check_cold(options)


def _check_cold(options: argparse.Namespace) -> None:
    given = {name: getattr(options, name) for name in ("eager", "out", "stack", "preset", "rival")}
    given["level"] = None if options.level == "model" else options.level
    given["variants"] = TOMESD if TOMESD in (options.variants or ()) else None
    for name, value in given.items():
        if value:
            raise ConfigError(
                f"{name}={value} has no meaning with --cold, which prints the first calls of whole "
                "models of ours, compiled, and records nothing; leave one of the two out"
            )
    for name in ("batch", "frames"):
        if len(getattr(options, name)) != 1:
            raise ConfigError(f"{name}={getattr(options, name)} must be one number with --cold")


def _setting(options: argparse.Namespace) -> Setting:
    names = options.variants or (["default"] if options.cold else ["lower_bound", "default"])
    if names == ["all"]:
        names = OURS if options.cold else (*OURS, TOMESD)
    variants: list[Merging | Rival] = []
    for name in names:
        variant = tomesd() if name == TOMESD else parse_variant(name)
        if not isinstance(variant, Merging | Rival):
            raise ConfigError(
                f"variant={name!r} takes fewer steps, and a call is one; leave it out"
            )
        variants.append(variant)
    height = options.height
    if options.tiny and height is None:
        height = 128
    return Setting(
        model=options.model,
        blocks=None if options.blocks is None else tuple(options.blocks),
        tiny=options.tiny,
        height=height,
        width=options.width,
        frames=options.frames[0],
        dtype=DTYPES[options.dtype],
        ratios=tuple(options.ratio),
        variants=(*variants, *map(load_rival, options.rival)),
        repeats=options.repeats,
        compiled=not options.eager,
        steps=options.steps,
        memory=not options.no_memory,
        clock=CPU if options.cpu_time else WALL,
    )


def _tables(options: argparse.Namespace) -> Iterator[Table]:
    setting = _setting(options)
    if options.level == "op":
        yield _operators(options, setting)
        return
    setting = fitted(setting)
    for frames, batch in itertools.product(options.frames, options.batch):
        yield from _compared(options, replace(setting, frames=frames, batch=batch))


def _compared(options: argparse.Namespace, setting: Setting) -> Iterator[Table]:
    title = setting.label
    if options.stack:
        if options.level not in ("model", "image"):
            raise ConfigError(f"--stack is for --level model or image, not {options.level}")
        yield from stacked(setting, image=options.level == "image")
    elif options.level == "image":
        timed, distances = images(setting)
        # Distances are known once everyone drew, which is while the table is made.
        yield compare(timed, setting, title=title, extra={"psnr": distances})
    else:
        model = load(setting)
        levels = {"block": blocks, "stage": stages, "model": models}
        whole = options.level == "model"
        planning = planning_seconds(model, setting) if whole else None
        for timed in levels[options.level](model, setting):
            yield compare(timed, setting, title=title, planning=planning)


def _operators(options: argparse.Namespace, setting: Setting) -> Table:
    sizes = SHAPES.get(options.model)
    if options.tokens is not None:
        width = options.channels or WIDTHS.get(options.model)
        sizes = None if width is None else tuple((tokens, width) for tokens in options.tokens)
    if sizes is None:
        raise ConfigError(
            f"the operators' sizes are known for {' and '.join(SHAPES)}, not for "
            f"{options.model!r}; give --tokens and --channels"
        )
    axes = (sizes, options.ratio, options.batch, options.region_tokens)
    shapes = [
        Shape(
            tokens=tokens,
            width=width,
            batch=batch,
            ratio=ratio,
            region_tokens=region,
            dtype=setting.dtype,
        )
        for (tokens, width), ratio, batch, region in _settings(axes, one_by_one=options.one_by_one)
    ]
    return operators(
        shapes,
        device=setting.device,
        repeats=options.repeats,
        compiled=setting.compiled,
        small=options.tiny,
        clock=setting.clock,
    )


def _settings(axes: Sequence[Sequence[Any]], *, one_by_one: bool) -> Iterator[tuple[Any, ...]]:
    """Every combination of values; or those in which at most one is not the first of its axis."""
    for values in itertools.product(*axes):
        changed = sum(value != axis[0] for value, axis in zip(values, axes, strict=True))
        if changed < 2 or not one_by_one:
            yield values


def _plot(record: Record) -> None:
    if find_spec("matplotlib") is None:
        print("no plot: pip install 'toma-fx[lab]'")
        return
    from toma_fx.bench.growth import plot_growth, varies

    rows = record.tables[0].rows
    if varies(rows) and record.stem is not None:
        print(f"wrote {plot_growth(rows, beside(record.stem, '.png'))}")
