"""One plan for a block, for its group, and for several steps."""

from collections.abc import Callable
from dataclasses import asdict, replace
from typing import Any, Literal

import pytest
import torch
from torch import Tensor, fx, nn

from tests.passes.blocks import (
    COMPONENTS,
    NAMES,
    OPTIONS,
    assert_close,
    block_of,
    calls,
    expect_graph,
    flow_of,
    inputs_of,
    is_equal,
    reference_components,
    reference_group,
    reference_once,
    rewrite,
    row_of,
    run,
    scope_kwargs,
)
from toma_fx.errors import InputError
from toma_fx.passes.merge_components import MergeComponents
from toma_fx.passes.merge_once import MergeOnce
from toma_fx.passes.pipeline import Pass, run_passes
from toma_fx.passes.plan_nodes import PlanOptions
from toma_fx.passes.share_plan import MEMORY, SharePlan
from toma_fx.passes.sites import FindSites
from toma_fx.runtime.plan import PlanScope
from toma_fx.runtime.schedule import PlanMemory

EVERY_BLOCK = pytest.mark.parametrize("name", NAMES)
EVERY_PLACEMENT = pytest.mark.parametrize("placement", ["component", "block"])
Role = Literal["alone", "lead", "follow"]


def merged(
    block: nn.Module, placement: str = "component", options: PlanOptions = OPTIONS
) -> fx.GraphModule:
    """The graph of a block with a plan at each place where tokens are merged."""
    flow = flow_of(block)
    passes: tuple[Pass, ...] = (MergeOnce(options=options, flow=flow),)
    if placement == "component":
        find = FindSites(sites=row_of(block).sites, components=COMPONENTS)
        passes = (find, MergeComponents(options=options, flow=flow))
    return rewrite(block, *passes)


def sharing(block: nn.Module, role: Role = "alone", memory: PlanMemory | None = None) -> SharePlan:
    return SharePlan(
        attention_kwargs=row_of(block).attention_kwargs, blocks="Block", role=role, memory=memory
    )


def shared(block: nn.Module, role: Role = "alone", placement: str = "component") -> fx.GraphModule:
    return run_passes(merged(block, placement), [sharing(block, role)])


def memory_of(select_every: int = 10, weigh_every: int = 5) -> PlanMemory:
    return PlanMemory(**asdict(OPTIONS), select_every=select_every, weigh_every=weigh_every)


def reference_of(placement: str) -> tuple[Callable[..., tuple[Tensor, ...]], Any]:
    """How the reference runs a block, and a group whose blocks share one plan."""
    group = reference_group(share=True, placement=placement)
    return (reference_components if placement == "component" else reference_once), group


@EVERY_BLOCK
@EVERY_PLACEMENT
def test_one_plan_serves_a_block(name: str, placement: str) -> None:
    block, inputs = block_of(name), inputs_of(name)
    forward, group = reference_of(placement)
    assert_close(
        run(shared(block, "alone", placement), inputs), forward(name, block, group, inputs)
    )


@EVERY_BLOCK
@EVERY_PLACEMENT
def test_blocks_that_follow_use_the_plan_of_the_first(name: str, placement: str) -> None:
    block = block_of(name)
    leader, follower = shared(block, "lead", placement), shared(block, "follow", placement)
    forward, group = reference_of(placement)
    scope = scope_kwargs(block, PlanScope())
    for seed, gm in enumerate((leader, follower, follower)):
        inputs = inputs_of(name, seed=seed)
        expected = forward(name, block, group, inputs)
        assert_close(run(gm, inputs, **scope), expected)
        if seed:  # The block's own plan would have given something else.
            assert not is_equal(run(leader, inputs), run(follower, inputs, **scope))


@EVERY_BLOCK
def test_a_first_block_on_its_own_computes_what_a_block_alone_does(name: str) -> None:
    block, inputs = block_of(name), inputs_of(name)
    assert is_equal(run(shared(block, "lead"), inputs), run(shared(block, "alone"), inputs))


@EVERY_BLOCK
def test_a_block_that_follows_on_its_own(name: str) -> None:
    with pytest.raises(InputError, match="shares the plan of its group's first block"):
        run(shared(block_of(name), "follow"), inputs_of(name))


