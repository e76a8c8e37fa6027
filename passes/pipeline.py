"""Definition of passes, and the loop that runs them.

The contract: a pass may assume a valid graph and must leave one. Valid means that the graph lints,
that ``node.meta["val"]`` of every node is an example of its value, and that no node writes into
another node's value, except where diffusers' own code does (`toma_fx.runtime.arguments.in_place`).
During a pass, anything goes. Linting, dead-code removal and recompiling happen here, between
passes. Printing and timing can happen here too, through the one callback.
"""

import linecache
import logging
import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import fx, nn
from torch.fx import graph_module

from toma_fx.runtime import plan

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Pass(ABC):
    """One rewrite of a graph; its fields are its options."""

    name: ClassVar[str]

    @abstractmethod
    def apply(self, gm: fx.GraphModule) -> int:
        """Rewrite ``gm.graph`` in place and return the number of changed places.

        Return 0 only if the graph is unchanged: it is then neither linted nor recompiled.
        """


Callback = Callable[[Pass, fx.GraphModule, int], None]


def run_passes(
    gm: fx.GraphModule, passes: Sequence[Pass], after_each: Callback | None = None
) -> fx.GraphModule:
    """Run passes in order, in place, and return the graph module.

    Args:
        gm: a captured graph; see `toma_fx.passes.capture`.
        passes: the passes to run.
        after_each: called with the pass, the graph module and the number of places changed.
    """
    stale = False
    for each in passes:
        changed = each.apply(gm)
        logger.debug("%s: %s changed %d places", type(gm).__name__, each.name, changed)
        if changed:
            gm.graph.eliminate_dead_code()
            if FLAT in gm.meta:  # it keeps its values correct while it is rewritten
                gm.meta[FLAT].values.refresh()
            elif LEAF_VALUE in gm.meta:
                refresh_values(gm)
            gm.graph.lint()
            stale = True
        if stale and after_each is not None:
            recompile(gm)
            stale = False
        if after_each is not None:
            after_each(each, gm, changed)
    if stale:
        recompile(gm)
    return gm


def recompile(gm: fx.GraphModule) -> None:
    """Recompile ``gm``, with a source that lives only as long as its forward.

    torch.fx keeps every source forever, for tracebacks. Here the source of the replaced forward is
    dropped at once, and the last one together with ``gm``.
    """
    # Each graph module has its own class, and so does each copy of it.
    cls: Any = type(gm)
    replaced = cls.forward
    gm.recompile()
    _forget_source(replaced)
    if "_toma_source" not in vars(cls):
        cls._toma_source = weakref.finalize(gm, lambda: _forget_source(cls.forward))
        cls._toma_source.atexit = False


def _forget_source(forward: Any) -> None:
    name = forward.__code__.co_filename
    # Private API, in which torch.fx keeps sources. Other files are not ours to forget.
    if graph_module._loader.eval_cache.pop(name, None) is not None:
        linecache.cache.pop(name, None)


LEAF_VALUE = "toma_leaf_value"
"""Key in ``gm.meta`` of the function that returns an example of a submodule's output."""

EXAMPLE_SCOPE = "toma_scope"
"""Key in ``gm.meta`` of the scope in which a block's example values are computed."""

FLAT = "toma_flat"
"""Key in ``gm.meta`` of the `toma_fx.passes.flat_graph.FlatGraph` that passes rewrite."""

LeafValue = Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], Any]


def example_value(node: fx.Node, root: nn.Module, leaf_value: LeafValue) -> Any:
    """Return the result of a call node for the example values of its arguments."""
    args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda n: n.meta["val"])
    if node.op == "call_method":
        return getattr(args[0], str(node.target))(*args[1:], **kwargs)
    if node.op == "call_module":
        return leaf_value(root.get_submodule(str(node.target)), args, dict(kwargs))
    assert callable(node.target)
    return node.target(*args, **kwargs)


def refresh_values(gm: fx.GraphModule) -> None:
    """Compute the example value of every call node again after a rewrite."""
    before = plan.enter(gm.meta.get(EXAMPLE_SCOPE))
    try:
        for node in gm.graph.nodes:
            if node.op.startswith("call_"):
                node.meta["val"] = example_value(node, gm, gm.meta[LEAF_VALUE])
    finally:
        plan.enter(before)
