"""Plans that last for several steps: when they are made again, and that no other run gets them."""

import copy
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

from tests.runtime.tokens import random_tokens
from toma_fx.runtime.merging import weigh
from toma_fx.runtime.schedule import DenoisingClock, PlanMemory, make_slots
from toma_fx.runtime.selector import select

PROMPT = torch.arange(6.0).reshape(1, 2, 3)
OTHER_PROMPT = PROMPT + 1


def watch(clock: DenoisingClock, timesteps: Sequence[Any], prompt: Tensor = PROMPT) -> list[Any]:
    """Step and run that the clock shows at each timestep."""
    return [tuple(map(int, clock(timestep, prompt))) for timestep in timesteps]


# Each timestep, then the step of the run, and the run counted from 0.
RUNS = {
    "falls": ([999, 979, 959], [0, 1, 2], [0, 0, 0]),
    "falls to zero": ([2, 1, 0], [0, 1, 2], [0, 0, 0]),
    "rises": ([999, 500, 999, 500], [0, 1, 0, 1], [0, 0, 1, 1]),
    "rises a little": ([999, 979, 980, 979], [0, 1, 0, 1], [0, 0, 1, 1]),
    "rises at each call": ([1, 2, 3], [0, 0, 0], [0, 1, 2]),
    "stays": ([999, 999, 979, 979], [0, 0, 1, 1], [0, 0, 0, 0]),
    "is a fraction": ([1.0, 0.98, 0.98, 0.5], [0, 1, 1, 2], [0, 0, 0, 0]),
}


@pytest.mark.parametrize("kind", [float, torch.tensor, lambda t: torch.tensor([t, t])])
@pytest.mark.parametrize(("timesteps", "steps", "runs"), RUNS.values(), ids=RUNS)
def test_clock(timesteps: list[float], steps: list[int], runs: list[int], kind: Any) -> None:
    seen = watch(DenoisingClock(), [kind(timestep) for timestep in timesteps])
    assert [step for step, _ in seen] == steps
    first = seen[0][1]
    assert [run - first for _, run in seen] == runs


def test_other_conditioning_is_another_run() -> None:
    clock = DenoisingClock()
    ((_, run),) = watch(clock, [999])
    assert watch(clock, [979], OTHER_PROMPT) == [(0, run + 1)]
    assert watch(clock, [959], OTHER_PROMPT) == [(1, run + 1)]
    assert watch(clock, [939], PROMPT) == [(0, run + 2)]


def test_reset_starts_another_run() -> None:
    clock = DenoisingClock()
    ((_, run),) = watch(clock, [999])
    clock.reset()
    # Not even a timestep that falls or stays goes on with a run that has ended.
    assert watch(clock, [999]) == [(0, run + 1)]
    clock.reset()
    assert watch(clock, [979])[0][1] == run + 2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_casting_the_model_does_not_break_the_clock(dtype: torch.dtype) -> None:
    """As a float buffer, a timestep would lose digits, and the next one could seem to rise."""
    timesteps = [999.7, 999.6, 999.5]
    expected = watch(DenoisingClock(), timesteps)
    clock = DenoisingClock()
    seen = []
    for timestep in timesteps:
        seen += watch(clock, [timestep])
        clock.to(dtype)
    assert seen == expected


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64, torch.int64])
def test_timesteps_of_any_dtype(dtype: torch.dtype) -> None:
    timesteps = torch.tensor([800, 600, 400, 600]).to(dtype)
    assert [step for step, _ in watch(DenoisingClock(), [*timesteps])] == [0, 1, 2, 0]


def test_what_the_clock_showed_before_does_not_change() -> None:
    clock = DenoisingClock()
    step, run = clock(999, PROMPT)
    clock(979, PROMPT)
    clock(999, PROMPT)
    assert int(step) == 0
    assert int(run) == 1


def test_copies_of_a_clock_do_not_share_time() -> None:
    clock = DenoisingClock()
    watch(clock, [999])
    other = copy.deepcopy(clock)
    watch(other, [979, 959])
    assert watch(clock, [979])[0][0] == 1


def test_state_is_no_part_of_the_state_dict() -> None:
    memory = memory_of()
    make_slots(memory, random_tokens(2, 48, 6))
    assert not DenoisingClock().state_dict()
    assert not memory.state_dict()


