"""The transformer of CogVideoX and CogVideoX 1.5."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from toma_fx.families import noise
from toma_fx.families.example_tensors import check_frames, check_size, random_tensors
from toma_fx.families.rows import NOT_MEASURED, Block, Family, Form, Grid, Place, TokenGrids
from toma_fx.passes.plan_nodes import Rows, TokenFlow
from toma_fx.passes.sites import Site

NATIVE_SIZE_1_5 = (768, 1360)
"""Height and width in pixels. The config of CogVideoX 1.5 gives the positions' limits instead."""
PIXELS_PER_LATENT = 8
LATENTS_PER_TOKEN = 2
"""Latents per token along a side, in all published models."""

_5B: dict[str, Any] = {
    "num_attention_heads": 48,
    "num_layers": 42,
    "use_rotary_positional_embeddings": True,
}
_5B_1_5: dict[str, Any] = {
    **_5B,
    "patch_size_t": 2,
    "patch_bias": False,
    "sample_height": 300,
    "sample_width": 300,
    "sample_frames": 81,
}

ARCHITECTURES: dict[str, dict[str, Any]] = {
    "cogvideox-2b": {},
    "cogvideox-5b": _5B,
    "cogvideox-5b-i2v": {**_5B, "in_channels": 32, "use_learned_positional_embeddings": True},
    "cogvideox1.5-5b": _5B_1_5,
    "cogvideox1.5-5b-i2v": {**_5B_1_5, "in_channels": 32, "ofs_embed_dim": 512},
}
"""Configurations of published transformers, where they differ from diffusers' defaults."""

_noise_level = noise.level_of_thousand


def _run_levels(scheduler: Any, steps: int, call: Mapping[str, Any]) -> list[float]:
    timesteps = noise.levels_of_run(scheduler, steps, scale=1)
    if timesteps is None:  # evenly spaced: within one training step of the models' own schedulers
        return noise.even_sigmas(steps)
    return [noise.level_of_thousand(t, scheduler) for t in timesteps]


def _sequence_lengths(call: Mapping[str, Any]) -> set[int]:
    text = call["encoder_hidden_states"].shape[1]
    rotary = call.get("image_rotary_emb")
    if rotary is not None:  # it has a row for each token
        return {rotary[0].shape[0] + text}
    frames, _, rows, columns = call["hidden_states"].shape[1:]
    return {frames * (rows // LATENTS_PER_TOKEN) * (columns // LATENTS_PER_TOKEN) + text}


def example_call(
    model: Any,
    like: Tensor,
    *,
    batch: int,
    height: int | None,
    width: int | None,
    frames: int | None = None,
) -> dict[str, Any]:
    """Make up the keyword arguments of a call of a CogVideoX transformer, with arbitrary values.

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
    latent_frames, rows, columns = _latent_size(config, height, width, frames)
    random = random_tensors(like)
    call: dict[str, Any] = {
        "hidden_states": random(batch, latent_frames, config.in_channels, rows, columns),
        "encoder_hidden_states": random(batch, config.max_text_seq_length, config.text_embed_dim),
        "timestep": torch.full((batch,), 500, device=like.device, dtype=torch.int64),
    }
    if config.use_rotary_positional_embeddings:
        patch = config.patch_size
        tokens = latent_frames // (config.patch_size_t or 1) * (rows // patch) * (columns // patch)
        shape = (tokens, config.attention_head_dim)
        rotary = torch.ones(shape, device=like.device, dtype=torch.float32)
        call["image_rotary_emb"] = rotary, torch.zeros_like(rotary)
    if config.ofs_embed_dim is not None:
        call["ofs"] = like.new_full((1,), 2.0)
    return call


def _latent_size(
    config: Any, height: int | None, width: int | None, frames: int | None
) -> tuple[int, int, int]:
    native = config.sample_height * PIXELS_PER_LATENT, config.sample_width * PIXELS_PER_LATENT
    if config.patch_size_t is not None:
        native = NATIVE_SIZE_1_5
    if height is None:
        height, width = native[0], native[1] if width is None else width
    width = height if width is None else width
    check_size(height, width, PIXELS_PER_LATENT * config.patch_size)
    step = config.temporal_compression_ratio
    latent_frames = check_frames(config.sample_frames if frames is None else frames, step)
    # The pipelines pad latent frames that do not fill a token.
    per_token = config.patch_size_t or 1
    latent_frames = -(-latent_frames // per_token) * per_token
    return latent_frames, height // PIXELS_PER_LATENT, width // PIXELS_PER_LATENT


WITHOUT_ROTARY = " without rotary values"


def _form_of(rotary: Any) -> str:
    return WITHOUT_ROTARY if rotary is None else ""


def _examples(block: Any, form: str = "") -> dict[str, Any]:
    like = torch.empty(0, dtype=torch.float16, device="meta")
    width, tokens = block.attn1.query_dim, 64
    rotary = like.new_empty(tokens, block.attn1.inner_dim // block.attn1.heads)
    return {
        "hidden_states": like.new_empty(2, tokens, width),
        "encoder_hidden_states": like.new_empty(2, 8, width),
        "temb": like.new_empty(2, block.norm1.linear.in_features),
        "image_rotary_emb": None if form else (rotary, rotary),
    }


def _grids(model: Any, call: Mapping[str, Any]) -> tuple[Grid, ...]:
    config = model.config
    frames, _, height, width = call["hidden_states"].shape[1:]
    size = config.patch_size
    return (Grid(height // size, width // size, frames // (config.patch_size_t or 1)),)


def _given_frames(model: Any, call: Mapping[str, Any]) -> tuple[int, ...]:
    """Return the first frame if the input has extra channels: it may be given."""
    return (0,) if model.config.in_channels != model.config.out_channels else ()


_MODULE = "diffusers.models.transformers.cogvideox_transformer_3d"

FAMILY = Family(
    name="cogvideox",
    cls=f"{_MODULE}.CogVideoXTransformer3DModel",
    title="CogVideoX and CogVideoX 1.5",
    blocks=(
        Block(
            cls=f"{_MODULE}.CogVideoXBlock",
            flow=TokenFlow(
                attention_kwargs="attention_kwargs",
                output=0,
                text="encoder_hidden_states",
                rows=(Rows(argument="image_rotary_emb", items=(0, 1), dim=0),),
                prefix=True,
            ),
            refused_by_attention=("attention_mask",),
            examples=_examples,
            form=Form(argument="image_rotary_emb", of=_form_of, names=("", WITHOUT_ROTARY)),
            # The feed-forward takes text and image together, attention takes them separately.
            sites=(
                Site(components=("self_attention",), enter=("attn1",), leave="attn1", outputs=(0,)),
            ),
        ),
    ),
    borders=(
        TokenGrids(
            grids=_grids,
            enter=(
                Place(module="patch_embed", last=True),
                Place(argument="image_rotary_emb", dim=0, listed=True),
            ),
            leave=(Place(module="norm_out"),),
            given_frames=_given_frames,
        ),
    ),
    attention_kwargs="attention_kwargs",
    prompt=("encoder_hidden_states",),
    unmerged_by_default={"transformer_blocks": (1, 4)},
    unmerged_because=NOT_MEASURED,
    noise_level=_noise_level,
    run_levels=_run_levels,
    example_call=example_call,
    sequence_lengths=_sequence_lengths,
    architectures=ARCHITECTURES,
)
