"""The transformer of HunyuanImage 2.1."""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from toma_fx.families import noise
from toma_fx.families.example_tensors import check_size, random_tensors, rotary_tables
from toma_fx.families.rows import NOT_MEASURED, Block, Family, Grid, KeyMask, Place, TokenGrids
from toma_fx.passes.plan_nodes import Rows, TokenFlow
from toma_fx.passes.sites import Site

NATIVE_PIXELS = 2048
PIXELS_PER_TOKEN = 32
"""Pixels per token along a side: 32 per latent, and each latent is a token."""
TEXT_TOKENS, GLYPH_TOKENS = 1000, 128
"""Number of tokens of the prompt, and of the text that the image shows."""

SCHEDULER: dict[str, Any] = {"shift": 5.0}
"""The shift of the authors' own runs; that of the distilled model is 4."""

ARCHITECTURES: dict[str, dict[str, Any]] = {
    "hunyuan-image-2.1": {"text_embed_2_dim": 1472},
    "hunyuan-image-2.1-distilled": {
        "text_embed_2_dim": 1472,
        "guidance_embeds": True,
        "use_meanflow": True,
    },
}
"""Configurations of published transformers, where they differ from diffusers' defaults."""

_noise_level = noise.level_of_thousand


def _run_levels(scheduler: Any, steps: int, call: Mapping[str, Any]) -> list[float]:
    planned = noise.flow_scheduler(**SCHEDULER) if scheduler is None else scheduler
    return noise.levels_of_flow(planned, steps, sigmas=noise.even_sigmas(steps))


def _sequence_lengths(call: Mapping[str, Any]) -> set[int]:
    texts = (call.get("encoder_hidden_states"), call.get("encoder_hidden_states_2"))
    text = sum(each.shape[1] for each in texts if each is not None)
    return {math.prod(call["hidden_states"].shape[2:]) + text}


def example_call(
    model: Any, like: Tensor, *, batch: int, height: int | None, width: int | None
) -> dict[str, Any]:
    """Make up the keyword arguments of a call of a HunyuanImage transformer, with arbitrary values.

    Args:
        model: the transformer; its tensors may be without data.
        like: an empty tensor with the device and dtype in which the transformer computes.
        batch: number of images.
        height: image height in pixels; 2048 if omitted.
        width: image width in pixels; the height if omitted.

    Raises:
        ModelError: when the size is not a multiple of a token's size.
    """
    config = model.config
    device, dtype = like.device, like.dtype
    height = NATIVE_PIXELS if height is None else height
    width = height if width is None else width
    check_size(height, width, PIXELS_PER_TOKEN)
    rows, columns = height // PIXELS_PER_TOKEN, width // PIXELS_PER_TOKEN
    random = random_tensors(like)
    call: dict[str, Any] = {
        "hidden_states": random(batch, config.in_channels, rows, columns),
        "timestep": torch.full((batch,), 500.0, device=device, dtype=dtype),
        "encoder_hidden_states": random(batch, TEXT_TOKENS, config.text_embed_dim),
        # 1 marks tokens that are not padding.
        "encoder_attention_mask": torch.ones(batch, TEXT_TOKENS, device=device, dtype=torch.int64),
    }
    if config.text_embed_2_dim is not None:
        call["encoder_hidden_states_2"] = random(batch, GLYPH_TOKENS, config.text_embed_2_dim)
        call["encoder_attention_mask_2"] = torch.zeros(
            batch, GLYPH_TOKENS, device=device, dtype=torch.int64
        )
    if config.guidance_embeds:
        call["guidance"] = torch.full((batch,), 3250.0, device=device, dtype=dtype)
    if config.use_meanflow:  # the model also takes the timestep of the next step
        call["timestep_r"] = torch.full((batch,), 400.0, device=device, dtype=dtype)
    return call


_MODULE = "diffusers.models.transformers.transformer_hunyuanimage"
_FLOW = TokenFlow(
    output=0,
    text="encoder_hidden_states",
    image_first=True,
    rows=(
        Rows(argument="image_rotary_emb", items=(0, 1), dim=0),
        Rows(argument="attention_mask", dim=-1, joint=True, optional=True),
    ),
)
_MASK = KeyMask(argument="attention_mask", shape=(2, 1, 1, 72))
_ATTENTION = Site(components=("self_attention",), enter=("attn",), leave="attn", outputs=(0,))


def _examples(block: Any) -> dict[str, Any]:
    like = torch.empty(0, dtype=torch.float16, device="meta")
    width = block.attn.query_dim
    return {
        "hidden_states": like.new_empty(2, 64, width),
        "encoder_hidden_states": like.new_empty(2, 8, width),
        "temb": like.new_empty(2, width),
        "attention_mask": like.new_empty(2, 1, 1, 72, dtype=torch.bool),
        "image_rotary_emb": rotary_tables(block.attn, 64),
    }


def _grids(model: Any, call: Mapping[str, Any]) -> tuple[Grid, ...]:
    sizes = call["hidden_states"].shape[2:]
    *frames, rows, columns = (
        size // step for size, step in zip(sizes, model.config.patch_size, strict=True)
    )
    return (Grid(rows, columns, *frames),)


FAMILY = Family(
    name="hunyuan_image",
    cls=f"{_MODULE}.HunyuanImageTransformer2DModel",
    title="HunyuanImage 2.1",
    blocks=(
        Block(
            cls=f"{_MODULE}.HunyuanImageTransformerBlock",
            flow=_FLOW,
            examples=_examples,
            key_mask=_MASK,
            sites=(_ATTENTION, Site(components=("mlp",), enter=("ff",), leave="ff")),
        ),
        Block(
            cls=f"{_MODULE}.HunyuanImageSingleTransformerBlock",
            flow=_FLOW,
            examples=_examples,
            key_mask=_MASK,
            # Attention handles image and text separately, the MLP both in one sequence.
            sites=(_ATTENTION,),
        ),
    ),
    borders=(
        TokenGrids(
            grids=_grids,
            enter=(
                Place(argument="hidden_states", patches=True),
                Place(module="rope", output=0, dim=0),
                Place(module="rope", output=1, dim=0),
            ),
            leave=(Place(patches=True),),
            patch=lambda config: tuple(config.patch_size),
        ),
    ),
    prompt=("encoder_hidden_states",),
    unmerged_by_default={"transformer_blocks": (1, 4), "single_transformer_blocks": (1, 4)},
    unmerged_because=NOT_MEASURED,
    noise_level=_noise_level,
    run_levels=_run_levels,
    example_call=example_call,
    sequence_lengths=_sequence_lengths,
    reads_values=True,
    architectures=ARCHITECTURES,
)
