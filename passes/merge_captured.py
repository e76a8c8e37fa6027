"""Merge tokens in a whole model that someone else captured as one flat graph.

Before, with its tokens in raster order and their number written into its shapes::

    to_q = torch.ops.aten.linear(norm1, p_attn1_to_q_weight)
    ...
    reshape = torch.ops.aten.reshape(transpose, [2, 256, 32])
    attn1 = torch.ops.aten.linear(reshape, p_attn1_to_out_0_weight, p_attn1_to_out_0_bias)
    add = torch.ops.aten.add(attn1, hidden_states)

After, with the plan of the first block at hand in all others of its group::

    merged = torch.ops.toma.merge(norm1, merge_weight)
    to_q = torch.ops.aten.linear(merged, p_attn1_to_q_weight)
    ...
    reshape = torch.ops.aten.reshape(transpose, [2, 128, 32])
    attn1 = torch.ops.aten.linear(reshape, p_attn1_to_out_0_weight, p_attn1_to_out_0_bias)
    unmerged = torch.ops.toma.unmerge(attn1, unmerge_weight)
    add = torch.ops.aten.add(unmerged, hidden_states)

The tokens of a part are the first value of three dimensions that its layers take from outside. From
there on the values say the rest: what has fewer tokens than before where it leaves the part is
unmerged, and what has not, such as text, goes on as it is.

**Rotary values.** Flux's attention takes a table of cosines and one of sines, ``(P + N, D)``, and
gives each a batch dimension of 1 where it uses it: ``unsqueeze(table, 0)`` in ATen's words,
``table[None, :, None, :]`` in Python's. Destinations differ from sample to sample, so at exactly
that place the destinations' rows, ``(B, P + M, D)``, stand in, and their batch is that dimension::

    rotary = torch.ops.aten.cat([table[:P].expand(B, -1, -1), toma.gather(table[P:], dest)], 1)
"""

import sys
from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import fx

from toma_fx.errors import CaptureError
from toma_fx.passes.captured import CapturedGraph, TokenCounts, innermost, operator_name, refused
from toma_fx.passes.order_captured import Border, order_tokens
from toma_fx.passes.pipeline import Pass
from toma_fx.passes.plan_nodes import PlanNodes, PlanOptions, TokenFlow, call, insert_plan, toma
from toma_fx.passes.sites import Site

aten = torch.ops.aten


@dataclass(frozen=True, kw_only=True)
class CapturedBlock:
    """A block to be merged, by its module path."""

    path: str
    sites: tuple[Site, ...]
    """The parts to be merged, in no order; a part named ``""`` is the whole block."""
    text: bool = False
    """Whether text tokens go through the block beside the image tokens."""
    text_first: bool = False
    """Whether it reads them before the image tokens, and joins both in one sequence."""
    group: Hashable = ""
    """The blocks that share a plan."""
    leads: bool = True
    """Whether it makes a plan; the other blocks of its group use the last one made."""
    options: PlanOptions = field(default_factory=PlanOptions)
    """How its plan is made."""


@dataclass(frozen=True)
class _Plan:
    nodes: PlanNodes
    destinations: fx.Node
    image: int
    """Tokens that it is for."""
    kept: int
    """Tokens that it keeps."""
    tables: dict[fx.Node, fx.Node] = field(default_factory=dict)
    """Rotary table to its rows at the destinations."""


@dataclass(frozen=True, kw_only=True)
class MergeCaptured(Pass):
    """Merge tokens in the named blocks of a graph with ``nn_module_stack`` and example values.

    Raises:
        CaptureError: when the graph holds something that merged tokens cannot go through; the
            message names the node and the reason.
    """

    name: ClassVar[str] = "merge_captured"

    blocks: tuple[CapturedBlock, ...]
    """In the order of the graph."""
    borders: tuple[Border, ...] = ()
    residual: str = "replace"
    """``"keep"``: add only a part's update, spread, to what went into it."""

    def apply(self, gm: fx.GraphModule) -> int:
        captured = CapturedGraph(gm)
        for border in self.borders:
            order_tokens(captured, border)
        plans: dict[Hashable, _Plan] = {}
        changed = 0
        for block in self.blocks:
            plan = None if block.leads else plans[block.group]
            for site in _in_order(captured, block):
                plans[block.group] = plan = self._merge(captured, block, site, plan)
                changed += 1
        captured.refresh()
        return changed

    def _merge(
        self, captured: CapturedGraph, block: CapturedBlock, site: Site, plan: _Plan | None
    ) -> _Plan:
        image, text = _token_counts(captured, block)
        tokens = _token_input(captured, block, site)
        inside = captured.regions[block.path]
        enter = [n for name in site.enter for n in captured.regions[_join(block.path, name)]]
        leave = set(captured.regions[_join(block.path, site.leave)])
        first = min(node for node in enter if tokens in node.all_input_nodes)
        if innermost(first) != block.path and captured.inputs(innermost(first), 3) != [tokens]:
            raise refused(first, "its layer is called several times in this graph")
        with captured.inserting_before(first, serving=first):
            nodes = plan.nodes if plan else _insert_plan(captured.graph, tokens, image, block)
            args = (tokens, nodes.merge_weight)
            merged = call(captured.graph, toma.merge.default, args, "merged")
        plan = plan or _made(nodes, image)
        if plan.image != image:
            raise refused(first, f"it takes {image} tokens, but its group's plan {plan.image}")
        counts = TokenCounts(tokens.meta["val"].shape[0], text, image, plan.kept)
        changed = {merged: tokens.meta["val"]}
        for node in enter:
            node.replace_input_with(tokens, merged)
            _use_destinations(captured, node, plan, counts, changed)
        left, around = False, set(inside)
        for node in inside:
            if not captured.rerun(node, changed, counts):
                continue
            outside = [user for user in node.users if user not in leave]
            if node in leave and outside:
                self._unmerge(captured, node, outside, (tokens, merged), nodes)
                left = True
            elif not around.issuperset(node.users):
                raise refused(node, f"its tokens leave {block.path} merged")
        if not left:
            raise refused(merged, f"no tokens like its own leave {block.path}")
        return plan

    def _unmerge(
        self,
        captured: CapturedGraph,
        node: fx.Node,
        users: list[fx.Node],
        went_in: tuple[fx.Node, fx.Node],
        plan: PlanNodes,
    ) -> None:
        """Let ``users`` have all tokens of ``node``, whose site took a pair: all, and merged."""
        graph, (tokens, merged) = captured.graph, went_in
        with captured.inserting_before(node.next, serving=node):
            back = node
            if self.residual == "keep":
                back = call(graph, aten.sub.Tensor, (node, merged), "update")
            args = (back, plan.unmerge_weight)
            back = call(graph, toma.unmerge.default, args, "unmerged")
            if self.residual == "keep":
                back = call(graph, aten.add.Tensor, (tokens, back))
        for user in users:
            user.replace_input_with(node, back)


