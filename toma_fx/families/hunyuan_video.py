"""The transformer of HunyuanVideo: text to video, and image to video."""

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from toma_fx.families import noise
from toma_fx.families.example_tensors import check_frames, check_size, random_tensors, rotary_tables
from toma_fx.families.rows import NOT_MEASURED, Block, Family, Grid, Place, TokenGrids
from toma_fx.passes.capture import Count
from toma_fx.passes.plan_nodes import Rows, TokenFlow
from toma_fx.passes.sites import Site

NATIVE_SIZE = (720, 1280, 129)
"""Native height and width in pixels, and number of frames."""
PIXELS_PER_LATENT = 8
FRAMES_PER_LATENT = 4
LATENTS_PER_TOKEN = (1, 2, 2)
"""Latents per token along frames, rows and columns, in all published models."""
TEXT_TOKENS = 256

SCHEDULER: dict[str, Any] = {"shift": 7.0}
"""The configuration of the published models' schedulers."""

ARCHITECTURES: dict[str, dict[str, Any]] = {
    "hunyuan-video": {},
    "hunyuan-video-i2v": {"image_condition_type": "token_replace"},
    "hunyuan-video-i2v-33ch": {
        "in_channels": 33,
        "guidance_embeds": False,
        "image_condition_type": "latent_concat",
    },
}
"""Configurations of published transformers, where they differ from diffusers' defaults."""

_noise_level = noise.level_of_thousand


def _run_levels(scheduler: Any, steps: int, call: Mapping[str, Any]) -> list[float]:
    planned = noise.flow_scheduler(**SCHEDULER) if scheduler is None else scheduler
    return noise.levels_of_flow(planned, steps, sigmas=noise.even_sigmas(steps))


