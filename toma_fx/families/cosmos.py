"""The transformer of Cosmos Predict 1, 2 and 2.5."""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from toma_fx.errors import InputError
from toma_fx.families import given, noise
from toma_fx.families.example_tensors import check_frames, check_size, random_tensors
from toma_fx.families.rows import NOT_MEASURED, Block, Family, Form, Grid, Place, TokenGrids
from toma_fx.passes.plan_nodes import Rows, TokenFlow
from toma_fx.passes.sites import Site

NATIVE_SIZE = (704, 1280, 93)
"""Native height and width in pixels, and number of frames."""
NATIVE_FRAMES_1 = 121
NATIVE_SIZE_IMAGE = (768, 1360, 1)
PIXELS_PER_LATENT = 8
FRAMES_PER_LATENT, FRAMES_PER_LATENT_1 = 4, 8
LATENTS_PER_TOKEN = (1, 2, 2)
"""Latents per token along frames, rows and columns, in all published models."""
TEXT_TOKENS = 512
FRAME_RATE, FRAME_RATE_1 = 16, 30

_14B: dict[str, Any] = {"num_attention_heads": 40, "num_layers": 36}
_2B: dict[str, Any] = {"num_attention_heads": 16}
_VIDEO: dict[str, Any] = {"in_channels": 17}
_IMAGE_2: dict[str, Any] = {"rope_scale": (1.0, 4.0, 4.0), "extra_pos_embed_type": None}
_VIDEO_2: dict[str, Any] = {
    **_VIDEO,
    "rope_scale": (1.0, 3.0, 3.0),
    "extra_pos_embed_type": None,
}
_PREDICT_2_5: dict[str, Any] = {
    **_VIDEO_2,
    "use_crossattn_projection": True,
    "crossattn_proj_in_channels": 100352,
}

ARCHITECTURES: dict[str, dict[str, Any]] = {
    "cosmos-1-7b-text2world": {},
    "cosmos-1-7b-video2world": _VIDEO,
    "cosmos-1-14b-text2world": {**_14B, "rope_scale": (2.0, 2.0, 2.0)},
    "cosmos-1-14b-video2world": {**_14B, **_VIDEO, "rope_scale": (2.0, 2.0, 2.0)},
    "cosmos-2-2b-text2image": {**_2B, **_IMAGE_2},
    "cosmos-2-14b-text2image": {**_14B, **_IMAGE_2},
    "cosmos-2-2b-video2world": {**_2B, **_VIDEO_2},
    "cosmos-2-14b-video2world": {**_14B, **_VIDEO_2, "rope_scale": (20 / 24, 2.0, 2.0)},
    "cosmos-2.5-2b": {**_2B, **_PREDICT_2_5},
    "cosmos-2.5-14b": {**_14B, **_PREDICT_2_5},
}
"""Configurations of published transformers, where they differ from diffusers' defaults."""


def _noise_level(timestep: float, scheduler: Any) -> float:
    """Return the noise level: Cosmos 2 and 2.5 take it as timestep, Cosmos 1 its scheduler's value.

    Raises:
        InputError: when the timestep is neither.
    """
    if type(scheduler).__name__.startswith("EDM"):  # a quarter of the logarithm of sigma
        sigma = math.exp(4 * timestep)
        return sigma / (sigma + 1)
    return noise.level_of_sigma(timestep, scheduler)


def _run_levels(scheduler: Any, steps: int, call: Mapping[str, Any]) -> list[float]:
    if scheduler is None:
        scheduler = _usual_scheduler(call)
    sigmas = None
    if not scheduler.config.get("use_flow_sigmas"):  # Cosmos 1 and 2 use these sigmas
        sigmas = torch.linspace(0, 1, steps, dtype=torch.float64)
    planned = noise.planned(scheduler, steps, **({} if sigmas is None else {"sigmas": sigmas}))
    levels = [float(sigma) for sigma in planned.sigmas[:steps]]
    # Some schedulers give noise relative to a unit of image, others its share of the sum.
    return [each / (each + 1) for each in levels] if max(levels) > 1 else levels


