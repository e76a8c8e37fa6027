"""Modules to trace through in place of the caller's, so that the process is not patched.

`torch.fx.Tracer.trace` records calls of submodules by replacing ``nn.Module.__call__`` and
``__getattr__`` while it runs, which affects every thread. Here the forward of a block runs on a
copy of its module tree, without the tensors. The class of each copy is a private subclass of its
module's class, which reports every call and every access to a tensor to a tracer::

    block.attn      Attention, with weights         called as ever by other threads
    stand-in.attn   a subclass of Attention         a call becomes a node of the graph
"""

from collections.abc import Callable
from types import MethodType
from typing import Any, Protocol

from torch import nn
from torch.utils import _pytree as pytree


class Told(Protocol):
    """Receiver of a stand-in's reports: a tracer, or its replacement."""

    def call_module(
        self, module: nn.Module, run: Callable[..., Any], args: Any, kwargs: Any, /
    ) -> Any:
        """Return the result of a stand-in's call; ``run`` calls its forward."""

    def getattr(self, name: str, value: Any, tensors: dict[str, Any], /) -> Any:
        """Return the value for a stand-in's parameter, buffer or submodule."""


class StandIn:
    """Mixin that comes before the module's class in the class of a stand-in."""

    # Skip ``super().__init_subclass__``: the actions of a class on its subclasses, such as keeping
    # a list of them, are not meant for stand-ins.
    def __init_subclass__(cls) -> None:
        pass

    # Needed because, for example, slicing a list of modules calls its class.
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
    """Return the module behind a stand-in."""
    return _told(stand_in)[0]


def stand_in_for(root: nn.Module, tracer: Told) -> Any:
    """Make a stand-in for a module, with stand-ins for all modules in it.

    The stand-in has its own attributes, lists and dictionaries, so changes by its forward stay in
    it. Tensors are shared.

    Args:
        root: the module to trace.
        tracer: receives all reports. Its ``call_module`` is called with the real module and a
            function that runs the stand-in's forward, for each call of a stand-in; its ``getattr``
            for each access to a parameter, a buffer or a submodule.
    """
    # Made for each trace, because a cached class would keep its tracer alive.
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
