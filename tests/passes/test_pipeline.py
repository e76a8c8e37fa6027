"""Running passes: the callback, the housekeeping in between, and the contract of every pass."""

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from torch import fx

from tests.passes.blocks import (
    NAMES,
    block_of,
    calls,
    capture,
    check_values,
    rewrite,
    row_of,
    run,
)
from toma_fx.config import MergeConfig, Schedule
from toma_fx.passes.pipeline import Pass, run_passes
from toma_fx.transform import passes_for
from toma_fx.treatment import Role, Treatment


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
}
ROLES: tuple[Role, ...] = ("alone", "lead", "follow")


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    ("role", "config"),
    [
        pytest.param(role, config, id=f"{role}, {label}")
        for role, (label, config) in itertools.product(ROLES, CONFIGS.items())
    ],
)
def test_every_pass_keeps_the_contract(name: str, role: Role, config: MergeConfig) -> None:
    """The graph is valid and runs, example values are true, and nothing is written in place."""
    block = block_of(name, torch.float16)

    def check(each: Pass, gm: fx.GraphModule, changed: int) -> None:
        gm.graph.lint()
        check_values(gm)
        assert gm.code == gm.graph.python_code("self").src

    treatment = Treatment(group=("blocks", config.ratio), role=role)
    run_passes(capture(block), passes_for(row_of(block), config, treatment), check)
