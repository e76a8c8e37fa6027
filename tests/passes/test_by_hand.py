"""Passes on a block that is no diffusers block, whose graph is written down node by node."""

import operator
from collections import Counter
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from tests.passes.blocks import calls
from toma_fx.passes.capture import capture_block
from toma_fx.passes.cleanup import Cleanup
from toma_fx.passes.hand_on import HandOn
from toma_fx.passes.merge import Merge
from toma_fx.passes.one_plan import OnePlan
from toma_fx.passes.pipeline import EXAMPLE_SCOPE, LEAF_VALUE, Pass, run_passes
from toma_fx.passes.plan_nodes import PlanOptions, TokenFlow
from toma_fx.passes.readable import readable
from toma_fx.passes.sites import Site
from toma_fx.runtime.plan import SCOPE, CallScope

FLOW = TokenFlow(attention_kwargs="attention_kwargs", tokens="x")
OPTIONS = PlanOptions(region_tokens=8, ratio=0.5, temperature=0.1)
MIX = Site(components=("mix",), enter=("mix",), leave="mix")
MLP = Site(components=("mlp",), enter=("grow",), leave="shrink")
GROUP = "blocks"


class Block(nn.Module):
    """Two residual branches, the second of which is two layers wide."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(6), nn.LayerNorm(6)
        self.mix = nn.Linear(6, 6)
        self.grow, self.shrink = nn.Linear(6, 24), nn.Linear(24, 6)

    def forward(self, x: Any, attention_kwargs: Any = None) -> Any:
        x = x + self.mix(self.norm1(x))
        return x + self.shrink(self.grow(self.norm2(x)).relu())


def block_of(seed: int = 0) -> Block:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Block().requires_grad_(requires_grad=False)


def tokens_of(seed: int = 0) -> Tensor:
    return torch.randn(2, 32, 6, generator=torch.Generator().manual_seed(seed))


def call_layer(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return module(*args, **kwargs)


def written(block: nn.Module) -> fx.GraphModule:
    """The graph of the block, node by node."""
    graph = fx.Graph()
    x = graph.placeholder("x")
    graph.placeholder("attention_kwargs", default_value=None)
    norm1 = graph.call_module("norm1", (x,))
    mix = graph.call_module("mix", (norm1,))
    add = graph.call_function(operator.add, (x, mix))
    norm2 = graph.call_module("norm2", (add,))
    grow = graph.call_module("grow", (norm2,))
    relu = graph.call_method("relu", (grow,))
    shrink = graph.call_module("shrink", (relu,))
    graph.output(graph.call_function(operator.add, (add, shrink)))
    gm = fx.GraphModule(block, graph)
    gm.meta[LEAF_VALUE] = call_layer
    gm.meta[EXAMPLE_SCOPE] = CallScope()
    for node in graph.find_nodes(op="placeholder"):
        node.meta["val"] = tokens_of() if node.target == "x" else None
    return gm


def written_and_run(block: nn.Module, *passes: Pass) -> tuple[fx.GraphModule, list[int]]:
    """The graph after some passes, and the number of places that each of them changed."""
    changes: list[int] = []
    gm = run_passes(written(block), passes, lambda each, gm, changed: changes.append(changed))
    return gm, changes


def greedy(x: Tensor, keep: int) -> list[int]:
    """The tokens of one region that stand for the others."""
    unit = F.normalize(x, dim=-1)
    similarity = unit @ unit.T
    best, picks = torch.full((len(x),), -1.0), list[int]()
    for _ in range(keep):
        # In steps: two tokens that are nearest to each other gain the same, but for rounding.
        gains = [
            -1 if i in picks else round(4096 * float((similarity[:, i] - best).clamp(min=0).sum()))
            for i in range(len(x))
        ]
        picks.append(max(range(len(x)), key=gains.__getitem__))
        best = torch.maximum(best, similarity[:, picks[-1]])
    return picks


def plan_of(x: Tensor, weighed: Tensor | None = None) -> list[tuple[Tensor, Tensor]]:
    """Merge and unmerge matrix of each region of 8 of a sample's tokens."""
    plan = []
    weighed = x if weighed is None else weighed
    for region, values in zip(x.split(8), weighed.split(8), strict=True):
        unit = F.normalize(values, dim=-1)
        logits = unit[greedy(region, keep=4)] @ unit.T / 0.1
        share = logits.softmax(dim=0)
        plan.append((share / share.sum(dim=1, keepdim=True), share.T))
    return plan


def merge(x: Tensor, plan: list[tuple[Tensor, Tensor]]) -> Tensor:
    return torch.cat([down @ part for part, (down, _) in zip(x.split(8), plan, strict=True)])


def unmerge(x: Tensor, plan: list[tuple[Tensor, Tensor]]) -> Tensor:
    return torch.cat([up @ part for part, (_, up) in zip(x.split(4), plan, strict=True)])