def _sequence_lengths(call: Mapping[str, Any]) -> set[int]:
    frames, rows, columns = call["hidden_states"].shape[-3:]
    of_frame, of_row, of_column = LATENTS_PER_TOKEN
    video = (frames // of_frame) * (rows // of_row) * (columns // of_column)
    return {video + call["encoder_hidden_states"].shape[1]}


def example_call(
    model: Any,
    like: Tensor,
    *,
    batch: int,
    height: int | None,
    width: int | None,
    frames: int | None = None,
) -> dict[str, Any]:
    """Make up the keyword arguments of a call of a HunyuanVideo transformer, with arbitrary values.

    Args:
        model: the transformer; its tensors may be without data.
        like: an empty tensor with the device and dtype in which the transformer computes.
        batch: number of videos.
        height: video height in pixels; the model's native size if omitted.
        width: video width in pixels; the height if omitted, or the native size if both are.
        frames: number of video frames; 129 if omitted.

    Raises:
        ModelError: when the size is not a multiple of a token's size, or when the number of
            frames is not 1 plus a multiple of the frames per latent frame.
    """
    config = model.config
    device, dtype = like.device, like.dtype
    size = _latent_size(config, height, width, frames)
    random = random_tensors(like)
    call: dict[str, Any] = {
        "hidden_states": random(batch, config.in_channels, *size),
        "timestep": torch.full((batch,), 500.0, device=device, dtype=torch.float32),
        "encoder_hidden_states": random(batch, TEXT_TOKENS, config.text_embed_dim),
        # 1 marks tokens that are not padding.
        "encoder_attention_mask": torch.ones(batch, TEXT_TOKENS, device=device, dtype=dtype),
        "pooled_projections": random(batch, config.pooled_projection_dim),
    }
    if config.guidance_embeds:
        call["guidance"] = torch.full((batch,), 6000.0, device=device, dtype=dtype)
    return call


def _latent_size(
    config: Any, height: int | None, width: int | None, frames: int | None
) -> tuple[int, int, int]:
    native_height, native_width, native_frames = NATIVE_SIZE
    if height is None:
        height, width = native_height, native_width if width is None else width
    width = height if width is None else width
    check_size(height, width, PIXELS_PER_LATENT * config.patch_size)
    latent_frames = check_frames(native_frames if frames is None else frames, FRAMES_PER_LATENT)
    return latent_frames, height // PIXELS_PER_LATENT, width // PIXELS_PER_LATENT


_MODULE = "diffusers.models.transformers.transformer_hunyuan_video"
_MASK = Rows(argument="attention_mask", dim=-1, joint=True, optional=True)
_ATTENTION = Site(components=("self_attention",), enter=("attn",), leave="attn", outputs=(0,))
GIVEN_TOKENS = 16


def _flow(rotary: str, **own: Any) -> TokenFlow:
    return TokenFlow(
        output=0,
        text="encoder_hidden_states",
        image_first=True,
        rows=(Rows(argument=rotary, items=(0, 1), dim=0), _MASK),
        prefix=True,
        **own,
    )


def _examples(block: Any, rotary_name: str) -> dict[str, Any]:
    like = torch.empty(0, dtype=torch.float16, device="meta")
    width = block.attn.query_dim
    tokens = GIVEN_TOKENS + 64
    return {
        "hidden_states": like.new_empty(2, tokens, width),
        "encoder_hidden_states": like.new_empty(2, 8, width),
        "temb": like.new_empty(2, width),
        "attention_mask": like.new_empty(2, 1, 1, tokens + 8, dtype=torch.bool),
        rotary_name: rotary_tables(block.attn, tokens),
    }


def _plain_examples(block: Any, rotary_name: str) -> dict[str, Any]:
    # The model passes arguments for given frames to these blocks too, which ignore them.
    return {**_examples(block, rotary_name), "args": (None, GIVEN_TOKENS)}


def _replacing_examples(block: Any, rotary_name: str) -> dict[str, Any]:
    examples = _examples(block, rotary_name)
    return {
        **examples,
        "token_replace_emb": examples["temb"],
        "num_tokens": Count(GIVEN_TOKENS),
    }


def _grids(model: Any, call: Mapping[str, Any]) -> tuple[Grid, ...]:
    of_frame, of_row, of_column = _patch(model.config)
    frames, rows, columns = call["hidden_states"].shape[-3:]
    return (Grid(rows // of_row, columns // of_column, frames // of_frame),)


def _patch(config: Any) -> tuple[int, int, int]:
    return (config.patch_size_t, config.patch_size, config.patch_size)


def _given_frames(model: Any, call: Mapping[str, Any]) -> tuple[int, ...]:
    """Return the first frame, in models that start from an image.

    SkyReels models can be recognised only by their number of channels.
    """
    config = model.config
    given = config.image_condition_type is not None or config.in_channels != config.out_channels
    return (0,) if given else ()


FAMILY = Family(
    name="hunyuan_video",
    cls=f"{_MODULE}.HunyuanVideoTransformer3DModel",
    title="HunyuanVideo",
    blocks=(
        Block(
            cls=f"{_MODULE}.HunyuanVideoTransformerBlock",
            flow=_flow("freqs_cis"),
            examples=partial(_plain_examples, rotary_name="freqs_cis"),
            sites=(_ATTENTION, Site(components=("mlp",), enter=("ff",), leave="ff")),
        ),
        Block(
            cls=f"{_MODULE}.HunyuanVideoSingleTransformerBlock",
            flow=_flow("image_rotary_emb"),
            examples=partial(_plain_examples, rotary_name="image_rotary_emb"),
            # Attention handles image and text separately, the MLP both in one sequence.
            sites=(_ATTENTION,),
        ),
        Block(
            cls=f"{_MODULE}.HunyuanVideoTokenReplaceTransformerBlock",
            flow=_flow("freqs_cis", prefix_tokens="num_tokens"),
            examples=partial(_replacing_examples, rotary_name="freqs_cis"),
            sites=(_ATTENTION, Site(components=("mlp",), enter=("ff",), leave="ff")),
        ),
        Block(
            cls=f"{_MODULE}.HunyuanVideoTokenReplaceSingleTransformerBlock",
            flow=_flow("image_rotary_emb", prefix_tokens="num_tokens"),
            examples=partial(_replacing_examples, rotary_name="image_rotary_emb"),
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
            patch=_patch,
            given_frames=_given_frames,
        ),
    ),
    prompt=("encoder_hidden_states",),
    unmerged_by_default={"transformer_blocks": (1, 4), "single_transformer_blocks": (1, 4)},
    unmerged_because=NOT_MEASURED,
    noise_level=_noise_level,
    run_levels=_run_levels,
    example_call=example_call,
    sequence_lengths=_sequence_lengths,
    architectures=ARCHITECTURES,
)
