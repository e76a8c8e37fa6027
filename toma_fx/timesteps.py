"""Timesteps as numbers, without waiting for a GPU at every step.

A policy decides by the timestep, outside every graph. On a CPU, reading one costs nothing. On a GPU
it waits until all that was queued before is done. So when the pipeline is known, a timestep is
looked up among those that its scheduler planned for the run, which are read once a run:

* a timestep that is an element of ``scheduler.timesteps``, by its place in memory;
* any other by ``scheduler.step_index``, if the first call of the run agreed with it, and once the
  scheduler has taken a step.

Without a pipeline, or where a call does not agree, the timestep itself is read.
"""

import math
import weakref
from typing import Any

import torch
from torch import Tensor


class TimestepReader:
    """Reads the timesteps of one model's calls.

    Args:
        pipeline: whose scheduler may be asked; None when it is not known.
    """

    def __init__(self, pipeline: Any = None) -> None:
        self._pipeline = _weak(pipeline)
        self._scheduler = getattr(pipeline, "scheduler", None)
        self._planned: tuple[Tensor, list[float]] | None = None
        self._scale: float | None = None

    def __getstate__(self) -> dict[str, Any]:
        # A copy of a model belongs to no pipeline that is known, but its timesteps mean the same.
        return {"_pipeline": None, "_scheduler": self.scheduler, "_planned": None, "_scale": None}

    @property
    def scheduler(self) -> Any:
        """Of the pipeline, now; of a copied model, the one at the time. None if none is known."""
        pipeline = None if self._pipeline is None else self._pipeline()
        return getattr(pipeline, "scheduler", self._scheduler)

    @property
    def planned(self) -> Tensor | None:
        """The timesteps of the run that the pipeline's scheduler planned: another tensor each run.

        None where the pipeline is not known.
        """
        known = self._pipeline is not None and self._pipeline() is not None
        tensor = getattr(self.scheduler, "timesteps", None) if known else None
        return tensor if isinstance(tensor, Tensor) else None

    def end(self) -> None:
        """Note that the run is over."""
        self._planned = self._scale = None

    def read(self, timestep: Any) -> list[float]:
        """The timestep of each row, or one for all.

        Args:
            timestep: a number, a scalar or ``(B,)``, as the model takes it.
        """
        if not isinstance(timestep, Tensor) or not _waits(timestep) or self._pipeline is None:
            return _values(timestep)
        planned = self._planned_timesteps()
        if planned is None:
            return _values(timestep)
        place = _place_in(timestep, planned[0])
        if place is not None:
            return [planned[1][place]]
        return self._by_step(timestep, planned[1])

    def _by_step(self, timestep: Tensor, planned: list[float]) -> list[float]:
        """By the scheduler's own step, once the first call of the run agreed with it."""
        if not hasattr(self.scheduler, "step_index"):
            return _values(timestep)
        step = self.scheduler.step_index
        index = (self.scheduler.begin_index or 0) if step is None else step
        if index >= len(planned):
            return _values(timestep)
        if step is not None and self._scale is not None:
            return [planned[index] / self._scale] if self._scale else _values(timestep)
        # The first call of a run shows what the pipeline divides by. Whether it is this scheduler
        # that takes the steps shows in the second.
        rows = _values(timestep)
        self._scale = _scale(planned[index], rows)
        return [planned[index] / self._scale] if self._scale else rows

    def _planned_timesteps(self) -> tuple[Tensor, list[float]] | None:
        tensor = getattr(self.scheduler, "timesteps", None)
        if not isinstance(tensor, Tensor):
            return None
        if self._planned is None or self._planned[0] is not tensor:
            self._planned, self._scale = (tensor, [float(t) for t in tensor.tolist()]), None
        return self._planned


def _scale(planned: float, rows: list[float]) -> float:
    """What a pipeline divides a planned timestep by; 0 when the rows are not that timestep."""
    for scale in (1.0, 1000.0):
        # The rows may be rounded, to bfloat16 at the worst, before and after the division.
        if planned and all(math.isclose(row * scale, planned, rel_tol=2**-7) for row in rows):
            return scale
    return 0.0


def _weak(pipeline: Any) -> Any:
    """A weak reference, if the pipeline is of a class that can have one."""
    return weakref.ref(pipeline) if hasattr(pipeline, "__weakref__") else None


def _waits(timestep: Tensor) -> bool:
    """Whether reading a tensor waits for a device."""
    return timestep.device.type not in ("cpu", "meta")


def _values(timestep: Any) -> list[float]:
    values = torch.as_tensor(timestep).flatten()
    return [float(value) for value in values.tolist()]


def _place_in(timestep: Tensor, planned: Tensor) -> int | None:
    """Which element of the planned timesteps a scalar is, if it is one of them."""
    same = timestep.untyped_storage().data_ptr() == planned.untyped_storage().data_ptr()
    if not same or timestep.numel() != 1 or timestep.dtype != planned.dtype:
        return None
    place = int(timestep.storage_offset()) - int(planned.storage_offset())
    return place if 0 <= place < planned.numel() else None
