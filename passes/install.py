"""A graph becomes the forward of a module again.

Before: a `GraphModule`, whose class, name and code object are its own. After: a subclass of the
module's class, with the same name, whose ``forward`` is the graph's code. Blocks with the same code
share the class, so ``torch.compile`` compiles it once, and everything that looks at a block finds
what it looks for: class, submodules, state-dict keys, hooks.
"""

import copy
import functools
import linecache
import re
from collections.abc import Callable
from hashlib import sha256
from types import ModuleType
from typing import Any

import torch
from torch import fx, nn

Helpers = tuple[tuple[str, Any], ...]


def generated_class(base: Any, gm: fx.GraphModule) -> type[Any]:
    """The subclass of ``base`` that runs a graph.

    Args:
        base: a module class.
        gm: a graph over the submodules of its instances, with the signature of its ``forward``.

    Returns:
        The class; the same one whenever base and code are the same.
    """
    code = gm.graph.python_code("self")
    # torch.fx offers more than the code uses: NaN, say, which no unpickled NaN would be equal to.
    used = {k: v for k, v in code.globals.items() if re.search(rf"\b{k}\b", code.src)}
    helpers = {k: v for k, v in used.items() if not isinstance(v, ModuleType)}
    return _class_of(base, code.src, tuple(helpers.items()))


def install(block: nn.Module, gm: fx.GraphModule) -> None:
    """Let ``block`` run the graph, with a copy of each submodule that passes added to it."""
    for name, child in gm.named_children():
        if name not in block._modules:
            block.add_module(name, copy.deepcopy(child))
    block.__class__ = generated_class(type(block), gm)


@functools.cache
def _class_of(base: Any, source: str, helpers: Helpers) -> type[Any]:
    filename = f"<toma_fx {base.__name__} {sha256(source.encode()).hexdigest()[:12]}>"
    # So that a traceback into the generated code shows its lines.
    linecache.cache[filename] = (len(source), None, source.splitlines(keepends=True), filename)
    namespace: dict[str, Any] = {"torch": torch, **dict(helpers)}
    exec(compile(source, filename, "exec"), namespace)

    def reduce(self: Any, protocol: object) -> tuple[Callable[..., Any], Any, Any]:
        # A generated class cannot be found by name, so a pickle holds what makes it.
        return _new, (base, source, helpers), self.__getstate__()

    attributes = {
        "__doc__": base.__doc__,
        "__module__": base.__module__,
        "__qualname__": base.__qualname__,
        "__reduce_ex__": reduce,
        "forward": namespace["forward"],
    }
    return type(base.__name__, (base,), attributes)


def _new(base: Any, source: str, helpers: Helpers) -> Any:
    cls: Any = _class_of(base, source, helpers)
    return cls.__new__(cls)
