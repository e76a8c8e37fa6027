"""Where a step spends its time, on the CPU and, from events of torch's own classes, on a GPU."""

from typing import Any

import pytest
import torch
from torch._C._autograd import DeviceType
from torch.autograd.profiler_util import EventList, FunctionEvent

from tests.tiny import tiny_flux, tiny_sdxl_unet
from toma_fx.bench.contenders import Setting
from toma_fx.bench.profile import breakdown, profile_step
from toma_fx.config import MergeConfig


def event(name: str, start: int, end: int, **more: Any) -> FunctionEvent:
    return FunctionEvent(0, name, 0, start, end, use_device="cuda", stack=[], **more)


def test_a_kernel_counts_once_on_a_gpu() -> None:
    merge, product, addition = (
        event("toma::merge", 0, 50),
        event("aten::bmm", 10, 40),
        event("aten::add", 60, 90),
    )
    product.append_kernel("gemm", 0, 30)
    addition.append_kernel("vectorised", 0, 10)
    on_gpu: dict[str, Any] = {"device_type": DeviceType.CUDA}
    region = event("## compiled region", 100, 140, is_user_annotation=True, **on_gpu)
    kernels = event("gemm", 100, 130, **on_gpu), event("vectorised", 130, 140, **on_gpu)
    events = EventList([merge, product, addition, region, *kernels], use_device="cuda")
    events._build_tree()
    rows, total = breakdown(events.key_averages(), gpu=True, most=20)
    assert total == pytest.approx(40e-6)
    assert {row["operator"]: row["share"] for row in rows} == {
        "toma::merge": 0.75,
        "gemm": 0.75,
        "vectorised": 0.25,
    }


@pytest.mark.parametrize("build", [tiny_sdxl_unet, tiny_flux])
def test_shares_on_the_cpu_are_of_the_whole_step(build: Any) -> None:
    setting = Setting(height=128, dtype=torch.float32)
    table = profile_step(build(), setting, MergeConfig(skip=()), compiled=False, most=1000)
    ours = [row for row in table.rows if row["operator"].startswith("toma::")]
    rest = [row for row in table.rows if row not in ours]
    assert {"toma::merge", "toma::unmerge"} <= {row["operator"] for row in ours}
    assert 0 < sum(row["share"] for row in rest) < 1  # a toma operator's own time is not there
    assert [row["share"] for row in rest] == sorted((r["share"] for r in rest), reverse=True)
