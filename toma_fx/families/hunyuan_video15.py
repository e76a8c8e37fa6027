"""The transformer of HunyuanVideo 1.5: text to video, and image to video."""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from toma_fx.families import noise
from toma_fx.families.example_tensors import check_frames, check_size, random_tensors, rotary_tables
from toma_fx.families.rows import NOT_MEASURED, Block, Family, Grid, Place, TokenGrids
from toma_fx.passes.plan_nodes import Rows, TokenFlow
from toma_fx.passes.sites import Site

NATIVE_SIZES = {640: (480, 848), 960: (720, 1280)}
"""Height and width in pixels, by the ``target_size`` of a model's config."""
NATIVE_FRAMES = 121
PIXELS_PER_LATENT = 16
FRAMES_PER_LATENT = 4
TEXT_TOKENS, GLYPH_TOKENS, IMAGE_TOKENS = 1000, 256, 729
"""Number of tokens of the prompt, of the text that the video shows, and of the first image."""

SCHEDULER: dict[str, Any] = {"shift": 5.0}
"""The configuration of the schedulers published with the models for 480 rows."""

ARCHITECTURES: dict[str, dict[str, Any]] = {
    "hunyuan-video-1.5-480p-t2v": {"task_type": "t2v"},
    "hunyuan-video-1.5-480p-i2v": {},
    "hunyuan-video-1.5-720p-t2v": {"target_size": 960, "task_type": "t2v"},
    "hunyuan-video-1.5-720p-i2v": {"target_size": 960},
    "hunyuan-video-1.5-480p-i2v-step-distilled": {"use_meanflow": True},
}
"""Configurations of published transformers, where they differ from diffusers' defaults."""

_noise_level = noise.level_of_thousand


def _run_levels(scheduler: Any, steps: int, call: Mapping[str, Any]) -> list[float]:
    planned = noise.flow_scheduler(**SCHEDULER) if scheduler is None else scheduler
    return noise.levels_of_flow(planned, steps, sigmas=noise.even_sigmas(steps))


def _sequence_lengths(call: Mapping[str, Any]) -> set[int]:
    more = ("encoder_hidden_states", "encoder_hidden_states_2", "image_embeds")
    text = sum(call[name].shape[1] for name in more)
    return {math.prod(call["hidden_states"].shape[-3:]) + text}


def example_call(
    model: Any,
    like: Tensor,
    *,
    batch: int,
    height: int | None,
    width: int | None,
    frames: int | None = None,
) -> dict[str, Any]:
    """Make up the keyword arguments of a HunyuanVideo 1.5 call, with arbitrary values.

    A text-to-video model gets an image of zeros, which tells it that there is no image.

    Args:
        model: the transformer; its tensors may be without data.
        like: an empty tensor with the device and dtype in which the transformer computes.
        batch: number of videos.
        height: video height in pixels; the model's native size if omitted.
        width: video width in pixels; the height if omitted, or the native size if both are.
        frames: number of video frames; 121 if omitted.

    Raises:
        ModelError: when the size is not a multiple of a token's size, or when the number of
            frames is not 1 plus a multiple of the frames per latent frame.
    """
    config = model.config
    device, dtype = like.device, like.dtype
    random = random_tensors(like)
    image = random(batch, IMAGE_TOKENS, config.image_embed_dim)
    size = _latent_size(config, height, width, frames)
    call: dict[str, Any] = {
        # The latents, the latents of an image to start from, and a mask of where there is one.
        "hidden_states": random(batch, config.in_channels, *size),
        "image_embeds": image if config.task_type == "i2v" else torch.zeros_like(image),
        "timestep": torch.full((batch,), 500.0, device=device, dtype=dtype),
        "encoder_hidden_states": random(batch, TEXT_TOKENS, config.text_embed_dim),
        # 1 marks tokens that are not padding.
        "encoder_attention_mask": torch.ones(batch, TEXT_TOKENS, device=device, dtype=dtype),
        "encoder_hidden_states_2": random(batch, GLYPH_TOKENS, config.text_embed_2_dim),
        "encoder_attention_mask_2": torch.zeros(batch, GLYPH_TOKENS, device=device, dtype=dtype),
    }
    if config.use_meanflow:  # the model also takes the timestep of the next step
        call["timestep_r"] = torch.full((batch,), 400.0, device=device, dtype=dtype)
    return call


def _latent_size(
    config: Any, height: int | None, width: int | None, frames: int | None
) -> tuple[int, int, int]:
    native_height, native_width = NATIVE_SIZES.get(config.target_size, NATIVE_SIZES[640])
    if height is None:
        height, width = native_height, native_width if width is None else width
    width = height if width is None else width
    check_size(height, width, PIXELS_PER_LATENT * config.patch_size)
    latent_frames = check_frames(NATIVE_FRAMES if frames is None else frames, FRAMES_PER_LATENT)
    return latent_frames, height // PIXELS_PER_LATENT, width // PIXELS_PER_LATENT


_MODULE = "diffusers.models.transformers.transformer_hunyuan_video15"


def _examples(block: Any) -> dict[str, Any]:
    like = torch.empty(0, dtype=torch.float16, device="meta")
    width = block.attn.query_dim
    return {
        "hidden_states": like.new_empty(2, 64, width),
        "encoder_hidden_states": like.new_empty(2, 8, width),
        "temb": like.new_empty(2, width),
        # A mask of the text only: attention takes all tokens of the video as valid.
        "attention_mask": like.new_empty(2, 8, dtype=torch.bool),
        "freqs_cis": rotary_tables(block.attn, 64),
    }


def _grids(model: Any, call: Mapping[str, Any]) -> tuple[Grid, ...]:
    of_frame, of_row, of_column = _patch(model.config)
    frames, rows, columns = call["hidden_states"].shape[-3:]
    return (Grid(rows // of_row, columns // of_column, frames // of_frame),)


def _patch(config: Any) -> tuple[int, int, int]:
    return (config.patch_size_t, config.patch_size, config.patch_size)


def _given_frames(model: Any, call: Mapping[str, Any]) -> tuple[int, ...]:
    """Return the first frame, in models that start from an image.

    Only the values of a call tell whether it has an image, so the model's config decides.
    """
    return (0,) if model.config.task_type != "t2v" else ()


FAMILY = Family(
    name="hunyuan_video15",
    cls=f"{_MODULE}.HunyuanVideo15Transformer3DModel",
    title="HunyuanVideo 1.5",
    blocks=(
        Block(
            cls=f"{_MODULE}.HunyuanVideo15TransformerBlock",
            flow=TokenFlow(
                output=0,
                text="encoder_hidden_states",
                image_first=True,
                rows=(Rows(argument="freqs_cis", items=(0, 1), dim=0),),
                prefix=True,
            ),
            examples=_examples,
            sites=(
                Site(components=("self_attention",), enter=("attn",), leave="attn", outputs=(0,)),
                Site(components=("mlp",), enter=("ff",), leave="ff"),
            ),
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
            patch=_patch,
            given_frames=_given_frames,
        ),
    ),
    prompt=("encoder_hidden_states",),
    unmerged_by_default={"transformer_blocks": (1, 4)},
    unmerged_because=NOT_MEASURED,
    noise_level=_noise_level,
    run_levels=_run_levels,
    example_call=example_call,
    sequence_lengths=_sequence_lengths,
    reads_values=True,
    architectures=ARCHITECTURES,
)
