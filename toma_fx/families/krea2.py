"""The transformer of Krea 2: raw and turbo."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from toma_fx.families import noise
from toma_fx.families.example_tensors import check_size, random_tensors
from toma_fx.families.rows import NOT_MEASURED, Block, Family, KeyMask, TokenSequence
from toma_fx.passes.plan_nodes import Rows, TokenFlow
from toma_fx.passes.sites import Site

NATIVE_PIXELS = 1024
PIXELS_PER_TOKEN = 16
"""Pixels per token along a side: 8 per latent times 2 latents per token."""
TEXT_TOKENS = 512

SCHEDULER: dict[str, Any] = {"use_dynamic_shifting": True, "max_image_seq_len": 6400}
"""Numbers from which the pipeline computes the raw model's shift; turbo's is always 1.15."""

ARCHITECTURES: dict[str, dict[str, Any]] = {"krea-2": {}}
"""The published transformers use diffusers' defaults; raw and turbo are alike."""

_noise_level = noise.level_of_sigma


def _run_levels(scheduler: Any, steps: int, call: Mapping[str, Any]) -> list[float]:
    planned = noise.flow_scheduler(**SCHEDULER) if scheduler is None else scheduler
    mu = noise.shift_of_size(planned, call["hidden_states"].shape[1])
    return noise.levels_of_flow(planned, steps, sigmas=noise.even_sigmas(steps), mu=mu)


def _sequence_lengths(call: Mapping[str, Any]) -> set[int]:
    return {call["hidden_states"].shape[1] + call["encoder_hidden_states"].shape[1]}


def example_call(
    model: Any, like: Tensor, *, batch: int, height: int | None, width: int | None
) -> dict[str, Any]:
    """Make up the keyword arguments of a call of a Krea 2 transformer, with arbitrary values.

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
    device = like.device
    height = NATIVE_PIXELS if height is None else height
    width = height if width is None else width
    check_size(height, width, PIXELS_PER_TOKEN)
    rows, columns = height // PIXELS_PER_TOKEN, width // PIXELS_PER_TOKEN
    text = (batch, TEXT_TOKENS, config.num_text_layers, config.text_hidden_dim)
    random = random_tensors(like)
    return {
        "hidden_states": random(batch, rows * columns, config.in_channels),
        "encoder_hidden_states": random(*text),
        "timestep": torch.full((batch,), 0.5, device=device, dtype=like.dtype),
        "position_ids": _positions(rows, columns, device),
        "encoder_attention_mask": torch.ones(batch, TEXT_TOKENS, device=device, dtype=torch.bool),
    }


def _positions(rows: int, columns: int, device: torch.device) -> Tensor:
    """Return image number, row and column; all are 0 for text, which comes first."""
    row = torch.arange(rows, device=device)[:, None].expand(rows, columns)
    column = torch.arange(columns, device=device).expand(rows, columns)
    image = torch.stack([torch.zeros_like(row), row, column], dim=-1).flatten(0, 1)
    return torch.cat([image.new_zeros(TEXT_TOKENS, 3), image]).to(torch.float32)


_MODULE = "diffusers.models.transformers.transformer_krea2"
EXAMPLE_TOKENS = 64


def _examples(block: Any) -> dict[str, Any]:
    # float32, in which the norms compute; torch warns if their weights have another dtype.
    like = torch.empty(0, dtype=torch.float32, device="meta")
    width, tokens = block.scale_shift_table.shape[-1], 8 + EXAMPLE_TOKENS
    rotary = like.new_empty(tokens, block.attn.head_dim)
    return {
        "hidden_states": like.new_empty(2, tokens, width),
        "temb": like.new_empty(2, 1, 6 * width),
        "image_rotary_emb": (rotary, rotary),
    }


FAMILY = Family(
    name="krea2",
    cls=f"{_MODULE}.Krea2Transformer2DModel",
    title="Krea 2",
    blocks=(
        Block(
            cls=f"{_MODULE}.Krea2TransformerBlock",
            flow=TokenFlow(
                joint=True,
                rows=(
                    Rows(argument="image_rotary_emb", items=(0, 1), dim=0, joint=True),
                    Rows(argument="attention_mask", dim=-1, joint=True, optional=True),
                ),
            ),
            examples=_examples,
            example_tokens=EXAMPLE_TOKENS,
            key_mask=KeyMask(argument="attention_mask", shape=(2, 1, 1, EXAMPLE_TOKENS + 8)),
            sites=(
                Site(components=("self_attention",), enter=("attn",), leave="attn"),
                Site(components=("mlp",), enter=("ff",), leave="ff"),
            ),
        ),
    ),
    borders=(
        TokenSequence(
            tokens="hidden_states",
            ids="position_ids",
            text_first=True,
            enter="img_in",
            leave="final_layer",
            positions="rotary_emb",
        ),
    ),
    prompt=("encoder_hidden_states",),
    unmerged_by_default={"transformer_blocks": (1, 4)},
    unmerged_because=NOT_MEASURED,
    noise_level=_noise_level,
    run_levels=_run_levels,
    example_call=example_call,
    sequence_lengths=_sequence_lengths,
    architectures=ARCHITECTURES,
)
