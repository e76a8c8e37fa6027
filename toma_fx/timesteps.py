"""Timesteps as numbers, without waiting for a GPU at every step.

A policy decides by the timestep, outside every graph. On a CPU, reading it costs nothing. On a GPU,
reading it waits for all queued work. So if the pipeline is known, a timestep is looked up among the
timesteps that its scheduler planned, which are read once per run:

* a timestep that is an element of ``scheduler.timesteps`` is found by its place in memory;
* any other is found by ``scheduler.step_index``, if the first call of the run agreed with it, and
  once the scheduler has taken a step.

Without a pipeline, or if a call does not agree, the timestep itself is read.
"""

import math
import weakref
from typing import Any

import torch
from torch import Tensor


class TimestepReader:
    """Reads the timesteps of one model's calls.

    Args:
        pipeline: pipeline whose scheduler may be asked; None if unknown.
    """

    def __init__(self, pipeline: Any = None) -> None:
        self._pipeline = _weak(pipeline)
        self._scheduler = getattr(pipeline, "scheduler", None)
        self._planned: tuple[Tensor, list[float]] | None = None
        self._scale: float | None = None

    def __getstate__(self) -> dict[str, Any]:
        # The pipeline of a copied model is unknown, but its timesteps mean the same.
        return {"_pipeline": None, "_scheduler": self.scheduler, "_planned": None, "_scale": None}

    @property
    def scheduler(self) -> Any:
        """The pipeline's current scheduler; a copied model keeps its former one, or None."""
        pipeline = None if self._pipeline is None else self._pipeline()
        return getattr(pipeline, "scheduler", self._scheduler)

    @property
    def planned(self) -> Tensor | None:
        """The timesteps that the pipeline's scheduler planned for the run: a new tensor per run.

        None if the pipeline is unknown.
        """
        known = self._pipeline is not None and self._pipeline() is not None
        tensor = getattr(self.scheduler, "timesteps", None) if known else None
        return tensor if isinstance(tensor, Tensor) else None

    def end(self) -> None:
        """Note that the run is over."""
        self._planned = self._scale = None

    def read(self, timestep: Any) -> list[float]:
        """Return the timestep of each row, or one for all.

        Args:
            timestep: a number, a scalar tensor or ``(B,)``, as the model takes it.
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
        """Look the timestep up by the scheduler's step, if the first call of the run agreed."""
        if not hasattr(self.scheduler, "step_index"):
            return _values(timestep)
        step = self.scheduler.step_index
        index = (self.scheduler.begin_index or 0) if step is None else step
        if index >= len(planned):
            return _values(timestep)
        if step is not None and self._scale is not None:
            return [planned[index] / self._scale] if self._scale else _values(timestep)
        # The first call of a run shows the pipeline's divisor. The second call shows whether it is
        # this scheduler that takes the steps.
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
    """Return the pipeline's divisor for a planned timestep; 0 if the rows are another timestep."""
    for scale in (1.0, 1000.0):
        # The rows may be rounded, at worst to bfloat16, before and after the division.
        if planned and all(math.isclose(row * scale, planned, rel_tol=2**-7) for row in rows):
            return scale
    return 0.0


def _weak(pipeline: Any) -> Any:
    """Return a weak reference, if the pipeline's class allows one."""
    return weakref.ref(pipeline) if hasattr(pipeline, "__weakref__") else None


def _waits(timestep: Tensor) -> bool:
    """Return whether reading a tensor waits for a device."""
    return timestep.device.type not in ("cpu", "meta")


def _values(timestep: Any) -> list[float]:
    values = torch.as_tensor(timestep).flatten()
    return [float(value) for value in values.tolist()]


def _place_in(timestep: Tensor, planned: Tensor) -> int | None:
    """Return the index of a scalar among the planned timesteps whose memory it shares, or None."""
    same = timestep.untyped_storage().data_ptr() == planned.untyped_storage().data_ptr()
    if not same or timestep.numel() != 1 or timestep.dtype != planned.dtype:
        return None
    place = int(timestep.storage_offset()) - int(planned.storage_offset())
    return place if 0 <= place < planned.numel() else None
