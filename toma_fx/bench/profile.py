"""Where one step spends its time: every toma operator, then the costliest of everything else."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from torch._C._autograd import DeviceType
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
    rows, total = breakdown(profiler.key_averages(), gpu=gpu, most=most)
    how = f"{'compiled blocks' if compiled else 'eager'}, {'device' if gpu else 'cpu'} time"
    return Table(
        title=f"{type(model).__name__}, one step at ratio {config.ratio:g}, {how}",
        columns=COLUMNS,
        rows=rows,
        notes=(
            f"{total:.4g} s in all, as the profiler sees them",
            "a toma operator's time holds that of what it calls; every other is counted by itself",
        ),
    )


def breakdown(events: Iterable[Any], *, gpu: bool, most: int) -> tuple[list[dict[str, Any]], float]:
    """The rows of a step, and its seconds.

    Args:
        events: averages by name, of torch's profiler. Those of a GPU hold its time more than once:
            as kernels, and as the time of operators and annotations. The kernels are the step.
        gpu: whether time is the GPU's.
        most: rows of what is not a toma operator, the costliest first.
    """
    kind = "device" if gpu else "cpu"
    alone, whole = f"self_{kind}_time_total", f"{kind}_time_total"
    events = list(events)
    ours = [e for e in events if e.key.startswith("toma::")]
    counted = [e for e in events if _is_kernel(e)] if gpu else events
    total = sum(getattr(e, alone) for e in counted)
    rest = [e for e in counted if e not in ours]
    rest.sort(key=lambda e: getattr(e, alone), reverse=True)
    rows = [
        {
            "operator": event.key,
            "calls": event.count,
            "seconds": getattr(event, name) / 1e6,
            "share": getattr(event, name) / total,
        }
        for name, found in ((whole, ours), (alone, rest[:most]))
        for event in found
    ]
    return rows, total / 1e6


def _is_kernel(event: Any) -> bool:
    return event.device_type == DeviceType.CUDA and not event.is_user_annotation
