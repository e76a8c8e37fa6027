"""A leader's plan as a graph of its own, and a leader that is compiled in two parts."""

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import fx, nn
from torch._dynamo.testing import CompileCounterWithBackend

from tests.passes.blocks import (
    GROUP,
    NAMES,
    assert_close,
    block_of,
    calls,
    expect_change,
    in_group,
    inputs_of,
    is_equal,
    row_of,
    run,
    scope_kwargs,
)
from toma_fx.passes.install import install
from toma_fx.passes.plan_apart import plan_apart
from toma_fx.runtime.plan import MERGED, REUSE, UNTOUCHED, WEIGH, CallScope

EVERY_BLOCK = pytest.mark.parametrize("name", NAMES)


def apart(block: nn.Module, **options: Any) -> fx.GraphModule:
    """The plan of a leader as something that can be called."""
    graph = plan_apart(in_group(block, "lead", **options))
    assert graph is not None
    return fx.GraphModule(block, graph)


def variants(block: nn.Module, role: Any, schedule: bool) -> dict[str, fx.GraphModule | None]:
    """What a recipe would install, with or without a schedule; and the block itself."""
    made: dict[str, fx.GraphModule | None] = {MERGED: in_group(block, role, keep=schedule)}
    if schedule and role == "lead":
        made[WEIGH] = in_group(block, role, keep=True, kept_destinations=True)
        made[REUSE] = in_group(block, "follow")
    if not schedule:
        made[UNTOUCHED] = None
    return made


def installed(name: str, schedule: bool = False) -> tuple[Any, Any]:
    """A leader and a follower, as a model holds them."""
    lead, follow = block_of(name), block_of(name)
    kwargs = row_of(lead).flow.attention_kwargs
    leading, following = (variants(lead, role, schedule) for role in ("lead", "follow"))
    install(lead, leading, attention_kwargs=kwargs, leads=GROUP, follower=following)
    install(follow, following, attention_kwargs=kwargs)
    return lead, follow


@pytest.fixture(autouse=True)
def _fresh_dynamo() -> Any:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@EVERY_BLOCK
def test_plan_and_follower_are_the_leader(name: str) -> None:
    block, inputs = block_of(name), inputs_of(name)
    lead, follow, planner = in_group(block, "lead"), in_group(block, "follow"), apart(block)
    assert not any("toma.merge" in call or "norm" in call for call in calls(planner))
    whole, parts = CallScope(), CallScope()
    expected = run(lead, inputs, **scope_kwargs(block, whole))
    assert planner(**inputs, **scope_kwargs(block, parts)) is None
    assert is_equal(parts.plans[GROUP], whole.plans[GROUP])
    assert is_equal(run(follow, inputs, **scope_kwargs(block, parts)), expected)


def test_graph() -> None:
    block = block_of("flux_single")
    expect_change(in_group(block, "lead"), apart(block), "plan_apart.flux_single")


@EVERY_BLOCK
def test_kept_destinations_go_with_the_plan(name: str) -> None:
    block, inputs = block_of(name), inputs_of(name)
    made = CallScope()
    apart(block, keep=True)(**inputs, **scope_kwargs(block, made))
    weighed = CallScope(WEIGH, kept=made.made())
    planner = apart(block, keep=True, kept_destinations=True)
    assert calls(planner)["toma.select"] == 0
    planner(**inputs_of(name, seed=1), **scope_kwargs(block, weighed))
    assert torch.equal(weighed.plans[GROUP][-1], made.plans[GROUP][-1])
    assert not torch.equal(weighed.plans[GROUP][0], made.plans[GROUP][0])


@EVERY_BLOCK
def test_a_plan_made_inside_the_block_stays_there(name: str) -> None:
    assert plan_apart(in_group(block_of(name), "lead", "component")) is None


