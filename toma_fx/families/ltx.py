"""The transformer of LTX-Video."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from toma_fx.errors import InputError
from toma_fx.families import given, noise
from toma_fx.families.example_tensors import check_frames, check_size, random_tensors
from toma_fx.families.rows import NOT_MEASURED, Block, Family, Grid, Place, Reading, TokenGrids
from toma_fx.passes.plan_nodes import Rows, TokenFlow
from toma_fx.passes.sites import Site

NATIVE_SIZE = (512, 704, 161)
"""Native height and width in pixels, and number of frames."""
PIXELS_PER_LATENT = 32
FRAMES_PER_LATENT = 8
FRAME_RATE = 25
TEXT_TOKENS = 128

SCHEDULER: dict[str, Any] = {
    "use_dynamic_shifting": True,
    "base_shift": 0.95,
    "max_shift": 2.05,
    "base_image_seq_len": 1024,
    "max_image_seq_len": 4096,
    "shift_terminal": 0.1,
}
"""The scheduler configuration of the first models; later models are published unshifted."""

ARCHITECTURES: dict[str, dict[str, Any]] = {
    "ltx-video": {},
    "ltx-video-0.9.7": {
        "attention_head_dim": 128,
        "cross_attention_dim": 4096,
        "num_layers": 48,
    },
}
"""Configurations of published transformers, where they differ from diffusers' defaults."""

_noise_level = noise.level_of_thousand


def _run_levels(scheduler: Any, steps: int, call: Mapping[str, Any]) -> list[float]:
    planned = noise.flow_scheduler(**SCHEDULER) if scheduler is None else scheduler
    mu = noise.shift_of_size(planned, call["hidden_states"].shape[1])
    return noise.levels_of_flow(planned, steps, sigmas=noise.even_sigmas(steps), mu=mu)


def _sequence_lengths(call: Mapping[str, Any]) -> set[int]:
    return {call["hidden_states"].shape[1]}


def example_call(
    model: Any,
    like: Tensor,
    *,
    batch: int,
    height: int | None,
    width: int | None,
    frames: int | None = None,
) -> dict[str, Any]:
    """Make up the keyword arguments of a call of an LTX-Video transformer, with arbitrary values.

    Args:
        model: the transformer; its tensors may be without data.
        like: an empty tensor with the device and dtype in which the transformer computes.
        batch: number of videos.
        height: video height in pixels; 512 if omitted.
        width: video width in pixels; the height if omitted, or 704 if both are.
        frames: number of video frames; 161 if omitted.

    Raises:
        ModelError: when the size is not a multiple of a token's size, or when the number of
            frames is not 1 plus a multiple of the frames per latent frame.
    """
    config = model.config
    latent_frames, rows, columns = _latent_size(height, width, frames)
    tokens = latent_frames * rows * columns
    random = random_tensors(like)
    return {
        "hidden_states": random(batch, tokens, config.in_channels),
        "encoder_hidden_states": random(batch, TEXT_TOKENS, config.caption_channels),
        "timestep": torch.full((batch,), 500.0, device=like.device, dtype=torch.float32),
        "encoder_attention_mask": torch.ones(
            batch, TEXT_TOKENS, device=like.device, dtype=torch.bool
        ),
        "num_frames": latent_frames,
        "height": rows,
        "width": columns,
        "rope_interpolation_scale": (
            FRAMES_PER_LATENT / FRAME_RATE,
            PIXELS_PER_LATENT,
            PIXELS_PER_LATENT,
        ),
    }


def _latent_size(height: int | None, width: int | None, frames: int | None) -> tuple[int, int, int]:
    native_height, native_width, native_frames = NATIVE_SIZE
    if height is None:
        height, width = native_height, native_width if width is None else width
    width = height if width is None else width
    check_size(height, width, PIXELS_PER_LATENT)
    latent_frames = check_frames(native_frames if frames is None else frames, FRAMES_PER_LATENT)
    return latent_frames, height // PIXELS_PER_LATENT, width // PIXELS_PER_LATENT


def _examples(block: Any) -> dict[str, Any]:
    like = torch.empty(0, dtype=torch.float16, device="meta")
    width, tokens = block.scale_shift_table.shape[-1], 64
    rotary = like.new_empty(2, tokens, width)
    return {
        "hidden_states": like.new_empty(2, tokens, width),
        "encoder_hidden_states": like.new_empty(2, 8, block.attn2.cross_attention_dim),
        "temb": like.new_empty(2, tokens, 6 * width),
        "image_rotary_emb": (rotary, rotary),
    }


