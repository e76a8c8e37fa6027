"""Hand a block's plan on to the blocks of its group (section 4.3.2), in the scope of the call.

Before::

    weights = torch.ops.toma.weigh(norm1, destinations, ...)
    merged = torch.ops.toma.merge(norm1, weights[0], layout)

After, in the group's first block::

    weights = torch.ops.toma.weigh(norm1, destinations, ...)
    plan = share(cross_attention_kwargs, 'Block', weights[0], weights[1])
    merged = torch.ops.toma.merge(norm1, plan[0], layout)

After, in a block that follows, which makes no plan::

    plan = shared(cross_attention_kwargs, 'Block')
    merged = torch.ops.toma.merge(norm1, plan[0], layout)

After, in the first block where a run keeps its destinations for several steps and only weighs::

    destinations = kept_destinations(cross_attention_kwargs, 'Block')
    weights = torch.ops.toma.weigh(norm1, destinations, ...)
    plan = share(cross_attention_kwargs, 'Block', weights[0], weights[1], destinations)
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import fx

from toma_fx.passes.pipeline import Pass
from toma_fx.passes.plan_nodes import PLAN, call, item, placeholder
from toma_fx.runtime import plan

PARTS = ("merge_weight", "unmerge_weight", "cos", "sin")
"""The parts of a plan that blocks share, in their order, where the block has them."""


@dataclass(frozen=True, kw_only=True)
class HandOn(Pass):
    """Let the uses of a plan's tensors go through the scope of the call."""

    name: ClassVar[str] = "hand_on"

    attention_kwargs: str
    """The argument that carries the scope from block to block."""
    group: str
    """Name under which the blocks of the group find the plan."""
    role: Literal["lead", "follow"]
    keep: bool = False
    """Whether the destinations are handed on too, for later calls."""
    kept_destinations: bool = False
    """Whether the destinations are those of an earlier call."""

    def apply(self, gm: fx.GraphModule) -> int:
        graph = gm.graph
        made = {node.meta[PLAN].name: node for node in graph.nodes if PLAN in node.meta}
        tensors = [made[name] for name in PARTS if name in made and made[name].users]
        destinations = made["destinations"]
        kwargs = placeholder(graph, self.attention_kwargs)
        self._give_example(kwargs, (*tensors, destinations))
        if self.kept_destinations:
            with graph.inserting_before(destinations):
                args = (kwargs, self.group)
                kept = call(graph, plan.kept_destinations, args, name="kept_destinations")
            destinations.replace_all_uses_with(kept)
            destinations = kept
        with graph.inserting_after(max(tensors, key=list(graph.nodes).index)):
            if self.role == "follow":
                through = call(graph, plan.shared, (kwargs, self.group), name="plan")
            else:
                handed = (*tensors, destinations) if self.keep else tuple(tensors)
                through = call(graph, plan.share, (kwargs, self.group, *handed), name="plan")
        at = through
        for index, tensor in enumerate(tensors):
            with graph.inserting_after(at):
                at = item(graph, through, index, name=f"shared_{tensor.name}")
            tensor.replace_all_uses_with(at, delete_user_cb=lambda user: user is not through)
        return len(tensors)

    def _give_example(self, kwargs: fx.Node, plan_nodes: tuple[fx.Node, ...]) -> None:
        """Give the argument that carries the scope an example value with a plan in it."""
        example = tuple(node.meta["val"] for node in plan_nodes)
        scope = plan.CallScope(kept={"": {self.group: example}})
        scope.plans[self.group] = example
        kwargs.meta["val"] = {plan.SCOPE: scope}
