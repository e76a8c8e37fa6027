"""Remove leftovers of the other passes: repeated pure calls, and nodes that become unused.

Before::

    getattr_1 = encoder_hidden_states.shape;  getitem = getattr_1[1]
    getattr_2 = encoder_hidden_states.shape;  getitem_1 = getattr_2[1]

After::

    getattr_1 = encoder_hidden_states.shape;  getitem = getattr_1[1]
"""

import operator
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import fx

from toma_fx.passes.pipeline import Pass
from toma_fx.runtime import arguments, plan

PURE = (
    getattr,
    operator.getitem,
    arguments.rotary_tables,
    arguments.several,
    plan.text_tokens,
    plan.unmerged_tokens,
)
"""Functions whose calls the other passes repeat."""


@dataclass(frozen=True, kw_only=True)
class Cleanup(Pass):
    """Eliminate the common subexpressions that inserting and sharing plans create."""

    name: ClassVar[str] = "cleanup"

    def apply(self, gm: fx.GraphModule) -> int:
        seen: dict[Any, fx.Node] = {}
        removed = 0
        for node in gm.graph.nodes:
            if node.op != "call_function" or node.target not in PURE:
                continue
            # Slices are not hashable, but equal text means the same nodes.
            first = seen.setdefault((node.target, str(node.args)), node)
            if first is not node:
                node.replace_all_uses_with(first)
                gm.graph.erase_node(node)
                removed += 1
        return removed
