"""A trace is the whole model as one graph, bit for bit."""

import inspect
from collections import Counter
from typing import Any

import pytest
import torch
from torch import fx, nn
from torch.utils import _pytree as pytree

import toma_fx
from tests.passes.blocks import left_behind
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
    merged = model.toma_recipe.merged
    groups = {block.path.rpartition(".")[0] for block in merged}
    assert found["toma.select.default"] == found["toma.weigh.default"] == len(groups)
    assert found["toma.merge.default"] == found["toma.unmerge.default"] == len(merged)


def test_layers_are_shared_and_values_are_known() -> None:
    model = toma_fx.transform(tiny_flux(), skip=())
    gm = toma_fx.trace(model, flux_inputs(model))
    gm.graph.lint()
    assert gm.get_submodule("proj_out") is model.proj_out
    assert all("val" in node.meta for node in gm.graph.nodes if node.op != "output")


@pytest.mark.parametrize(
    "options", [{"schedule": toma_fx.Schedule(select_every=3)}, {"merge_below": 0.1}], ids=str
)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_trace_is_a_call_that_merges(family: str, options: dict[str, Any]) -> None:
    """Whatever the policy says of the call's timestep: one graph is one variant."""
    make, make_inputs = FAMILIES[family]
    model, always = (toma_fx.transform(make(), skip=(), **more) for more in (options, {}))
    inputs = make_inputs(model)
    gm = toma_fx.trace(model, inputs)
    assert operators(gm) == operators(toma_fx.trace(always, inputs))
    with torch.no_grad():
        expected = always(**inputs, return_dict=False)[0]
        assert torch.equal(gm(*flat(model, inputs)), expected)
    assert len(model.toma_state) == 0


def test_nodes_say_which_modules_made_them() -> None:
    model = tiny_flux()
    with torch.fx.traceback.preserve_node_meta():  # as while another thread compiles
        gm = toma_fx.trace(model, flux_inputs(model))
    (node,) = (n for n in gm.graph.nodes if n.target == "transformer_blocks.1.attn.to_q")
    assert list(node.meta["nn_module_stack"].values()) == [
        (path, type(model.get_submodule(path)))
        for path in (
            "transformer_blocks.1",
            "transformer_blocks.1.attn",
            "transformer_blocks.1.attn.to_q",
        )
    ]


def test_traces_leave_nothing_behind() -> None:
    model = tiny_flux(num_layers=1, num_single_layers=1)
    inputs = flux_inputs(model)
    names, before = set(vars(model)), left_behind()
    for _ in range(3):
        toma_fx.trace(model, inputs)
    assert left_behind() == before
    assert set(vars(model)) == names
