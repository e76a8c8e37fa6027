"""The scope of a thread, in which blocks share a plan that no dictionary of kwargs reaches."""

import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounter

from toma_fx.errors import InputError
from toma_fx.runtime import plan

PLAN = (torch.zeros(1), torch.ones(1))


def in_thread(function: Any) -> Any:
    """What a function returns in a thread of its own."""
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(function).result()


@pytest.fixture
def scope() -> Iterator[plan.CallScope]:
    """A scope that this thread is in."""
    scope = plan.CallScope(grids=(48, 16), unmerged=8)
    before = plan.enter(scope)
    yield scope
    assert plan.enter(before) is scope


def test_a_thread_is_in_no_scope_until_it_enters_one() -> None:
    assert plan.current() is None
    first, second = plan.CallScope(), plan.CallScope()
    assert plan.enter(first) is None
    assert plan.enter(second) is first
    assert plan.current() is second
    assert plan.enter(None) is second


def test_threads_do_not_see_each_others_scopes(scope: plan.CallScope) -> None:
    def other() -> plan.CallScope | None:
        assert plan.current() is None
        plan.enter(own)
        return plan.current()

    own = plan.CallScope()
    assert in_thread(other) is own
    assert plan.current() is scope


def test_blocks_without_attention_kwargs_share_a_plan_in_the_scope_of_the_thread(
    scope: plan.CallScope,
) -> None:
    assert plan.is_due(None, "Block")
    plan.share(None, "Block", *PLAN)
    assert plan.shared(None, "Block") == PLAN == scope.plans["Block"]
    assert not plan.is_due(None, "Block")
    assert not in_thread(lambda: plan.is_due(None, "Block"))
    with pytest.raises(InputError, match="shares the plan of its group's first block"):
        in_thread(lambda: plan.shared(None, "Block"))
    plan.postpone(None, "Other", lambda: plan.share(None, "Other", *PLAN))
    assert plan.shared(None, "Other") == PLAN
    # A dictionary that reaches a block says which scope it is in.
    own = {plan.SCOPE: plan.CallScope()}
    assert plan.is_due(own, "Block")


def test_blocks_without_attention_kwargs_run_the_variant_of_the_thread_s_call() -> None:
    before = plan.enter(plan.CallScope(plan.REUSE, kept={"": {"Block": PLAN}}))
    try:
        assert plan.variant(None, "Block") == plan.REUSE
        assert plan.variant(None, "Other") == plan.MERGED
        assert plan.kept_destinations(None, "Block") is PLAN[-1]
        assert in_thread(lambda: plan.variant(None, "Block")) == plan.MERGED
    finally:
        plan.enter(before)


def test_the_tokens_of_a_sequence_that_are_no_image(scope: plan.CallScope) -> None:
    """Text is what the grids, and a first frame that is given, leave of it."""
    tokens = torch.zeros(2, 8 + 64 + 5, 3)
    assert plan.unmerged_tokens(None) == 8
    assert plan.text_tokens(None, tokens) == 5
    kwargs = {plan.SCOPE: plan.CallScope(grids=(70,))}
    assert plan.unmerged_tokens(kwargs) == 0
    assert plan.text_tokens(kwargs, tokens) == 7
    assert plan.unmerged_tokens({"scale": 1.0}) == 0


@pytest.mark.parametrize("kwargs", [None, {}, {"scale": 1.0}, {plan.SCOPE: plan.CallScope()}])
def test_text_in_the_sequence_of_a_block_that_is_called_on_its_own(kwargs: Any) -> None:
    message = (
        "tokens of shape (2, 64, 3) hold image and text, and only the model knows how many of "
        "each; call or export the whole model, not this block alone"
    )
    with pytest.raises(InputError, match=f"^{re.escape(message)}$"):
        plan.text_tokens(kwargs, torch.zeros(2, 64, 3))


def test_a_block_in_a_scope_runs_there_in_any_thread(scope: plan.CallScope) -> None:
    """As the backward pass does with gradient checkpointing."""
    own = plan.CallScope()
    seen: list[Any] = []

    def block(*args: Any, **kwargs: Any) -> str:
        seen.append((plan.current(), args, kwargs))
        return "output"

    bound = plan.InScope(block, own)
    assert bound(1, mask=None) == in_thread(lambda: bound(2)) == "output"
    assert seen == [(own, (1,), {"mask": None}), (own, (2,), {})]
    assert plan.current() is scope


def test_the_scope_is_left_after_an_exception(scope: plan.CallScope) -> None:
    def block() -> None:
        raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        plan.InScope(block, plan.CallScope())()
    assert plan.current() is scope


def test_compiled_code_serves_every_thread() -> None:
    """Its guards look at the scope of a thread that may never have entered one."""
    frames = CompileCounter()

    def block(tokens: Tensor) -> Tensor:
        return tokens * plan.unmerged_tokens(None)

    compiled = torch.compile(block, backend=frames, fullgraph=True)
    tokens = torch.ones(2, 3)
    assert torch.equal(compiled(tokens), 0 * tokens)
    assert torch.equal(in_thread(lambda: compiled(tokens)), 0 * tokens)
    assert frames.frame_count == 1
    for _ in range(3):  # every call of a model has a scope of its own
        bound = plan.InScope(compiled, plan.CallScope(unmerged=4))
        assert torch.equal(bound(tokens), 4 * tokens)
        assert torch.equal(in_thread(lambda each=bound: each(tokens)), 4 * tokens)
    assert frames.frame_count == 2


def test_code_that_enters_a_scope_is_compiled_once_in_a_thread_that_never_did() -> None:
    frames = CompileCounter()

    def model(tokens: Tensor) -> Tensor:
        before = plan.enter(None)
        try:
            return tokens * plan.unmerged_tokens(None)
        finally:
            plan.enter(before)

    compiled = torch.compile(model, backend=frames, fullgraph=True)
    tokens = torch.ones(2, 3)
    for outputs in (in_thread(lambda: [compiled(tokens), compiled(tokens)]), [compiled(tokens)]):
        assert all(torch.equal(output, 0 * tokens) for output in outputs)
    assert frames.frame_count == 1
