"""A plan that blocks of a group, and later calls of a run, take out of the scope of the call."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor, fx, nn

from tests.passes.blocks import (
    GROUP,
    NAMES,
    OPTIONS,
    Role,
    assert_close,
    block_of,
    calls,
    expect_change,
    hand_on_pass,
    in_group,
    inputs_of,
    is_equal,
    merge_pass,
    reference_components,
    reference_group,
    reference_once,
    rewrite,
    run,
    scope_kwargs,
)
from toma_fx.errors import InputError
from toma_fx.passes.one_plan import OnePlan
from toma_fx.passes.pipeline import run_passes
from toma_fx.runtime.plan import REUSE, WEIGH, CallScope

EVERY_BLOCK = pytest.mark.parametrize("name", NAMES)
EVERY_PLACEMENT = pytest.mark.parametrize("placement", ["component", "block"])


def alone(block: nn.Module, placement: str) -> fx.GraphModule:
    return rewrite(block, merge_pass(block, placement), OnePlan())


@EVERY_BLOCK
@EVERY_PLACEMENT
def test_blocks_that_follow_use_the_plan_of_the_first(name: str, placement: str) -> None:
    block = block_of(name)
    leader, follower = (in_group(block, role, placement) for role in ("lead", "follow"))
    group = reference_group(share=True, placement=placement, residual="replace")
    reference = reference_components if placement == "component" else reference_once
    scope = scope_kwargs(block, CallScope())
    for seed, gm in enumerate((leader, follower, follower)):
        inputs = inputs_of(name, seed=seed)
        assert_close(run(gm, inputs, **scope), reference(name, block, group, inputs))
        if seed:  # The block's own plan would have given something else.
            assert not is_equal(run(leader, inputs), run(follower, inputs, **scope))


@EVERY_BLOCK
@EVERY_PLACEMENT
def test_a_first_block_on_its_own_computes_what_a_block_alone_does(
    name: str, placement: str
) -> None:
    block, inputs = block_of(name), inputs_of(name)
    expected = run(alone(block, placement), inputs)
    assert is_equal(run(in_group(block, "lead", placement), inputs), expected)


@EVERY_BLOCK
def test_a_block_that_follows_on_its_own(name: str) -> None:
    with pytest.raises(InputError, match="shares the plan of its group's first block"):
        run(in_group(block_of(name), "follow"), inputs_of(name))


@EVERY_BLOCK
@EVERY_PLACEMENT
@pytest.mark.parametrize(
    ("role", "keep", "kept_destinations", "selects", "weighs"),
    [
        ("lead", False, False, 1, 1),
        ("lead", True, False, 1, 1),
        ("lead", True, True, 0, 1),
        ("follow", False, False, 0, 0),
        ("follow", True, False, 0, 0),
    ],
)
def test_what_is_changed(
    name: str,
    placement: str,
    role: Role,
    keep: bool,
    kept_destinations: bool,
    selects: int,
    weighs: int,
) -> None:
    block = block_of(name)
    gm = alone(block, placement)
    before = calls(gm)
    each = hand_on_pass(block, role, keep=keep, kept_destinations=kept_destinations)
    # Two weights, and where the block takes rotary values, cosines and sines.
    tensors = 2 if name == "unet" else 4
    assert each.apply(gm) == tensors
    gm.graph.eliminate_dead_code()
    gm.graph.lint()
    after = calls(gm)
    assert after["toma.select"] == selects
    assert after["toma.weigh"] == weighs
    assert after["kept_destinations"] == kept_destinations
    assert after["toma.rows"] == (weighs * 2 if name != "unet" else 0)
    assert after["share"] == (role == "lead")
    assert after["shared"] == (role == "follow")
    assert after["toma.merge"] == after["toma.unmerge"] == before["toma.merge"]
    for share in gm.graph.nodes:
        if getattr(share.target, "__name__", "") == "share":
            assert len(share.args) == 2 + tensors + keep


def test_fixed_weights_are_shared_too() -> None:
    block, inputs = block_of("unet"), inputs_of("unet")
    merge = merge_pass(block, options=replace(OPTIONS, selector="fixed"))
    scope = scope_kwargs(block, CallScope())
    roles: tuple[Role, ...] = ("lead", "follow")
    graphs = [rewrite(block, merge, OnePlan(), hand_on_pass(block, role)) for role in roles]
    assert [calls(gm)["toma.fixed_weights"] for gm in graphs] == [1, 0]
    leader, follower = (run(gm, inputs, **scope) for gm in graphs)
    assert is_equal(leader, follower)


@EVERY_BLOCK
@EVERY_PLACEMENT
def test_a_kept_plan_merges_later_calls_as_it_did(name: str, placement: str) -> None:
    """A call that reuses the plan does what a block that follows does in the call that made it."""
    block = block_of(name)
    leader = in_group(block, "lead", placement, keep=True)
    follower = in_group(block, "follow", placement, keep=True)
    first, later = inputs_of(name), inputs_of(name, seed=1)
    made = CallScope()
    run(leader, first, **scope_kwargs(block, made))
    expected = run(follower, later, **scope_kwargs(block, made))
    kept = CallScope(REUSE, kept=made.made())
    assert is_equal(run(follower, later, **scope_kwargs(block, kept)), expected)
    assert not is_equal(run(leader, later), expected)


@EVERY_BLOCK
def test_kept_destinations_are_weighed_anew(name: str) -> None:
    block = block_of(name)
    leader = in_group(block, keep=True)
    weigh = in_group(block, keep=True, kept_destinations=True)
    first, later = inputs_of(name), inputs_of(name, seed=1)
    made = CallScope()
    run(leader, first, **scope_kwargs(block, made))
    scope = CallScope(WEIGH, kept=made.made())
    output = run(weigh, later, **scope_kwargs(block, scope))
    before, after = made.plans[GROUP], scope.plans[GROUP]
    assert torch.equal(after[-1], before[-1])
    assert not torch.equal(after[0], before[0])
    assert not is_equal(output, run(leader, later))
    toma = torch.ops.toma
    tokens: Tensor = later["hidden_states"]
    how = OPTIONS.temperature, OPTIONS.merge_over, OPTIONS.unmerge
    assert is_equal(after[:2], toma.weigh(tokens, before[-1], [8, 16, 64, 4], *how))
    # On the tokens that the destinations were selected from, nothing is new.
    again = run(weigh, first, **scope_kwargs(block, CallScope(WEIGH, kept=made.made())))
    assert is_equal(again, run(leader, first))


@pytest.mark.parametrize("name", ["unet", "flux_single"])
@pytest.mark.parametrize("how", ["lead", "follow", "weigh"])
def test_graph(name: str, how: str) -> None:
    block = block_of(name)
    before, after = (alone(block, "component") for _ in range(2))
    role: Role = "follow" if how == "follow" else "lead"
    keep = how == "weigh"
    run_passes(after, [hand_on_pass(block, role, keep=keep, kept_destinations=keep)])
    expect_change(before, after, f"hand_on.{name}.{how}")
