"""`toma_fx.backend`: merging between Dynamo and the compiler."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import fx, nn
from torch._dynamo.backends.registry import lookup_backend

import toma_fx
from tests.tiny import flux_inputs, smallest_flux, smallest_unet, tiny_flux, unet_inputs
from toma_fx import MergeConfig
from toma_fx.errors import ConfigError

COMPILE: Any = torch.compile
FAMILIES: dict[str, Any] = {
    "unet": (smallest_unet, unet_inputs),
    "flux": (smallest_flux, flux_inputs),
}


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    torch._dynamo.reset()
    with torch.no_grad():
        yield


@pytest.mark.parametrize("family", FAMILIES)
def test_a_compiled_model_merges_and_stays_as_it_was(family: str) -> None:
    make, make_inputs = FAMILIES[family]
    model = make()
    inputs = {**make_inputs(model), "return_dict": False}
    untouched = model(**inputs)[0]
    backend = toma_fx.backend(ratio=0.5, skip=(), inner=lookup_backend("aot_eager"))
    output = COMPILE(model, backend=backend, fullgraph=True)(**inputs)[0]
    expected = toma_fx.transform(model, ratio=0.5, skip=())(**inputs)[0]
    torch.testing.assert_close(output, expected, rtol=1e-3, atol=1e-4)
    assert torch.equal(model(**inputs)[0], untouched)


def test_the_inner_backend_gets_the_merged_graph_and_the_options() -> None:
    seen: list[Any] = []

    def inner(gm: fx.GraphModule, example_inputs: Any, **options: Any) -> Any:
        seen.extend((gm, options))
        return gm

    model = smallest_unet()
    backend = toma_fx.backend(MergeConfig(ratio=0.25), inner=inner)
    COMPILE(model, backend=backend, options={"trace": True})(**unet_inputs(model))
    gm, options = seen
    merges = gm.graph.find_nodes(op="call_function", target=torch.ops.toma.merge.default)
    assert len(merges) == 3
    assert options == {"options": {"trace": True}}


def test_a_graph_without_blocks_is_an_error() -> None:
    backend = toma_fx.backend(inner=lookup_backend("eager"))
    compiled = COMPILE(nn.Linear(2, 2), backend=backend)
    with pytest.raises(Exception, match="no transformer block found"):
        compiled(torch.ones(1, 2))


def test_options_are_checked_at_once() -> None:
    with pytest.raises(ConfigError, match="is not an option"):
        toma_fx.backend(rate=0.5)
    with pytest.raises(ConfigError, match="both a config and the options ratio"):
        toma_fx.backend(MergeConfig(), ratio=0.5)


@pytest.mark.slow
def test_inductor() -> None:
    model = tiny_flux(num_layers=1, num_single_layers=1)
    inputs = {**flux_inputs(model, height=8, width=8), "return_dict": False}
    backend = toma_fx.backend(skip=())
    output = COMPILE(model, backend=backend, fullgraph=True)(**inputs)[0]
    expected = toma_fx.transform(model, skip=())(**inputs)[0]
    torch.testing.assert_close(output, expected, rtol=1e-3, atol=1e-4)
