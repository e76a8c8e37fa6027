"""Modules to trace through in place of a caller's, so that nothing of the process is patched.

`torch.fx.Tracer.trace` sees calls of submodules by replacing ``nn.Module.__call__`` and
``__getattr__`` for as long as it runs, which every thread notices. Here the forward of a block runs
on a copy of its tree of modules, without the tensors. Each copy is of a private subclass of its
module's class, which tells a tracer of every call and every tensor that is asked for::

    block.attn      Attention, with weights         called as ever by other threads
    stand-in.attn   a subclass of Attention         a call becomes a node of the graph
"""

from collections.abc import Callable
from types import MethodType
from typing import Any, Protocol

from torch import nn
from torch.utils import _pytree as pytree


class Told(Protocol):
    """Whom stand-ins tell: a tracer, or what takes its place."""

    def call_module(
        self, module: nn.Module, run: Callable[..., Any], args: Any, kwargs: Any, /
    ) -> Any:
        """The result of a call of a stand-in, of whose forward ``run`` is the call."""

    def getattr(self, name: str, value: Any, tensors: dict[str, Any], /) -> Any:
        """The answer to a stand-in's being asked for a parameter, a buffer or a submodule."""


class StandIn:
    """What the class of a stand-in has in front of the class of its module."""

    # Not ``super().__init_subclass__``: whatever a class does about its subclasses, such as keeping
    # a list of them, is not for these.
    def __init_subclass__(cls) -> None:
        pass

    # A slice of a list of modules, say, is made by calling it.
    @property  # type: ignore[misc]
    def __class__(self) -> type:
        return type(module_of(self))

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        module, tracer, _ = _told(self)
        return tracer.call_module(module, super().__call__, args, kwargs)  # type: ignore[misc]

    def __getattr__(self, name: str) -> Any:
        _, tracer, tensors = _told(self)
        return tracer.getattr(name, super().__getattr__(name), tensors)  # type: ignore[misc]


_TOLD = "_toma_stand_in"


def _told(stand_in: StandIn) -> tuple[nn.Module, Told, dict[str, Any]]:
    told: tuple[nn.Module, Told, dict[str, Any]] = vars(stand_in)[_TOLD]
    return told


def module_of(stand_in: StandIn) -> nn.Module:
    """The module that is stood in for."""
    return _told(stand_in)[0]


def stand_in_for(root: nn.Module, tracer: Told) -> Any:
    """A stand-in for a module, on stand-ins for all modules in it.

    What its forward changes, its own attributes and the lists and dictionaries in them, is the
    stand-in's. Tensors are shared.

    Args:
        root: what is traced.
        tracer: its ``call_module`` is called with the real module, and what runs the forward of the
            stand-in, whenever a stand-in is called; its ``getattr`` whenever one is asked for a
            parameter, a buffer or a submodule.
    """
    # Made anew for each trace, since a class that is kept would keep its tracer.
    classes = {cls: _subclass(cls) for cls in {type(module) for module in root.modules()}}
    stand_ins = {module: object.__new__(classes[type(module)]) for module in root.modules()}
    tensors: dict[str, Any] = {}

    def swap(value: Any) -> Any:
        if isinstance(value, nn.Module):
            return stand_ins.get(value, value)
        if isinstance(value, MethodType) and isinstance(value.__self__, nn.Module):
            return MethodType(value.__func__, swap(value.__self__))
        return value

    for module, stand_in in stand_ins.items():
        vars(stand_in).update(pytree.tree_map(swap, vars(module)))
        vars(stand_in)[_TOLD] = (module, tracer, tensors)
    return stand_ins[root]


def _subclass(cls: type[nn.Module]) -> type[Any]:
    names = {"__module__": cls.__module__, "__qualname__": cls.__qualname__, "__doc__": cls.__doc__}
    return type(cls.__name__, (StandIn, cls), names)
