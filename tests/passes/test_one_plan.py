"""One plan for all sites of a block, or of a group in a flat graph."""

from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

from tests.passes.blocks import (
    NAMES,
    OPTIONS,
    assert_close,
    block_of,
    calls,
    expect_change,
    inputs_of,
    merge_pass,
    reference_components,
    reference_group,
    reference_once,
    rewrite,
    run,
)
from toma_fx.errors import CaptureError
from toma_fx.passes.one_plan import OnePlan
from toma_fx.passes.pipeline import run_passes
from toma_fx.passes.plan_nodes import insert_plan

EVERY_BLOCK = pytest.mark.parametrize("name", NAMES)
EVERY_PLACEMENT = pytest.mark.parametrize("placement", ["component", "block"])


@EVERY_BLOCK
@EVERY_PLACEMENT
def test_one_plan_serves_a_block(name: str, placement: str) -> None:
    block, inputs = block_of(name), inputs_of(name)
    residual = "replace" if placement == "component" else "keep"
    gm = rewrite(block, merge_pass(block, placement, residual=residual), OnePlan())
    group: Any = reference_group(share=True, placement=placement)
    reference = reference_components if placement == "component" else reference_once
    assert_close(run(gm, inputs), reference(name, block, group, inputs))


@pytest.mark.parametrize(
    ("name", "placement", "repeated"),
    [
        ("unet", "component", 2),
        ("flux_double", "component", 1),
        ("flux_single", "component", 0),
        ("unet", "block", 0),
        ("flux_double", "block", 0),
    ],
)
def test_what_is_changed(name: str, placement: str, repeated: int) -> None:
    """The layout, the destinations and two weights of each plan but the first."""
    block = block_of(name)
    gm = rewrite(block, merge_pass(block, placement))
    before = calls(gm)
    changes: list[int] = []
    for _ in range(2):
        run_passes(gm, [OnePlan()], lambda each, gm, changed: changes.append(changed))
    assert changes == [4 * repeated, 0]
    removed = {"toma.select", "toma.weigh", "region_layout"}
    assert before - calls(gm) == {
        **(dict.fromkeys(removed, repeated) if repeated else {}),
        **({"getitem": 2 * repeated} if repeated else {}),
    }
    assert not calls(gm) - before


def plans_of(groups: tuple[str, ...], sizes: tuple[int, ...]) -> fx.GraphModule:
    """A graph with a plan for each of some tokens, whose layouts are numbers."""
    graph = fx.Graph()
    merged = []
    for index, (group, size) in enumerate(zip(groups, sizes, strict=True)):
        tokens = graph.placeholder(f"tokens_{index}")
        tokens.meta["val"] = torch.empty(2, size, 4, device="meta")
        layout = [8, 16, size, size // 16]
        plan = insert_plan(graph, tokens, layout, OPTIONS, group)
        args = (tokens, plan.merge_weight, layout)
        merged.append(graph.call_function(torch.ops.toma.merge.default, args))
    graph.output(tuple(merged))
    gm = fx.GraphModule(nn.Module(), graph)
    for node in graph.nodes:
        if node.op == "call_function":
            args = fx.node.map_arg(node.args, lambda each: each.meta["val"])
            node.meta["val"] = node.target(*args)
    return gm


def test_groups_keep_their_plans_apart() -> None:
    gm = plans_of(("a", "b", "a", "b"), (32, 32, 32, 32))
    assert OnePlan().apply(gm) == 2 * 2  # destinations and merge weight
    gm.graph.eliminate_dead_code()
    gm.recompile()
    assert calls(gm) == {"toma.select": 2, "toma.weigh": 2, "toma.merge": 4, "getitem": 2}
    tokens = [torch.randn(2, 32, 4, generator=torch.Generator().manual_seed(i)) for i in range(4)]
    toma = torch.ops.toma
    layout = [8, 16, 32, 2]
    how = OPTIONS.temperature, OPTIONS.merge_over, OPTIONS.unmerge

    def weight(x: Tensor) -> Tensor:
        destinations = toma.select(x, layout, OPTIONS.selector)
        weights: tuple[Tensor, Tensor] = toma.weigh(x, destinations, layout, *how)
        return weights[0]

    for index, result in enumerate(gm(*tokens)):
        expected = toma.merge(tokens[index], weight(tokens[index % 2]), layout)
        assert torch.equal(result, expected)


def test_a_group_whose_sites_have_other_numbers_of_tokens() -> None:
    gm = plans_of(("a", "a"), (32, 48))
    message = r"destinations_1.* shape \(2, 3, 8\), but .* has \(2, 2, 8\); .* share='block'"
    with pytest.raises(CaptureError, match=message):
        OnePlan().apply(gm)


@pytest.mark.parametrize("name", ["unet", "flux_double"])
def test_graph(name: str) -> None:
    block = block_of(name)
    before, after = (rewrite(block, merge_pass(block)) for _ in range(2))
    run_passes(after, [OnePlan()])
    expect_change(before, after, f"one_plan.{name}")