def by_loop(
    block: Any,
    x_BND: Tensor,
    sites: tuple[Site, ...],
    *,
    one_plan: bool,
    leader: Tensor | None = None,
) -> Tensor:
    """What the passes make of the block, one sample at a time.

    Args:
        block: whose layers run.
        x_BND: tokens.
        sites: that run on merged ones.
        one_plan: whether the first site's plan serves the second.
        leader: tokens of the block whose plan this one uses.
    """
    samples = []
    for index, x in enumerate(x_BND):
        plan = None if leader is None else plan_of(block.norm1(leader[index]))
        h = block.norm1(x)
        if MIX in sites:
            plan = plan_of(h) if plan is None else plan
            x = x + unmerge(block.mix(merge(h, plan)), plan)
        else:
            x = x + block.mix(h)
        h = block.norm2(x)
        if MLP in sites:
            plan = plan if one_plan and plan is not None else plan_of(h)
            x = x + unmerge(block.shrink(block.grow(merge(h, plan)).relu()), plan)
        else:
            x = x + block.shrink(block.grow(h).relu())
        samples.append(x)
    return torch.stack(samples)


def merge_pass(*sites: Site, **options: Any) -> Merge:
    return Merge(flow=FLOW, sites=sites, options=OPTIONS, residual="replace", **options)


def test_the_written_graph_is_the_block_and_what_a_capture_writes() -> None:
    block = block_of()
    gm = run_passes(written(block), ())
    assert torch.equal(gm(tokens_of()), block(tokens_of()))
    examples = {"x": tokens_of()}
    captured = capture_block(block, examples, "attention_kwargs", call_layer)
    kept = [line for line in readable(captured).splitlines() if not line.startswith("carried")]
    assert kept == readable(gm).splitlines()


@pytest.mark.parametrize(
    "sites", [(MIX,), (MLP,), (MIX, MLP), (MLP, MIX)], ids=["mix", "mlp", "both", "in any order"]
)
def test_merge(sites: tuple[Site, ...]) -> None:
    block, x = block_of(), tokens_of()
    before = calls(written(block))
    gm, changes = written_and_run(block, merge_pass(*sites))
    assert changes == [len(sites)]
    operators = ("toma.select", "toma.weigh", "toma.merge", "toma.unmerge", "region_layout")
    expected = Counter(dict.fromkeys(operators, len(sites))) + Counter(getitem=2 * len(sites))
    assert calls(gm) - before == expected
    assert not before - calls(gm)
    torch.testing.assert_close(gm(x), by_loop(block, x, sites, one_plan=False))
    assert not torch.allclose(gm(x), block(x), atol=1e-3)


@pytest.mark.parametrize("residual", ["keep", "replace"])
def test_merge_once(residual: str) -> None:
    block, x_BND = block_of(), tokens_of()
    gm, changes = written_and_run(block, Merge(flow=FLOW, options=OPTIONS, residual=residual))
    assert changes == [1]
    samples = []
    for x in x_BND:
        plan = plan_of(x)
        before = merge(x, plan)
        after = block(before)
        spread = (
            unmerge(after, plan) if residual == "replace" else x + unmerge(after - before, plan)
        )
        samples.append(spread)
    torch.testing.assert_close(gm(x_BND), torch.stack(samples))


def test_one_plan_and_cleanup() -> None:
    block, x = block_of(), tokens_of()
    gm, changes = written_and_run(block, merge_pass(MIX, MLP), OnePlan(), Cleanup(), OnePlan())
    assert changes == [2, 4, 0, 0]
    assert calls(gm) - calls(written(block)) == {
        "region_layout": 1,
        "toma.select": 1,
        "toma.weigh": 1,
        "getitem": 2,
        "toma.merge": 2,
        "toma.unmerge": 2,
    }
    torch.testing.assert_close(gm(x), by_loop(block, x, (MIX, MLP), one_plan=True))


def test_hand_on() -> None:
    lead, follow = block_of(0), block_of(0)
    passes = (merge_pass(MIX, MLP), OnePlan())
    handed = HandOn(attention_kwargs="attention_kwargs", group=GROUP, role="lead", keep=True)
    taken = HandOn(attention_kwargs="attention_kwargs", group=GROUP, role="follow", keep=True)
    leader, changes = written_and_run(lead, *passes, handed)
    assert changes == [2, 4, 2]
    follower, changes = written_and_run(follow, *passes, taken)
    assert changes == [2, 4, 2]
    assert calls(leader)["share"] == calls(follower)["shared"] == 1
    assert calls(follower)["toma.select"] == calls(follower)["toma.weigh"] == 0

    scope = {SCOPE: CallScope()}
    first, second = tokens_of(0), tokens_of(1)
    sites = (MIX, MLP)
    torch.testing.assert_close(leader(first, scope), by_loop(lead, first, sites, one_plan=True))
    expected = by_loop(follow, second, sites, one_plan=True, leader=first)
    torch.testing.assert_close(follower(second, scope), expected)
    assert not torch.allclose(expected, by_loop(follow, second, sites, one_plan=True), atol=1e-3)


def test_a_repeated_call_is_made_once() -> None:
    graph = fx.Graph()
    x = graph.placeholder("x")
    x.meta["val"] = tokens_of()
    counts = []
    for _ in range(2):
        shape = graph.call_function(getattr, (x, "shape"))
        counts.append(graph.call_function(operator.getitem, (shape, 1)))
    graph.output(graph.call_function(operator.add, tuple(counts)))
    gm = fx.GraphModule(nn.Module(), graph)
    gm.meta[LEAF_VALUE] = call_layer
    changes: list[int] = []
    run_passes(gm, [Cleanup()] * 2, lambda each, gm, changed: changes.append(changed))
    assert changes == [2, 0]
    assert calls(gm) == {"getattr": 1, "getitem": 1, "add": 1}
    assert gm(tokens_of()) == 64
