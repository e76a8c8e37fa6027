"""Merge and unmerge once around the whole block (ToMA_once, section 5.1).

Before::

    norm1 = self.norm1(hidden_states)
    ...
    return add_2

After, with ``residual="replace"`` as in the paper::

    select = torch.ops.toma.select(hidden_states, 64, 0.5, 'facility_location')
    weigh = torch.ops.toma.weigh(hidden_states, select, 0.001, 'region', 'transpose')
    merge = torch.ops.toma.merge(hidden_states, weigh[0])
    norm1 = self.norm1(merge)
    ...
    return torch.ops.toma.unmerge(add_2, weigh[1])

With ``residual="keep"`` the residual stream stays whole, and only the block's update is spread::

    return hidden_states + torch.ops.toma.unmerge(add_2 - merge, weigh[1])
"""

import operator
from dataclasses import dataclass, field
from typing import ClassVar

from torch import fx

from toma_fx.passes.pipeline import Pass
from toma_fx.passes.plan_nodes import PlanOptions, TokenFlow, call, insert_plan, placeholder, toma


@dataclass(frozen=True, kw_only=True)
class MergeOnce(Pass):
    """Let the whole block run on merged tokens."""

    name: ClassVar[str] = "merge_once"

    options: PlanOptions = field(default_factory=PlanOptions)
    flow: TokenFlow = field(default_factory=TokenFlow)
    residual: str = "keep"

    def apply(self, gm: fx.GraphModule) -> int:
        graph = gm.graph
        tokens = placeholder(graph, self.flow.tokens)
        first = next(
            n for n in graph.nodes if n.op != "placeholder" and tokens in n.all_input_nodes
        )
        layers = [n for n in graph.nodes if n.op == "call_module"]
        users = list(tokens.users)
        with graph.inserting_before(first):
            plan = insert_plan(graph, tokens, self.options, self.flow, at_site=False)
            merged = call(graph, toma.merge.default, (tokens, plan.merge_weight), name="merged")
        for user in users:
            user.replace_input_with(tokens, merged)
        for layer in layers:
            if plan.rotary is not None and self.flow.rotary in layer.kwargs:
                layer.update_kwarg(self.flow.rotary, plan.rotary)
        self._return(graph, tokens, merged, plan.unmerge_weight)
        return 1

    def _return(
        self, graph: fx.Graph, tokens: fx.Node, merged: fx.Node, unmerge_weight: fx.Node
    ) -> None:
        output = graph.output_node()
        (returned,) = output.args
        result = returned if self.flow.output is None else returned[self.flow.output]  # type: ignore[index]
        with graph.inserting_before(output):
            if self.residual == "replace":
                back = call(graph, toma.unmerge.default, (result, unmerge_weight), "unmerged")
            else:
                update = call(graph, operator.sub, (result, merged), "update")
                spread = call(graph, toma.unmerge.default, (update, unmerge_weight), "unmerged")
                back = call(graph, operator.add, (tokens, spread))
        output.replace_input_with(result, back)  # type: ignore[arg-type]
