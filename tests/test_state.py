"""Runs and their plans: calls that belong together, and no plan is kept for good."""

import copy
import pickle
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor

from toma_fx.runtime.memory import Kept
from toma_fx.runtime.plan import Plans
from toma_fx.state import MOST_RUNS, Run, State

PROMPT = torch.arange(6.0).reshape(1, 2, 3)
SHAPE: tuple[object, ...] = ((1, 4, 8, 8), torch.float32)


def prompt_of(seed: int = 0) -> Tensor:
    return torch.randn(1, 2, 3, generator=torch.Generator().manual_seed(seed))


def runs_of(
    state: State,
    timesteps: Sequence[float],
    prompt: Tensor = PROMPT,
    shape: tuple[object, ...] = SHAPE,
) -> list[Run]:
    return [state.run_of(prompt, shape, timestep) for timestep in timesteps]


def plans_of(run: Run) -> Plans:
    assert run.kept is not None
    return run.kept.plans


# Each timestep, the step of its run, and the run, in the order in which they began.
ORDERS = {
    "falls": ([999, 979, 959], [0, 1, 2], [0, 0, 0]),
    "falls to zero": ([2, 1, 0], [0, 1, 2], [0, 0, 0]),
    "is a fraction": ([1.0, 0.98, 0.5], [0, 1, 2], [0, 0, 0]),
    "rises": ([999, 500, 999, 500], [0, 1, 0, 1], [0, 0, 1, 1]),
    "rises a little": ([999, 979, 980, 979], [0, 1, 0, 1], [0, 0, 1, 1]),
    "rises at each call": ([1, 2, 3], [0, 0, 0], [0, 1, 2]),
    "two views": ([999, 999, 979, 979, 959, 959], [0, 0, 1, 1, 2, 2], [0, 1, 0, 1, 0, 1]),
    "three views": ([9, 9, 9, 8, 8, 8, 7, 7, 7], [0, 0, 0, 1, 1, 1, 2, 2, 2], [0, 1, 2] * 3),
    "a new image of two views": (
        [9, 9, 5, 5, 9, 9, 5, 5],
        [0, 0, 1, 1] * 2,
        [0, 1, 0, 1, 2, 3, 2, 3],
    ),
    # PNDM repeats its second timestep. What it does not continue is another run, which ends there.
    "repeated": ([999, 979, 979, 959, 939], [0, 1, 0, 2, 3], [0, 0, 1, 0, 0]),
}


@pytest.mark.parametrize(("timesteps", "steps", "runs"), ORDERS.values(), ids=ORDERS)
def test_the_calls_of_a_run(timesteps: list[float], steps: list[int], runs: list[int]) -> None:
    state = State()
    seen: list[int] = []
    found: list[Run] = []
    for timestep in timesteps:
        (run,) = runs_of(state, [timestep])
        found.append(run)
        seen.append(run.step)
    assert seen == steps
    order = list({id(run): run for run in found}.values())
    assert [order.index(run) for run in found] == runs


@pytest.mark.parametrize("calls", [2, 3])
def test_prompts_that_take_turns_in_a_step_are_runs_of_their_own(calls: int) -> None:
    state = State()
    prompts = [prompt_of(seed) for seed in range(calls)]
    first = [state.run_of(prompt, SHAPE, 9) for prompt in prompts]
    assert len(set(map(id, first))) == calls
    for step in range(1, 4):
        again = [state.run_of(prompt, SHAPE, 9 - step) for prompt in prompts]
        assert all(a is b for a, b in zip(first, again, strict=True))
        assert [run.step for run in again] == [step] * calls
    assert len(state) == calls


def test_runs_of_other_sizes_are_told_apart() -> None:
    state = State()
    (first,) = runs_of(state, [9])
    (other,) = runs_of(state, [8], shape=((1, 4, 8, 16), torch.float32))
    assert other is not first
    assert runs_of(state, [7]) == [first]


def test_an_interrupted_run_is_no_part_of_the_next() -> None:
    state = State()
    (first,) = set(map(id, runs_of(state, [9, 8, 7])))
    (second,) = {id(run) for run in runs_of(state, [9, 8, 7, 6, 5])}
    assert first != second
    assert len(state) == 1


def test_embeddings_made_anew_at_each_step_go_on_with_the_run() -> None:
    state = State()
    (run,) = runs_of(state, [9])
    for step in (8, 7):
        assert runs_of(state, [step], PROMPT.clone()) == [run]
    assert runs_of(state, [6], PROMPT + 1) != [run]


def test_another_prompt_in_the_same_memory_is_another_run() -> None:
    state = State()
    prompt = PROMPT.clone()
    (run,) = runs_of(state, [9], prompt)
    prompt += 1
    (other,) = runs_of(state, [8], prompt)
    assert other is not run
    assert other.step == 0


def test_a_prompt_is_held_so_that_its_memory_is_not_given_to_another() -> None:
    state = State()
    (run,) = runs_of(state, [9], torch.full((1000, 1000), 1.0))
    for value in (2.0, 3.0):
        assert runs_of(state, [8], torch.full((1000, 1000), value)) != [run]


