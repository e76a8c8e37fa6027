"""Refuse, at every call, inputs that speak of single image tokens, which merging has joined.

Before::

    carried = toma_fx_runtime_plan_carry(cross_attention_kwargs, 'gligen')
    attn1 = self.attn1(norm1, attention_mask = attention_mask, **carried)

After::

    carried = toma_fx_runtime_plan_carry(cross_attention_kwargs, 'gligen', 'ip_adapter_masks', ...)
    mask = toma_fx_runtime_plan_carry_mask(attention_mask, 'attention_mask', True)
    attn1 = self.attn1(norm1, attention_mask = mask, **carried)
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar

from torch import fx

from toma_fx.passes.pipeline import Pass
from toma_fx.passes.plan_nodes import call, placeholder, redirect
from toma_fx.runtime import plan


@dataclass(frozen=True, kw_only=True)
class GuardInputs(Pass):
    """Guard the attention masks of merged components, and the attention kwargs."""

    name: ClassVar[str] = "guard_inputs"

    components: tuple[str, ...]
    """The components that run on merged tokens."""
    masks: Mapping[str, str] = field(default_factory=dict)
    """The component that each attention mask argument goes to."""
    refused: tuple[str, ...] = ("ip_adapter_masks", "attention_mask")
    """Attention kwargs that refer to image tokens, for attention on merged ones."""

    def apply(self, gm: fx.GraphModule) -> int:
        graph = gm.graph
        changed = 0
        if self.components != ("mlp",):  # or attention sees every token
            for carry in graph.find_nodes(op="call_function", target=plan.carry):
                carry.args = (*carry.args, *self.refused)
                changed += 1
        for name, component in self.masks.items():
            if component in self.components:
                mask = placeholder(graph, name)
                with graph.inserting_after(mask):
                    guarded = call(
                        graph,
                        plan.carry_mask,
                        (mask, name, component == "self_attention"),
                        name=f"carried_{name}",
                    )
                redirect(mask, guarded)
                changed += 1
        return changed