@pytest.mark.parametrize(
    ("name", "placement", "repeated"),
    [
        ("unet", "component", 2),
        ("flux_double", "component", 1),
        ("flux_single", "component", 0),
        ("unet", "block", 0),
    ],
)
def test_what_is_changed(name: str, placement: str, repeated: int) -> None:
    block = block_of(name)
    flux = name != "unet"
    roles: dict[Role, int] = {"alone": 0, "lead": 1, "follow": 1}
    for role, handed_on in roles.items():
        gm = merged(block, placement)
        before = calls(gm)
        assert before["toma.weigh"] == before["toma.merge"] == repeated + 1
        changed = sharing(block, role).apply(gm)
        assert changed >= repeated + handed_on
        gm.graph.eliminate_dead_code()
        gm.graph.lint()
        after = calls(gm)
        assert (changed == 0) == (after == before)
        made = role != "follow"
        assert after["toma.select"] == after["toma.weigh"] == made
        assert after["rotary_at"] == (flux and made)
        assert after["share"] == (role == "lead")
        assert after["shared"] == (role == "follow")
        assert after["toma.merge"] == after["toma.unmerge"] == before["toma.merge"]


def test_fixed_weights_are_shared_too() -> None:
    block, inputs = block_of("unet"), inputs_of("unet")
    options = replace(OPTIONS, selector="fixed")
    scope = scope_kwargs(block, PlanScope())
    roles: tuple[Role, ...] = ("lead", "follow")
    graphs = [run_passes(merged(block, options=options), [sharing(block, role)]) for role in roles]
    assert [calls(gm)["toma.fixed_weights"] for gm in graphs] == [1, 0]
    leader, follower = (run(gm, inputs, **scope) for gm in graphs)
    assert is_equal(leader, follower)


@EVERY_BLOCK
@EVERY_PLACEMENT
def test_a_kept_plan_serves_the_steps_until_it_is_made_again(name: str, placement: str) -> None:
    block = block_of(name)
    gm = run_passes(merged(block, placement), [sharing(block, "lead", memory_of(2, 2))])
    follower = shared(block, "follow", placement)
    leader = shared(block, "lead", placement)
    kept = PlanScope()
    for step in range(4):
        inputs = inputs_of(name, seed=step)
        time = (torch.tensor(step), torch.tensor(1))
        result = run(gm, inputs, **scope_kwargs(block, PlanScope(time)))
        if step % 2 == 0:
            expected = run(leader, inputs, **scope_kwargs(block, kept))
        else:
            expected = run(follower, inputs, **scope_kwargs(block, kept))
        assert is_equal(result, expected), f"step {step}"


@EVERY_BLOCK
def test_a_kept_plan_is_shared_in_its_group(name: str) -> None:
    block = block_of(name)
    leader = run_passes(merged(block), [sharing(block, "lead", memory_of())])
    follower = shared(block, "follow")
    for step in (0, 1):
        scope = scope_kwargs(block, PlanScope((torch.tensor(step), torch.tensor(1))))
        inputs = inputs_of(name, seed=step)
        assert is_equal(run(leader, inputs, **scope), run(follower, inputs, **scope))


def test_a_kept_plan_is_made_in_one_module() -> None:
    block = block_of("flux_double")
    gm = run_passes(merged(block), [sharing(block, "lead", memory_of())])
    after = calls(gm)
    assert after["toma.select"] == after["toma.weigh"] == 0
    assert after[MEMORY] == after["time_of"] == after["rotary_at"] == 1
    assert isinstance(gm.get_submodule(MEMORY), PlanMemory)


def test_a_block_with_a_schedule_on_its_own() -> None:
    block = block_of("unet")
    gm = run_passes(merged(block), [sharing(block, "lead", memory_of())])
    with pytest.raises(InputError, match="needs the model's clock"):
        run(gm, inputs_of("unet"))


def test_a_memory_counts_as_a_change() -> None:
    """Nothing is repeated and nothing handed on, and still the graph is another."""
    block = block_of("unet")
    gm = merged(block, "block")
    assert sharing(block, "alone", memory_of()).apply(gm) > 0


@pytest.mark.parametrize("name", ["unet", "flux_single"])
@pytest.mark.parametrize("role", ["alone", "lead", "follow"])
def test_graph(name: str, role: Role) -> None:
    expect_graph(shared(block_of(name), role), f"share_plan.{name}.{role}")


def test_graph_with_a_memory() -> None:
    block = block_of("flux_single")
    gm = run_passes(merged(block), [sharing(block, "lead", memory_of())])
    expect_graph(gm, "share_plan.flux_single.memory")
