"""The graphs of a full step, which remembers, and of a step between, which recalls."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import fx, nn

from tests.passes.blocks import (
    GROUP,
    NAMES,
    Role,
    assert_close,
    block_of,
    calls,
    capture,
    expect_change,
    hand_on_pass,
    inputs_of,
    is_equal,
    kwargs_argument,
    merge_pass,
    rewrite,
    row_of,
    run,
)
from toma_fx.passes.cleanup import Cleanup
from toma_fx.passes.one_plan import OnePlan
from toma_fx.passes.pipeline import Pass
from toma_fx.passes.recall import Recall
from toma_fx.passes.remember import Remember
from toma_fx.runtime.memory import BlockMemory, Memories
from toma_fx.runtime.plan import RECALL, REMEMBER, SCOPE, CallScope

EVERY_BLOCK = pytest.mark.parametrize("name", NAMES)
PATH = "blocks.0"


def merging(block: nn.Module, role: Role) -> tuple[Pass, ...]:
    merge = merge_pass(block, "block", residual="keep")
    return merge, OnePlan(), hand_on_pass(block, role)


def remember(block: nn.Module, role: Role = "lead", *, control: bool = True) -> Remember:
    return Remember(flow=row_of(block).flow, merging=merging(block, role), control=control)


def recall(
    block: nn.Module, theta: float = 0.5, *, extrapolate: bool = True, control: bool = True
) -> Recall:
    flow = row_of(block).flow
    return Recall(flow=flow, theta=theta, extrapolate=extrapolate, control=control)


def between(block: nn.Module, *given: Any, **options: Any) -> fx.GraphModule:
    return rewrite(block, *merging(block, "follow"), recall(block, *given, **options), Cleanup())


def run_in(
    block: nn.Module, gm: fx.GraphModule, scope: CallScope, inputs: dict[str, Any]
) -> tuple[torch.Tensor, ...]:
    assert scope.memories is not None
    scope.memories.begin(PATH)
    output = run(gm, inputs, **{kwargs_argument(block): {SCOPE: scope}})
    scope.memories.end(PATH)
    return output


def full_step(
    block: nn.Module, inputs: dict[str, Any], **options: Any
) -> tuple[tuple[torch.Tensor, ...], CallScope]:
    """What the block returns, and the scope in which it remembered."""
    scope = CallScope(REMEMBER, memories=Memories({}, None))
    gm = rewrite(block, remember(block, **options), Cleanup())
    return run_in(block, gm, scope, inputs), scope


def scope_after(scope: CallScope, ahead: float, earlier: Any = None) -> CallScope:
    assert scope.memories is not None
    left = scope.memories.made[PATH]
    before = left.update if earlier is None else earlier
    memories = Memories({PATH: left._replace(earlier=before)}, torch.tensor(ahead))
    return CallScope(RECALL, kept=scope.made(), memories=memories)


def tokens_of(name: str, inputs: dict[str, Any]) -> tuple[torch.Tensor, ...]:
    """What goes into the streams of a block, in the order of its outputs."""
    image, text = inputs["hidden_states"], inputs["encoder_hidden_states"]
    return (image,) if name == "unet" else (text, image)


@EVERY_BLOCK
@pytest.mark.parametrize("control", [True, False])
def test_a_full_step_returns_what_the_block_does_and_leaves_its_updates(
    name: str, control: bool
) -> None:
    block, inputs = block_of(name), inputs_of(name)
    output, scope = full_step(block, inputs, control=control)
    expected = run(block, inputs)
    assert is_equal(output, expected)
    assert scope.memories is not None
    left: BlockMemory = scope.memories.made[PATH]
    for update, tokens, whole in zip(left.update, tokens_of(name, inputs), output, strict=True):
        assert torch.equal(update, whole - tokens)
    assert [len(each.shape) for each in left.merged] == [3] * len(output) * control
    assert GROUP in scope.plans


@EVERY_BLOCK
@pytest.mark.parametrize("theta", [0.0, 0.5, 1.0])
def test_nothing_has_changed_since_the_full_step(name: str, theta: float) -> None:
    block, inputs = block_of(name), inputs_of(name)
    expected, scope = full_step(block, inputs)
    output = run_in(block, between(block, theta), scope_after(scope, 1.0), inputs)
    assert_close(output, expected)


@EVERY_BLOCK
def test_updates_go_on_changing_as_they_did(name: str) -> None:
    """With theta 0, whatever goes in now."""
    block, inputs, later = block_of(name), inputs_of(name), inputs_of(name, seed=1)
    _, scope = full_step(block, inputs)
    assert scope.memories is not None
    now = scope.memories.made[PATH].update
    before = tuple(torch.randn_like(each) for each in now)
    output = run_in(block, between(block, 0.0), scope_after(scope, 0.5, before), later)
    tokens = tokens_of(name, later)
    assert_close(
        output, tuple(x + u + 0.5 * (u - b) for x, u, b in zip(tokens, now, before, strict=True))
    )


@EVERY_BLOCK
def test_what_is_changed(name: str) -> None:
    block = block_of(name)
    streams = 1 if name == "unet" else 2
    gm = capture(block)
    whole = calls(gm)
    assert remember(block).apply(gm) == streams
    gm.graph.eliminate_dead_code()
    gm.graph.lint()
    full = calls(gm)
    assert full["remember"] == full["share"] == 1
    assert full["toma.merge"] == 1
    assert full["toma.unmerge"] == 0
    assert full["norm1"] == 2 * whole["norm1"]
    without = calls(rewrite(block, remember(block, control=False), Cleanup()))
    assert without["share"] == 1
    assert without["toma.merge"] == 0
    assert without["norm1"] == whole["norm1"]
    follows = calls(rewrite(block, remember(block, "follow", control=False), Cleanup()))
    assert follows["shared"] == 1  # or nobody would ask for the plan of a leader that was skipped
    gm = rewrite(block, *merging(block, "follow"))
    assert recall(block).apply(gm) == streams
    step = calls(between(block))
    assert (step["recall"], step["steps_ahead"]) == (1, 1)
    assert (step["toma.merge"], step["toma.unmerge"]) == (2, 1)
    only = calls(between(block, 0.0))
    assert not {"toma.merge", "toma.unmerge", "shared", "norm1"} & set(only)
    assert "steps_ahead" not in calls(between(block, extrapolate=False))


def test_the_passes_can_be_compared() -> None:
    """Blocks with equal passes are one graph."""
    block = block_of("unet")
    assert remember(block) == remember(block)
    assert hash(recall(block)) == hash(recall(block))
    assert recall(block) != replace(recall(block), theta=0.25)


@pytest.mark.parametrize("name", ["unet", "flux_single"])
def test_graph_of_a_full_step(name: str) -> None:
    block = block_of(name)
    after = rewrite(block, remember(block), Cleanup())
    expect_change(rewrite(block, *merging(block, "lead")), after, f"remember.{name}")


@pytest.mark.parametrize("name", ["unet", "flux_single"])
def test_graph_of_a_step_between(name: str) -> None:
    block = block_of(name)
    expect_change(rewrite(block, *merging(block, "follow")), between(block), f"recall.{name}")
