"""Module information in the nodes of a captured graph.

Nothing is rewritten. Paths and classes come from ``nn_module_stack``, which `torch.export`, Dynamo
and `torch.fx` each spell differently.
"""

import functools
import re
from typing import Any

from torch import fx

from toma_fx.errors import CaptureError


def module_stack(node: fx.Node) -> dict[str, str]:
    """Return path and class name of the modules whose forwards made a node, outermost first."""
    stack = node.meta.get("nn_module_stack") or {}
    return {_path(path): class_name(cls) for path, cls in stack.values()}


def innermost(node: fx.Node) -> str:
    """Return the path of the module whose own forward made a node; ``""`` is the model."""
    return next(reversed(module_stack(node)), "")


def class_name(cls: type | str) -> str:
    """Return the qualified name of a class in ``nn_module_stack``, given as class or name."""
    return cls if isinstance(cls, str) else f"{cls.__module__}.{cls.__qualname__}"


@functools.cache
def _path(source: str) -> str:
    """Turn Dynamo's ``L['self'].__dict__['_modules']['blocks'].0`` and the like into a path."""
    path = re.sub(r"\.?__dict__\['_modules'\]|\._modules", "", source)
    path = re.sub(r"\['?(\w+)'?\]", r".\1", path)
    return re.sub(r"^L\.\w+", "", path).strip(".")


def operator_name(node: fx.Node) -> str:
    """Return ``reshape`` for the method, the function and the ATen operator of that name."""
    target: Any = node.target
    return str(getattr(target, "__name__", target)).partition(".")[0]


def refused(node: fx.Node, why: str) -> CaptureError:
    """Make an error that tells which node cannot run on merged tokens, where it is, and why."""
    path = innermost(node) or "the model"
    return CaptureError(
        f"{node.format_node()} in {path} cannot run on merged tokens: {why}. Merge the model "
        "instead, before it is captured: toma_fx.transform(model)"
    )
