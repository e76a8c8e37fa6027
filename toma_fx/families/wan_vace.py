"""The transformer of Wan 2.1 VACE, in which further blocks run on a video that controls."""

from dataclasses import replace
from typing import Any

from toma_fx.families import wan
from toma_fx.families.rows import Block, Family, Place
from toma_fx.passes.plan_nodes import TokenFlow

ARCHITECTURES: dict[str, dict[str, Any]] = {
    "wan2.1-vace-1.3b": {**wan.SMALL, "vace_layers": list(range(0, 30, 2))},
    "wan2.1-vace-14b": {},
}
"""Published transformers, where they differ from diffusers' defaults."""

_MODULE = "diffusers.models.transformers.transformer_wan_vace"


def _examples(block: Any) -> dict[str, Any]:
    examples = wan.examples(block)
    return {**examples, "control_hidden_states": examples["hidden_states"]}


FAMILY: Family = replace(
    wan.FAMILY,
    name="wan_vace",
    cls=f"{_MODULE}.WanVACETransformer3DModel",
    title="Wan 2.1 VACE",
    blocks=(
        *wan.FAMILY.blocks,
        Block(
            cls=f"{_MODULE}.WanVACETransformerBlock",
            flow=TokenFlow(
                tokens="control_hidden_states",
                output=1,
                also_merged=("hidden_states",),
                also_returned=(0,),
                rows=(wan.ROTARY,),
                prefix=True,
            ),
            examples=_examples,
            sites=wan.SITES,
        ),
    ),
    borders=(
        replace(
            wan.BORDER,
            enter=(*wan.BORDER.enter, Place(argument="control_hidden_states", patches=True)),
        ),
    ),
    unmerged_by_default={"blocks": (1, 4), "vace_blocks": (1, 4)},
    architectures=ARCHITECTURES,
    block_counts={"blocks": "num_layers", "vace_blocks": "vace_layers"},
)
