"""A leader's plan as a graph of its own, and a leader that is compiled in two parts."""

import copy
import pickle
from dataclasses import asdict
from typing import Any

import pytest
import torch
from torch import fx, nn
from torch._dynamo.testing import CompileCounterWithBackend

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
    rewrite,
    row_of,
    run,
    scope_kwargs,
)
from toma_fx.passes.install import install
from toma_fx.passes.merge_components import MergeComponents
from toma_fx.passes.merge_once import MergeOnce
from toma_fx.passes.plan_apart import plan_apart
from toma_fx.passes.share_plan import SharePlan
from toma_fx.passes.sites import FindSites
from toma_fx.runtime.plan import PlanScope
from toma_fx.runtime.schedule import PlanMemory

EVERY_BLOCK = pytest.mark.parametrize("name", NAMES)


def graph_of(block: nn.Module, role: Any, memory: PlanMemory | None = None) -> fx.GraphModule:
    share = SharePlan(
        attention_kwargs=row_of(block).attention_kwargs, blocks="Block", role=role, memory=memory
    )
    return rewrite(block, MergeOnce(options=OPTIONS, flow=flow_of(block)), share)


def installed(name: str) -> tuple[Any, Any]:
    """A leader and a follower, as a model holds them."""
    lead, follow = block_of(name), block_of(name)
    follower = graph_of(follow, "follow")
    install(lead, graph_of(lead, "lead"), follower=follower)
    install(follow, follower)
    return lead, follow


@pytest.fixture(autouse=True)
def _fresh_dynamo() -> Any:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@EVERY_BLOCK
def test_plan_and_follower_are_the_leader(name: str) -> None:
    block, inputs = block_of(name), inputs_of(name)
    lead, follow = graph_of(block, "lead"), graph_of(block, "follow")
    apart = plan_apart(lead)
    assert apart is not None
    assert not any("toma.merge" in call or "norm" in call for call in calls(apart))
    whole, parts = PlanScope(), PlanScope()
    expected = run(lead, inputs, **scope_kwargs(block, whole))
    assert apart(**inputs, **scope_kwargs(block, parts)) is None
    assert is_equal(parts.plans["Block"], whole.plans["Block"])
    assert is_equal(run(follow, inputs, **scope_kwargs(block, parts)), expected)


def test_golden() -> None:
    apart = plan_apart(graph_of(block_of("flux_single"), "lead"))
    assert apart is not None
    expect_graph(apart, "plan_apart.flux_single")


@EVERY_BLOCK
def test_memory_goes_with_the_plan(name: str) -> None:
    memory = PlanMemory(**asdict(OPTIONS), select_every=10, weigh_every=5)
    apart = plan_apart(graph_of(block_of(name), "lead", memory))
    assert apart is not None
    assert list(dict(apart.named_children())) == ["toma"]


@EVERY_BLOCK
def test_a_plan_made_inside_the_block_stays_there(name: str) -> None:
    block = block_of(name)
    find = FindSites(sites=row_of(block).sites, components=COMPONENTS)
    merge = MergeComponents(options=OPTIONS, flow=flow_of(block))
    share = SharePlan(attention_kwargs=row_of(block).attention_kwargs, blocks="Block", role="lead")
    assert plan_apart(rewrite(block, find, merge, share)) is None


@EVERY_BLOCK
def test_leader_shares_the_compiled_code_of_its_followers(name: str) -> None:
    lead, follow = installed(name)
    inputs = inputs_of(name)
    expected = [
        run(block, inputs, **scope_kwargs(block, scope))
        for scope in [PlanScope()]
        for block in (lead, follow)
    ]
    frames = CompileCounterWithBackend("eager")
    for block in (lead, follow):
        block.compile(backend=frames, fullgraph=True)
    scope = PlanScope()
    for block, like in zip((lead, follow), expected, strict=True):
        assert_close(run(block, inputs, **scope_kwargs(block, scope)), like)
    assert frames.frame_count == 2  # the plan, and the block of both


@EVERY_BLOCK
def test_compiled_leader_follows_what_is_done_to_it(name: str) -> None:
    lead, _ = installed(name)
    lead.compile(backend="eager")
    inputs = inputs_of(name)
    before = run(lead, inputs, **scope_kwargs(lead, PlanScope()))
    with torch.no_grad():
        for parameter in lead.parameters():
            parameter.mul_(1.5)
    after = run(lead, inputs, **scope_kwargs(lead, PlanScope()))
    assert not is_equal(after, before)
    uncompiled = copy.deepcopy(lead)
    assert uncompiled._compiled_call_impl is None
    assert_close(after, run(uncompiled, inputs, **scope_kwargs(lead, PlanScope())))
    reloaded = pickle.loads(pickle.dumps(lead))
    reloaded.compile(backend="eager")
    assert_close(run(reloaded, inputs, **scope_kwargs(lead, PlanScope())), after)


@EVERY_BLOCK
def test_hooks_of_a_compiled_leader_run_once(name: str) -> None:
    lead, _ = installed(name)
    heard = []
    lead.register_forward_pre_hook(lambda module, args: heard.append(module))
    lead.compile(backend="eager")
    run(lead, inputs_of(name), **scope_kwargs(lead, PlanScope()))
    assert len(heard) == 1


@EVERY_BLOCK
def test_replaced_forward_is_compiled_whole(name: str) -> None:
    lead, _ = installed(name)
    inputs, scope = inputs_of(name), PlanScope()
    heard, original = [], lead.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        heard.append(args)
        return original(*args, **kwargs)

    lead.forward = forward
    expected = run(lead, inputs, **scope_kwargs(lead, scope))
    lead.compile(backend="eager")
    assert_close(run(lead, inputs, **scope_kwargs(lead, scope)), expected)
    assert len(heard) == 2
