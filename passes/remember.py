"""A full step of a run with memory: run a block on all tokens and remember its update.

Before, in the graph of a block that merges::

    merged = torch.ops.toma.merge(hidden_states, plan[0], layout)
    ...
    update = add_2 - merged
    unmerged = torch.ops.toma.unmerge(update, plan[1], layout)
    return hidden_states + unmerged

After, with diffusers' original block next to it::

    merged = torch.ops.toma.merge(hidden_states, plan[0], layout)
    ...
    update = add_2 - merged
    norm1 = self.norm1(hidden_states)
    ...
    update_1 = add_5 - hidden_states
    remember(cross_attention_kwargs, (update_1,), (update,))
    return add_5
"""

import copy
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import fx

from toma_fx.passes.pipeline import Pass, run_passes
from toma_fx.passes.plan_nodes import TokenFlow, call, carrier, placeholder
from toma_fx.passes.streams import streams
from toma_fx.runtime import memory, plan


@dataclass(frozen=True, kw_only=True)
class Remember(Pass):
    """Return a block's result on all tokens, and leave its updates in the scope."""

    name: ClassVar[str] = "remember"

    flow: TokenFlow
    merging: tuple[Pass, ...]
    """Passes that make the plan and merge; empty if later steps do not merge."""
    control: bool
    """True also runs the block on merged tokens, to remember their update."""

    def apply(self, gm: fx.GraphModule) -> int:
        untouched = copy.deepcopy(gm.graph)
        run_passes(gm, self.merging)
        graph, output = gm.graph, gm.graph.output_node()
        with graph.inserting_before(output):
            merged = [each.update_of_merged(graph) for each in streams(graph, self.flow)]
            arguments: dict[fx.Node, Any] = {
                node: placeholder(graph, str(node.target))
                for node in untouched.find_nodes(op="placeholder")
            }
            output.args = (graph.graph_copy(untouched, arguments),)
            whole = [each.update(graph) for each in streams(graph, self.flow)]
            kwargs = carrier(graph, self.flow.attention_kwargs)
            # No other node may use the plan here, but later steps need it.
            asked = graph.find_nodes(op="call_function", target=plan.shared)
            given = (tuple(merged),) if self.control else ((), *asked)
            call(graph, memory.remember, (kwargs, tuple(whole), *given), name="remembered")
        return len(whole)
