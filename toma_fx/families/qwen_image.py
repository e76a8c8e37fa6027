"""The transformer of Qwen-Image: image, edit and layered."""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from toma_fx.errors import InputError
from toma_fx.families import noise
from toma_fx.families.example_tensors import random_tensors, token_grid
from toma_fx.families.rows import (
    NOT_MEASURED,
    Block,
    Family,
    Grid,
    KeyMask,
    Place,
    References,
    TokenGrids,
)
from toma_fx.passes.plan_nodes import Rows, TokenFlow
from toma_fx.passes.sites import Site

NATIVE_PIXELS = 1024
LAYERED_PIXELS = 640
"""Pixels along a side of the image that Qwen-Image-Layered decomposes."""
PIXELS_PER_TOKEN = 16
"""Pixels per token along a side: 8 per latent times 2 latents per token."""
TEXT_TOKENS = 256
"""Number of tokens of a long prompt. Pipelines pad prompts only to the longest of a batch."""
LAYERS = 4
"""Default number of layers into which Qwen-Image-Layered decomposes an image."""

SCHEDULER: dict[str, Any] = {
    "use_dynamic_shifting": True,
    "base_shift": 0.5,
    "max_shift": 0.9,
    "base_image_seq_len": 256,
    "max_image_seq_len": 8192,
    "shift_terminal": 0.02,
}
"""The configuration of the published models' schedulers."""

ARCHITECTURES: dict[str, dict[str, Any]] = {
    "qwen-image": {},
    "qwen-image-edit": {},
    "qwen-image-edit-2511": {"zero_cond_t": True},
    "qwen-image-layered": {"use_additional_t_cond": True, "use_layer3d_rope": True},
}
"""Configurations of published transformers, where they differ from diffusers' defaults."""

_noise_level = noise.level_of_sigma


def _run_levels(scheduler: Any, steps: int, call: Mapping[str, Any]) -> list[float]:
    planned = noise.flow_scheduler(**SCHEDULER) if scheduler is None else scheduler
    # The size of the generated image, which comes before the images to edit.
    mu = noise.shift_of_size(planned, math.prod(call["img_shapes"][0][0]))
    if scheduler is not None and "additional_t_cond" in call:  # as QwenImageLayeredPipeline does
        mu = (math.prod(call["img_shapes"][0][-1]) / 256) ** 0.5
    return noise.levels_of_flow(planned, steps, sigmas=noise.even_sigmas(steps), mu=mu)


def _sequence_lengths(call: Mapping[str, Any]) -> set[int]:
    image, text = call["hidden_states"].shape[1], call["encoder_hidden_states"].shape[1]
    return {image + text}


