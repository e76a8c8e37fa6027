"""Where one step spends its time: every toma operator, then the costliest of everything else."""

from typing import Any

import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

from toma_fx.bench.contenders import Setting, compile_blocks
from toma_fx.bench.record import Column, Table, number, percent, seconds
from toma_fx.bench.timing import many_compiled
from toma_fx.config import MergeConfig
from toma_fx.inputs import random_inputs
from toma_fx.transform import transform

COLUMNS = (
    Column("operator", "operator", lambda name: name[:70]),
    Column("calls", "calls", number),
    Column("seconds", "time", seconds),
    Column("share", "of the step", percent),
)


def profile_step(
    model: nn.Module, setting: Setting, config: MergeConfig, *, compiled: bool, most: int = 20
) -> Table:
    """Profile one forward of the merged model.

    Args:
        model: untouched.
        setting: sizes.
        config: how tokens are merged.
        compiled: profile compiled blocks, where a toma operator has become kernels that go by
            other names.
        most: rows of what is not a toma operator, the costliest first.
    """
    merged = transform(model, config)
    if compiled:
        compile_blocks(merged)
    inputs = random_inputs(model, **setting.size)
    gpu = setting.device == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if gpu else [])]
    with torch.inference_mode(), many_compiled():
        for _ in range(2):
            merged(**inputs)
        with profile(activities=activities, acc_events=True) as profiler:
            merged(**inputs)
            if gpu:
                torch.cuda.synchronize()
    kind = "device" if gpu else "cpu"
    events: list[Any] = list(profiler.key_averages())
    total = sum(getattr(event, f"self_{kind}_time_total") for event in events)

    def row(event: Any, micros: float) -> dict[str, Any]:
        return {
            "operator": event.key,
            "calls": event.count,
            "seconds": micros / 1e6,
            "share": micros / total,
        }

    ours = [e for e in events if e.key.startswith("toma::")]
    rest = sorted(
        (e for e in events if not e.key.startswith("toma::")),
        key=lambda e: getattr(e, f"self_{kind}_time_total"),
        reverse=True,
    )
    rows = [row(e, getattr(e, f"{kind}_time_total")) for e in ours]
    rows += [row(e, getattr(e, f"self_{kind}_time_total")) for e in rest[:most]]
    how = "compiled blocks" if compiled else "eager"
    return Table(
        title=f"{type(model).__name__}, one step at ratio {config.ratio:g}, {how}, {kind} time",
        columns=COLUMNS,
        rows=rows,
        notes=(
            f"{total / 1e6:.4g} s in all, as the profiler sees them",
            "a toma operator's time holds that of what it calls; every other is counted by itself",
        ),
    )
