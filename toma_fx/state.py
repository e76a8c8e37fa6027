"""The one store of state between calls: the plans and memories of denoising runs.

A run is the calls that denoise one image or one batch of images. Runs are distinguished, so that
none uses another's plans:

* by thread, so that any number of threads may run a model;
* by prompt, so that two calls per step (true guidance, modular guiders) are two runs;
* by the sizes, dtype and device of the call;
* by order, if several calls of a step agree in all this, such as the views of one large image;
* by timestep: a rising timestep starts a new run.

Two images with the same prompt may take turns, step by step, in one thread only if they are at the
same timesteps. Otherwise give each its own `toma_fx.transform`; weights are shared, so this costs
no memory.
"""

import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from toma_fx.families.rows import grid_sizes
from toma_fx.runtime.memory import Kept
from toma_fx.runtime.plan import Plan

MOST_RUNS = 32
"""Maximum number of runs that are kept. The least recently used run is dropped first; if it
continues, it makes new plans."""

MOST_REFERENCES = 4
"""Maximum number of sets of references (those of one call) whose plans are kept."""


class _Held:
    """Holds a tensor, so that its memory is not reused for another."""

    def __init__(self, tensor: Tensor) -> None:
        self._tensor = tensor.detach()
        self._version = _version(tensor)

    def has(self, tensor: Tensor) -> bool:
        """Return whether a tensor is the same piece of memory, unchanged."""
        mine = self._tensor
        return (
            mine.data_ptr() == tensor.data_ptr()
            and (mine.shape, mine.stride()) == (tensor.shape, tensor.stride())
            and self._version == _version(tensor)
        )

    def equals(self, tensor: Tensor) -> bool:
        """Return whether the values are equal. On a GPU, this waits for the device."""
        mine = self._tensor
        alike = (mine.dtype, mine.device) == (tensor.dtype, tensor.device)
        return alike and self._version == _version(mine) and torch.equal(mine, tensor)


class _Planned(NamedTuple):
    """References with a plan, and the thread that made it."""

    thread: int
    references: _Held
    grids: tuple[int, ...]
    plan: Plan


@dataclass(eq=False)
class Run:
    """One denoising run.

    Attributes:
        thread, shape, prompt: properties that distinguish the run.
        timestep: timestep of its last call.
        step: number of timesteps before that one.
        kept: data that the run keeps; None before its first call has ended.
        kept_at: the last two steps at which data was kept.
    """

    thread: int
    shape: tuple[object, ...]
    prompt: _Held
    timestep: float
    step: int = 0
    kept: Kept | None = None
    kept_at: tuple[int, ...] = ()


class State:
    """The runs of one model."""

    def __init__(self) -> None:
        self._runs: list[Run] = []
        self._read: list[tuple[tuple[tuple[_Held, ...], object], Any]] = []
        self._references: list[_Planned] = []
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._runs)

    def __reduce__(self) -> tuple[type["State"], tuple[()]]:
        return State, ()  # a copy or a pickle of a model has no run in progress

    def run_of(self, prompt: Tensor, shape: tuple[object, ...], timestep: float) -> Run:
        """Return the run that a call belongs to, advanced to its new step."""
        thread = threading.get_ident()
        with self._lock:
            alike = [run for run in self._runs if (run.thread, run.shape) == (thread, shape)]
        mine = [run for run in alike if run.prompt.has(prompt)]
        if not mine:  # some pipelines recompute the embeddings at every step
            mine = [run for run in alike if run.prompt.equals(prompt)]
        later = [run for run in mine if run.timestep > timestep]
        with self._lock:
            if later:
                run = min(later, key=lambda each: each.timestep)
                run.timestep = timestep
                run.step += 1
            else:
                if not any(run.timestep == timestep for run in mine):
                    self._runs = [run for run in self._runs if run not in mine]
                run = Run(thread, shape, _Held(prompt), timestep)
            # The list is in order of use; runs at the same step are in the order of their calls.
            others = [each for each in self._runs if each is not run]
            self._runs = [*others[1 - MOST_RUNS :], run]
        return run

    def grids_of(
        self, ids: Tensor, *, sort: bool, places: Callable[[Tensor], Tensor] = lambda ids: ids
    ) -> tuple[int, ...] | None:
        """Return the token counts of the grids in a sequence; None if it is one grid.

        Args:
            ids: ``(N, 3)`` or ``(1, N, 3)``: image number, row and column of each token.
            sort: whether token order brings the tokens of each image together.
            places: converts other ids into image number, row and column.
        """

        def grids() -> tuple[int, ...]:
            numbers = places(ids if ids.ndim == 2 else ids[0])[:, 0].round().tolist()
            return grid_sizes(numbers, sort=sort)

        found: tuple[int, ...] = self.read((ids,), grids)
        return found if len(found) > 1 else None

    def read(self, of: tuple[Tensor, ...], how: Callable[[], Any], sizes: object = None) -> Any:
        """Return data read from the values of an image's tensors; it is read once per image.

        Args:
            of: tensors made once per image, such as token positions; they identify the image.
            how: reads the values.
            sizes: further properties that identify the image.
        """
        with self._lock:
            for (known, known_sizes), read in self._read:
                same = len(known) == len(of) and known_sizes == sizes
                if same and all(held.has(each) for held, each in zip(known, of, strict=True)):
                    return read
        read = how()
        key = tuple(map(_Held, of)), sizes
        with self._lock:
            self._read = [*self._read[1 - MOST_RUNS :], (key, read)]
        return read

    def plan_for(
        self, references: Tensor, grids: tuple[int, ...], make: Callable[[], Plan]
    ) -> Plan:
        """Return the plan for the tokens of references, made once for references of equal values.

        Args:
            references: ``(B, n, C)``.
            grids: grids of the call.
            make: makes the plan, a tuple of tensors.
        """
        with self._lock:
            known = list(self._references)
        for each in known:
            if each.grids == grids and each.references.equals(references):
                return each.plan
        # Outside of inference mode, so that later calls outside of it can use the plan.
        with torch.inference_mode(mode=False), torch.no_grad():
            made = _Planned(threading.get_ident(), _Held(references.clone()), grids, make())
        with self._lock:
            self._references = [*self._references[1 - MOST_REFERENCES :], made]
        return made.plan

    def keep(self, run: Run, made: Kept, *, earlier: bool = False) -> None:
        """Keep the data of a call for later calls of its run.

        The tensors are copied, because a CUDA graph overwrites its results when it is replayed, and
        so that calls outside of `torch.inference_mode` can use them.

        Args:
            run: run of the call.
            made: data of the call.
            earlier: whether each memory also holds the updates of the memory before it.
        """
        with torch.inference_mode(mode=False), torch.no_grad():
            kept: Kept = pytree.tree_map_only(Tensor, torch.clone, made)
            run.kept = kept.following(run.kept) if earlier else kept
        run.kept_at = (*run.kept_at, run.step)[-2:]

    def end(self) -> None:
        """Drop the runs of this thread, whose image is done."""
        thread = threading.get_ident()
        with self._lock:
            self._runs = [run for run in self._runs if run.thread != thread]
            self._read = []
            self._references = [each for each in self._references if each.thread != thread]

    def nbytes(self) -> int:
        """Return the bytes of the kept data."""
        tensors = pytree.tree_leaves([run.kept for run in self._runs])
        tensors += [each for planned in self._references for each in planned.plan]
        return sum(each.nbytes for each in tensors if isinstance(each, Tensor))


def _version(tensor: Tensor) -> int:
    return -1 if tensor.is_inference() else tensor._version
