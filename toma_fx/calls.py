"""Calls of a transformed model: their arguments by name, decided from outside, and remembered."""

import contextlib
import inspect
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._subclasses import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor
from torch.utils import _pytree as pytree

from toma_fx.policy import Decision
from toma_fx.runtime.memory import Kept

Arguments = dict[str, Any]


def named_arguments(
    function: Callable[..., Any],
) -> Callable[[tuple[Any, ...], Arguments], Arguments]:
    """How to give every argument of a method a name, whatever the version of diffusers."""
    signature = inspect.signature(function)
    names = tuple(signature.parameters)[1:]
    required = tuple(n for n in names if signature.parameters[n].default is inspect.Parameter.empty)

    def named(args: tuple[Any, ...], kwargs: Arguments) -> Arguments:
        call = {**dict(zip(names, args, strict=False)), **kwargs}
        lost = len(call) < len(args) + len(kwargs)
        if lost or any(name not in call for name in required):
            signature.bind(None, *args, **kwargs)  # raises the TypeError of an ordinary call
        return call

    return named


@dataclass
class Forced:
    """A decision made for a call from outside, for a report or an export.

    Attributes:
        decision: what the call runs.
        made: what it left, if that was asked for.
    """

    decision: Decision
    made: Kept | None = None


_THREAD = threading.local()


@contextlib.contextmanager
def forced(decision: Decision) -> Iterator[Forced]:
    """Within it, calls of transformed models in this thread run what is decided here."""
    before = forced_now()
    _THREAD.forced = now = Forced(decision)
    try:
        yield now
    finally:
        _THREAD.forced = before


def forced_now() -> Forced | None:
    """What is decided from outside for calls in this thread, if anything is."""
    now: Forced | None = getattr(_THREAD, "forced", None)
    return now


@dataclass(frozen=True)
class LastCall:
    """A call that a model really had.

    Attributes:
        arguments: by name, tensors without data.
        grids: token counts of the grids in its image sequence, when there were several.
        given: whether each frame of its video was given, where its values told.
    """

    arguments: Arguments
    grids: tuple[int, ...] | None = None
    given: tuple[bool, ...] | None = None


def is_traced(call: Arguments) -> bool:
    """Whether a graph is made of a call. Torch's own answer holds for all threads of a process."""
    return torch.compiler.is_compiling() and any(
        isinstance(each, FakeTensor | FunctionalTensor) for each in pytree.tree_leaves(call)
    )


def is_empty(tensor: Tensor) -> bool:
    """Whether a tensor says a shape and holds no data."""
    return tensor.is_meta or isinstance(tensor, FakeTensor)


def to_meta(call: Mapping[str, Any]) -> Arguments:
    """The arguments with tensors that have shapes but no data."""
    meta: Arguments = pytree.tree_map_only(Tensor, lambda t: t.detach().to("meta"), dict(call))
    return meta