def _usual_scheduler(call: Mapping[str, Any]) -> Any:
    """Return the scheduler with which the models are published in diffusers' format."""
    # Imported here because families are loaded before any scheduler is needed.
    from diffusers import EDMEulerScheduler, UniPCMultistepScheduler

    if "condition_mask" in call and "fps" not in call:  # Cosmos 2.5
        return UniPCMultistepScheduler(
            use_karras_sigmas=True,
            use_flow_sigmas=True,
            prediction_type="flow_prediction",
            sigma_max=200.0,
            sigma_min=0.01,
        )
    # Cosmos 2 uses another class, which makes the same sigmas.
    return EDMEulerScheduler(sigma_min=0.002, sigma_max=80, sigma_schedule="karras")


def _sequence_lengths(call: Mapping[str, Any]) -> set[int]:
    frames, rows, columns = call["hidden_states"].shape[-3:]
    of_frame, of_row, of_column = LATENTS_PER_TOKEN
    return {(frames // of_frame) * (rows // of_row) * (columns // of_column)}


def _timestep(call: Mapping[str, Any]) -> Tensor:
    """Return the timestep of each video in a batch; if frames have timesteps, the last frame's.

    Given frames are kept near timestep 0.
    """
    timestep: Tensor = call["timestep"]
    return timestep if timestep.ndim < 2 else timestep[:, 0, -1, 0, 0]


def example_call(
    model: Any,
    like: Tensor,
    *,
    batch: int,
    height: int | None,
    width: int | None,
    frames: int | None = None,
) -> dict[str, Any]:
    """Make up the keyword arguments of a call of a Cosmos transformer, with arbitrary values.

    Args:
        model: the transformer; its tensors may be without data.
        like: an empty tensor with the device and dtype in which the transformer computes.
        batch: number of videos or images.
        height: video height in pixels; the model's native size if omitted.
        width: video width in pixels; the height if omitted, or the native size if both are.
        frames: number of video frames; the model's native number if omitted.

    Raises:
        ModelError: when the size is not a multiple of a token's size, or when the number of
            frames is not 1 plus a multiple of the frames per latent frame.
    """
    config = model.config
    first, newest = config.extra_pos_embed_type is not None, config.use_crossattn_projection
    given = config.in_channels > config.out_channels  # frames to continue from
    size, pixels = _sizes(config, height, width, frames)
    text = config.crossattn_proj_in_channels if newest else config.text_embed_dim
    random = random_tensors(like)
    call: dict[str, Any] = {
        "hidden_states": random(batch, config.in_channels - given, *size),
        "timestep": torch.full((batch,), 0.5, device=like.device, dtype=like.dtype),
        "encoder_hidden_states": random(batch, TEXT_TOKENS, text),
        "padding_mask": like.new_zeros(1, 1, *pixels),
    }
    if given:
        call["condition_mask"] = like.new_zeros(batch, 1, *size)
    if first or (given and not newest):
        call["fps"] = FRAME_RATE_1 if first else FRAME_RATE
    if given and not first:  # one timestep per frame
        each = (batch, 1, size[0], 1, 1)
        dtype = torch.float32 if newest else like.dtype
        call["timestep"] = torch.full(each, 0.5, device=like.device, dtype=dtype)
    return call


def _sizes(
    config: Any, height: int | None, width: int | None, frames: int | None
) -> tuple[tuple[int, int, int], tuple[int, int]]:
    """Return the sizes in latents and in pixels."""
    native, per_latent = NATIVE_SIZE, FRAMES_PER_LATENT
    if config.extra_pos_embed_type is not None:
        native, per_latent = (*NATIVE_SIZE[:2], NATIVE_FRAMES_1), FRAMES_PER_LATENT_1
    elif config.in_channels == config.out_channels:
        native = NATIVE_SIZE_IMAGE
    if height is None:
        height, width = native[0], native[1] if width is None else width
    width = height if width is None else width
    check_size(height, width, PIXELS_PER_LATENT * config.patch_size[1])
    latent_frames = check_frames(native[2] if frames is None else frames, per_latent)
    rows, columns = height // PIXELS_PER_LATENT, width // PIXELS_PER_LATENT
    return (latent_frames, rows, columns), (height, width)


PER_TOKEN, POSITIONS = " of each token", " with positions"
GIVEN_FRAMES = 2
"""Largest number of latent frames from which the pipelines continue."""


def _form_of(embedded_timestep: Tensor, positions: Tensor | None) -> str:
    each = PER_TOKEN if embedded_timestep.ndim == 3 else ""
    return each if positions is None else f"{POSITIONS}{each}"


def _examples(block: Any, form: str = "") -> dict[str, Any]:
    like = torch.empty(0, dtype=torch.float16, device="meta")
    width, tokens = block.attn1.query_dim, 64
    rotary = like.new_empty(tokens, block.attn1.inner_dim // block.attn1.heads)
    times = (2, tokens) if form.endswith(PER_TOKEN) else (2,)
    text: Any = like.new_empty(2, 8, block.attn2.cross_attention_dim)
    return {
        "hidden_states": like.new_empty(2, tokens, width),
        "encoder_hidden_states": (text, text) if block.img_context else text,
        "embedded_timestep": like.new_empty(*times, width),
        "temb": like.new_empty(*times, 3 * width),
        "image_rotary_emb": (rotary, rotary),
        "extra_pos_emb": like.new_empty(2, tokens, width) if POSITIONS in form else None,
        "controlnet_residual": None,
        "latents": None,
    }


def _grids(model: Any, call: Mapping[str, Any]) -> tuple[Grid, ...]:
    if call.get("block_controlnet_hidden_states") is not None:
        raise InputError(
            "block_controlnet_hidden_states adds to single tokens between blocks, where tokens are "
            "reordered and merged; leave it out, or call the untransformed model"
        )
    sizes = call["hidden_states"].shape[-3:]
    frames, rows, columns = (
        size // step for size, step in zip(sizes, model.config.patch_size, strict=True)
    )
    return (Grid(rows, columns, frames),)


def _given_frames(model: Any, call: Mapping[str, Any]) -> tuple[int, ...]:
    """Return the frames that may be given: as many as pipelines continue from, for a video."""
    frames: int = call["hidden_states"].shape[-3]
    given = model.config.in_channels > model.config.out_channels
    return tuple(range(min(GIVEN_FRAMES, frames - 1))) if given else ()


def _reads_given(model: Any, call: Mapping[str, Any]) -> tuple[bool, ...] | None:
    """Return which of the first frames the condition mask marks.

    Later frames would be moved before them, but the model assigns timesteps to frames by position.
    """
    mask: Tensor | None = call.get("condition_mask")
    if mask is None:
        return None
    marked = given.marked_frames(mask, *_grids(model, call))
    return tuple(all(marked[: frame + 1]) for frame in range(len(marked)))


def _frames_apart(model: Any, call: Mapping[str, Any]) -> bool:
    """Return whether frames have timesteps, which the model itself expands to their tokens."""
    return bool(call["timestep"].ndim == 5)


_MODULE = "diffusers.models.transformers.transformer_cosmos"

FAMILY = Family(
    name="cosmos",
    cls=f"{_MODULE}.CosmosTransformer3DModel",
    title="Cosmos and Anima",
    blocks=(
        Block(
            cls=f"{_MODULE}.CosmosTransformerBlock",
            flow=TokenFlow(
                rows=(
                    Rows(argument="image_rotary_emb", items=(0, 1), dim=0),
                    Rows(argument="embedded_timestep", ndim=3, optional=True),
                    Rows(argument="temb", ndim=3, optional=True),
                    Rows(argument="extra_pos_emb", ndim=3),
                ),
                prefix=True,
            ),
            examples=_examples,
            form=Form(
                argument="embedded_timestep",
                more=("extra_pos_emb",),
                of=_form_of,
                names=("", PER_TOKEN, POSITIONS, f"{POSITIONS}{PER_TOKEN}"),
            ),
            masks=(("attention_mask", "cross_attention"),),
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
            enter=(
                Place(module="patch_embed", dims=3),
                Place(module="rope", output=0, dim=0),
                Place(module="rope", output=1, dim=0),
                Place(module="learnable_pos_embed"),
            ),
            leave=(Place(module="norm_out"),),
            given_frames=_given_frames,
            reads_given=_reads_given,
            frames_apart=_frames_apart,
        ),
    ),
    timestep=_timestep,
    prompt=("encoder_hidden_states",),
    unmerged_by_default={"transformer_blocks": (1, 4)},
    unmerged_because=NOT_MEASURED,
    noise_level=_noise_level,
    run_levels=_run_levels,
    example_call=example_call,
    sequence_lengths=_sequence_lengths,
    architectures=ARCHITECTURES,
)
