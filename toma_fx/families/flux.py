"""The transformer of FLUX.1: dev, schnell, Fill, Kontext and what was made from them."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from toma_fx.families import noise
from toma_fx.families.example_tensors import image_ids, random_tensors, rotary_tables, token_grid
from toma_fx.families.rows import Block, Family, References, TokenSequence
from toma_fx.passes.plan_nodes import Rows, TokenFlow
from toma_fx.passes.sites import Site

NATIVE_PIXELS = 1024
PIXELS_PER_TOKEN = 16
"""Pixels per token along a side: 8 per latent times 2 latents per token."""
TEXT_TOKENS = 512


def _modulated_norm(count: int) -> Any:
    """Return the example output of a norm: its tokens and ``count`` modulations."""

    def value(module: Any, hidden_states: Tensor, *, emb: Tensor) -> tuple[Tensor, ...]:
        return (hidden_states, *[emb] * count)

    return value


def _attention(
    module: Any, *, hidden_states: Tensor, encoder_hidden_states: Tensor | None = None, **_: Any
) -> Any:
    if encoder_hidden_states is None:
        return hidden_states
    adapters = "IPAdapter" in type(module.processor).__name__
    return (hidden_states, encoder_hidden_states) + (hidden_states,) * adapters


def _examples(block: Any, width: int) -> dict[str, Any]:
    # float16, because Flux clips float16 overflow, and the graph must show it.
    like = torch.empty(0, dtype=torch.float16, device="meta")
    return {
        "hidden_states": like.new_empty(2, 64, width),
        "encoder_hidden_states": like.new_empty(2, 8, width),
        "temb": like.new_empty(2, width),
        "image_rotary_emb": rotary_tables(block.attn, 72),
    }


def _run_levels(scheduler: Any, steps: int, call: Mapping[str, Any]) -> list[float]:
    planned = noise.flow_scheduler(use_dynamic_shifting=True) if scheduler is None else scheduler
    mu = noise.shift_of_size(planned, call["hidden_states"].shape[1])
    return noise.levels_of_flow(planned, steps, sigmas=noise.even_sigmas(steps), mu=mu)


def _sequence_lengths(call: Mapping[str, Any]) -> set[int]:
    image, text = call["hidden_states"].shape[1], call["encoder_hidden_states"].shape[1]
    return {image, image + text}


def example_call(
    model: Any, like: Tensor, *, batch: int, height: int | None, width: int | None
) -> dict[str, Any]:
    """Make up the keyword arguments of a call of a Flux transformer, with arbitrary values.

    Args:
        model: the transformer; its tensors may be without data.
        like: an empty tensor with the device and dtype in which the transformer computes.
        batch: number of images.
        height: image height in pixels; 1024 if omitted.
        width: image width in pixels; the height if omitted.

    Raises:
        ModelError: when the size is not a multiple of a token's size.
    """
    config = model.config
    device, dtype = like.device, like.dtype
    rows, columns = token_grid(height, width, NATIVE_PIXELS, PIXELS_PER_TOKEN)
    random = random_tensors(like)
    call: dict[str, Any] = {
        # The layer, since a Control LoRA widens it.
        "hidden_states": random(batch, rows * columns, model.x_embedder.in_features),
        "encoder_hidden_states": random(batch, TEXT_TOKENS, config.joint_attention_dim),
        "pooled_projections": random(batch, config.pooled_projection_dim),
        "timestep": torch.full((batch,), 0.5, device=device, dtype=dtype),
        "img_ids": image_ids(rows, columns, device).to(dtype),
        "txt_ids": torch.zeros(TEXT_TOKENS, 3, device=device, dtype=dtype),
    }
    if config.guidance_embeds:
        call["guidance"] = torch.full((batch,), 3.5, device=device, dtype=torch.float32)
    # The attribute is absent until an IP-Adapter is loaded, and None after it is unloaded.
    if (projections := getattr(model, "encoder_hid_proj", None)) is not None:
        layers = [each.image_embeds for each in projections.image_projection_layers]
        embeds = [random(batch, 1, layer.in_features) for layer in layers]
        call["joint_attention_kwargs"] = {"ip_adapter_image_embeds": embeds}
    return call


def _edit_call(call: Mapping[str, Any]) -> dict[str, Any]:
    """Make a call of Kontext, whose reference has image number 1."""
    tokens, ids = call["hidden_states"], call["img_ids"]
    number = torch.tensor([1, 0, 0], device=ids.device, dtype=ids.dtype)
    both = torch.cat([tokens, tokens], dim=1)
    return {**call, "hidden_states": both, "img_ids": torch.cat([ids, ids + number])}


_BLOCK = "diffusers.models.transformers.transformer_flux"
_NORM = "diffusers.models.normalization"
_ROTARY = Rows(argument="image_rotary_emb", items=(0, 1), dim=0, joint=True)
_REFUSED = ("ip_adapter_masks", "attention_mask")

FAMILY = Family(
    name="flux",
    cls=f"{_BLOCK}.FluxTransformer2DModel",
    title="FLUX.1 dev, schnell, Fill and Kontext",
    blocks=(
        Block(
            cls=f"{_BLOCK}.FluxTransformerBlock",
            flow=TokenFlow(
                attention_kwargs="joint_attention_kwargs",
                output=1,
                text="encoder_hidden_states",
                rows=(_ROTARY,),
            ),
            refused_by_attention=_REFUSED,
            examples=lambda block: _examples(block, block.norm2.normalized_shape[0]),
            sites=(
                Site(components=("self_attention",), enter=("attn",), leave="attn", outputs=(0, 2)),
                Site(components=("mlp",), enter=("ff",), leave="ff"),
            ),
        ),
        Block(
            cls=f"{_BLOCK}.FluxSingleTransformerBlock",
            flow=TokenFlow(
                attention_kwargs="joint_attention_kwargs",
                output=1,
                text="encoder_hidden_states",
                text_first=True,
                rows=(_ROTARY,),
            ),
            refused_by_attention=_REFUSED,
            examples=lambda block: _examples(block, block.proj_out.out_features),
            sites=(
                Site(components=("self_attention",), enter=("attn",), leave="attn"),
                Site(components=("mlp",), enter=("proj_mlp",), leave="act_mlp"),
                Site(
                    components=("self_attention", "mlp"),
                    enter=("attn", "proj_mlp"),
                    leave="proj_out",
                ),
            ),
        ),
    ),
    borders=(
        TokenSequence(
            tokens="hidden_states",
            ids="img_ids",
            more=("controlnet_block_samples", "controlnet_single_block_samples"),
            enter="x_embedder",
            leave="proj_out",
            positions="pos_embed",
        ),
    ),
    references=References(example=_edit_call),
    attention_kwargs="joint_attention_kwargs",
    prompt=("encoder_hidden_states",),
    leaf_values={
        f"{_NORM}.AdaLayerNormZero": _modulated_norm(4),
        f"{_NORM}.AdaLayerNormZeroSingle": _modulated_norm(1),
        f"{_BLOCK}.FluxAttention": _attention,
    },
    # The first 5 of 19 double-stream and the first 5 of 38 single-stream blocks: the paper's "first
    # 10 blocks" in its authors' configuration.
    unmerged_by_default={"transformer_blocks": (5, 19), "single_transformer_blocks": (5, 38)},
    unmerged_because="spared by default, as in the paper",
    # Measured by benchmarks/methods.py; docs/choose.md has the table.
    regretted=(
        "ruins images: at ratio 0.5, a small trained Flux draws what the prompt asks for in 52 % "
        "of cases instead of 71 %, and in 59 % when it merges below a noise level of 0.8"
    ),
    noise_level=noise.level_of_sigma,
    run_levels=_run_levels,
    example_call=example_call,
    sequence_lengths=_sequence_lengths,
    architectures={"flux": {"guidance_embeds": True}},
    block_counts={
        "transformer_blocks": "num_layers",
        "single_transformer_blocks": "num_single_layers",
    },
)
"""``architectures``: FLUX.1-dev's transformer, where it differs from diffusers' defaults."""
