"""Calls of a transformed model: naming their arguments, forcing a decision, recording the last."""

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
    """Return a function that names all arguments of a method, for any version of diffusers."""
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
    """A decision that a report or an export imposes on a call.

    Attributes:
        decision: the decision for the call.
        made: data that the call left, if that was requested.
    """

    decision: Decision
    made: Kept | None = None


_THREAD = threading.local()


@contextlib.contextmanager
def forced(decision: Decision) -> Iterator[Forced]:
    """Impose a decision on calls of transformed models in this thread, within the context."""
    before = forced_now()
    _THREAD.forced = now = Forced(decision)
    try:
        yield now
    finally:
        _THREAD.forced = before


def forced_now() -> Forced | None:
    """Return the decision imposed on calls in this thread, if any."""
    now: Forced | None = getattr(_THREAD, "forced", None)
    return now


@dataclass(frozen=True)
class LastCall:
    """The last real call of a model.

    Attributes:
        arguments: arguments by name, with tensors without data.
        grids: token counts of the grids in its image sequence, if there are several.
        given: whether each frame of its video was given, if its values tell.
    """

    arguments: Arguments
    grids: tuple[int, ...] | None = None
    given: tuple[bool, ...] | None = None


def is_traced(call: Arguments) -> bool:
    """Return whether this call is being traced; torch's own answer is for the whole process."""
    return torch.compiler.is_compiling() and any(
        isinstance(each, FakeTensor | FunctionalTensor) for each in pytree.tree_leaves(call)
    )


def is_empty(tensor: Tensor) -> bool:
    """Return whether a tensor has a shape but no data."""
    return tensor.is_meta or isinstance(tensor, FakeTensor)


def to_meta(call: Mapping[str, Any]) -> Arguments:
    """Return the arguments with tensors that have shapes but no data."""
    meta: Arguments = pytree.tree_map_only(Tensor, lambda t: t.detach().to("meta"), dict(call))
    return meta