def example_call(
    model: Any, like: Tensor, *, batch: int, height: int | None, width: int | None
) -> dict[str, Any]:
    """Make up the keyword arguments of a call of a Qwen-Image transformer, with arbitrary values.

    A transformer that gives images to edit a time step of their own gets one such image, as large
    as the generated one. Earlier edit models cannot be told from Qwen-Image, and get none.

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
    device, dtype = like.device, like.dtype
    native = LAYERED_PIXELS if config.use_additional_t_cond else NATIVE_PIXELS
    rows, columns = token_grid(height, width, native, PIXELS_PER_TOKEN)
    images = 1 + config.zero_cond_t
    if config.use_additional_t_cond:  # the whole image, its layers, and the image to decompose
        images = 1 + LAYERS + 1
    random = random_tensors(like)
    call: dict[str, Any] = {
        "hidden_states": random(batch, images * rows * columns, config.in_channels),
        "encoder_hidden_states": random(batch, TEXT_TOKENS, config.joint_attention_dim),
        "timestep": torch.full((batch,), 0.5, device=device, dtype=dtype),
        "img_shapes": [[(1, rows, columns)] * images] * batch,
    }
    if config.guidance_embeds:
        call["guidance"] = torch.full((batch,), 3.5, device=device, dtype=torch.float32)
    if config.use_additional_t_cond:
        call["additional_t_cond"] = torch.zeros(batch, device=device, dtype=torch.long)
    return call


_MODULE = "diffusers.models.transformers.transformer_qwenimage"


def _examples(block: Any) -> dict[str, Any]:
    # float16, because Qwen-Image clips float16 overflow, and the graph must show it.
    like = torch.empty(0, dtype=torch.float16, device="meta")
    rotary = torch.empty(0, block.attention_head_dim // 2, dtype=torch.complex64, device="meta")
    examples = {
        "hidden_states": like.new_empty(2, 64, block.dim),
        "encoder_hidden_states": like.new_empty(2, 8, block.dim),
        "temb": like.new_empty(2, block.dim),
        "image_rotary_emb": tuple(rotary.new_empty(tokens, rotary.shape[1]) for tokens in (64, 8)),
        "modulate_index": None,
    }
    if block.zero_cond_t:  # images to edit are modulated by timestep 0
        examples["temb"] = like.new_empty(4, block.dim)
        examples["modulate_index"] = like.new_empty(2, 64, dtype=torch.int32)
    return examples


def _grids(model: Any, call: Mapping[str, Any]) -> tuple[Grid, ...]:
    shapes = call["img_shapes"]
    if any(list(each) != list(shapes[0]) for each in shapes):
        raise InputError(
            f"img_shapes={shapes!r} gives samples of a batch images of different sizes, but one "
            "plan serves them all; call the model once for each size"
        )
    return tuple(Grid(rows, columns, frames) for frames, rows, columns in _shapes_of_sample(call))


def _shapes_of_sample(call: Mapping[str, Any]) -> list[tuple[int, int, int]]:
    """Return the shapes of a sample; a call gives a list per sample, or one shape per image."""
    first = call["img_shapes"][0]
    return first if isinstance(first, list) else [first]


def _drawn(model: Any, grids: tuple[Grid, ...]) -> int:
    """Return 1, the first image; if an image is decomposed, all images but the last."""
    return len(grids) - 1 if model.config.use_additional_t_cond else 1


def _shorter(call: Mapping[str, Any], drawn: int, left: tuple[int, ...]) -> dict[str, Any]:
    """Return shapes from which the model computes how many tokens may be at timestep 0."""
    shapes = [*_shapes_of_sample(call)[:drawn], *((1, 1, tokens) for tokens in left)]
    return {"img_shapes": [shapes] * len(call["img_shapes"])}


def _edit_call(call: Mapping[str, Any]) -> dict[str, Any]:
    """Add an image to edit to a call, unless it has one already."""
    shapes = _shapes_of_sample(call)
    if len(shapes) > 1:
        return dict(call)
    both = torch.cat([call["hidden_states"]] * 2, dim=1)
    return {**call, "hidden_states": both, "img_shapes": [shapes * 2] * len(call["img_shapes"])}


FAMILY = Family(
    name="qwen_image",
    cls=f"{_MODULE}.QwenImageTransformer2DModel",
    title="Qwen-Image, Edit and Edit Plus",
    blocks=(
        Block(
            cls=f"{_MODULE}.QwenImageTransformerBlock",
            flow=TokenFlow(
                attention_kwargs="joint_attention_kwargs",
                output=1,
                rows=(
                    Rows(argument="image_rotary_emb", items=(0,), dim=0),
                    Rows(argument="modulate_index", optional=True),
                ),
            ),
            refused_by_attention=("attention_mask",),
            examples=_examples,
            key_mask=KeyMask(argument="encoder_hidden_states_mask", shape=(2, 8)),
            sites=(
                Site(components=("self_attention",), enter=("attn",), leave="attn", outputs=(0,)),
                Site(components=("mlp",), enter=("img_mlp",), leave="img_mlp"),
            ),
        ),
    ),
    borders=(
        TokenGrids(
            grids=_grids,
            enter=(
                Place(argument="hidden_states"),
                Place(argument="controlnet_block_samples", listed=True),
                Place(module="pos_embed", output=0, dim=0, told=("video_fhw", "img_shapes")),
            ),
            leave=(Place(),),
        ),
    ),
    references=References(drawn=_drawn, shorter=_shorter, example=_edit_call),
    attention_kwargs="attention_kwargs",
    prompt=("encoder_hidden_states",),
    unmerged_by_default={"transformer_blocks": (1, 4)},
    unmerged_because=NOT_MEASURED,
    noise_level=_noise_level,
    run_levels=_run_levels,
    example_call=example_call,
    sequence_lengths=_sequence_lengths,
    architectures=ARCHITECTURES,
    block_counts={"transformer_blocks": "num_layers"},
)
