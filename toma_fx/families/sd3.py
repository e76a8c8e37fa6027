"""The transformer of Stable Diffusion 3 and 3.5."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from toma_fx.families import noise
from toma_fx.families.example_tensors import check_size, random_tensors
from toma_fx.families.rows import NOT_MEASURED, Block, Family, Grid, Place, TokenGrids
from toma_fx.passes.plan_nodes import TokenFlow
from toma_fx.passes.sites import Site

PIXELS_PER_LATENT = 8
LATENTS_PER_TOKEN = 2
"""Latents per token along a side, in all published models."""
TEXT_TOKENS = 77 + 256
"""Number of tokens of CLIP, then of T5."""

SCHEDULER: dict[str, Any] = {"shift": 3.0}
"""The configuration of the published models' schedulers."""

_MEDIUM: dict[str, Any] = {
    "num_layers": 24,
    "num_attention_heads": 24,
    "caption_projection_dim": 1536,
}

ARCHITECTURES: dict[str, dict[str, Any]] = {
    "sd3-medium": {**_MEDIUM, "pos_embed_max_size": 192},
    "sd3.5-medium": {
        **_MEDIUM,
        "pos_embed_max_size": 384,
        "dual_attention_layers": tuple(range(13)),
        "qk_norm": "rms_norm",
    },
    "sd3.5-large": {
        "num_layers": 38,
        "num_attention_heads": 38,
        "caption_projection_dim": 2432,
        "pos_embed_max_size": 192,
        "qk_norm": "rms_norm",
    },
}
"""Configurations of published transformers, where they differ from diffusers' defaults."""

_noise_level = noise.level_of_thousand


def _run_levels(scheduler: Any, steps: int, call: Mapping[str, Any]) -> list[float]:
    planned = noise.flow_scheduler(**SCHEDULER) if scheduler is None else scheduler
    mu = noise.shift_of_size(planned, _tokens(call["hidden_states"]))
    return noise.levels_of_flow(planned, steps, mu=mu)


def _tokens(latents_BCHW: Tensor) -> int:
    rows, columns = latents_BCHW.shape[-2:]
    return (rows // LATENTS_PER_TOKEN) * (columns // LATENTS_PER_TOKEN)


def _sequence_lengths(call: Mapping[str, Any]) -> set[int]:
    image, text = _tokens(call["hidden_states"]), call["encoder_hidden_states"].shape[1]
    return {image, image + text}


def example_call(
    model: Any, like: Tensor, *, batch: int, height: int | None, width: int | None
) -> dict[str, Any]:
    """Make up the keyword arguments of a Stable Diffusion 3 call, with arbitrary values.

    Args:
        model: the transformer; its tensors may be without data.
        like: an empty tensor with the device and dtype in which the transformer computes.
        batch: number of images.
        height: image height in pixels; the model's native size if omitted.
        width: image width in pixels; the height if omitted, or the native size if both are.

    Raises:
        ModelError: when the size is not a multiple of a token's size.
    """
    config = model.config
    height = config.sample_size * PIXELS_PER_LATENT if height is None else height
    width = height if width is None else width
    check_size(height, width, PIXELS_PER_LATENT * config.patch_size)
    rows, columns = height // PIXELS_PER_LATENT, width // PIXELS_PER_LATENT
    random = random_tensors(like)
    return {
        "hidden_states": random(batch, config.in_channels, rows, columns),
        "timestep": torch.full((batch,), 500.0, device=like.device, dtype=torch.float32),
        "encoder_hidden_states": random(batch, TEXT_TOKENS, config.joint_attention_dim),
        "pooled_projections": random(batch, config.pooled_projection_dim),
    }


def _examples(block: Any) -> dict[str, Any]:
    like = torch.empty(0, dtype=torch.float16, device="meta")
    width = block.norm2.normalized_shape[0]
    return {
        "hidden_states": like.new_empty(2, 64, width),
        "encoder_hidden_states": like.new_empty(2, 8, width),
        "temb": like.new_empty(2, width),
    }


def _grids(model: Any, call: Mapping[str, Any]) -> tuple[Grid, ...]:
    rows, columns = call["hidden_states"].shape[-2:]
    size = model.config.patch_size
    return (Grid(rows // size, columns // size),)


FAMILY = Family(
    name="sd3",
    cls="diffusers.models.transformers.transformer_sd3.SD3Transformer2DModel",
    title="Stable Diffusion 3 and 3.5",
    blocks=(
        Block(
            cls="diffusers.models.attention.JointTransformerBlock",
            flow=TokenFlow(
                attention_kwargs="joint_attention_kwargs",
                output=1,
                text="encoder_hidden_states",
            ),
            refused_by_attention=("attention_mask",),
            examples=_examples,
            sites=(
                Site(components=("self_attention",), enter=("attn",), leave="attn", outputs=(0,)),
                Site(components=("self_attention",), enter=("attn2",), leave="attn2"),
                Site(components=("mlp",), enter=("ff",), leave="ff"),
            ),
        ),
    ),
    borders=(
        TokenGrids(
            grids=_grids,
            enter=(
                # Reorder after the position embedding, which adds positions to tokens.
                Place(module="pos_embed"),
                Place(argument="block_controlnet_hidden_states", listed=True),
            ),
            leave=(Place(patches=True),),
            patch=lambda config: (config.patch_size, config.patch_size),
        ),
    ),
    attention_kwargs="joint_attention_kwargs",
    prompt=("encoder_hidden_states",),
    unmerged_by_default={"transformer_blocks": (1, 4)},
    unmerged_because=NOT_MEASURED,
    noise_level=_noise_level,
    run_levels=_run_levels,
    example_call=example_call,
    sequence_lengths=_sequence_lengths,
    architectures=ARCHITECTURES,
)
