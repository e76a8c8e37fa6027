"""Running passes: the callback, the housekeeping in between, and the contract of every pass."""

import copy
import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import fx, nn

from tests.passes.blocks import (
    NAMES,
    block_of,
    calls,
    capture,
    check_values,
    merge_pass,
    rewrite,
    run,
)
from tests.tiny import (
    flux_inputs,
    smallest_flux,
    smallest_unet,
    tiny_flux,
    tiny_sdxl_unet,
    unet_inputs,
)
from toma_fx.build import recipe_of
from toma_fx.config import MergeConfig
from toma_fx.passes.cleanup import Cleanup
from toma_fx.passes.debug import dump_each
from toma_fx.passes.one_plan import OnePlan
from toma_fx.passes.order_tokens import OrderTokens
from toma_fx.passes.pass_manager import FxPass
from toma_fx.passes.pipeline import Pass, run_passes
from toma_fx.passes.plan_nodes import PlanOptions
from toma_fx.recipe import Recipe, Role
from toma_fx.schedule import Schedule

Passes = tuple[Pass, ...]
Case = tuple[fx.GraphModule, Passes]


@dataclass(frozen=True, kw_only=True)
class Rewrite(Pass):
    """A pass that does what it is told, and says that it changed so many places."""

    name: ClassVar[str] = "rewrite"
    how: Callable[[fx.Graph], Any]
    changed: int = 1

    def apply(self, gm: fx.GraphModule) -> int:
        self.how(gm.graph)
        return self.changed


def double_the_output(graph: fx.Graph) -> None:
    output = graph.output_node()
    (result,) = output.args
    assert isinstance(result, fx.Node)
    with graph.inserting_before(output):
        graph.call_function(torch.exp, (result,))  # unused
        output.args = (graph.call_function(torch.mul, (result, 2)),)


def test_the_callback_sees_every_pass_and_what_it_left() -> None:
    seen: list[tuple[Pass, int, int]] = []
    nothing = Rewrite(how=lambda graph: None, changed=0)
    double = Rewrite(how=double_the_output, changed=3)

    def note(each: Pass, gm: fx.GraphModule, changed: int) -> None:
        seen.append((each, changed, calls(gm)["mul"]))

    gm = capture(block_of("unet"))
    assert run_passes(gm, [nothing, double, double], note) is gm
    assert seen == [(nothing, 0, 0), (double, 3, 1), (double, 3, 2)]


def test_after_a_pass_the_graph_is_compiled_and_tidy_and_has_values() -> None:
    block = block_of("unet")
    gm = rewrite(block, Rewrite(how=double_the_output))
    tokens = torch.randn(1, 16, 32, generator=torch.Generator().manual_seed(0))
    inputs = {"hidden_states": tokens, "encoder_hidden_states": tokens}
    (result,), (plain,) = run(gm, inputs), run(block, inputs)
    assert torch.equal(result, 2 * plain)
    assert calls(gm)["exp"] == 0
    (doubled,) = gm.graph.find_nodes(op="call_function", target=torch.mul)
    assert doubled.meta["val"].shape == (2, 64, 32)


def test_a_pass_that_leaves_an_invalid_graph_is_stopped() -> None:
    def use_before_definition(graph: fx.Graph) -> None:
        first, second, *_ = (node for node in graph.nodes if node.op == "call_module")
        first.args = (second,)

    with pytest.raises(RuntimeError, match="was used before it has been defined"):
        run_passes(capture(block_of("unet")), [Rewrite(how=use_before_definition)])


CONFIGS = {
    "default": MergeConfig(),
    "replace": MergeConfig(residual="replace"),
    "pinv over the image": MergeConfig(unmerge="pinv", merge_over="image"),
    "one region": MergeConfig(region="image"),
    "components": MergeConfig(placement="component"),
    "attention": MergeConfig(placement="component", components=("self_attention",)),
    "mlp": MergeConfig(placement="component", components=("mlp",)),
    "fixed": MergeConfig.preset("lower_bound"),
    "schedule": MergeConfig(schedule=Schedule(select_every=10, weigh_every=5)),
    "schedule of components": MergeConfig.preset("toma"),
    "below a noise level": MergeConfig(merge_below=0.5),
}
ROLES: tuple[Role, ...] = ("alone", "lead", "follow")
PATHS = {
    "unet": "mid_block.attentions.0.transformer_blocks.0",
    "flux_double": "transformer_blocks.0",
    "flux_single": "single_transformer_blocks.0",
}


@functools.cache
def _recipe(name: str, config: MergeConfig) -> Recipe:
    return recipe_of(tiny_sdxl_unet() if name == "unet" else tiny_flux(), config)


