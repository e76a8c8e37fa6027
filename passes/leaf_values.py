"""Outputs of submodules for example values, computed without weights.

The forward runs on a stand-in, in which a linear layer only gives its output width. So offloaded,
quantised and adapted layers need no special case, and no weight is read::

    attn(hidden_states, encoder_hidden_states)    diffusers' own forward and processor
      to_q(hidden_states)                         hidden_states' shape, as wide as out_features
      norm_q(query)                               its forward, on a weight without data
"""

from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from toma_fx.errors import CaptureError
from toma_fx.passes.capture import STAR
from toma_fx.passes.pipeline import LeafValue
from toma_fx.passes.stand_ins import stand_in_for
from toma_fx.runtime.arguments import RotaryTable


def run_on_examples(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Return an example of a module's output.

    Args:
        module: a submodule of a block; it is not run.
        args: positional arguments of its call: example values on the meta device.
        kwargs: keyword arguments of its call.

    Raises:
        CaptureError: when its forward fails on them.
    """
    named = {name: value for name, value in kwargs.items() if name != STAR}
    if _is_linear(module):
        return _as_wide(module, args, named)
    values = pytree.tree_leaves((args, named))
    tensors = [value for value in values if isinstance(value, Tensor)]
    runner = _Runner(next((t.dtype for t in tensors if t.is_floating_point()), None))
    stand_in = stand_in_for(module, runner)
    for each in stand_in.modules():
        _use_known_processor(each)
    try:
        with torch.no_grad():
            return runner.call_module(module, MethodType(_called, stand_in), args, named)
    except Exception as error:
        raise CaptureError(
            f"a {type(module).__name__} cannot run on tensors without data, which tell the shape "
            f"of its output ({type(error).__name__}: {error}); if something was put into it, take "
            "it off and transform again"
        ) from error


def remembering(leaf_value: LeafValue) -> LeafValue:
    """Cache a leaf-value function: every pass asks for the values of all submodules again."""
    known: dict[Any, Any] = {}

    def remembered(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        leaves, spec = pytree.tree_flatten((args, kwargs))
        key = module, spec, tuple(map(_kind, leaves))
        if key not in known:
            known[key] = leaf_value(module, args, kwargs)
        return known[key]

    return remembered


def _kind(value: Any) -> Any:
    """Return the properties of an example value on which a submodule's output depends."""
    if isinstance(value, Tensor):
        return tuple(value.shape), value.stride(), value.dtype, value.device
    if isinstance(value, RotaryTable):
        return RotaryTable, _kind(value.values)
    return type(value), value


def _use_known_processor(stand_in: Any) -> None:
    """Let attention run diffusers' processor in place of a foreign one.

    Foreign code may count its calls or read values. Its output has the shape of diffusers' one.
    """
    processor = getattr(stand_in, "processor", None)
    cls: Any = processor.__class__
    if processor is None or _is_known(cls):
        return
    known = next(filter(_is_known, cls.__mro__), None)
    default = getattr(stand_in, "_default_processor_cls", None)
    if known is not None and not isinstance(processor, nn.Module):
        vars(stand_in)["processor"] = copied = known.__new__(known)
        vars(copied).update(vars(processor))
    elif default is not None:
        vars(stand_in)["processor"] = default()


def _is_known(cls: type) -> bool:
    return cls.__module__.partition(".")[0] == "diffusers"


def _is_linear(module: nn.Module) -> bool:
    return isinstance(getattr(module, "out_features", None), int)


def _as_wide(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """Return a linear layer's output: tokens like its input, with its output width."""
    tokens: Tensor = args[0] if args else next(iter(kwargs.values()))
    return tokens.new_empty(*tokens.shape[:-1], module.out_features)


def _called(stand_in: Any) -> None:
    """Do nothing; binding it makes the first call look like a stand-in's call from inside."""


class _Runner:
    """Replaces the tracer that stand-ins report to.

    Args:
        dtype: dtype of all computation; weights may be stored in others.
    """

    def __init__(self, dtype: torch.dtype | None) -> None:
        self._dtype = dtype

    def call_module(
        self, module: nn.Module, called: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Return the result of a call of a stand-in, whose forward runs without hooks."""
        if _is_linear(module):
            return _as_wide(module, args, kwargs)
        stand_in = called.__self__
        return type(stand_in).forward(stand_in, *args, **kwargs)

    def getattr(self, name: str, value: Any, tensors: dict[str, Any]) -> Any:
        """Return an attribute of a stand-in; for a tensor, its shape on the meta device."""
        if not isinstance(value, Tensor):
            return value
        return value.detach().to("meta", self._dtype if value.is_floating_point() else None)