def grids(model: Any, call: Mapping[str, Any]) -> tuple[Grid, ...]:
    """Return the grid of the video's tokens.

    Raises:
        InputError: when the call does not give the numbers of frames, rows and columns.
    """
    frames, rows, columns = (call.get(name) for name in ("num_frames", "height", "width"))
    if frames is None or rows is None or columns is None:
        raise InputError(
            f"a call with num_frames={frames}, height={rows} and width={columns} does not say "
            "where its tokens are; pass all three for the latent video, with video_coords too"
        )
    return (Grid(rows, columns, frames),)


def given_tokens(model: Any, call: Mapping[str, Any]) -> int:
    """Return the number of tokens of frames that are given for places inside the video.

    Raises:
        InputError: when there are fewer tokens than the video has.
    """
    (video,) = grids(model, call)
    tokens: int = call["hidden_states"].shape[1]
    if tokens < video.tokens:
        raise InputError(
            f"hidden_states has {tokens} tokens, but {video} has {video.tokens}; "
            "pass num_frames, height and width of the latent video"
        )
    return tokens - video.tokens


def given_frames(model: Any, call: Mapping[str, Any]) -> tuple[int, ...]:
    """Return the first frame if tokens have separate timesteps: a part of it may be given."""
    return (0,) if _has_a_timestep_each(call) else ()


def reads_given(
    model: Any, call: Mapping[str, Any], *, given_last: bool = False
) -> tuple[bool, ...] | None:
    """Return which frames have only tokens at timestep 0.

    Args:
        model: the called model.
        call: its arguments by name.
        given_last: whether frames that are given for places inside the video come after it.
    """
    if not _has_a_timestep_each(call):
        return None
    (video,) = grids(model, call)
    start = 0 if given_last else given_tokens(model, call)
    return given.frames_without_noise(call["timestep"].narrow(1, start, video.tokens), video)


def _has_a_timestep_each(call: Mapping[str, Any]) -> bool:
    """Return whether tokens have own timesteps, ``(B, N)``; one for all may be ``(B, 1)``."""
    timestep: Tensor = call["timestep"]
    return timestep.ndim == 2 and timestep.shape[1] > 1


def _video_of(coords: Tensor) -> dict[str, int]:
    """Return the frames, rows and columns of a video, computed from its tokens' positions.

    Args:
        coords: ``(B, 3, N)``: time, row and column of each token, in raster order at the end. The
            first frame is at time 0, and no given frame before the video is.
    """
    times, rows, _ = coords[0].tolist()
    area = _run(times)
    columns = _run(rows)
    frames = 1
    while times[-1 - area * (frames - 1)] > 0 and len(times) >= area * (frames + 1):
        frames += 1
    return {"num_frames": frames, "height": area // columns, "width": columns}


def _run(numbers: list[float]) -> int:
    """Return how many numbers at the end are equal."""
    return next(
        (i for i, each in enumerate(reversed(numbers)) if each != numbers[-1]), len(numbers)
    )


_MODULE = "diffusers.models.transformers.transformer_ltx"

FAMILY = Family(
    name="ltx",
    cls=f"{_MODULE}.LTXVideoTransformer3DModel",
    title="LTX-Video",
    blocks=(
        Block(
            cls=f"{_MODULE}.LTXVideoTransformerBlock",
            flow=TokenFlow(
                rows=(
                    Rows(argument="image_rotary_emb", items=(0, 1)),
                    Rows(argument="temb", optional=True),
                ),
                prefix=True,
            ),
            examples=_examples,
            masks=(("encoder_attention_mask", "cross_attention"),),
            sites=(
                Site(components=("self_attention",), enter=("attn1",), leave="attn1"),
                Site(components=("cross_attention",), enter=("attn2",), leave="attn2"),
                Site(components=("mlp",), enter=("ff",), leave="ff"),
            ),
        ),
    ),
    borders=(
        TokenGrids(
            grids=grids,
            enter=(
                Place(argument="hidden_states"),
                Place(argument="timestep", ndim=2),
                Place(module="rope", output=0),
                Place(module="rope", output=1),
            ),
            leave=(Place(),),
            given_frames=given_frames,
            reads_given=reads_given,
            given_tokens=given_tokens,
            reading=Reading(argument="video_coords", makes=_video_of),
        ),
    ),
    timestep=noise.timestep_of_last_token,
    prompt=("encoder_hidden_states",),
    unmerged_by_default={"transformer_blocks": (1, 4)},
    unmerged_because=NOT_MEASURED,
    noise_level=_noise_level,
    run_levels=_run_levels,
    example_call=example_call,
    sequence_lengths=_sequence_lengths,
    architectures=ARCHITECTURES,
)
