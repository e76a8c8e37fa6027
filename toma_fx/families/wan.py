"""The transformers of Wan 2.1 and 2.2, including VACE."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from toma_fx.families import given, noise
from toma_fx.families.example_tensors import check_frames, check_size, random_tensors
from toma_fx.families.rows import (
    NOT_MEASURED,
    Block,
    Family,
    Form,
    Grid,
    Place,
    TokenGrids,
)
from toma_fx.passes.plan_nodes import Rows, TokenFlow
from toma_fx.passes.sites import Site

NATIVE_SIZE = (480, 832, 81)
"""Native height and width in pixels, and number of frames."""
NATIVE_SIZE_5B = (704, 1280, 121)
PIXELS_PER_LATENT, PIXELS_PER_LATENT_5B = 8, 16
FRAMES_PER_LATENT = 4
LATENTS_PER_TOKEN = (1, 2, 2)
"""Latents per token along frames, rows and columns, in all published models."""
CHANNELS_5B = 48
"""Latent channels of Wan 2.2 TI2V 5B, the only model with an autoencoder of its own."""
TEXT_TOKENS = 512
IMAGE_TOKENS = 257
"""Number of tokens of an image in CLIP's hidden states."""

SMALL: dict[str, Any] = {"num_attention_heads": 12, "ffn_dim": 8960, "num_layers": 30}
_IMAGE: dict[str, Any] = {"in_channels": 36, "image_dim": 1280, "added_kv_proj_dim": 5120}

ARCHITECTURES: dict[str, dict[str, Any]] = {
    "wan2.1-1.3b": SMALL,
    "wan2.1-14b": {},
    "wan2.1-i2v-14b": _IMAGE,
    "wan2.1-flf2v-14b": {**_IMAGE, "pos_embed_seq_len": 2 * IMAGE_TOKENS},
    "wan2.2-a14b": {},
    "wan2.2-i2v-a14b": {"in_channels": 36},
    "wan2.2-5b": {
        "num_attention_heads": 24,
        "in_channels": CHANNELS_5B,
        "out_channels": CHANNELS_5B,
        "ffn_dim": 14336,
        "num_layers": 30,
    },
}
"""Configurations of published transformers, where they differ from diffusers' defaults."""

_noise_level = noise.level_of_thousand


def _run_levels(scheduler: Any, steps: int, call: Mapping[str, Any]) -> list[float]:
    if scheduler is None:
        scheduler = _usual_scheduler(call["hidden_states"].shape[1])
    return noise.levels_of_flow(scheduler, steps)


def _usual_scheduler(channels: int) -> Any:
    """Return the scheduler with which the models are published in diffusers' format."""
    # Imported here because families are loaded before any scheduler is needed.
    from diffusers import UniPCMultistepScheduler

    return UniPCMultistepScheduler(
        prediction_type="flow_prediction",
        use_flow_sigmas=True,
        flow_shift=5.0 if channels == CHANNELS_5B else 3.0,
    )


