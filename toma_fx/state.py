"""The one store of what lasts from call to call: the plans and memories of denoising runs.

A run is the calls that denoise one image, or one batch of images. Runs are told apart, so that none
uses another's plans:

* by thread, so that any number of threads may run a model;
* by their prompt, so that two calls a step, as of true guidance and modular guiders, are two runs;
* by the sizes, the type and the device of the call;
* by order, where several calls of a step agree in all this, as of the views of one large image;
* a timestep that rises starts a new run.

Two images with the same prompt that take turns, step by step, in one thread, can be told apart as
long as they are at the same timesteps. If they are not, give each its own `toma_fx.transform`; the
weights are shared, so it costs no memory.
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
"""Runs that are kept at the same time. The one that was used longest ago goes first; should it go
on, it makes new plans."""

MOST_REFERENCES = 4
"""References, of one image or of several in one call, whose plans are kept at the same time."""


class _Held:
    """A tensor that is held, so that its memory is not given to another."""

    def __init__(self, tensor: Tensor) -> None:
        self._tensor = tensor.detach()
        self._version = _version(tensor)

    def has(self, tensor: Tensor) -> bool:
        """Whether this is the same piece of memory, unchanged."""
        mine = self._tensor
        return (
            mine.data_ptr() == tensor.data_ptr()
            and (mine.shape, mine.stride()) == (tensor.shape, tensor.stride())
            and self._version == _version(tensor)
        )

    def equals(self, tensor: Tensor) -> bool:
        """Whether the values are equal. On a GPU, asking waits for it."""
        mine = self._tensor
        alike = (mine.dtype, mine.device) == (tensor.dtype, tensor.device)
        return alike and self._version == _version(mine) and torch.equal(mine, tensor)


class _Planned(NamedTuple):
    """References that have a plan, and the thread that made it."""

    thread: int
    references: _Held
    grids: tuple[int, ...]
    plan: Plan


@dataclass(eq=False)
class Run:
    """One denoising run.

    Attributes:
        thread, shape, prompt: what it is told apart by.
        timestep: of its last call.
        step: how many timesteps came before that one.
        kept: what it keeps; None before its first call is over.
        kept_at: the last two steps at which it did.
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
        return State, ()  # a copy of a model, or a pickle, has no run under way

    def run_of(self, prompt: Tensor, shape: tuple[object, ...], timestep: float) -> Run:
        """The run that a call belongs to, at its new step."""
        thread = threading.get_ident()
        with self._lock:
            alike = [run for run in self._runs if (run.thread, run.shape) == (thread, shape)]
        mine = [run for run in alike if run.prompt.has(prompt)]
        if not mine:  # some pipelines make the embeddings anew for every step
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
            # The order of the list is that of use; of runs at the same step, the order of calls.
            others = [each for each in self._runs if each is not run]
            self._runs = [*others[1 - MOST_RUNS :], run]
        return run

    def grids_of(
        self, ids: Tensor, *, sort: bool, places: Callable[[Tensor], Tensor] = lambda ids: ids
    ) -> tuple[int, ...] | None:
        """Token counts of the grids in a sequence; None when it is one grid.

        Args:
            ids: ``(N, 3)`` or ``(1, N, 3)``: image number, row and column of each token.
            sort: whether token order brings the tokens of an image together.
            places: image number, row and column, of other ids.
        """

        def grids() -> tuple[int, ...]:
            numbers = places(ids if ids.ndim == 2 else ids[0])[:, 0].round().tolist()
            return grid_sizes(numbers, sort=sort)

        found: tuple[int, ...] = self.read((ids,), grids)
        return found if len(found) > 1 else None

    def read(self, of: tuple[Tensor, ...], how: Callable[[], Any], sizes: object = None) -> Any:
        """What the values of an image's tensors say, which is asked once for each image.

        Args:
            of: tensors made once an image, as positions of tokens, which tell it from others.
            how: reads the values.
            sizes: what else tells it from others.
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
        """The plan for the tokens of references, which is made once for those of equal values.

        Args:
            references: ``(B, n, C)``.
            grids: of the call.
            make: makes the plan, of tensors.
        """
        with self._lock:
            known = list(self._references)
        for each in known:
            if each.grids == grids and each.references.equals(references):
                return each.plan
        # What a call outside of `torch.inference_mode` can use.
        with torch.inference_mode(mode=False), torch.no_grad():
            made = _Planned(threading.get_ident(), _Held(references.clone()), grids, make())
        with self._lock:
            self._references = [*self._references[1 - MOST_REFERENCES :], made]
        return made.plan

    def keep(self, run: Run, made: Kept, *, earlier: bool = False) -> None:
        """Keep what a call made for those that follow in its run.

        Copies, since a CUDA graph writes its results anew when it is replayed; and copies that a
        call outside of `torch.inference_mode` can use.

        Args:
            run: to which the call belongs.
            made: by the call.
            earlier: whether each memory is to hold the updates of the one before it, too.
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
        """Bytes of what is kept."""
        tensors = pytree.tree_leaves([run.kept for run in self._runs])
        tensors += [each for planned in self._references for each in planned.plan]
        return sum(each.nbytes for each in tensors if isinstance(each, Tensor))


def _version(tensor: Tensor) -> int:
    return -1 if tensor.is_inference() else tensor._version
