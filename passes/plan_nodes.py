"""The nodes that make a plan: inserted by the merge pass, found again by those that share it."""

import operator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from toma_fx.errors import CaptureError

toma = torch.ops.toma

PLAN = "toma_plan"
"""The key in ``node.meta`` of a `PlanPart`."""

UPDATE = "toma_update"
"""The key in ``node.meta`` of what a whole block adds to merged tokens."""


@dataclass(frozen=True, kw_only=True)
class PlanOptions:
    """How plans are made: the arguments of the plan's operators."""

    region_tokens: int = 64
    ratio: float = 0.5
    selector: str = "facility_location"
    temperature: float = 0.001
    merge_over: str = "region"
    unmerge: str = "transpose"


@dataclass(frozen=True, kw_only=True)
class Rows:
    """An argument of a block with a row for each token: merged tokens take their destinations'."""

    argument: str
    items: tuple[int, ...] = ()
    """Which of its items, where it is a tuple."""
    dim: int = 1
    """The rows' dimension: 1 behind the batch, 0 in a table that all samples share, -1 in a mask of
    keys."""
    joint: bool = False
    """Whether it has rows for the text tokens too."""
    ndim: int | None = None
    """Its dimensions, where it has rows only if it has so many."""
    optional: bool = False
    """Whether it may be None when the block runs, or have one row for all tokens, whatever the
    example was. Its rows are no part of a plan, so it may also change from step to step."""
    changes: bool = False
    """Whether its rows change from step to step, so that a plan that is kept needs new ones."""


@dataclass(frozen=True, kw_only=True)
class TokenFlow:
    """Where tokens are in a block's graph, by the names of its arguments."""

    attention_kwargs: str | None = None
    """The argument with the attention kwargs, which carry the scope of the call; None where no
    such dictionary reaches the block."""
    tokens: str = "hidden_states"
    """The argument with the image tokens, ``(B, N, D)``."""
    output: int | None = None
    """Which output is the image tokens, when the block returns several."""
    text: str | None = None
    """The argument with text tokens, ``(B, P, D)``."""
    text_first: bool = False
    """Whether the tokens of a site are text and image tokens in one sequence."""
    joint: bool = False
    """Whether ``tokens`` itself holds text and image tokens in one sequence."""
    image_first: bool = False
    """Whether the image stands before the text where both are in one sequence."""
    rows: tuple[Rows, ...] = ()
    """What has a row for each token."""
    also_merged: tuple[str, ...] = ()
    """Arguments with further tokens of the same grid, ``(B, N, D)``, which are merged alike."""
    also_returned: tuple[int, ...] = ()
    """Outputs with further tokens of the same grid, which come back spread."""
    prefix: bool = False
    """Whether image tokens before all others may have to stay as they are, as in a video's first
    frame."""
    prefix_tokens: str | None = None
    """The argument that says how many, where a block has one; elsewhere the call's scope knows."""


@dataclass(frozen=True)
class PlanPart:
    """What a node is in a plan: one of its group's, of which one is enough."""

    group: str
    name: str
    changes: bool = False
    """Whether it is another one at every step, whatever the plan is."""


@dataclass(frozen=True)
class PlanNodes:
    """A plan in a graph."""

    layout: Any
    destinations: fx.Node
    merge_weight: fx.Node
    unmerge_weight: fx.Node


def placeholder(graph: fx.Graph, name: str) -> Any:
    """The argument called ``name``.

    Raises:
        CaptureError: when the graph has none.
    """
    for node in graph.find_nodes(op="placeholder"):
        if node.target == name:
            return node
    raise CaptureError(f"the graph has no argument {name!r}; it has {_arguments(graph)}")


def _arguments(graph: fx.Graph) -> str:
    return ", ".join(str(node.target) for node in graph.find_nodes(op="placeholder"))


def carrier(graph: fx.Graph, attention_kwargs: str | None) -> fx.Node | None:
    """The argument that carries the scope of the call; None where the thread does."""
    return None if attention_kwargs is None else placeholder(graph, attention_kwargs)


def insert_plan(
    graph: fx.Graph, tokens: fx.Node, layout: Any, options: PlanOptions, group: str = ""
) -> PlanNodes:
    """Insert, at the insertion point, the nodes that make a plan from ``tokens``.

    Args:
        graph: where.
        tokens: image tokens, of which destinations are selected.
        layout: how they are cut into regions: a node, or the numbers.
        options: how.
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
    """A function call at the insertion point, named as the paper names its result."""
    return graph.create_node("call_function", target, args, name=name)


def redirect(node: fx.Node, through: fx.Node) -> None:
    """Let every other use of ``node`` use ``through``, a call that takes it."""
    node.replace_all_uses_with(through, delete_user_cb=lambda user: user is not through)


def item(graph: fx.Graph, node: fx.Node, index: int, name: str | None = None) -> fx.Node:
    """``node[index]`` at the insertion point."""
    return call(graph, operator.getitem, (node, index), name)
