"""Contenders against the faster untouched model: seconds, ratios, memory, compiling."""

import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from toma_fx.bench.contenders import BASELINES, LOWER_BOUND, Setting
from toma_fx.bench.levels import Timed
from toma_fx.bench.timing import Contender, Timing, interleaved, notes_on, peak_memory
from toma_fx.tables import Column, Table, mebibytes, number, percent, seconds, span, times

COLUMNS = (
    Column("contender", "contender"),
    Column("ratio", "ratio", number),
    Column("times", "times as fast", times),
    Column("times_spread", "spread", span(times)),
    Column("kept", "of the bound's saving", percent),
    Column("seconds", "a call", seconds),
    Column("seconds_spread", "spread", span(seconds)),
    Column("peak_bytes", "peak memory", mebibytes),
    Column("peak_share", "of untouched", percent),
    Column("compile_seconds", "compiling", seconds),
    Column("psnr", "PSNR, dB", lambda value: f"{value:.1f}"),
    Column("error", "relative error", lambda value: f"{value:.2g}"),
)
LEGEND = (
    "times as fast: medians and ends of the ratios in one round, against the faster untouched one",
    "of the bound's saving: the time saved, relative to that saved by the lower bound",
)
COMPILING = (
    "compiling: the extra seconds of the first call, with what torch's caches held; "
    "benchmarks.cold_start times first calls with nothing cached"
)


def compare(
    timed: Timed,
    setting: Setting,
    *,
    title: str,
    extra: Mapping[str, Callable[[], Mapping[tuple[str, float | None], Any]]] | None = None,
) -> Table:
    """Time the contenders in turn; on a GPU, measure the memory of each too.

    Args:
        timed: the contenders, the untouched ones first.
        setting: repeats and clock.
        title: words before the title of ``timed``.
        extra: returns more keys of the rows, by contender and ratio; it is called last.
    """
    timings = interleaved(timed.contenders, setting.repeats, clock=setting.clock)
    rows = rows_of(timed.contenders, timings)
    for row, contender in zip(rows, timed.contenders, strict=True):
        # A recorded call allocates nothing any more.
        if not row["failure"] and torch.cuda.is_available() and not setting.cuda_graphs:
            row["peak_bytes"] = peak_memory(contender.run)
    if untouched := next(r for r in rows if r["baseline"]).get("peak_bytes"):
        for row in rows:
            if row.get("peak_bytes"):
                row["peak_share"] = row["peak_bytes"] / untouched
    for key, find in (extra or {}).items():
        values = find()
        for row in rows:
            row[key] = values.get((row["contender"], row["ratio"]))
    notes = (*LEGEND, *timed.notes)
    if any(c.compiled for c in timed.contenders):
        notes += (COMPILING,)
    notes += notes_on(setting.clock)
    return Table(title=f"{title}: {timed.title}", columns=COLUMNS, rows=rows, notes=notes)


def rows_of(contenders: Sequence[Contender], timings: Sequence[Timing]) -> list[dict[str, Any]]:
    """A row for each contender, with ratios to the faster untouched one."""
    untouched = [t for t in timings if t.name in BASELINES and t.calls]
    base = min(untouched, key=lambda timing: timing.median)
    bounds = {
        c.ratio: t.median
        for c, t in zip(contenders, timings, strict=True)
        if c.name == LOWER_BOUND and t.calls
    }
    return [
        {
            "contender": contender.name,
            "ratio": contender.ratio,
            "baseline": timing is base,
            **_figures(contender, timing, base, bounds.get(contender.ratio)),
            "failure": timing.failure,
        }
        for contender, timing in zip(contenders, timings, strict=True)
    ]


def _figures(
    contender: Contender, timing: Timing, base: Timing, bound: float | None
) -> dict[str, Any]:
    if timing.failure:
        return {}
    ratios = [b / c for b, c in zip(base.calls, timing.calls, strict=True)]
    saved, most = base.median - timing.median, base.median - (bound or base.median)
    first = timing.first_call
    return {
        "times": statistics.median(ratios),
        "times_spread": [min(ratios), max(ratios)],
        "kept": saved / most if most > 0 else None,
        "seconds": timing.median,
        "seconds_spread": [min(timing.calls), max(timing.calls)],
        "calls": list(timing.calls),
        "first_call": first,
        "compile_seconds": max(0.0, first - timing.median)
        if contender.compiled and first is not None
        else None,
    }