SELECTION: dict[str, Any] = {"region_tokens": 16, "ratio": 0.5, "selector": "facility_location"}
WEIGHING: dict[str, Any] = {"temperature": 0.1, "merge_over": "region", "unmerge": "transpose"}


def memory_of(select_every: int = 10, weigh_every: int = 5, **changes: Any) -> PlanMemory:
    options = {**SELECTION, **WEIGHING, **changes}
    return PlanMemory(**options, select_every=select_every, weigh_every=weigh_every)


def recall(memory: PlanMemory, tokens: Tensor, step: int, run: int) -> tuple[Tensor, ...]:
    make_slots(memory, tokens)
    result: tuple[Tensor, ...] = memory(tokens, torch.tensor(step), torch.tensor(run))
    return result


def fresh_plan(selected_from: Tensor, weighed_from: Tensor) -> tuple[Tensor, ...]:
    destinations = select(selected_from, *SELECTION.values())
    return destinations, *weigh(weighed_from, destinations, *WEIGHING.values())


def is_same(plan: tuple[Tensor, ...], other: tuple[Tensor, ...]) -> bool:
    return all(torch.equal(part, like) for part, like in zip(plan, other, strict=True))


@pytest.mark.parametrize(
    ("select_every", "weigh_every"), [(1, 1), (10, 5), (4, 2), (3, 2), (5, 10), (1, 5), (100, 1)]
)
def test_a_plan_is_made_again_exactly_at_the_scheduled_steps(
    select_every: int, weigh_every: int
) -> None:
    memory = memory_of(select_every, weigh_every)
    for step in range(22):
        tokens = random_tokens(2, 48, 6, seed=step)
        if step % select_every == 0:
            selected_from = weighed_from = tokens
        if step % weigh_every == 0:
            weighed_from = tokens
        plan = recall(memory, tokens, step, run=1)
        assert is_same(plan, fresh_plan(selected_from, weighed_from)), f"step {step}"


@pytest.mark.parametrize("step", [0, 1, 4, 9])
def test_a_plan_of_another_run_is_never_used(step: int) -> None:
    memory = memory_of()
    first, second, third = (random_tokens(2, 48, 6, seed=seed) for seed in range(3))
    recall(memory, first, step=0, run=1)
    assert is_same(recall(memory, second, step, run=2), fresh_plan(second, second))
    # Nor is it when the first run comes back, because its plan is gone.
    assert is_same(recall(memory, third, step, run=1), fresh_plan(third, third))


@pytest.mark.parametrize("run", [0, 1])
def test_the_first_plan_is_made_whatever_the_step(run: int) -> None:
    tokens = random_tokens(2, 48, 6)
    plan = recall(memory_of(), tokens, step=3, run=run)
    assert is_same(plan, fresh_plan(tokens, tokens))


def test_each_shape_has_a_plan_of_its_own() -> None:
    memory = memory_of()
    shapes = [(2, 48, 6), (1, 48, 6), (2, 32, 6), (2, 48, 8)]
    first = [random_tokens(*shape) for shape in shapes]
    for tokens in first:
        recall(memory, tokens, step=0, run=1)
    for tokens in first:
        later = recall(memory, torch.randn_like(tokens), step=1, run=1)
        assert is_same(later, fresh_plan(tokens, tokens))


def test_a_plan_that_was_handed_out_does_not_change() -> None:
    memory = memory_of()
    for step, run in ((0, 1), (1, 1)):
        plan = recall(memory, random_tokens(2, 48, 6), step, run)
        before = [part.clone() for part in plan]
        recall(memory, random_tokens(2, 48, 6, seed=1), step=0, run=2)
        assert is_same(plan, tuple(before))


@pytest.mark.parametrize("changes", [{"merge_over": "image"}, {"unmerge": "pinv"}, {"ratio": 0.75}])
def test_every_option_reaches_the_operators(changes: dict[str, Any]) -> None:
    tokens = random_tokens(2, 48, 6)
    options = {**SELECTION, **WEIGHING, **changes}
    destinations = select(tokens, *(options[name] for name in SELECTION))
    expected = destinations, *weigh(tokens, destinations, *(options[name] for name in WEIGHING))
    memory = memory_of(**changes)
    assert is_same(recall(memory, tokens, step=0, run=1), expected)
    assert is_same(recall(memory, torch.zeros_like(tokens), step=1, run=1), expected)


