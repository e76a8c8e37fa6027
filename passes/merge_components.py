"""Merge and unmerge around each component (ToMA, section 4.2).

Before::

    norm1 = self.norm1(hidden_states)
    attn1 = self.attn1(norm1)
    add = attn1 + hidden_states

After::

    norm1 = self.norm1(hidden_states)
    select = torch.ops.toma.select(norm1, 64, 0.5, 'facility_location')
    weigh = torch.ops.toma.weigh(norm1, select, 0.001, 'region', 'transpose')
    merge = torch.ops.toma.merge(norm1, weigh[0])
    attn1 = self.attn1(merge)
    unmerge = torch.ops.toma.unmerge(attn1, weigh[1])
    add = unmerge + hidden_states

Every site gets a plan of its own; `share_plan` makes them one.
"""

from dataclasses import dataclass, field
from typing import ClassVar

from torch import fx

from toma_fx.passes.pipeline import Pass
from toma_fx.passes.plan_nodes import PlanOptions, TokenFlow, call, insert_plan, redirect, toma
from toma_fx.passes.sites import SITES, FoundSite


@dataclass(frozen=True, kw_only=True)
class MergeComponents(Pass):
    """Let each site that `FindSites` found run on merged tokens."""

    name: ClassVar[str] = "merge_components"

    options: PlanOptions = field(default_factory=PlanOptions)
    flow: TokenFlow = field(default_factory=TokenFlow)

    def apply(self, gm: fx.GraphModule) -> int:
        # In the order of the graph, so that the first plan is made where all others can see it.
        order = {node: i for i, node in enumerate(gm.graph.nodes)}
        found = sorted(gm.meta[SITES], key=lambda site: min(order[n] for n in site.enter))
        for site in found:
            self._merge(gm.graph, site, min(site.enter, key=order.__getitem__))
        return len(found)

    def _merge(self, graph: fx.Graph, site: FoundSite, first: fx.Node) -> None:
        with graph.inserting_before(first):
            plan = insert_plan(graph, site.tokens, self.options, self.flow, at_site=True)
            merged = call(
                graph, toma.merge.default, (site.tokens, plan.merge_weight), name="merged"
            )
        for layer in site.enter:
            layer.replace_input_with(site.tokens, merged)
            if plan.rotary is not None and self.flow.rotary in layer.kwargs:
                layer.update_kwarg(self.flow.rotary, plan.rotary)
        for output in site.leave:
            with graph.inserting_after(output):
                args = (output, plan.unmerge_weight)
                back = call(graph, toma.unmerge.default, args, name="unmerged")
            redirect(output, back)