def block_cases(name: str, role: Role, config: MergeConfig) -> Iterator[Case]:
    """Every variant of a block, as a recipe says."""
    recipe = _recipe(name, config)
    (found,) = (each for each in recipe.blocks if each.path == PATHS[name])
    for passes in recipe.variants(replace(found, role=role)).values():
        if passes is not None:
            yield capture(block_of(name, torch.float16)), passes


@functools.cache
def _program(name: str) -> torch.export.ExportedProgram:
    model = smallest_unet() if name == "unet" else smallest_flux()
    size = {"height": 8, "width": 8}
    inputs = unet_inputs(model, **size) if name == "unet" else flux_inputs(model, **size)
    inputs["return_dict"] = False
    return torch.export.export(model, (), inputs, strict=False)


FLAT = {
    "unet": (
        OrderTokens(
            enter="down_blocks.0.attentions.0.transformer_blocks.0",
            leave="down_blocks.0.attentions.0.transformer_blocks.0",
            grid="down_blocks.0.attentions.0",
        ),
        "down_blocks.0.attentions.0.transformer_blocks.0",
        "mid_block.attentions.0.transformer_blocks.0",
        "mid_block.attentions.0.transformer_blocks.1",
    ),
    "flux": (
        OrderTokens(enter="x_embedder", leave="proj_out", ids="pos_embed"),
        "transformer_blocks.0",
        "single_transformer_blocks.0",
        "single_transformer_blocks.1",
    ),
}
"""What brings tokens into tile order, and the blocks of a small model."""


def flat_case(name: str, placement: str, residual: str) -> Case:
    """The graph of a whole model, whose blocks of one list share a plan."""
    gm = copy.deepcopy(_program(name).graph_module)
    order, *paths = FLAT[name]
    merges = [
        replace(
            merge_pass(_module(name, path), placement, options=options, residual=residual),
            block=path,
            group=path.rpartition(".")[0],
        )
        for path in paths
        for options in [PlanOptions(region_tokens=16 if path.startswith("down") else 4)]
    ]
    return gm, (Cleanup(), OnePlan(), order, *merges, OnePlan(), Cleanup())


def _module(name: str, path: str) -> nn.Module:
    model: nn.Module = smallest_unet() if name == "unet" else smallest_flux()
    return model.get_submodule(path)


@dataclass(frozen=True, kw_only=True)
class Honest(Pass):
    """A pass that must say truly whether it changed the graph."""

    name: ClassVar[str] = "honest"
    each: Pass

    def apply(self, gm: fx.GraphModule) -> int:
        before = str(gm.graph)
        changed = self.each.apply(gm)
        assert (changed == 0) == (str(gm.graph) == before), self.each.name
        # Nor does it say so of a graph in which there is nothing left to do.
        if isinstance(self.each, OnePlan | Cleanup):
            assert self.each.apply(gm) == 0
        return changed


def check_contract(gm: fx.GraphModule, passes: Passes, folder: Path) -> None:
    """A valid graph goes in and a valid graph comes out, whoever runs the pass."""
    gm, wrapped = copy.deepcopy(gm), copy.deepcopy(gm)
    changes: list[int] = []

    def check(each: Pass, gm: fx.GraphModule, changed: int) -> None:
        changes.append(changed)
        gm.graph.lint()
        check_values(gm)
        assert gm.code == gm.graph.python_code("self").src

    run_passes(gm, [Honest(each=each) for each in passes], check)
    assert sum(changes) > 0

    lines: list[str] = []
    dump = dump_each(wrapped, folder, lines.append)
    for each, changed in zip(passes, changes, strict=True):
        result = FxPass(each)(wrapped)
        assert result is not None
        assert result.graph_module is wrapped
        assert result.modified == (changed > 0)
        dump(each, wrapped, changed)
    assert wrapped.code == gm.code
    assert len(list(folder.iterdir())) == len(lines) + 1 == len(passes) + 1

    run_passes(gm, (OnePlan(), Cleanup()), check)
    assert changes[-2:] == [0, 0]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("role", ROLES)
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_every_pass_keeps_the_contract_in_a_block(
    name: str, role: Role, config: MergeConfig, tmp_path: Path
) -> None:
    for index, (gm, passes) in enumerate(block_cases(name, role, config)):
        check_contract(gm, passes, tmp_path / str(index))


@pytest.mark.parametrize("name", FLAT)
@pytest.mark.parametrize(
    ("placement", "residual"), [("block", "keep"), ("block", "replace"), ("component", "replace")]
)
def test_every_pass_keeps_the_contract_in_a_flat_graph(
    name: str, placement: str, residual: str, tmp_path: Path
) -> None:
    check_contract(*flat_case(name, placement, residual), tmp_path / "graphs")
