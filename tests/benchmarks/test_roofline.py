"""The least that operators need, against counts of operators that ran."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.operators import Shape
from benchmarks.roofline import Needs, Peaks, measure_peaks


@pytest.mark.parametrize("ratio", [0.25, 0.5])
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("count", [128, 541])  # in regions of 16, and of 16 places
def test_matrix_products_and_bytes_are_those_of_the_operators(
    count: int, batch: int, ratio: float
) -> None:
    shape = Shape(tokens=count, width=24, batch=batch, ratio=ratio, region_tokens=16)
    keep, size, _, regions = cut = shape.layout
    tokens = torch.randn(batch, count, 24).to(shape.dtype)
    destinations = torch.ops.toma.select(tokens, cut, "facility_location")
    weights = torch.ops.toma.weigh(tokens, destinations, cut, 0.001, "region", "transpose")
    with FlopCounterMode(display=False) as merging:
        merged = torch.ops.toma.merge(tokens, weights[0], cut)
    with FlopCounterMode(display=False) as unmerging:
        torch.ops.toma.unmerge(merged, weights[1], cut)
    needs, dtype = shape.needs("merge")
    assert dtype == shape.dtype
    assert needs.matmul == merging.get_total_flops() == unmerging.get_total_flops()
    assert needs.bytes == tokens.nbytes + merged.nbytes + weights[0].nbytes
    with FlopCounterMode(display=False) as selecting:
        torch.ops.toma.select(tokens, cut, "facility_location")
    needs, dtype = shape.needs("select")
    assert dtype == torch.float32
    assert needs.matmul == selecting.get_total_flops()
    assert needs.bytes == tokens.nbytes + destinations.nbytes
    needs, _ = shape.needs("weigh")
    expected = tokens.nbytes + destinations.nbytes + sum(weight.nbytes for weight in weights)
    assert needs.bytes == expected
    assert needs.matmul == 2 * batch * regions * size * keep * 24
    order = torch.arange(count)
    reordered = torch.ops.toma.reorder(tokens, order)
    needs, _ = shape.needs("reorder")
    assert needs.bytes == tokens.nbytes + order.nbytes + reordered.nbytes


def test_the_bound_is_the_slower_of_memory_and_arithmetic() -> None:
    peaks = Peaks(bytes=10.0, flops={torch.float32: 100.0})
    for needs, seconds, limit in (
        (Needs(bytes=20, matmul=100), 2.0, "memory"),
        (Needs(bytes=20, matmul=300, other=100), 4.0, "arithmetic"),
    ):
        assert peaks.bound(needs, torch.float32) == seconds
        assert peaks.limit(needs, torch.float32) == limit


def test_peaks_are_measured_for_every_dtype() -> None:
    peaks = measure_peaks("cpu", (torch.float32, torch.bfloat16), small=True)
    assert set(peaks.flops) == {torch.float32, torch.bfloat16}
    assert min(peaks.bytes, *peaks.flops.values()) > 0
