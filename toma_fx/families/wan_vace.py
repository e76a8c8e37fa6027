"""The transformer of Wan 2.1 VACE, with further blocks that run on a control video."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from toma_fx.families import given, wan
from toma_fx.families.rows import Block, Family, Place
from toma_fx.passes.plan_nodes import TokenFlow

ARCHITECTURES: dict[str, dict[str, Any]] = {
    "wan2.1-vace-1.3b": {**wan.SMALL, "vace_layers": list(range(0, 30, 2))},
    "wan2.1-vace-14b": {},
}
"""Configurations of published transformers, where they differ from diffusers' defaults."""

_MODULE = "diffusers.models.transformers.transformer_wan_vace"


def _examples(block: Any) -> dict[str, Any]:
    examples = wan.examples(block)
    return {**examples, "control_hidden_states": examples["hidden_states"]}


def _reads_given(model: Any, call: Mapping[str, Any]) -> tuple[bool, ...] | None:
    """Return which frames are given: reference images before the video, and kept video frames.

    The last channels of the control video mark, pixel by pixel, what is generated.
    """
    grids, control = wan.grids(model, call), call["control_hidden_states"]
    anew = control[:, 2 * model.config.in_channels :]
    if anew.shape[1] == 0 or anew.shape[2:] != call["hidden_states"].shape[2:]:
        return None
    made = [given.marked_frames(sample[None], *grids) for sample in anew]
    return tuple(not all(of_samples) for of_samples in zip(*made, strict=True))


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
            reads_given=_reads_given,
        ),
    ),
    unmerged_by_default={"blocks": (1, 4), "vace_blocks": (1, 4)},
    architectures=ARCHITECTURES,
    block_counts={"blocks": "num_layers", "vace_blocks": "vace_layers"},
)
