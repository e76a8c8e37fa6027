"""Seconds that the plans of one call take, timed alone, beside those of the call."""

from collections import Counter
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from toma_fx.bench.contenders import Setting, merged_configs
from toma_fx.bench.timing import Contender, interleaved
from toma_fx.build import merged_copy
from toma_fx.config import MergeConfig
from toma_fx.inputs import random_inputs, weightless
from toma_fx.tables import Column, Table, percent

PLANNING = "planning: select and weigh of all groups, timed alone, relative to a call"


def with_planning(table: Table, planning: dict[tuple[str, float], float]) -> Table:
    """A table of `toma_fx.bench.compare.compare` with the share of planning in every row.

    Args:
        table: table of whole models.
        planning: seconds of `planning_seconds`.
    """
    rows = []
    for row in table.rows:
        found = planning.get((row["contender"], row["ratio"] or 0.0))
        known = found is not None and not row["failure"]
        share = found / row["seconds"] if known and found is not None else None
        rows.append({**row, "planning_seconds": found, "planning": share})
    columns = (*table.columns, Column("planning", "planning", percent))
    return replace(table, rows=rows, columns=columns, notes=(*table.notes, PLANNING))


def planning_seconds(
    model: nn.Module, setting: Setting, *, repeats: int = 5
) -> dict[tuple[str, float], float]:
    """Seconds that all plans of one call take, timed alone, by variant and ratio.

    Args:
        model: an untouched model.
        setting: sizes, ratios and variants.
        repeats: samples of each plan.
    """
    found = {}
    for name, ratio, config in merged_configs(setting):
        if config.selector == "fixed":
            continue  # fixed weights look at no token, so there is nothing to plan
        plans = planned(merged_copy(model, config), setting)
        calls = [_plan_call(shape, layout, config, setting) for shape, layout in plans]
        timings = interleaved(calls, repeats, at_least=0.02, clock=setting.clock)
        found[name, ratio] = sum(
            count * timing.median for count, timing in zip(plans.values(), timings, strict=True)
        )
    return found


Plans = Counter[tuple[tuple[int, ...], tuple[int, ...]]]
"""Number of plans by the tokens' shape ``(B, N, D)`` and their layout of regions."""


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
