"""Share a block's plan with the blocks of its group (section 4.3.2), in the scope of the call.

Before::

    weights = torch.ops.toma.weigh(norm1, destinations, ...)
    merged = torch.ops.toma.merge(norm1, weights[0], layout)

After, in the group's first block::

    weights = torch.ops.toma.weigh(norm1, destinations, ...)
    plan = share(cross_attention_kwargs, 'Block', weights[0], weights[1])
    merged = torch.ops.toma.merge(norm1, plan[0], layout)

After, in a block that follows and makes no plan::

    plan = shared(cross_attention_kwargs, 'Block')
    merged = torch.ops.toma.merge(norm1, plan[0], layout)

After, in the first block, if a run keeps its destinations for several steps and only weighs::

    destinations = kept_destinations(cross_attention_kwargs, 'Block')
    weights = torch.ops.toma.weigh(norm1, destinations, ...)
    plan = share(cross_attention_kwargs, 'Block', weights[0], weights[1], destinations)
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import fx

from toma_fx.passes.pipeline import EXAMPLE_SCOPE, Pass
from toma_fx.passes.plan_nodes import PLAN, call, carrier, item
from toma_fx.runtime import arguments, plan

_OPTIONAL = (arguments.rows_if_given, arguments.mask_of_keys)


@dataclass(frozen=True, kw_only=True)
class HandOn(Pass):
    """Route the uses of a plan's tensors through the scope of the call."""

    name: ClassVar[str] = "hand_on"

    attention_kwargs: str | None
    """Argument that carries the scope from block to block; None for the scope of the thread."""
    group: str
    """Name under which the blocks of the group find the plan."""
    role: Literal["lead", "follow"]
    keep: bool = False
    """True also shares the destinations, for later calls."""
    kept_destinations: bool = False
    """True takes the destinations of an earlier call."""
    own_rows: bool = False
    """True lets every block take the rows that change from step to step, because the plan stays."""

    def apply(self, gm: fx.GraphModule) -> int:
        graph = gm.graph
        made = {node.meta[PLAN].name: node for node in graph.nodes if PLAN in node.meta}
        destinations = made.pop("destinations")
        inside = {*made.values()}
        own = [node for node in inside if self.own_rows and node.meta[PLAN].changes]
        # Tensors that are only used to compute other parts of the plan need not be shared.
        tensors = [
            node
            for name, node in made.items()
            if name != "layout" and node.users.keys() - inside and node not in own
        ]
        # Values that may be None, or change with each step, are no part of a plan: each block takes
        # them itself.
        takers = [user for user in destinations.users if user.target in _OPTIONAL]
        takers += own
        first = (destinations,) if takers else ()
        scope = self._example_scope(gm.meta[EXAMPLE_SCOPE], (*first, *tensors, destinations))
        gm.meta[EXAMPLE_SCOPE] = scope
        kwargs = carrier(graph, self.attention_kwargs)
        if kwargs is not None:
            kwargs.meta["val"] = {plan.SCOPE: scope}
        if self.kept_destinations:
            with graph.inserting_before(destinations):
                args = (kwargs, self.group)
                kept = call(graph, plan.kept_destinations, args, name="kept_destinations")
            destinations.replace_all_uses_with(kept)
            destinations = kept
        uses = {tensor: list(tensor.users) for tensor in tensors}
        if takers:
            uses = {destinations: takers, **uses}
        with graph.inserting_after(max(tensors, key=list(graph.nodes).index)):
            if self.role == "follow":
                through = call(graph, plan.shared, (kwargs, self.group), name="plan")
            else:
                handed = (*uses, destinations) if self.keep else tuple(uses)
                through = call(graph, plan.share, (kwargs, self.group, *handed), name="plan")
        at = through
        for index, (tensor, users) in enumerate(uses.items()):
            with graph.inserting_after(at):
                at = item(graph, through, index, name=f"shared_{tensor.name}")
            for user in users:
                user.replace_input_with(tensor, at)
        place = list(graph.nodes).index
        for taker in [each for each in takers if place(each) < place(through)]:
            at.append(taker)
        return len(uses)

    def _example_scope(
        self, before: plan.CallScope, plan_nodes: tuple[fx.Node, ...]
    ) -> plan.CallScope:
        """Return the scope, with a plan in it, in which example values are computed."""
        example = tuple(node.meta["val"] for node in plan_nodes)
        kept = {"": {self.group: example}}
        scope = plan.CallScope(grids=before.grids, unmerged=before.unmerged, kept=kept)
        scope.plans[self.group] = example
        return scope