def _insert_plan(graph: fx.Graph, tokens: fx.Node, image: int, block: CapturedBlock) -> PlanNodes:
    text = tokens.meta["val"].shape[1] - image
    if text:
        args = (tokens, 1, text, sys.maxsize)
        tokens = call(graph, aten.slice.Tensor, args, "image_tokens")
    return insert_plan(graph, tokens, block.options, TokenFlow(), at_site=False)


def _join(path: str, name: str) -> str:
    return ".".join(filter(None, (path, name)))


def _in_order(captured: CapturedGraph, block: CapturedBlock) -> list[Site]:
    """So that the first plan is made where all others can see it."""
    regions = captured.regions
    return sorted(
        block.sites, key=lambda site: min(regions[_join(block.path, n)][0] for n in site.enter)
    )


def _token_counts(captured: CapturedGraph, block: CapturedBlock) -> tuple[int, int]:
    """How many image tokens and text tokens go through a block."""
    region = captured.regions[block.path]
    image, *others = captured.inputs(block.path, ndim=3)
    if not block.text:
        text = 0
    elif not others:
        raise refused(region[0], "its block reads no text tokens")
    else:
        image, others = (others[0], [image]) if block.text_first else (image, others)
        text = others[0].meta["val"].shape[1]
    counts = image.meta["val"].shape[1], text
    if not all(isinstance(count, int) for count in counts):
        raise refused(region[0], f"the token counts {counts} are not fixed; export fixed sizes")
    return counts


def _token_input(captured: CapturedGraph, block: CapturedBlock, site: Site) -> fx.Node:
    found = set()
    for name in site.enter:
        inputs = captured.inputs(_join(block.path, name), ndim=3)
        found.add(inputs[1 if block.text_first and not name else 0])
    if len(found) != 1:
        raise CaptureError(f"{', '.join(site.enter)} must take the same tokens, but take {found}")
    return found.pop()


def _made(nodes: PlanNodes, image: int) -> _Plan:
    weights: Any = nodes.merge_weight.args[0]
    destinations = weights.args[1]
    _, regions, picks = destinations.meta["val"].shape
    if regions * picks == image:
        raise refused(destinations, f"the ratio is too small to merge any of {image} tokens")
    return _Plan(nodes, destinations, image, regions * picks)


def _use_destinations(
    captured: CapturedGraph,
    node: fx.Node,
    plan: _Plan,
    counts: TokenCounts,
    changed: dict[fx.Node, Any],
) -> None:
    """Where ``node`` gives a rotary table a batch dimension, let the destinations' rows be."""
    name, table = operator_name(node), node.args[0] if node.args else None
    if name not in ("unsqueeze", "getitem") or not isinstance(table, fx.Node) or not counts.text:
        return
    value, index = table.meta["val"], node.args[1]
    leading = index[0] is None if isinstance(index, tuple) else name == "unsqueeze" and index == 0
    rows = counts.text + counts.image
    if not leading or not isinstance(value, torch.Tensor) or value.shape[:-1] != (rows,):
        return
    if table not in plan.tables:
        with captured.inserting_before(node, serving=node):
            plan.tables[table] = _rows(captured.graph, table, plan.destinations, counts)
    at = plan.tables[table]
    changed[at] = value.unsqueeze(0)
    if isinstance(index, tuple):
        node.args = (at, (slice(None), *index[1:]))
    else:
        node.replace_all_uses_with(at)


def _rows(graph: fx.Graph, table: fx.Node, destinations: fx.Node, counts: TokenCounts) -> fx.Node:
    """Rows of the text tokens, then of the destinations, as `runtime.plan.rotary_at` gives them."""
    batch: Any = counts.batch
    if not isinstance(batch, int):
        batch = call(graph, aten.sym_size.int, (destinations, 0))
    text = call(graph, aten.slice.Tensor, (table, 0, 0, counts.text))
    text = call(graph, aten.expand.default, (text, [batch, -1, -1]))
    image = call(graph, aten.slice.Tensor, (table, 0, counts.text, sys.maxsize))
    image = call(graph, toma.gather.default, (image, destinations))
    return call(graph, aten.cat.default, ([text, image], 1), "rotary")