@pytest.mark.parametrize("part", [slice(0, 1), slice(1, 2)])
def test_a_part_of_a_prompt_is_not_the_prompt(part: slice) -> None:
    both = torch.cat([PROMPT, PROMPT + 1])
    state = State()
    (run,) = runs_of(state, [9], both)
    assert runs_of(state, [8], both[part]) != [run]


def test_threads_do_not_share_runs() -> None:
    state = State()
    with ThreadPoolExecutor(1) as one, ThreadPoolExecutor(1) as two:
        first = one.submit(runs_of, state, [9, 8]).result()[-1]
        second = two.submit(runs_of, state, [7]).result()[-1]
        assert second is not first
        assert one.submit(runs_of, state, [6]).result() == [first]
        assert (first.step, second.step) == (2, 0)
        two.submit(state.end).result()
        assert len(state) == 1
        assert one.submit(runs_of, state, [5]).result() == [first]


def test_many_threads_at_once_lose_nothing() -> None:
    state = State()
    timesteps = list(range(60, 0, -1))
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda _: runs_of(state, timesteps), range(8)))
    for runs in found:
        assert len(set(map(id, runs))) == 1
        assert runs[-1].step == len(timesteps) - 1


def test_only_so_many_runs_are_kept() -> None:
    state = State()
    (first,) = runs_of(state, [9])
    prompts = [prompt_of(seed) for seed in range(MOST_RUNS - 1)]
    runs = [state.run_of(prompt, SHAPE, 9) for prompt in prompts]
    assert len(state) == MOST_RUNS
    assert runs_of(state, [8]) == [first]
    (new,) = runs_of(state, [9], prompt_of(99))
    assert len(state) == MOST_RUNS
    assert runs_of(state, [7]) == [first]  # which was used later than those that it is older than
    assert runs_of(state, [8], prompt_of(99)) == [new]
    assert state.run_of(prompts[0], SHAPE, 8) is not runs[0]
    assert state.run_of(prompts[2], SHAPE, 8) is runs[2]


def test_the_end_of_an_image_ends_its_run() -> None:
    state = State()
    (run,) = runs_of(state, [9])
    state.keep(run, Kept({"": {"blocks": (torch.ones(3, 5),)}}))
    assert state.nbytes() == 60
    state.end()
    assert (len(state), state.nbytes()) == (0, 0)
    assert runs_of(state, [8]) != [run]


def test_kept_plans_are_copies() -> None:
    """What a CUDA graph returned is written anew when it is replayed."""
    state = State()
    (run,) = runs_of(state, [9])
    weight = torch.ones(3)
    state.keep(run, Kept({"": {"blocks": (weight,)}}))
    weight.zero_()
    assert torch.equal(plans_of(run)[""]["blocks"][0], torch.ones(3))


def test_plans_made_in_inference_mode_serve_a_call_with_gradients() -> None:
    state = State()
    with torch.inference_mode():
        prompt, weight = PROMPT.clone(), torch.full((3, 3), 0.5)
        (run,) = runs_of(state, [9], prompt)
        state.keep(run, Kept({"": {"blocks": (weight,)}}))
    assert runs_of(state, [8], prompt) == [run]
    assert runs_of(state, [7], prompt.clone()) == [run]
    tokens = torch.ones(3, 3, requires_grad=True)
    (kept,) = plans_of(run)[""]["blocks"]
    (kept @ tokens).sum().backward()
    assert tokens.grad is not None
    assert not kept.requires_grad


def test_plans_carry_no_gradients() -> None:
    state = State()
    (run,) = runs_of(state, [9])
    weight = torch.ones(3, requires_grad=True) * 2
    state.keep(run, Kept({"": {"blocks": (weight,)}}))
    assert not plans_of(run)[""]["blocks"][0].requires_grad


@pytest.mark.parametrize(
    "duplicate", [copy.deepcopy, copy.copy, lambda state: pickle.loads(pickle.dumps(state))]
)
def test_a_copy_has_no_run_under_way(duplicate: Any) -> None:
    state = State()
    runs_of(state, [9])
    twin = duplicate(state)
    assert (len(state), len(twin)) == (1, 0)
    runs_of(twin, [9])
    assert runs_of(state, [8])[0].step == 1


# Image number of each token, and the grids, in the order given and in token order.
GRIDS = {
    "one": ([0.0] * 6, None, None),
    "two": ([0.0] * 4 + [1.0] * 2, (4, 2), (4, 2)),
    "of one number, apart": ([0.0] * 2 + [1.0] * 3 + [0.0], (2, 3, 1), (3, 3)),
}


@pytest.mark.parametrize(("numbers", "given", "ordered"), GRIDS.values(), ids=GRIDS)
@pytest.mark.parametrize("batched", [False, True])
def test_grids_of_a_sequence(numbers: list[float], given: Any, ordered: Any, batched: bool) -> None:
    ids = torch.zeros(len(numbers), 3)
    ids[:, 0] = torch.tensor(numbers)
    ids = ids[None] if batched else ids
    state = State()
    assert state.grids_of(ids, sort=False) == given
    assert State().grids_of(ids, sort=True) == ordered
    ids += torch.tensor([1.0, 0, 0])  # another image in the same memory
    ids[..., 0, 0] = 7
    assert state.grids_of(ids, sort=False) != given