@EVERY_BLOCK
def test_leader_shares_the_compiled_code_of_its_followers(name: str) -> None:
    lead, follow = installed(name)
    inputs = inputs_of(name)
    expected = [
        run(block, inputs, **scope_kwargs(block, scope))
        for scope in [CallScope()]
        for block in (lead, follow)
    ]
    frames = CompileCounterWithBackend("eager")
    for block in (lead, follow):
        block.compile(backend=frames, fullgraph=True)
    scope = CallScope()
    for block, like in zip((lead, follow), expected, strict=True):
        assert_close(run(block, inputs, **scope_kwargs(block, scope)), like)
    assert frames.frame_count == 2  # the plan, and the block of both


@EVERY_BLOCK
def test_leader_runs_the_variant_of_the_call(name: str) -> None:
    """Compiled or not, and whole where an earlier call left no plan."""
    (lead, follow), (eager_lead, eager_follow) = (installed(name, schedule=True) for _ in range(2))
    frames = CompileCounterWithBackend("eager")
    for block in (lead, follow):
        block.compile(backend=frames, fullgraph=True)
    kept = None
    for seed, variant in enumerate((MERGED, REUSE, WEIGH, REUSE)):
        inputs = inputs_of(name, seed=seed)
        scope, like = (CallScope(variant, kept=kept) for _ in range(2))
        for block, eager in ((lead, eager_lead), (follow, eager_follow)):
            expected = run(eager, inputs, **scope_kwargs(block, like))
            assert_close(run(block, inputs, **scope_kwargs(block, scope)), expected)
        kept = like.made() if variant != REUSE else kept
    # Two that make plans, and the block of both, which is called by two variants.
    assert frames.frame_count <= 4
    without = CallScope(REUSE, kept={"": {}})
    run(lead, inputs, **scope_kwargs(lead, without))
    assert GROUP in without.plans


@EVERY_BLOCK
def test_an_untouched_call_makes_no_plan(name: str) -> None:
    lead, _ = installed(name)
    lead.compile(backend="eager")
    scope = CallScope(UNTOUCHED)
    output = run(lead, inputs_of(name), **scope_kwargs(lead, scope))
    assert_close(output, run(block_of(name), inputs_of(name)))
    assert scope.plans == {}


@EVERY_BLOCK
def test_compiled_leader_follows_what_is_done_to_it(name: str) -> None:
    lead, _ = installed(name)
    lead.compile(backend="eager")
    inputs = inputs_of(name)
    before = run(lead, inputs, **scope_kwargs(lead, CallScope()))
    with torch.no_grad():
        for parameter in lead.parameters():
            parameter.mul_(1.5)
    after = run(lead, inputs, **scope_kwargs(lead, CallScope()))
    assert not is_equal(after, before)
    uncompiled = copy.deepcopy(lead)
    assert uncompiled._compiled_call_impl is None
    assert_close(after, run(uncompiled, inputs, **scope_kwargs(lead, CallScope())))
    reloaded = pickle.loads(pickle.dumps(lead))
    reloaded.compile(backend="eager")
    assert_close(run(reloaded, inputs, **scope_kwargs(lead, CallScope())), after)


@EVERY_BLOCK
def test_hooks_of_a_compiled_leader_run_once(name: str) -> None:
    lead, _ = installed(name)
    heard = []
    lead.register_forward_pre_hook(lambda module, args: heard.append(module))
    lead.compile(backend="eager")
    run(lead, inputs_of(name), **scope_kwargs(lead, CallScope()))
    assert len(heard) == 1


@EVERY_BLOCK
def test_replaced_forward_is_compiled_whole(name: str) -> None:
    lead, _ = installed(name)
    inputs, scope = inputs_of(name), CallScope()
    heard, original = [], lead.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        heard.append(args)
        return original(*args, **kwargs)

    lead.forward = forward
    expected = run(lead, inputs, **scope_kwargs(lead, scope))
    lead.compile(backend="eager")
    assert_close(run(lead, inputs, **scope_kwargs(lead, scope)), expected)
    assert len(heard) == 2
