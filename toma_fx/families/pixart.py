"""The transformer of PixArt-alpha and PixArt-Sigma."""

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
TEXT_TOKENS, TEXT_TOKENS_SIGMA = 120, 300

_PIXART: dict[str, Any] = {"caption_channels": 4096}
_SIGMA: dict[str, Any] = {**_PIXART, "use_additional_conditions": False}

ARCHITECTURES: dict[str, dict[str, Any]] = {
    "pixart-alpha-512": {**_PIXART, "sample_size": 64},
    "pixart-alpha-1024": _PIXART,
    "pixart-sigma-512": {**_SIGMA, "sample_size": 64, "interpolation_scale": 1},
    "pixart-sigma-1024": {**_SIGMA, "interpolation_scale": 2},
    "pixart-sigma-2048": {**_SIGMA, "sample_size": 256, "interpolation_scale": 4},
}
"""Configurations of published transformers, where they differ from diffusers' defaults."""

_noise_level = noise.level_of_thousand


def _run_levels(scheduler: Any, steps: int, call: Mapping[str, Any]) -> list[float]:
    timesteps = noise.levels_of_run(scheduler, steps, scale=1)
    if timesteps is None:  # evenly spaced: within one training step of the models' own schedulers
        return noise.even_sigmas(steps)
    return [noise.level_of_thousand(t, scheduler) for t in timesteps]


def _sequence_lengths(call: Mapping[str, Any]) -> set[int]:
    rows, columns = call["hidden_states"].shape[-2:]
    return {(rows // LATENTS_PER_TOKEN) * (columns // LATENTS_PER_TOKEN)}


def example_call(
    model: Any, like: Tensor, *, batch: int, height: int | None, width: int | None
) -> dict[str, Any]:
    """Make up the keyword arguments of a call of a PixArt transformer, with arbitrary values.

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
    device = like.device
    height = config.sample_size * PIXELS_PER_LATENT if height is None else height
    width = height if width is None else width
    check_size(height, width, PIXELS_PER_LATENT * config.patch_size)
    rows, columns = height // PIXELS_PER_LATENT, width // PIXELS_PER_LATENT
    text = TEXT_TOKENS_SIGMA if config.use_additional_conditions is False else TEXT_TOKENS
    random = random_tensors(like)
    return {
        "hidden_states": random(batch, config.in_channels, rows, columns),
        "encoder_hidden_states": random(batch, text, config.caption_channels),
        # 1 marks tokens that are not padding.
        "encoder_attention_mask": torch.ones(batch, text, device=device, dtype=torch.int64),
        "timestep": torch.full((batch,), 500, device=device, dtype=torch.int64),
        "added_cond_kwargs": _added(config, like, batch, height, width),
    }


def _added(config: Any, like: Tensor, batch: int, height: int, width: int) -> dict[str, Any]:
    asked = config.use_additional_conditions
    if not (config.sample_size == 128 if asked is None else asked):
        return {"resolution": None, "aspect_ratio": None}
    size = torch.tensor([height, width], device=like.device).repeat(batch, 1)
    ratio = torch.tensor([height / width], device=like.device).repeat(batch, 1)
    return {"resolution": size.to(like.dtype), "aspect_ratio": ratio.to(like.dtype)}


def _examples(block: Any) -> dict[str, Any]:
    like = torch.empty(0, dtype=torch.float16, device="meta")
    return {
        "hidden_states": like.new_empty(2, 64, block.dim),
        "timestep": like.new_empty(2, 6 * block.dim),
    }


def _grids(model: Any, call: Mapping[str, Any]) -> tuple[Grid, ...]:
    rows, columns = call["hidden_states"].shape[-2:]
    size = model.config.patch_size
    return (Grid(rows // size, columns // size),)


FAMILY = Family(
    name="pixart",
    cls="diffusers.models.transformers.pixart_transformer_2d.PixArtTransformer2DModel",
    title="PixArt-alpha and PixArt-Sigma",
    blocks=(
        Block(
            cls="diffusers.models.attention.BasicTransformerBlock",
            flow=TokenFlow(attention_kwargs="cross_attention_kwargs"),
            examples=_examples,
            masks=(
                ("attention_mask", "self_attention"),
                ("encoder_attention_mask", "cross_attention"),
            ),
            refused=("gligen",),
            refused_by_attention=("attention_mask",),
            sites=(
                Site(components=("self_attention",), enter=("attn1",), leave="attn1"),
                Site(components=("cross_attention",), enter=("attn2",), leave="attn2"),
                Site(components=("mlp",), enter=("ff",), leave="ff"),
            ),
        ),
    ),
    borders=(
        TokenGrids(
            grids=_grids,
            # Reorder after the position embedding, which adds positions to tokens.
            enter=(Place(module="pos_embed"),),
            leave=(Place(patches=True),),
            patch=lambda config: (config.patch_size, config.patch_size),
        ),
    ),
    attention_kwargs="cross_attention_kwargs",
    prompt=("encoder_hidden_states",),
    unmerged_by_default={"transformer_blocks": (1, 4)},
    unmerged_because=NOT_MEASURED,
    noise_level=_noise_level,
    run_levels=_run_levels,
    example_call=example_call,
    sequence_lengths=_sequence_lengths,
    architectures=ARCHITECTURES,
)
