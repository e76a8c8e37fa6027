"""Nodes that make a plan: the merge pass inserts them, and passes that share plans find them."""

import operator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from toma_fx.errors import CaptureError

toma = torch.ops.toma

PLAN = "toma_plan"
"""Key in ``node.meta`` of a `PlanPart`."""

UPDATE = "toma_update"
"""Key in ``node.meta`` that marks the update of merged tokens by a whole block."""


@dataclass(frozen=True, kw_only=True)
class PlanOptions:
    """Options for making plans: the arguments of the plan's operators."""

    region_tokens: int = 64
    ratio: float = 0.5
    selector: str = "facility_location"
    temperature: float = 0.001
    merge_over: str = "region"
    unmerge: str = "transpose"


@dataclass(frozen=True, kw_only=True)
class Rows:
    """Block argument with a row for each token; merged tokens take their destinations' rows."""

    argument: str
    items: tuple[int, ...] = ()
    """Items with rows, if the argument is a tuple."""
    dim: int = 1
    """Dimension of the rows: 1 after the batch, 0 in a table shared by all samples, -1 in a key
    mask."""
    joint: bool = False
    """True if it also has rows for the text tokens."""
    ndim: int | None = None
    """Required number of dimensions: tensors with another number have no rows; None for any."""
    optional: bool = False
    """True if the argument, whatever its example, may be None when the block runs, or have one row
    for all tokens. Its rows are not part of a plan, so they may also change from step to step."""
    changes: bool = False
    """True if its rows change from step to step, so that a kept plan needs new ones."""


@dataclass(frozen=True, kw_only=True)
class TokenFlow:
    """Position of the tokens in a block's graph, by the names of its arguments."""

    attention_kwargs: str | None = None
    """Argument with the attention kwargs, which carry the scope of the call; None if the block gets
    no such dictionary."""
    tokens: str = "hidden_states"
    """Argument with the image tokens, ``(B, N, D)``."""
    output: int | None = None
    """Index of the output with the image tokens, if the block returns several outputs."""
    text: str | None = None
    """Argument with the text tokens, ``(B, P, D)``."""
    text_first: bool = False
    """True if the tokens of a site are text and image tokens in one sequence."""
    joint: bool = False
    """True if ``tokens`` itself holds text and image tokens in one sequence."""
    image_first: bool = False
    """True if the image comes before the text in such a sequence."""
    rows: tuple[Rows, ...] = ()
    """Arguments that have a row for each token."""
    also_merged: tuple[str, ...] = ()
    """Arguments with further tokens of the same grid, ``(B, N, D)``, merged in the same way."""
    also_returned: tuple[int, ...] = ()
    """Indices of outputs with further tokens of the same grid, which are unmerged."""
    prefix: bool = False
    """True if some image tokens before all others may have to stay unmerged, such as those of a
    video's first frame."""
    prefix_tokens: str | None = None
    """Argument with the number of these tokens; if None, the call's scope knows it."""


@dataclass(frozen=True)
class PlanPart:
    """Role of a node in a plan; a group needs only one node per role."""

    group: str
    name: str
    changes: bool = False
    """True if the value differs at every step, even if the plan does not."""


@dataclass(frozen=True)
class PlanNodes:
    """A plan in a graph."""

    layout: Any
    destinations: fx.Node
    merge_weight: fx.Node
    unmerge_weight: fx.Node


def placeholder(graph: fx.Graph, name: str) -> Any:
    """Return the placeholder of the argument ``name``.

    Raises:
        CaptureError: when the graph has no such argument.
    """
    for node in graph.find_nodes(op="placeholder"):
        if node.target == name:
            return node
    raise CaptureError(f"the graph has no argument {name!r}; it has {_arguments(graph)}")


def _arguments(graph: fx.Graph) -> str:
    return ", ".join(str(node.target) for node in graph.find_nodes(op="placeholder"))


def carrier(graph: fx.Graph, attention_kwargs: str | None) -> fx.Node | None:
    """Return the argument that carries the scope of the call; None if the thread carries it."""
    return None if attention_kwargs is None else placeholder(graph, attention_kwargs)


def insert_plan(
    graph: fx.Graph, tokens: fx.Node, layout: Any, options: PlanOptions, group: str = ""
) -> PlanNodes:
    """Insert the nodes that make a plan from ``tokens`` at the insertion point.

    Args:
        graph: the graph.
        tokens: image tokens, from which destinations are selected.
        layout: division of the tokens into regions: a node, or plain numbers.
        options: options of the plan.
        group: the group whose blocks can share the plan.
    """
    args: tuple[Any, ...] = (tokens, layout, options.selector)
    destinations = call(graph, toma.select.default, args, name="destinations")
    if options.selector == "fixed":
        args = (tokens, destinations, layout)
        weights = call(graph, toma.fixed_weights.default, args, name="weights")
    else:
        how = (options.temperature, options.merge_over, options.unmerge)
        args = (tokens, destinations, layout, *how)
        weights = call(graph, toma.weigh.default, args, name="weights")
    merge_weight = item(graph, weights, 0, name="merge_weight")
    unmerge_weight = item(graph, weights, 1, name="unmerge_weight")
    made = PlanNodes(layout, destinations, merge_weight, unmerge_weight)
    for name, node in vars(made).items():
        if isinstance(node, fx.Node):
            node.meta[PLAN] = PlanPart(group, name)
    return made


def call(graph: fx.Graph, target: Any, args: tuple[Any, ...], name: str | None = None) -> fx.Node:
    """Insert a function call at the insertion point, named after the paper's term if it has one."""
    return graph.create_node("call_function", target, args, name=name)


def redirect(node: fx.Node, through: fx.Node) -> None:
    """Replace all other uses of ``node`` by ``through``, a call that takes ``node``."""
    node.replace_all_uses_with(through, delete_user_cb=lambda user: user is not through)


def item(graph: fx.Graph, node: fx.Node, index: int, name: str | None = None) -> fx.Node:
    """Insert ``node[index]`` at the insertion point."""
    return call(graph, operator.getitem, (node, index), name)
