"""Other threads notice nothing of a capture, and several threads may transform at once."""

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import nn

import toma_fx
from tests.passes.blocks import NAMES, block_of, capture, row_of
from tests.tiny import flux_inputs, smallest_flux, smallest_unet, unet_inputs
from toma_fx.build import example_of_leaf
from toma_fx.families import all_families
from toma_fx.passes.capture import capture_block
from toma_fx.passes.readable import readable

THREADS = 4


def in_another_thread(work: Callable[[], Any]) -> Any:
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(work).result(timeout=60)


@pytest.mark.parametrize("name", NAMES)
def test_another_thread_while_a_block_is_captured(name: str) -> None:
    """It calls a module of its own, the captured block, and captures it too."""
    block, bystander = block_of(name), nn.Linear(4, 4)
    expected, patchable = capture(block).code, (nn.Module.__call__, nn.Module.__getattr__)
    seen = []

    def other() -> None:
        assert bystander(torch.ones(1, 4)).shape == (1, 4)
        assert bystander.weight is bystander._parameters["weight"]
        seen.append(capture(block).code)

    def value(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        assert (nn.Module.__call__, nn.Module.__getattr__) == patchable
        in_another_thread(other)
        return example_of_leaf(family, module, args, kwargs)

    row = row_of(block)
    family = next(each for each in all_families() if row in each.blocks)
    gm = capture_block(block, row.examples(block), row.flow.attention_kwargs, value)
    assert len(seen) == len(gm.graph.find_nodes(op="call_module"))
    assert {gm.code, *seen} == {expected}


def at_once(work: Callable[[], Any]) -> list[Any]:
    start = threading.Barrier(THREADS)

    def wait_and_work(_: int) -> Any:
        start.wait()
        return work()

    with ThreadPoolExecutor(THREADS) as pool:
        return list(pool.map(wait_and_work, range(THREADS)))


@pytest.mark.parametrize(
    ("make", "make_inputs"),
    [(smallest_unet, unet_inputs), (smallest_flux, flux_inputs)],
    ids=["unet", "flux"],
)
def test_transforms_at_once(make: Any, make_inputs: Any) -> None:
    model = make()
    inputs = make_inputs(model)
    alone = toma_fx.transform(model, skip=())
    with torch.no_grad():
        expected = alone(**inputs).sample
        for each in at_once(lambda: toma_fx.transform(model, skip=())):
            assert torch.equal(each(**inputs).sample, expected)
    assert not hasattr(model, "_toma")


def test_traces_at_once() -> None:
    model = smallest_flux()
    inputs = flux_inputs(model)
    expected = readable(toma_fx.trace(model, inputs))
    assert {readable(gm) for gm in at_once(lambda: toma_fx.trace(model, inputs))} == {expected}
