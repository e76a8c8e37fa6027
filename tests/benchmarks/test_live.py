"""Peak memory from shapes: compared with torch's profiler, and with merging at real sizes."""

import functools
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from benchmarks.live import live_peak, peak_memory, peak_of_model
from benchmarks.tiny import tiny
from tests.tiny import tiny_flux, tiny_sdxl_unet
from toma_fx import MergeConfig, transform
from toma_fx.inputs import random_inputs


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Attention's kernel takes half a mebibyte of scratch for each thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def test_it_is_what_the_profiler_sees_of_layers_without_scratch() -> None:
    layers = [torch.nn.Linear(64, 256), torch.nn.GELU(), torch.nn.Linear(256, 64)]
    tokens = torch.ones(512, 64)

    def run() -> torch.Tensor:
        output: torch.Tensor = torch.nn.Sequential(*layers)(torch.cat([tokens, tokens]))
        return tokens + output[:512]

    slack = 4096  # of the profiler's own small tensors and the allocator's rounding
    assert 0 <= peak_memory(run) - live_peak(run) <= slack


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("build", [tiny_sdxl_unet, tiny_flux])
def test_of_a_model_it_is_that_less_the_scratch_of_a_kernel(build: Any) -> None:
    model = build()
    inputs = random_inputs(model, height=256)
    for each in (model, transform(model, MergeConfig(skip=()))):
        run = functools.partial(each, **inputs)
        scratch = peak_memory(run) - live_peak(run)
        assert 0 <= scratch <= 2**19  # attention's, whatever the number of tokens


def test_what_was_there_before_is_not_counted_and_what_is_dropped_is_given_back() -> None:
    matrix = torch.ones(256, 256)
    assert live_peak(lambda: matrix.view(-1)) == 0
    assert live_peak(lambda: matrix + 1) == matrix.nbytes
    assert live_peak(lambda: (matrix + 1).add(1).add(1)) == 2 * matrix.nbytes


# The first ResNet of a UNet's last stage holds more than any merged block; Flux has nothing else.
@pytest.mark.parametrize(
    ("name", "most", "changes"),
    [("sdxl", 0.9, {}), ("flux", 0.7, {"num_layers": 1, "num_single_layers": 2})],
)
def test_merging_lowers_the_peak_at_real_size(
    name: str, most: float, changes: dict[str, Any]
) -> None:
    untouched = peak_of_model(name, height=1024, **changes)
    assert peak_of_model(name, MergeConfig(skip=()), height=1024, **changes) < most * untouched


@pytest.mark.parametrize("model", ["qwen-image", "wan2.1-vace-14b"])
def test_peak_memory_is_known_from_shapes(model: str) -> None:
    how = {"height": 128, **tiny(model)}
    bound = peak_of_model(model, MergeConfig(ratio=0.75), **how)
    assert 0 < bound != peak_of_model(model, **how)


def test_peak_memory_counts_what_is_alive_at_once() -> None:
    matrix = torch.ones(256, 256)
    size = matrix.nbytes

    def chain() -> torch.Tensor:
        a = matrix + 1
        b = a + 1
        del a
        return b + 1

    slack = 4096  # of the profiler's own small tensors and the allocator's rounding
    assert size <= peak_memory(lambda: matrix + 1) <= size + slack
    assert 2 * size <= peak_memory(chain) <= 2 * size + slack
