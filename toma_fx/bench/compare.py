"""Contenders against the faster untouched model: seconds, ratios, memory, compiling, planning."""

import statistics
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from toma_fx.bench.contenders import (
    BASELINES,
    LOWER_BOUND,
    Setting,
    compile_blocks,
    merged_configs,
)
from toma_fx.bench.levels import Timed
from toma_fx.bench.record import Column, Table, mebibytes, number, percent, seconds, span, times
from toma_fx.bench.timing import Contender, Timing, interleaved, notes_on, peak_memory
from toma_fx.build import merged_copy
from toma_fx.config import MergeConfig
from toma_fx.inputs import random_inputs, weightless
from toma_fx.transform import transform

COLUMNS = (
    Column("contender", "contender"),
    Column("ratio", "ratio", number),
    Column("times", "times as fast", times),
    Column("times_spread", "spread", span(times)),
    Column("kept", "of the bound's saving", percent),
    Column("seconds", "a call", seconds),
    Column("seconds_spread", "spread", span(seconds)),
    Column("planning", "planning", percent),
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
    "compiling: what the first call took longer, with what torch's caches held; --cold times first "
    "calls with nothing cached"
)
PLANNING = "planning: select and weigh of all groups, timed alone, relative to a call"


def compare(
    timed: Timed,
    setting: Setting,
    *,
    title: str,
    planning: Mapping[tuple[str, float], float] | None = None,
    extra: Mapping[str, Callable[[], Mapping[tuple[str, float | None], Any]]] | None = None,
) -> Table:
    """Time the contenders in turn, then measure the memory of each.

    Args:
        timed: the contenders, the untouched ones first.
        setting: repeats, and whether memory is measured.
        title: what stands before that of ``timed``.
        planning: seconds of all plans of a call, by variant and ratio.
        extra: more keys of the rows, by contender and ratio, asked for when all have been called.
    """
    timings = interleaved(timed.contenders, setting.repeats, clock=setting.clock)
    rows = rows_of(timed.contenders, timings)
    for row, contender in zip(rows, timed.contenders, strict=True):
        if row["failure"]:
            continue
        if setting.memory:
            row["peak_bytes"] = peak_memory(contender.run)
        plan = (planning or {}).get((contender.name, contender.ratio or 0.0))
        row["planning"] = None if plan is None else plan / row["seconds"]
        row["planning_seconds"] = plan
    if setting.memory:
        untouched = next(r for r in rows if r["baseline"])["peak_bytes"]
        for row in rows:
            if row.get("peak_bytes"):
                row["peak_share"] = row["peak_bytes"] / untouched
    for key, find in (extra or {}).items():
        values = find()
        for row in rows:
            row[key] = values.get((row["contender"], row["ratio"]))
    notes = (*LEGEND, *((PLANNING,) if planning else ()), *timed.notes)
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


def planning_seconds(
    model: nn.Module, setting: Setting, *, repeats: int = 5
) -> dict[tuple[str, float], float]:
    """Seconds that all plans of one call take, timed alone, by variant and ratio.

    Args:
        model: untouched.
        setting: sizes, ratios and variants.
        repeats: samples of each plan.
    """
    found = {}
    for name, config in merged_configs(setting):
        if config.selector == "fixed":
            continue  # its weights look at no token, so there is nothing to plan
        plans = planned(merged_copy(model, config), setting)
        calls = [_plan_call(shape, layout, config, setting) for shape, layout in plans]
        timings = interleaved(calls, repeats, at_least=0.02, clock=setting.clock)
        found[name, config.ratio] = sum(
            count * timing.median for count, timing in zip(plans.values(), timings, strict=True)
        )
    return found


Plans = Counter[tuple[tuple[int, ...], tuple[int, ...]]]
"""Shapes ``(B, N, D)`` of tokens, and how they are cut into regions: how often."""


class _Selections(TorchFunctionMode):
    """Notes every selection."""

    def __init__(self) -> None:
        super().__init__()
        self.plans: Plans = Counter()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (torch.ops.toma.select, torch.ops.toma.select.default):
            tokens, layout = args[:2]
            self.plans[tuple(tokens.shape), tuple(layout)] += 1
        return func(*args, **(kwargs or {}))


def planned(merged: nn.Module, setting: Setting) -> Plans:
    """The plans that a call makes."""
    model = weightless(merged)
    with torch.no_grad(), _Selections() as selections:
        model(**random_inputs(model, **setting.size))
    found: Plans = selections.plans
    return found


def _plan_call(
    shape: tuple[int, ...], regions: tuple[int, ...], config: MergeConfig, setting: Setting
) -> Contender:
    tokens = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    tokens = tokens.to(setting.device, setting.dtype)

    def plan(tokens: torch.Tensor) -> Any:
        chosen = torch.ops.toma.select(tokens, regions, config.selector)
        return torch.ops.toma.weigh(
            tokens, chosen, regions, config.temperature, config.merge_over, config.unmerge
        )

    call = torch.compile(plan, fullgraph=True, dynamic=False) if setting.compiled else plan
    return Contender(name=f"plan of {shape[1]} tokens", run=lambda: call(tokens))


def side_by_side(
    model: nn.Module,
    configs: dict[str, MergeConfig],
    *,
    height: int | None = None,
    width: int | None = None,
    batch: int = 1,
    repeats: int = 3,
    compiled: bool = True,
) -> list[Timing]:
    """Time one forward of a model, untouched and with each configuration, in turn.

    Args:
        model: an untouched model.
        configs: name and configuration of each contender.
        height: of the image, in pixels; the model's native size when left out.
        width: of the image, in pixels; like ``height`` when left out.
        batch: images.
        repeats: calls of each model that are counted, interleaved, after a first one that is not.
        compiled: compile the transformer blocks of every contender, the untouched model included.

    Returns:
        The timing of the untouched model, then of each contender.
    """
    inputs = random_inputs(model, height=height, width=width, batch=batch)
    # Every contender is a transform, so that compiling one leaves the given model alone: a ratio of
    # 0 is the untouched model, bit for bit.
    models = {
        name: transform(model, config)
        for name, config in {"untouched": MergeConfig(ratio=0), **configs}.items()
    }
    if compiled:
        for each in models.values():
            compile_blocks(each)
    contenders = [
        Contender(name=name, run=lambda each=each: each(**inputs))  # type: ignore[misc]
        for name, each in models.items()
    ]
    return interleaved(contenders, repeats)


def table(timings: Sequence[Timing]) -> str:
    """The timings as a table, each beside the first one's."""
    rows = []
    for timing in timings:
        ratios = [b / c for b, c in zip(timings[0].calls, timing.calls, strict=True)]
        rows.append(
            {
                "name": timing.name,
                "median": timing.median,
                "spread": (min(timing.calls), max(timing.calls)),
                "times": statistics.median(ratios),
                "times_spread": (min(ratios), max(ratios)),
                "first": timing.first_call,
            }
        )
    columns = (
        Column("name", "model"),
        Column("median", "s a call", _three),
        Column("spread", "spread", span(_three)),
        Column("times", "times as fast", times),
        Column("times_spread", "spread", span(times)),
        Column("first", "first call, s", _three),
    )
    return Table(title="", columns=columns, rows=rows).text().strip("\n")


def _three(value: float) -> str:
    return f"{value:.3g}"