def _tokens(latents_BCFHW: Tensor) -> int:
    frames, rows, columns = latents_BCFHW.shape[-3:]
    of_frame, of_row, of_column = LATENTS_PER_TOKEN
    return (frames // of_frame) * (rows // of_row) * (columns // of_column)


def _sequence_lengths(call: Mapping[str, Any]) -> set[int]:
    return {_tokens(call["hidden_states"])}


def _rows_change(call: Mapping[str, Any]) -> bool:
    """Return whether each token has a timestep, whose modulation is a row of that token."""
    timestep: Tensor = call["timestep"]
    return timestep.ndim == 2


def example_call(
    model: Any,
    like: Tensor,
    *,
    batch: int,
    height: int | None,
    width: int | None,
    frames: int | None = None,
) -> dict[str, Any]:
    """Make up the keyword arguments of a call of a Wan transformer, with arbitrary values.

    Args:
        model: the transformer; its tensors may be without data.
        like: an empty tensor with the device and dtype in which the transformer computes.
        batch: number of videos.
        height: video height in pixels; the model's native size if omitted.
        width: video width in pixels; the height if omitted, or the native size if both are.
        frames: number of video frames; the model's native number if omitted.

    Raises:
        ModelError: when the size is not a multiple of a token's size, or when the number of
            frames is not 1 plus a multiple of the frames per latent frame.
    """
    config = model.config
    random = random_tensors(like)
    latents = random(batch, config.in_channels, *_latent_size(config, height, width, frames))
    call: dict[str, Any] = {
        "hidden_states": latents,
        "timestep": torch.full((batch,), 500, device=like.device, dtype=torch.int64),
        "encoder_hidden_states": random(batch, TEXT_TOKENS, config.text_dim),
    }
    if config.in_channels == CHANNELS_5B:  # a timestep for each token
        each = (batch, _tokens(latents))
        call["timestep"] = torch.full(each, 500.0, device=like.device, dtype=torch.float32)
    if config.image_dim is not None:
        images = (config.pos_embed_seq_len or IMAGE_TOKENS) // IMAGE_TOKENS
        call["encoder_hidden_states_image"] = random(batch * images, IMAGE_TOKENS, config.image_dim)
    if "vace_layers" in config:
        call["control_hidden_states"] = random(batch, config.vace_in_channels, *latents.shape[2:])
        call["control_hidden_states_scale"] = like.new_ones(len(config.vace_layers))
    return call


def _latent_size(
    config: Any, height: int | None, width: int | None, frames: int | None
) -> tuple[int, int, int]:
    large = config.in_channels == CHANNELS_5B
    native_height, native_width, native_frames = NATIVE_SIZE_5B if large else NATIVE_SIZE
    if height is None:
        height, width = native_height, native_width if width is None else width
    width = height if width is None else width
    frames = native_frames if frames is None else frames
    pixels = PIXELS_PER_LATENT_5B if large else PIXELS_PER_LATENT
    check_size(height, width, pixels * config.patch_size[1])
    latent_frames = check_frames(frames, FRAMES_PER_LATENT)
    return latent_frames, height // pixels, width // pixels


_MODULE = "diffusers.models.transformers.transformer_wan"
ROTARY = Rows(argument="rotary_emb", items=(0, 1))
SITES = (
    Site(components=("self_attention",), enter=("attn1",), leave="attn1"),
    Site(components=("cross_attention",), enter=("attn2",), leave="attn2"),
    Site(components=("mlp",), enter=("ffn",), leave="ffn"),
)
PER_TOKEN = " of each token"


def form_of(temb: Tensor) -> str:
    """Return whether each token has its own modulation, ``(B, N, 6, D)``, or the video has one."""
    return PER_TOKEN if temb.ndim == 4 else ""


def examples(block: Any, form: str = "") -> dict[str, Any]:
    """Return example arguments of a block."""
    like = torch.empty(0, dtype=torch.float16, device="meta")
    width, tokens = block.scale_shift_table.shape[-1], 64
    rotary = like.new_empty(1, tokens, 1, block.attn1.inner_dim // block.attn1.heads)
    return {
        "hidden_states": like.new_empty(2, tokens, width),
        "encoder_hidden_states": like.new_empty(2, 520, width),
        "temb": like.new_empty(2, *([tokens] if form else []), 6, width),
        "rotary_emb": (rotary, rotary),
    }


def grids(model: Any, call: Mapping[str, Any]) -> tuple[Grid, ...]:
    """Return the grid of the video's tokens."""
    sizes = call["hidden_states"].shape[-3:]
    frames, rows, columns = (
        size // step for size, step in zip(sizes, model.config.patch_size, strict=True)
    )
    return (Grid(rows, columns, frames),)


def _given_frames(model: Any, call: Mapping[str, Any]) -> tuple[int, ...]:
    """Return the first frame, if there are extra input channels or a timestep for each token.

    Models that take two images, the start and the end of the video, also return the last frame.
    """
    config = model.config
    drawn = config.out_channels or config.in_channels
    first = (0,) if config.in_channels != drawn or call["timestep"].ndim == 2 else ()
    return first if config.pos_embed_seq_len is None else (*first, -1)


def _reads_given(model: Any, call: Mapping[str, Any]) -> tuple[bool, ...] | None:
    """Return which frames are marked as given, or have only tokens at timestep 0.

    The marks are channels between the generated and the given latents: one for each video frame
    that a latent frame represents.
    """
    config, latents, (grid,) = model.config, call["hidden_states"], grids(model, call)
    if call["timestep"].ndim == 2:
        return given.frames_without_noise(call["timestep"], grid)
    drawn = config.out_channels or config.in_channels
    if config.in_channels != 2 * drawn + FRAMES_PER_LATENT:
        return None
    return given.marked_frames(latents[:, drawn : drawn + FRAMES_PER_LATENT], grid)


BORDER = TokenGrids(
    grids=grids,
    enter=(
        Place(argument="hidden_states", patches=True),
        Place(argument="timestep", ndim=2),
        Place(module="rope", output=0),
        Place(module="rope", output=1),
    ),
    leave=(Place(patches=True),),
    patch=lambda config: tuple(config.patch_size),
    given_frames=_given_frames,
    reads_given=_reads_given,
)

FAMILY = Family(
    name="wan",
    cls=f"{_MODULE}.WanTransformer3DModel",
    title="Wan 2.1 and 2.2",
    # Measured by benchmarks/methods.py; docs/choose.md has the table.
    regretted=(
        "ruins videos: at ratio 0.5, a small trained Wan draws what the prompt asks for in 47 % of "
        "cases instead of 56 %, and in 50 % when it merges below a noise level of 0.8"
    ),
    blocks=(
        Block(
            cls=f"{_MODULE}.WanTransformerBlock",
            flow=TokenFlow(rows=(ROTARY, Rows(argument="temb", ndim=4, changes=True)), prefix=True),
            examples=examples,
            form=Form(argument="temb", of=form_of, names=("", PER_TOKEN)),
            sites=SITES,
        ),
    ),
    borders=(BORDER,),
    timestep=noise.timestep_of_last_token,
    rows_change=_rows_change,
    prompt=("encoder_hidden_states",),
    unmerged_by_default={"blocks": (1, 4)},
    unmerged_because=NOT_MEASURED,
    noise_level=_noise_level,
    run_levels=_run_levels,
    example_call=example_call,
    sequence_lengths=_sequence_lengths,
    architectures=ARCHITECTURES,
    block_counts={"blocks": "num_layers"},
)
