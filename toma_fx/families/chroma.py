"""The transformer of Chroma, derived from FLUX.1 schnell."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from toma_fx.families import noise
from toma_fx.families.example_tensors import image_ids, random_tensors, rotary_tables, token_grid
from toma_fx.families.rows import NOT_MEASURED, Block, Family, Form, TokenSequence
from toma_fx.passes.plan_nodes import Rows, TokenFlow
from toma_fx.passes.sites import Site

NATIVE_PIXELS = 1024
PIXELS_PER_TOKEN = 16
"""Pixels per token along a side: 8 per latent times 2 latents per token."""
TEXT_TOKENS = 512

SCHEDULER: dict[str, Any] = {"shift": 3.0}
"""The configuration of Chroma1-HD's scheduler."""

ARCHITECTURES: dict[str, dict[str, Any]] = {"chroma": {}}
"""The published transformers use diffusers' defaults."""

_noise_level = noise.level_of_sigma


def _run_levels(scheduler: Any, steps: int, call: Mapping[str, Any]) -> list[float]:
    planned = noise.flow_scheduler(**SCHEDULER) if scheduler is None else scheduler
    mu = noise.shift_of_size(planned, call["hidden_states"].shape[1])
    return noise.levels_of_flow(planned, steps, sigmas=noise.even_sigmas(steps), mu=mu)


def _sequence_lengths(call: Mapping[str, Any]) -> set[int]:
    image, text = call["hidden_states"].shape[1], call["encoder_hidden_states"].shape[1]
    return {image + text}


def example_call(
    model: Any, like: Tensor, *, batch: int, height: int | None, width: int | None
) -> dict[str, Any]:
    """Make up the keyword arguments of a call of a Chroma transformer, with arbitrary values.

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
    image = rows * columns
    random = random_tensors(like)
    return {
        "hidden_states": random(batch, image, config.in_channels),
        "timestep": torch.full((batch,), 0.5, device=device, dtype=dtype),
        "encoder_hidden_states": random(batch, TEXT_TOKENS, config.joint_attention_dim),
        "txt_ids": torch.zeros(TEXT_TOKENS, 3, device=device, dtype=dtype),
        "img_ids": image_ids(rows, columns, device).to(dtype),
        # 1 marks tokens that are not padding.
        "attention_mask": torch.ones(batch, TEXT_TOKENS + image, device=device, dtype=dtype),
    }


_MODULE = "diffusers.models.transformers.transformer_chroma"
_ROWS = (
    Rows(argument="image_rotary_emb", items=(0, 1), dim=0, joint=True),
    Rows(argument="attention_mask", joint=True),
)
_REFUSED = ("ip_adapter_masks",)
EXAMPLE_TOKENS = 64
WITHOUT_MASK = " without a mask"


def _form(mask: Tensor | None) -> str:
    """Return the form of a block: with or without a mask of queries and keys."""
    return WITHOUT_MASK if mask is None else ""


_FORM = Form(argument="attention_mask", of=_form, names=("", WITHOUT_MASK))


def _like() -> Tensor:
    # float16, because Chroma clips float16 overflow, and the graph must show it.
    return torch.empty(0, dtype=torch.float16, device="meta")


def _double_examples(block: Any, form: str = "") -> dict[str, Any]:
    like, width = _like(), block.norm2.normalized_shape[0]
    return {
        "hidden_states": like.new_empty(2, EXAMPLE_TOKENS, width),
        "encoder_hidden_states": like.new_empty(2, 8, width),
        "temb": like.new_empty(2, 12, width),
        **_joint_examples(block, form),
    }


def _single_examples(block: Any, form: str = "") -> dict[str, Any]:
    like, width = _like(), block.proj_out.out_features
    return {
        "hidden_states": like.new_empty(2, 8 + EXAMPLE_TOKENS, width),
        "temb": like.new_empty(2, 3, width),
        **_joint_examples(block, form),
    }


def _joint_examples(block: Any, form: str) -> dict[str, Any]:
    tokens = 8 + EXAMPLE_TOKENS
    return {
        "image_rotary_emb": rotary_tables(block.attn, tokens),
        "attention_mask": None if form else _like().new_empty(2, tokens),
    }


FAMILY = Family(
    name="chroma",
    cls=f"{_MODULE}.ChromaTransformer2DModel",
    title="Chroma",
    blocks=(
        Block(
            cls=f"{_MODULE}.ChromaTransformerBlock",
            flow=TokenFlow(
                attention_kwargs="joint_attention_kwargs",
                output=1,
                text="encoder_hidden_states",
                rows=_ROWS,
            ),
            refused_by_attention=_REFUSED,
            examples=_double_examples,
            form=_FORM,
            sites=(
                Site(components=("self_attention",), enter=("attn",), leave="attn", outputs=(0, 2)),
                Site(components=("mlp",), enter=("ff",), leave="ff"),
            ),
        ),
        Block(
            cls=f"{_MODULE}.ChromaSingleTransformerBlock",
            flow=TokenFlow(attention_kwargs="joint_attention_kwargs", joint=True, rows=_ROWS),
            refused_by_attention=_REFUSED,
            examples=_single_examples,
            example_tokens=EXAMPLE_TOKENS,
            form=_FORM,
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
            joint=("attention_mask",),
            enter="x_embedder",
            leave="proj_out",
            positions="pos_embed",
        ),
    ),
    attention_kwargs="joint_attention_kwargs",
    prompt=("encoder_hidden_states",),
    unmerged_by_default={"transformer_blocks": (1, 4), "single_transformer_blocks": (1, 4)},
    unmerged_because=NOT_MEASURED,
    noise_level=_noise_level,
    run_levels=_run_levels,
    example_call=example_call,
    sequence_lengths=_sequence_lengths,
    architectures=ARCHITECTURES,
)
