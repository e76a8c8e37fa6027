"""Merge and unmerge around the sites of a block (ToMA, section 4.2; ToMA_once, section 5.1).

Before::

    norm1 = self.norm1(hidden_states)
    attn1 = self.attn1(norm1)
    add = attn1 + hidden_states

After, around each component::

    norm1 = self.norm1(hidden_states)
    layout = region_layout(cross_attention_kwargs, norm1, 64, 0.5)
    destinations = torch.ops.toma.select(norm1, layout, 'facility_location')
    weights = torch.ops.toma.weigh(norm1, destinations, layout, 0.001, 'region', 'transpose')
    merged = torch.ops.toma.merge(norm1, weights[0], layout)
    attn1 = self.attn1(merged)
    unmerged = torch.ops.toma.unmerge(attn1, weights[1], layout)
    add = unmerged + hidden_states

Or once around the block, here with ``residual="replace"`` as in the paper::

    ...
    merged = torch.ops.toma.merge(hidden_states, weights[0], layout)
    norm1 = self.norm1(merged)
    ...
    return torch.ops.toma.unmerge(add_2, weights[1], layout)

With ``residual="keep"`` the residual stream stays whole, and only a site's update is unmerged::

    return hidden_states + torch.ops.toma.unmerge(add_2 - merged, weights[1], layout)

The same pass merges in the graph of one block and in the flat graph of a whole model, one block at
a time. `block_graph` and `flat_graph` contain the differences. Every site gets a plan of its own;
`one_plan` makes them share one.
"""

from dataclasses import dataclass, field
from typing import ClassVar

from torch import fx

from toma_fx.passes.block_graph import BlockGraph
from toma_fx.passes.flat_graph import FlatGraph
from toma_fx.passes.pipeline import LEAF_VALUE, Pass
from toma_fx.passes.plan_nodes import UPDATE, PlanOptions, TokenFlow, call, insert_plan, toma
from toma_fx.passes.sites import WHOLE_BLOCK, FoundSite, Site


@dataclass(frozen=True, kw_only=True)
class Merge(Pass):
    """Run sites of a block on merged tokens.

    Raises:
        CaptureError: when a site is missing or malformed in the graph, or when the graph contains
            an operation that merged tokens do not support; the message names the node and the
            reason.
    """

    name: ClassVar[str] = "merge"

    flow: TokenFlow
    sites: tuple[Site, ...] = (WHOLE_BLOCK,)
    options: PlanOptions = field(default_factory=PlanOptions)
    residual: str = "keep"
    """``"keep"`` adds only the unmerged update of a site to its input. ``"replace"`` unmerges the
    output of a site."""
    block: str = ""
    """Path of the block in a flat graph; empty in the graph of a block."""
    group: str = ""
    """In a flat graph, the group whose blocks can share a plan."""

    def apply(self, gm: fx.GraphModule) -> int:
        block = LEAF_VALUE in gm.meta and not self.block
        graph = BlockGraph(gm, self.flow) if block else FlatGraph.of(gm, self.flow)
        found = graph.find(self.sites, self.block)
        for each in found:
            self._merge(graph, each)
        return len(found)

    def _merge(self, graph: BlockGraph | FlatGraph, found: FoundSite) -> None:
        after = () if found.after is None else (found.after,)
        with graph.inserting_before(found.first):
            tokens = found.tokens
            if found.before is not None or after:
                tokens = graph.image_tokens(found)
            layout = graph.layout(tokens, self.options)
            plan = insert_plan(graph.graph, tokens, layout, self.options, self.group)
            args = (found.tokens, plan.merge_weight, layout, *after)
            merged = call(graph.graph, toma.merge.default, args, name="merged")
        for node in found.readers:
            node.replace_input_with(found.tokens, merged)
        for node, users in graph.leaves(found, merged, plan):
            with graph.inserting_after(node):
                back = node
                if self.residual == "keep":
                    back = call(graph.graph, graph.subtract, (node, merged), name="update")
                    if not found.site.leave:
                        back.meta[UPDATE] = True
                args = (back, plan.unmerge_weight, layout, *after)
                back = call(graph.graph, toma.unmerge.default, args, name="unmerged")
                if self.residual == "keep":
                    back = call(graph.graph, graph.add, (found.tokens, back))
            for user in users:
                user.replace_input_with(node, back)
