"""Use one plan for all sites that can share it (section 4.3.2): those of a block, or of a group.

Before, with a plan for each site::

    destinations = torch.ops.toma.select(norm1, layout, ...)
    weights = torch.ops.toma.weigh(norm1, destinations, layout, ...)
    ...
    destinations_1 = torch.ops.toma.select(norm2, layout_1, ...)
    weights_1 = torch.ops.toma.weigh(norm2, destinations_1, layout_1, ...)

After, the first plan serves all sites, and the others are removed::

    destinations = torch.ops.toma.select(norm1, layout, ...)
    weights = torch.ops.toma.weigh(norm1, destinations, layout, ...)

In the graph of a block, all sites share its plan. In a flat graph, those of a group do.
"""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, fx

from toma_fx.errors import CaptureError
from toma_fx.passes.pipeline import Pass
from toma_fx.passes.plan_nodes import PLAN, PlanPart


@dataclass(frozen=True, kw_only=True)
class OnePlan(Pass):
    """Make every site of a group use the group's first plan.

    Raises:
        CaptureError: when sites of a group have different numbers of tokens.
    """

    name: ClassVar[str] = "one_plan"

    def apply(self, gm: fx.GraphModule) -> int:
        first: dict[PlanPart, fx.Node] = {}
        changed = 0
        for node in gm.graph.nodes:
            part = node.meta.get(PLAN)
            if part is None or first.setdefault(part, node) is node or not node.users:
                continue
            _check_same_size(node, first[part])
            node.replace_all_uses_with(first[part])
            changed += 1
        return changed


def _check_same_size(node: fx.Node, first: fx.Node) -> None:
    value, like = node.meta["val"], first.meta["val"]
    if isinstance(value, Tensor) and value.shape != like.shape:
        raise CaptureError(
            f"{node.format_node()} is a plan of shape {tuple(value.shape)}, but its group's plan "
            f"has {tuple(like.shape)}; transform with share='block'"
        )