def test_weights_have_the_dtype_of_the_tokens_at_every_step() -> None:
    """Under autocast, tokens may come in another dtype than at the call that made the slot."""
    memory = memory_of()
    make_slots(memory, random_tokens(2, 48, 6))
    for step in (0, 1):
        _, merging, spreading = recall(memory, random_tokens(2, 48, 6).bfloat16(), step, run=1)
        assert merging.dtype == spreading.dtype == torch.bfloat16


def test_casting_the_model_in_the_middle_of_a_run() -> None:
    memory = memory_of()
    tokens = random_tokens(2, 48, 6)
    kept = recall(memory, tokens, step=0, run=1)
    memory.bfloat16()
    destinations, merging, _ = recall(memory, torch.randn(2, 48, 6).bfloat16(), step=1, run=1)
    assert torch.equal(destinations, kept[0])
    assert torch.equal(merging, kept[1].bfloat16())


def test_copies_of_a_memory_do_not_share_plans() -> None:
    memory = memory_of()
    tokens = random_tokens(2, 48, 6)
    plan = recall(memory, tokens, step=0, run=1)
    recall(copy.deepcopy(memory), random_tokens(2, 48, 6, seed=1), step=0, run=1)
    assert is_same(recall(memory, torch.zeros_like(tokens), step=1, run=1), plan)


def test_slots_made_in_inference_mode_serve_a_call_with_gradients() -> None:
    memory = memory_of()
    tokens = random_tokens(2, 48, 6)
    with torch.inference_mode():
        plan = recall(memory, tokens, step=0, run=1)
    later = recall(memory, torch.zeros_like(tokens).requires_grad_(), step=1, run=1)
    assert is_same(later, plan)
    assert not any(part.requires_grad for part in later)


def test_slots_are_made_in_every_memory_of_a_module() -> None:
    model = nn.ModuleList([nn.Sequential(memory_of()), nn.Identity(), memory_of()])
    make_slots(model, random_tokens(2, 48, 6))
    memories = [module for module in model.modules() if isinstance(module, PlanMemory)]
    assert [len(memory.slots) for memory in memories] == [1, 1]


class Scheduled(nn.Module):
    """A model with a clock and the memory of one group."""

    def __init__(self) -> None:
        super().__init__()
        self.clock = DenoisingClock()
        self.memory = memory_of()

    def forward(self, tokens: Tensor, timestep: Tensor, prompt: Tensor) -> tuple[Tensor, ...]:
        make_slots(self, tokens)
        plan: tuple[Tensor, ...] = self.memory(tokens, *self.clock(timestep, prompt))
        return plan


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_one_compiled_graph_serves_all_steps_and_runs(backend: str) -> None:
    """22 steps of one image, then the first steps of another, and of one with another prompt."""
    calls = [(999.0 - 40 * step, PROMPT) for step in range(22)]
    calls += [(999.0, PROMPT), (959.0, PROMPT), (919.0, OTHER_PROMPT), (879.0, OTHER_PROMPT)]
    eager = Scheduled()
    frames = CompileCounterWithBackend(backend)
    compiled = torch.compile(Scheduled(), backend=frames, fullgraph=True)
    for index, (timestep, prompt) in enumerate(calls):
        tokens = random_tokens(2, 48, 6, seed=index)
        plan = compiled(tokens, torch.tensor(timestep), prompt)
        assert is_same(plan, eager(tokens, torch.tensor(timestep), prompt)), f"call {index}"
        assert frames.frame_count == 1
        # At a step that keeps its plan no part is, and what takes it would be compiled for both.
        assert not any(part._is_view() for part in plan)


def test_the_conditional_stays_in_the_graph() -> None:
    """What makes one graph serve all steps: nothing in it was decided while it was traced."""
    model = Scheduled()
    tokens = random_tokens(2, 48, 6)
    make_slots(model, tokens)
    program = torch.export.export(model, (tokens, torch.tensor(9.0), PROMPT), strict=False)
    conditions = program.graph.find_nodes(op="call_function", target=torch.ops.higher_order.cond)
    assert len(conditions) == 2
