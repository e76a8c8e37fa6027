"""Sets of tables behind one command: those of docs/speed.md on a CPU, a GPU's in ten minutes.

A part that fails, or that would start after its time, is a row that says so: what the other parts
measured is kept.
"""

import gc
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from typing import Any

import torch

from toma_fx.bench.compare import compare, planning_seconds
from toma_fx.bench.contenders import LOWER_BOUND, Setting, load
from toma_fx.bench.image import images
from toma_fx.bench.levels import blocks, models
from toma_fx.bench.operators import SHAPES, Shape, operators
from toma_fx.bench.profile import profile_step
from toma_fx.bench.record import Column, Record, Table
from toma_fx.bench.stack import stacked
from toma_fx.bench.timing import reason
from toma_fx.choices import BENCH_MINUTES
from toma_fx.config import MergeConfig
from toma_fx.lab.variants import Preset

Part = Callable[[], Iterable[Table]]
DEFAULT = Preset(name="default", preset="default")
OURS = (Preset(name=LOWER_BOUND, preset=LOWER_BOUND), DEFAULT)


def readme(*, tiny: bool = False, compiled: bool = True) -> dict[str, Part]:
    """The tables of docs/speed.md, within ten minutes on two cores."""
    base = Setting(ratios=(0.5, 0.75), variants=OURS, tiny=tiny, compiled=compiled)
    sdxl = _sized(base, model="sdxl", height=512)
    flux = _sized(base, model="flux", height=512, blocks=(3, 6))
    large = _sized(base, model="sdxl", height=1024, batch=2)
    return {
        "operators": lambda: [_operators(base)],
        "SDXL": lambda: _models(sdxl),
        "Flux": lambda: _models(flux),
        "SDXL's blocks": lambda: _blocks(large),
    }


def h200(*, tiny: bool = False, compiled: bool = True) -> dict[str, Part]:
    """What is measured whenever a GPU is at hand."""
    base = Setting(ratios=(0.25, 0.5, 0.75), variants=OURS, tiny=tiny, compiled=compiled)
    sdxl = _sized(base, model="sdxl", height=1024, batch=2, repeats=10)
    flux = _sized(base, model="flux", height=1024, repeats=5)
    half = {"ratios": (0.5,), "variants": (DEFAULT,), "batch": 1, "repeats": 2, "steps": 28}
    return {
        "SDXL": lambda: _models(sdxl, profiled=True),
        "Flux": lambda: _models(flux, profiled=True),
        "operators": lambda: [_operators(replace(base, batch=2, ratios=(0.5,)))],
        "Flux, images": lambda: _images(_sized(flux, **half)),
        "SDXL, images": lambda: _images(_sized(sdxl, **half)),
        "operators at other ratios": lambda: [
            _operators(replace(base, batch=2, ratios=(0.25, 0.75)))
        ],
        "Flux, additions": lambda: stacked(_sized(flux, **half), image=True),
    }


def _sized(base: Setting, **changes: Any) -> Setting:
    """A setting with changes; a test's has its own size, one ratio, and calls everything once."""
    if base.tiny:
        changes |= {"height": 128, "repeats": 1, "steps": 2, "blocks": None, "ratios": (0.5,)}
    return replace(base, **changes)


PRESETS = {"readme": readme, "h200": h200}


def run_preset(
    name: str,
    record: Record,
    *,
    tiny: bool = False,
    compiled: bool = True,
    minutes: float = BENCH_MINUTES,
) -> Iterator[Table]:
    """Measure every part of a preset, and keep each table as soon as it is there.

    Args:
        name: one of `PRESETS`.
        record: where tables are kept.
        tiny: models and sizes of a test.
        compiled: compile blocks and operators.
        minutes: after these no further part is started.
    """
    start = time.monotonic()
    for title, part in PRESETS[name](tiny=tiny, compiled=compiled).items():
        late = time.monotonic() - start > 60 * minutes
        missing = [_nothing(title, f"not started after {minutes:g} minutes")]
        for table in missing if late else _guarded(title, part):
            record.add(table)
            yield table


def _guarded(title: str, part: Part) -> Iterator[Table]:
    try:
        yield from part()
    except Exception as error:  # the parts that follow are measured all the same
        yield _nothing(title, reason(error))
    finally:
        torch._dynamo.reset()  # compiled code holds on to its model
        gc.collect()


def _nothing(title: str, failure: str) -> Table:
    row = {"part": title, "failure": failure}
    return Table(title=title, columns=(Column("part", "part"),), rows=[row])


def _operators(setting: Setting) -> Table:
    sizes = ((256, 32),) if setting.tiny else dict.fromkeys((*SHAPES["sdxl"], *SHAPES["flux"]))
    shapes = [
        Shape(tokens=tokens, width=width, batch=setting.batch, ratio=ratio)
        for tokens, width in sizes
        for ratio in setting.ratios
    ]
    return operators(
        shapes,
        device=setting.device,
        repeats=1 if setting.tiny else 7,
        compiled=setting.compiled,
        small=setting.tiny,
    )


def _models(setting: Setting, *, profiled: bool = False) -> Iterator[Table]:
    model = load(setting)
    planning = planning_seconds(model, setting)
    for timed in models(model, setting):
        yield compare(timed, setting, title=setting.label, planning=planning)
    if profiled:
        for compiled in (False, True) if setting.compiled else (False,):
            yield profile_step(model, setting, MergeConfig(), compiled=compiled)


def _blocks(setting: Setting) -> Iterator[Table]:
    for timed in blocks(load(setting), setting):
        yield compare(timed, setting, title=setting.label)


def _images(setting: Setting) -> Iterator[Table]:
    timed, _ = images(setting)
    yield compare(timed, setting, title=setting.label)
