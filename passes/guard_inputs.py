"""Refuse, at every call, inputs that refer to single image tokens, because merging joins these.

Before::

    passed_on = toma_fx_runtime_plan_pass_on(cross_attention_kwargs)
    attn1 = self.attn1(norm1, attention_mask = attention_mask, **passed_on)

After::

    passed_on = toma_fx_runtime_plan_pass_on(cross_attention_kwargs, 'ip_adapter_masks', ...)
    mask = toma_fx_runtime_plan_pass_on_mask(attention_mask, 'attention_mask', True)
    attn1 = self.attn1(norm1, attention_mask = mask, **passed_on)
"""

from dataclasses import dataclass
from typing import ClassVar

from torch import fx

from toma_fx.passes.pipeline import Pass
from toma_fx.passes.plan_nodes import call, placeholder, redirect
from toma_fx.runtime import plan


@dataclass(frozen=True, kw_only=True)
class GuardInputs(Pass):
    """Guard the attention masks of merged components and the attention kwargs."""

    name: ClassVar[str] = "guard_inputs"

    components: tuple[str, ...]
    """Components that run on merged tokens."""
    masks: tuple[tuple[str, str], ...] = ()
    """Pairs of an attention mask argument and the component that uses it."""
    refused: tuple[str, ...] = ()
    """Attention kwargs that no merged block supports."""
    refused_by_attention: tuple[str, ...] = ()
    """Attention kwargs that refer to single image tokens, which merged attention does not have."""

    @property
    def refused_kwargs(self) -> tuple[str, ...]:
        """Attention kwargs to refuse."""
        return self.refused + (() if self.components == ("mlp",) else self.refused_by_attention)

    def apply(self, gm: fx.GraphModule) -> int:
        graph = gm.graph
        changed = 0
        if self.refused_kwargs:
            for passed_on in graph.find_nodes(op="call_function", target=plan.pass_on):
                passed_on.args = (*passed_on.args, *self.refused_kwargs)
                changed += 1
        for name, component in self.masks:
            if component in self.components:
                mask = placeholder(graph, name)
                with graph.inserting_after(mask):
                    guarded = call(
                        graph,
                        plan.pass_on_mask,
                        (mask, name, component == "self_attention"),
                        name=f"passed_on_{name}",
                    )
                redirect(mask, guarded)
                changed += 1
        return changed
