"""The transformer of FLUX.3."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from toma_fx.families import noise
from toma_fx.families.example_tensors import check_size, image_ids, random_tensors
from toma_fx.families.rows import NOT_MEASURED, Block, Family, TokenSequence
from toma_fx.passes.plan_nodes import Rows, TokenFlow
from toma_fx.passes.sites import Site

NATIVE_PIXELS = 1024
PIXELS_PER_TOKEN = 16
"""Pixels per token along a side: 8 per latent times 2 latents per token."""
TEXT_TOKENS = 240
"""Number of tokens of a long prompt. The pipeline pads each prompt to a multiple of 80."""
POSITION_SCALE = 0.5
"""Scale of rows and columns in the positions of image tokens."""

SCHEDULER: dict[str, Any] = {"shift": 6.93}
"""The configuration that the pipeline gives its scheduler."""

ARCHITECTURES: dict[str, dict[str, Any]] = {}
"""Empty: no published model with these numbers is known."""

_noise_level = noise.level_of_sigma


def _run_levels(scheduler: Any, steps: int, call: Mapping[str, Any]) -> list[float]:
    planned = noise.flow_scheduler(**SCHEDULER) if scheduler is None else scheduler
    return noise.levels_of_flow(planned, steps, sigmas=noise.even_sigmas(steps))


def _sequence_lengths(call: Mapping[str, Any]) -> set[int]:
    image, text = call["hidden_states"].shape[1], call["encoder_hidden_states"].shape[1]
    given = call.get("image_cond_hidden_states")
    if given is None:
        return {image, image + text}
    return {image, given.shape[1], image + given.shape[1] + text}


def example_call(
    model: Any, like: Tensor, *, batch: int, height: int | None, width: int | None
) -> dict[str, Any]:
    """Make up the keyword arguments of a call of a FLUX.3 transformer, with arbitrary values.

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
    height = NATIVE_PIXELS if height is None else height
    width = height if width is None else width
    check_size(height, width, PIXELS_PER_TOKEN)
    rows, columns = height // PIXELS_PER_TOKEN, width // PIXELS_PER_TOKEN
    random = random_tensors(like)
    call: dict[str, Any] = {
        "hidden_states": random(batch, rows * columns, config.in_channels),
        "encoder_hidden_states": random(batch, TEXT_TOKENS, config.joint_attention_dim),
        "timestep": torch.full((batch,), 0.5, device=device, dtype=dtype),
        "img_ids": _image_ids(rows, columns, device),
        "txt_ids": _text_ids(device),
    }
    if config.flow_map:  # the timestep of the next step
        call["target_timestep"] = torch.full((batch,), 0.4, device=device, dtype=dtype)
    return call


def _image_ids(rows: int, columns: int, device: torch.device) -> Tensor:
    """Return time, row, column, and a position in text, which is 0."""
    ids = functional.pad(image_ids(rows, columns, device), (0, 1))
    return ids.to(torch.float32) * POSITION_SCALE


def _text_ids(device: torch.device) -> Tensor:
    position = torch.arange(TEXT_TOKENS, device=device, dtype=torch.float32)
    zero = torch.zeros_like(position)
    return torch.stack([zero, zero, zero, position], dim=-1)


_MODULE = "diffusers.models.transformers.transformer_flux3"
_SITES = (
    Site(components=("self_attention",), enter=("attn",), leave="attn"),
    Site(components=("mlp",), enter=("ff",), leave="ff"),
)


def _like() -> Tensor:
    # float32, in which the norms compute; torch warns if their weights have another dtype.
    return torch.empty(0, dtype=torch.float32, device="meta")


def _mode_examples(block: Any) -> dict[str, Any]:
    like = _like()
    width, tokens = block.attn.query_dim, 64
    rotary = like.new_empty(tokens, block.attn.head_dim)
    return {
        "hidden_states": like.new_empty(2, tokens, width),
        "temb_mod": like.new_empty(2, tokens, 3 * width),
        "image_rotary_emb": (rotary, rotary),
    }


def _single_examples(block: Any) -> dict[str, Any]:
    like = _like()
    width, tokens, text = block.attn.query_dim, 64, 8
    rotary = like.new_empty(text + tokens, block.attn.head_dim)
    return {
        "hidden_states": like.new_empty(2, tokens, width),
        "encoder_hidden_states": like.new_empty(2, text, width),
        "temb_mod": like.new_empty(2, tokens, 3 * width),
        "temb_mod_context": like.new_empty(2, text, 3 * width),
        "image_rotary_emb": (rotary, rotary),
    }


def _places(ids: Tensor) -> Tensor:
    """Return image number, row and column; references count down in the last column of ids."""
    return torch.stack([-ids[:, 3], ids[:, 1] / POSITION_SCALE, ids[:, 2] / POSITION_SCALE], dim=1)


FAMILY = Family(
    name="flux3",
    cls=f"{_MODULE}.Flux3Transformer2DModel",
    title="FLUX.3",
    blocks=(
        Block(
            cls=f"{_MODULE}.Flux3ModeTransformerBlock",
            flow=TokenFlow(
                rows=(
                    Rows(argument="image_rotary_emb", items=(0, 1), dim=0),
                    Rows(argument="temb_mod", optional=True),
                ),
            ),
            examples=_mode_examples,
            sites=_SITES,
        ),
        Block(
            cls=f"{_MODULE}.Flux3SingleTransformerBlock",
            flow=TokenFlow(
                output=1,
                text="encoder_hidden_states",
                text_first=True,
                rows=(
                    Rows(argument="image_rotary_emb", items=(0, 1), dim=0, joint=True),
                    Rows(argument="temb_mod", optional=True),
                ),
            ),
            examples=_single_examples,
            sites=_SITES,
        ),
    ),
    borders=(
        TokenSequence(
            tokens="hidden_states",
            ids="img_ids",
            references=("image_cond_hidden_states", "image_cond_ids"),
            places=_places,
            enter="x_embedders.image",
            leave="proj_out",
            positions="pos_embed",
        ),
    ),
    prompt=("encoder_hidden_states",),
    never_merged={"txt_mode_blocks.*": "its tokens are those of the text"},
    unmerged_by_default={
        "mode_blocks.image": (1, 4),
        "mode_blocks.image_cond": (1, 4),
        "single_transformer_blocks": (1, 4),
    },
    unmerged_because=NOT_MEASURED,
    noise_level=_noise_level,
    run_levels=_run_levels,
    example_call=example_call,
    sequence_lengths=_sequence_lengths,
    architectures=ARCHITECTURES,
)
