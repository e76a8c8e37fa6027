"""The nodes that make a plan: inserted by the merge passes, found again by the sharing pass."""

import operator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from toma_fx.errors import CaptureError
from toma_fx.runtime import plan

toma = torch.ops.toma


@dataclass(frozen=True, kw_only=True)
class PlanOptions:
    """How plans are made: the arguments of `torch.ops.toma.select` and `torch.ops.toma.weigh`."""

    region_tokens: int = 64
    ratio: float = 0.5
    selector: str = "facility_location"
    """As `select` takes it; or ``"fixed"``, weights that never look at the tokens."""
    temperature: float = 0.001
    merge_over: str = "region"
    unmerge: str = "transpose"


@dataclass(frozen=True, kw_only=True)
class TokenFlow:
    """Where tokens are in a block's graph, by the names of its arguments."""

    tokens: str = "hidden_states"
    """The argument with the image tokens, ``(B, N, D)``."""
    output: int | None = None
    """Which output is the image tokens, when the block returns several."""
    text: str | None = None
    """The argument with text tokens, ``(B, P, D)``."""
    text_first: bool = False
    """Whether the tokens of a site are text and image tokens in one sequence."""
    rotary: str | None = None
    """The argument with rotary values, and the keyword under which attention takes them."""


@dataclass(frozen=True)
class PlanNodes:
    """A plan in a graph."""

    merge_weight: fx.Node
    unmerge_weight: fx.Node
    rotary: fx.Node | None


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


def insert_plan(
    graph: fx.Graph, tokens: fx.Node, options: PlanOptions, flow: TokenFlow, *, at_site: bool
) -> PlanNodes:
    """Insert, at the insertion point, the nodes that make a plan from ``tokens``.

    Args:
        graph: where.
        tokens: what destinations are selected from.
        options: how.
        flow: the block's arguments.
        at_site: whether ``tokens`` are those of a site, which may start with text tokens.
    """
    text_tokens = None
    if flow.text is not None:
        shape = call(graph, getattr, (placeholder(graph, flow.text), "shape"))
        text_tokens = item(graph, shape, 1, name="text_tokens")
        if flow.text_first and at_site:
            image = (slice(None), slice(text_tokens, None))
            tokens = call(graph, operator.getitem, (tokens, image), name="image_tokens")
    region_tokens, ratio, selector = options.region_tokens, options.ratio, options.selector
    if selector == "fixed":
        args: tuple[Any, ...] = (tokens, region_tokens, ratio, "grid")
        destinations = call(graph, toma.select.default, args, name="destinations")
        weights = call(graph, toma.fixed_weights.default, (tokens, destinations), name="weights")
    else:
        args = (tokens, region_tokens, ratio, selector)
        destinations = call(graph, toma.select.default, args, name="destinations")
        how = (options.temperature, options.merge_over, options.unmerge)
        args = (tokens, destinations, *how)
        weights = call(graph, toma.weigh.default, args, name="weights")
    merge_weight = item(graph, weights, 0, name="merge_weight")
    unmerge_weight = item(graph, weights, 1, name="unmerge_weight")
    if flow.rotary is None:
        return PlanNodes(merge_weight, unmerge_weight, None)
    table = placeholder(graph, flow.rotary)
    values = call(graph, plan.rotary_at, (table, destinations, text_tokens), name="rotary")
    cos, sin = item(graph, values, 0, name="cos"), item(graph, values, 1, name="sin")
    rotary = call(graph, plan.rotary_tables, (cos, sin), name="tables")
    return PlanNodes(merge_weight, unmerge_weight, rotary)


def call(graph: fx.Graph, target: Any, args: tuple[Any, ...], name: str | None = None) -> fx.Node:
    """A function call at the insertion point, named as the paper names its result."""
    return graph.create_node("call_function", target, args, name=name)


def redirect(node: fx.Node, through: fx.Node) -> None:
    """Let every other use of ``node`` use ``through``, a call that takes it."""
    node.replace_all_uses_with(through, delete_user_cb=lambda user: user is not through)


def item(graph: fx.Graph, node: fx.Node, index: int, name: str | None = None) -> fx.Node:
    """``node[index]`` at the insertion point."""
    return call(graph, operator.getitem, (node, index), name)
