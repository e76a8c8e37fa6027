"""A trace is the whole model as one graph, bit for bit."""

import inspect
from collections import Counter
from typing import Any

import pytest
import torch
from torch import fx, nn
from torch.utils import _pytree as pytree

import toma_fx
from tests.tiny import flux_inputs, tiny_flux, tiny_sdxl_unet, unet_inputs

FAMILIES: dict[str, tuple[Any, Any]] = {
    "unet": (tiny_sdxl_unet, unet_inputs),
    "flux": (tiny_flux, flux_inputs),
}


def flat(model: nn.Module, inputs: dict[str, Any]) -> list[torch.Tensor]:
    order = inspect.signature(model.forward).parameters
    return pytree.tree_leaves([inputs[name] for name in order if name in inputs])


def operators(gm: fx.GraphModule) -> Counter[str]:
    return Counter(str(node.target) for node in gm.graph.nodes if "toma." in str(node.target))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("placement", ["component", "block"])
def test_trace_equals_the_model(family: str, placement: str) -> None:
    make, make_inputs = FAMILIES[family]
    model = toma_fx.transform(make(), skip=(), placement=placement)
    gm = toma_fx.trace(model, make_inputs(model))
    for batch in (2, 3):
        inputs = make_inputs(model, batch=batch, seed=batch)
        with torch.no_grad():
            expected = model(**inputs, return_dict=False)[0]
            assert torch.equal(gm(*flat(model, inputs)), expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_trace_of_an_untouched_model_has_no_toma_nodes(family: str) -> None:
    make, make_inputs = FAMILIES[family]
    model = make()
    inputs = make_inputs(model)
    gm = toma_fx.trace(model, inputs)
    assert not operators(gm)
    with torch.no_grad():
        assert torch.equal(gm(*flat(model, inputs)), model(**inputs, return_dict=False)[0])


@pytest.mark.parametrize("family", FAMILIES)
def test_sharing_a_plan_is_a_def_use_edge(family: str) -> None:
    make, make_inputs = FAMILIES[family]
    model = toma_fx.transform(make(), skip=())
    found = operators(toma_fx.trace(model, make_inputs(model)))
    groups = {path.rpartition(".")[0] for path in model._toma.merged}
    assert found["toma.select.default"] == found["toma.weigh.default"] == len(groups)
    assert found["toma.merge.default"] == found["toma.unmerge.default"] == len(model._toma.merged)


def test_layers_are_shared_and_values_are_known() -> None:
    model = toma_fx.transform(tiny_flux(), skip=())
    gm = toma_fx.trace(model, flux_inputs(model))
    gm.graph.lint()
    assert gm.get_submodule("proj_out") is model.proj_out
    assert all("val" in node.meta for node in gm.graph.nodes if node.op != "output")


def test_scheduled_model_keeps_its_plans_in_the_trace() -> None:
    schedule = toma_fx.Schedule(select_every=3, weigh_every=2)
    model = toma_fx.transform(tiny_flux(), skip=(), schedule=schedule)
    reference = toma_fx.transform(tiny_flux(), skip=(), schedule=schedule)
    gm = toma_fx.trace(model, flux_inputs(model))
    with torch.no_grad():
        for step in range(5):
            inputs = flux_inputs(model, seed=step)
            inputs["encoder_hidden_states"] = torch.ones_like(inputs["encoder_hidden_states"])
            inputs["timestep"] = torch.full_like(inputs["timestep"], 1 - step / 10)
            expected = reference(**inputs, return_dict=False)[0]
            assert torch.equal(gm(*flat(model, inputs)), expected)
