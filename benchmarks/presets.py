"""Sets of tables behind one command: those of docs/speed.md on a CPU, and a GPU's.

    python -m benchmarks.presets readme --out benchmarks/results    (make bench)
    python -m benchmarks.presets h200 --out benchmarks/results      (make bench-gpu)

A part that fails, or that would start too late, becomes a row with the reason. The tables of the
other parts are kept.
"""

import argparse
import gc
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.operators import SHAPES, Shape, operators
from benchmarks.options import command_options
from benchmarks.planning import planning_seconds, with_planning
from benchmarks.stack import stacked
from benchmarks.tiny import tiny
from toma_fx.bench.compare import compare
from toma_fx.bench.contenders import LOWER_BOUND, Setting, load
from toma_fx.bench.image import images
from toma_fx.bench.levels import blocks, models
from toma_fx.bench.record import Record, machine
from toma_fx.bench.timing import reason
from toma_fx.tables import Column, Table
from toma_fx.variants import Merging, merging

MINUTES = 8.0
"""No part of a preset starts later than this."""
Part = Callable[[], Iterable[Table]]
DEFAULT = Merging(name="default")
OURS = (merging({"preset": LOWER_BOUND}), DEFAULT)
EVERY_SECOND = {"memory": 2, "merge_below": 0.8, "skip": ()}
ADVISED = (
    merging({"ratio": 0.25}),
    merging({"ratio": 0.5}),
    merging({"ratio": 0.9, "theta": 0.5, **EVERY_SECOND}),
    merging({"ratio": 0.5, "theta": 0.0, **EVERY_SECOND}),
)
"""Merging at every step, and memory with and without merging between full steps."""


def readme(*, small: bool = False, compiled: bool = True) -> dict[str, Part]:
    """The tables of docs/speed.md, within ten minutes on two cores."""
    base = Setting(ratios=(0.5, 0.75), variants=OURS, overrides=_small(small), compiled=compiled)
    sdxl = _sized(base, model="sdxl", height=512)
    flux = _sized(base, model="flux", height=512, blocks=(3, 6))
    large = _sized(base, model="sdxl", height=1024, batch=2)
    return {
        "operators": lambda: [_operators(base)],
        "SDXL": lambda: _models(sdxl),
        "Flux": lambda: _models(flux),
        "SDXL's blocks": lambda: _blocks(large),
    }


def h200(*, small: bool = False, compiled: bool = True) -> dict[str, Part]:
    """The tables to measure whenever a GPU is at hand."""
    base = Setting(
        ratios=(0.25, 0.5, 0.75), variants=OURS, overrides=_small(small), compiled=compiled
    )
    sdxl = _sized(base, model="sdxl", height=1024, batch=2, repeats=10)
    # The blocks of SDXL are short for a GPU, so that the host decides unless graphs are replayed.
    replayed = replace(sdxl, cuda_graphs=torch.cuda.is_available())
    flux = _sized(base, model="flux", height=1024, repeats=5)
    half = {"ratios": (0.5,), "variants": (DEFAULT,), "batch": 1, "repeats": 2, "steps": 25}
    drawn = {**half, "variants": ADVISED, "repeats": 3}
    return {
        "SDXL": lambda: _models(sdxl),
        "SDXL, CUDA graphs": lambda: _models(replayed),
        "Flux": lambda: _models(flux),
        "operators": lambda: [_operators(replace(base, batch=2, ratios=(0.5,)))],
        "SDXL, images": lambda: _images(_sized(sdxl, **drawn)),
        "Flux, images": lambda: _images(_sized(flux, **drawn)),
        "operators at other ratios": lambda: [
            _operators(replace(base, batch=2, ratios=(0.25, 0.75)))
        ],
        "SDXL, four images": lambda: _models(replace(sdxl, batch=8)),
        "Flux, additions": lambda: stacked(_sized(flux, **half), image=True),
    }


def _small(wanted: bool) -> Mapping[str, Any]:
    return tiny("sdxl") if wanted else {}


def _sized(base: Setting, **changes: Any) -> Setting:
    """A setting with changes; that of a test has its own size and one ratio, and calls all once."""
    if base.overrides:
        changes |= {"height": 128, "repeats": 1, "steps": 2, "blocks": None, "ratios": (0.5,)}
        changes["overrides"] = tiny(changes.get("model", base.model))
    return replace(base, **changes)


PRESETS = {"readme": readme, "h200": h200}


def run_preset(
    name: str,
    record: Record,
    *,
    small: bool = False,
    compiled: bool = True,
    minutes: float = MINUTES,
) -> Iterator[Table]:
    """Measure every part of a preset, and keep each table as soon as it is there.

    Args:
        name: one of `PRESETS`.
        record: the record that keeps the tables.
        small: models and sizes of a test.
        compiled: compile blocks and operators.
        minutes: no part starts later than this.
    """
    start = time.monotonic()
    for title, part in PRESETS[name](small=small, compiled=compiled).items():
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
    sizes = ((256, 32),) if setting.overrides else dict.fromkeys((*SHAPES["sdxl"], *SHAPES["flux"]))
    shapes = [
        Shape(tokens=tokens, width=width, batch=setting.batch, ratio=ratio)
        for tokens, width in sizes
        for ratio in setting.ratios
    ]
    return operators(
        shapes,
        device=setting.device,
        repeats=1 if setting.overrides else 7,
        compiled=setting.compiled,
        small=bool(setting.overrides),
    )


def _models(setting: Setting) -> Iterator[Table]:
    model = load(setting)
    # The host's part of planning would be set against replays, which have none.
    planning = {} if setting.cuda_graphs else planning_seconds(model, setting)
    for timed in models(model, setting):
        table = compare(timed, setting, title=setting.label)
        yield table if setting.cuda_graphs else with_planning(table, planning)


def _blocks(setting: Setting) -> Iterator[Table]:
    for timed in blocks(load(setting), setting):
        yield compare(timed, setting, title=setting.label)


def _images(setting: Setting) -> Iterator[Table]:
    timed, _ = images(setting)
    yield compare(timed, setting, title=setting.label)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure a preset, print its tables and keep them."""
    parser = argparse.ArgumentParser(description="Measure sets of tables.")
    add = parser.add_argument
    add("preset", choices=tuple(PRESETS), help="docs/speed.md's on a CPU, or a GPU's")
    add("--minutes", type=float, default=MINUTES, help=f"to start parts ({MINUTES:g})")
    add("--eager", action="store_true", help="do not compile")
    add("--tiny", action="store_true", help="models of a test, to try it out")
    add("--out", type=Path, metavar="DIR", help="folder for CSV, JSON and Markdown")
    options = command_options(parser, "benchmarks.presets", arguments)
    record = Record(command=options.command, folder=options.out)
    how = {"small": options.tiny, "compiled": not options.eager, "minutes": options.minutes}
    failed = False
    for each in run_preset(options.preset, record, **how):
        print(f"{each.text()}\n", flush=True)
        failed |= [*each.rows[0]] == ["part", "failure"]
    print("\n".join([machine(), *(f"wrote {file}" for file in record.files)]))
    if failed:
        parser.exit(1, "some parts of the preset were not measured; see the rows above\n")


if __name__ == "__main__":
    main()
