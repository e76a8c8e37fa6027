"""A step between full steps of a run with memory: correct the remembered update.

Before, in the graph of a block that merges with the plan of the last full step::

    merged = torch.ops.toma.merge(hidden_states, plan[0], layout)
    ...
    update = add_2 - merged
    unmerged = torch.ops.toma.unmerge(update, plan[1], layout)
    return hidden_states + unmerged

After, with ``u`` the remembered update, ``u'`` the one before it, and ``u_m`` the remembered
update of merged tokens::

    change = (u - u') * steps_ahead(cross_attention_kwargs)
    expected = hidden_states + (u + change)
    merged = torch.ops.toma.merge(hidden_states, plan[0], layout)
    ...
    missed = (add_2 - merged) - u_m - torch.ops.toma.merge(change, plan[0], layout)
    return expected + torch.ops.toma.unmerge(missed * theta, plan[1], layout)

Tokens that do not merge, such as text, do the same without merge and unmerge.
"""

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import fx

from toma_fx.passes.pipeline import EXAMPLE_SCOPE, Pass
from toma_fx.passes.plan_nodes import TokenFlow, call, carrier, item
from toma_fx.passes.streams import Stream, return_instead, streams
from toma_fx.runtime import memory


@dataclass(frozen=True, kw_only=True)
class Recall(Pass):
    """Use merged tokens only to correct the updates that memory predicts."""

    name: ClassVar[str] = "recall"

    flow: TokenFlow
    theta: float
    """Share of the correction that is added. With 0, nothing runs on merged tokens."""
    extrapolate: bool
    """True extrapolates the last change of the updates."""
    control: bool
    """True compares the update of merged tokens with their update at the full step; False compares
    it with the merged remembered update."""

    def apply(self, gm: fx.GraphModule) -> int:
        graph = gm.graph
        found = streams(graph, self.flow)
        with graph.inserting_before(graph.output_node()):
            now = [each.update_of_merged(graph) for each in found]
        self._give_examples(gm, found, now)
        kwargs = carrier(graph, self.flow.attention_kwargs)
        with graph.inserting_before(graph.output_node()):
            recalled = call(graph, memory.recall, (kwargs,), name="recalled")
            fields = [item(graph, recalled, field) for field in range(3)]
            ahead = None
            if self.extrapolate:
                ahead = call(graph, memory.steps_ahead, (kwargs,), name="ahead")
            returned = [
                self._corrected(
                    graph, stream, update, [item(graph, field, place) for field in fields], ahead
                )
                for place, (stream, update) in enumerate(zip(found, now, strict=True))
            ]
        return_instead(graph, returned)
        return len(found)

    def _give_examples(self, gm: fx.GraphModule, found: list[Stream], now: list[fx.Node]) -> None:
        """Provide the memories with which example values are computed."""
        whole = tuple(each.returned.meta["val"] for each in found)
        merged = tuple(
            (each.returned if each.merged is None else each.merged).meta["val"] for each in found
        )
        memories = memory.Memories({}, whole[0].new_empty(()))
        memories.here = memory.BlockMemory(whole, merged, whole)
        gm.meta[EXAMPLE_SCOPE].memories = memories

    def _corrected(
        self,
        graph: fx.Graph,
        stream: Stream,
        now: fx.Node,
        recalled: Sequence[fx.Node],
        ahead: fx.Node | None,
    ) -> fx.Node:
        """Return the corrected output of a stream whose (merged) update is now ``now``."""
        kept, kept_merged, earlier = recalled
        expected, change = kept, None
        if ahead is not None:
            change = _both(graph, operator.sub, kept, earlier, "change")
            change = _both(graph, operator.mul, change, ahead, "change")
            expected = _both(graph, operator.add, kept, change, "expected")
        out = expected
        if stream.tokens is not None:
            out = _both(graph, operator.add, stream.tokens, expected, "expected")
        if self.theta == 0:
            return out
        if self.control:
            missed = _both(graph, operator.sub, now, kept_merged, "missed")
            if change is not None:
                missed = _both(graph, operator.sub, missed, stream.merge(graph, change), "missed")
        else:
            missed = _both(graph, operator.sub, now, stream.merge(graph, expected), "missed")
        if self.theta != 1:
            missed = _both(graph, operator.mul, missed, self.theta, "missed")
        return _both(graph, operator.add, out, stream.unmerge(graph, missed), "corrected")


def _both(graph: fx.Graph, operation: Any, first: fx.Node, second: Any, name: str) -> fx.Node:
    return call(graph, operation, (first, second), name=name)
