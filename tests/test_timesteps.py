"""Timesteps that a policy knows without reading them from a device."""

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    HeunDiscreteScheduler,
    LCMScheduler,
)
from torch import Tensor

from toma_fx import timesteps
from toma_fx.timesteps import TimestepReader

# numpy, of how diffusers hands it a tensor.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

SCHEDULERS: dict[str, Callable[[], Any]] = {
    "euler": EulerDiscreteScheduler,
    "heun": HeunDiscreteScheduler,
    "flow matching": FlowMatchEulerDiscreteScheduler,
    "shifted flow matching": lambda: FlowMatchEulerDiscreteScheduler(shift=3.0),
    "lcm": LCMScheduler,
    "ddim": DDIMScheduler,  # which has no step_index
}
EVERY_SCHEDULER = pytest.mark.parametrize("scheduler", SCHEDULERS)


class Pipeline:
    """What is asked of a pipeline."""

    def __init__(self, scheduler: Any) -> None:
        self.scheduler = scheduler


def as_it_is(timestep: Tensor) -> Tensor:
    return timestep


def a_row_each(timestep: Tensor) -> Tensor:
    return timestep.expand(2)


def of_a_thousand(timestep: Tensor) -> Tensor:
    """As Flux's pipelines hand it to the transformer."""
    return timestep.expand(2).to(torch.float32) / 1000


def rounded(timestep: Tensor) -> Tensor:
    return timestep.expand(2).to(torch.bfloat16) / 1000


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """What is read from a device, as if each tensor were on one."""
    real, seen = timesteps._values, list[Tensor]()

    def values(timestep: Any) -> list[float]:
        seen.append(timestep)
        return real(timestep)

    monkeypatch.setattr(timesteps, "_waits", lambda timestep: True)
    monkeypatch.setattr(timesteps, "_values", values)
    return seen


def steps_of(scheduler: Any, first: int = 0, calls: int = 1) -> Iterator[Tensor]:
    """The timesteps of a denoising run, each as often as the model is called."""
    sample = torch.zeros(1, 4, 2, 2)
    for timestep in scheduler.timesteps[first:]:
        if hasattr(scheduler, "scale_model_input"):
            scheduler.scale_model_input(sample, timestep)
        for _ in range(calls):
            yield timestep
        sample = scheduler.step(sample, timestep, sample).prev_sample


def expect(reader: TimestepReader, timestep: Tensor) -> None:
    values = timestep.flatten().tolist()
    got = reader.read(timestep)
    close = 2**-7 if timestep.dtype == torch.bfloat16 else 1e-6
    assert len(got) in (1, len(values))
    assert got * (len(values) // len(got)) == pytest.approx(values, rel=close)


@EVERY_SCHEDULER
@pytest.mark.parametrize("given", [as_it_is, a_row_each, of_a_thousand, rounded])
@pytest.mark.parametrize("calls", [1, 2])
def test_timesteps_are_what_reading_them_says(
    scheduler: str, given: Callable[[Tensor], Tensor], calls: int, reads: list[Tensor]
) -> None:
    pipeline = Pipeline(SCHEDULERS[scheduler]())
    reader = TimestepReader(pipeline)
    for _ in range(2):  # runs
        pipeline.scheduler.set_timesteps(8)
        reads.clear()
        for timestep in steps_of(pipeline.scheduler, calls=calls):
            expect(reader, given(timestep))
        if scheduler != "ddim" or given is as_it_is:
            assert len(reads) <= 2
        reader.end()


@pytest.mark.parametrize("scheduler", ["euler", "flow matching"])
@pytest.mark.parametrize("given", [as_it_is, of_a_thousand, rounded])
def test_a_run_that_begins_later(
    scheduler: str, given: Callable[[Tensor], Tensor], reads: list[Tensor]
) -> None:
    """As image to image: the pipeline says where it begins."""
    pipeline = Pipeline(SCHEDULERS[scheduler]())
    reader = TimestepReader(pipeline)
    pipeline.scheduler.set_timesteps(10)
    pipeline.scheduler.set_begin_index(4)
    for timestep in steps_of(pipeline.scheduler, first=4):
        expect(reader, given(timestep))
    assert len(reads) <= 2


@pytest.mark.parametrize("scheduler", ["euler", "flow matching", "ddim"])
@pytest.mark.parametrize("given", [as_it_is, a_row_each, of_a_thousand])
def test_a_loop_with_another_scheduler_is_read(
    scheduler: str, given: Callable[[Tensor], Tensor], reads: list[Tensor]
) -> None:
    """The pipeline's own has planned the same run, and never takes a step."""
    pipeline = Pipeline(SCHEDULERS[scheduler]())
    reader = TimestepReader(pipeline)
    pipeline.scheduler.set_timesteps(8)
    for steps in (8, 5):
        other = copy.deepcopy(pipeline.scheduler)
        other.set_timesteps(steps)
        for timestep in steps_of(other):
            expect(reader, given(timestep))
        reader.end()


def test_rows_at_different_timesteps_are_read(reads: list[Tensor]) -> None:
    pipeline = Pipeline(FlowMatchEulerDiscreteScheduler())
    reader = TimestepReader(pipeline)
    pipeline.scheduler.set_timesteps(4)
    for timestep in steps_of(pipeline.scheduler):
        rows = torch.stack([timestep, timestep / 2]) / 1000
        assert reader.read(rows) == pytest.approx(rows.tolist())
    assert len(reads) == 4


@pytest.mark.parametrize("timestep", [500, 0.25, torch.tensor(7), torch.tensor([0.5, 0.25])])
def test_without_a_pipeline_they_are_read(timestep: Any, reads: list[Tensor]) -> None:
    expected = torch.as_tensor(timestep).flatten().tolist()
    assert TimestepReader().read(timestep) == expected
    gone = TimestepReader(Pipeline(EulerDiscreteScheduler()))
    assert type(gone.scheduler) is EulerDiscreteScheduler  # which says what timesteps mean
    assert gone.read(timestep) == expected


def test_a_copy_belongs_to_no_pipeline_but_knows_what_timesteps_mean() -> None:
    pipeline = Pipeline(EulerDiscreteScheduler())
    reader = TimestepReader(pipeline)
    assert reader.scheduler is pipeline.scheduler
    copied = copy.deepcopy(reader)
    assert type(copied.scheduler) is EulerDiscreteScheduler
    pipeline.scheduler = FlowMatchEulerDiscreteScheduler()
    assert reader.scheduler is pipeline.scheduler
    assert type(copied.scheduler) is EulerDiscreteScheduler


def test_on_a_cpu_nothing_is_asked_of_the_scheduler() -> None:
    pipeline = Pipeline(EulerDiscreteScheduler())
    pipeline.scheduler.set_timesteps(4)
    assert TimestepReader(pipeline).read(torch.tensor(3.5)) == [3.5]
