"""The transformer of LTX-2, which generates a video and its sound."""

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from toma_fx.errors import InputError
from toma_fx.families import ltx, noise
from toma_fx.families.example_tensors import check_frames, check_size, random_tensors
from toma_fx.families.rows import NOT_MEASURED, Block, Family, Form, Grid, Place, TokenGrids
from toma_fx.passes.plan_nodes import Rows, TokenFlow
from toma_fx.passes.sites import Site

NATIVE_SIZE = (512, 768, 121)
"""Native height and width in pixels, and number of frames."""
FRAME_RATE = 24.0
TEXT_TOKENS = 1024

SCHEDULER: dict[str, Any] = {
    "use_dynamic_shifting": True,
    "base_shift": 0.95,
    "max_shift": 2.05,
    "base_image_seq_len": 1024,
    "max_image_seq_len": 4096,
    "shift_terminal": 0.1,
}
"""The scheduler configuration of the published models, except distilled ones."""

_LTX_2_3: dict[str, Any] = {
    "rope_type": "split",
    "gated_attn": True,
    "cross_attn_mod": True,
    "audio_gated_attn": True,
    "audio_cross_attn_mod": True,
    "use_prompt_embeddings": False,
    "perturbed_attn": True,
}

ARCHITECTURES: dict[str, dict[str, Any]] = {
    "ltx-2": {"rope_type": "split"},
    "ltx-2.3": _LTX_2_3,
    "ltx-2.5": {**_LTX_2_3, "ff_bias": False, "use_keyframes_abs_pos_embedding": True},
}
"""Configurations of published transformers, where they differ from diffusers' defaults."""

_noise_level = noise.level_of_thousand


def _run_levels(scheduler: Any, steps: int, call: Mapping[str, Any]) -> list[float]:
    planned = noise.flow_scheduler(**SCHEDULER) if scheduler is None else scheduler
    mu = noise.shift_of_size(planned, call["hidden_states"].shape[1])
    return noise.levels_of_flow(planned, steps, sigmas=noise.even_sigmas(steps), mu=mu)


def _sequence_lengths(call: Mapping[str, Any]) -> set[int]:
    return {call["hidden_states"].shape[1], call["audio_hidden_states"].shape[1]}


def example_call(
    model: Any,
    like: Tensor,
    *,
    batch: int,
    height: int | None,
    width: int | None,
    frames: int | None = None,
) -> dict[str, Any]:
    """Make up the keyword arguments of a call of an LTX-2 transformer, with arbitrary values.

    Args:
        model: the transformer; its tensors may be without data.
        like: an empty tensor with the device and dtype in which the transformer computes.
        batch: number of videos.
        height: video height in pixels; 512 if omitted.
        width: video width in pixels; the height if omitted, or 768 if both are.
        frames: number of video frames; 121 if omitted.

    Raises:
        ModelError: when the size is not a multiple of a token's size, or when the number of
            frames is not 1 plus a multiple of the frames per latent frame.
    """
    config = model.config
    device = like.device
    latent_frames, rows, columns = _latent_size(config, height, width, frames)
    tokens = latent_frames * rows * columns
    sounds = _audio_frames(config, NATIVE_SIZE[2] if frames is None else frames)
    text, audio_text = _text_widths(config)
    timestep = torch.full((batch,), 500.0, device=device, dtype=torch.float32)
    mask = torch.ones(batch, TEXT_TOKENS, device=device, dtype=torch.int64)
    random = random_tensors(like)
    return {
        "hidden_states": random(batch, tokens, config.in_channels),
        "audio_hidden_states": random(batch, sounds, config.audio_in_channels),
        "encoder_hidden_states": random(batch, TEXT_TOKENS, text),
        "audio_encoder_hidden_states": random(batch, TEXT_TOKENS, audio_text),
        "timestep": timestep,
        "sigma": timestep,
        "encoder_attention_mask": mask,
        "audio_encoder_attention_mask": mask,
        "num_frames": latent_frames,
        "height": rows,
        "width": columns,
        "fps": FRAME_RATE,
        "audio_num_frames": sounds,
        # Start and end of each token: in time, height and width for video, in time for sound.
        "video_coords": torch.zeros(batch, 3, tokens, 2, device=device, dtype=torch.float32),
        "audio_coords": torch.zeros(batch, 1, sounds, 2, device=device, dtype=torch.float32),
        "isolate_modalities": False,
        "use_cross_timestep": True,
    }


def _latent_size(
    config: Any, height: int | None, width: int | None, frames: int | None
) -> tuple[int, int, int]:
    native_height, native_width, native_frames = NATIVE_SIZE
    if height is None:
        height, width = native_height, native_width if width is None else width
    width = height if width is None else width
    per_frame, per_row, per_column = config.vae_scale_factors
    check_size(height, width, per_row)
    latent_frames = check_frames(native_frames if frames is None else frames, per_frame)
    return latent_frames, height // per_row, width // per_column


def _audio_frames(config: Any, frames: int) -> int:
    """Return the number of sound latents for the length of a video."""
    rate: float = config.audio_sampling_rate / config.audio_hop_length / config.audio_scale_factor
    return round(frames / FRAME_RATE * rate)


def _text_widths(config: Any) -> tuple[int, int]:
    """Return the widths of the text embeddings for the video and for the sound."""
    if config.use_prompt_embeddings:  # the model itself projects them to its width
        return config.caption_channels, config.caption_channels
    return config.cross_attention_dim, config.audio_cross_attention_dim


ISOLATED = " isolated"


def _form_of(attends: bool | None) -> str:
    """Return whether video and sound attend to each other; some guidance separates them."""
    return "" if attends is None or attends else ISOLATED


def _examples(block: Any, form: str = "") -> dict[str, Any]:
    like = torch.empty(0, dtype=torch.float16, device="meta")
    tokens, sounds, text = 64, 16, 8
    modulations, width = block.scale_shift_table.shape
    audio_modulations, audio_width = block.audio_scale_shift_table.shape
    between = block.audio_to_video_attn
    examples = {
        "hidden_states": like.new_empty(2, tokens, width),
        "audio_hidden_states": like.new_empty(2, sounds, audio_width),
        "encoder_hidden_states": like.new_empty(2, text, block.attn2.cross_attention_dim),
        "audio_encoder_hidden_states": like.new_empty(
            2, text, block.audio_attn2.cross_attention_dim
        ),
        "temb": like.new_empty(2, tokens, modulations * width),
        "temb_audio": like.new_empty(2, 1, audio_modulations * audio_width),
        "temb_ca_scale_shift": like.new_empty(2, 1, 4 * width),
        "temb_ca_audio_scale_shift": like.new_empty(2, 1, 4 * audio_width),
        "temb_ca_gate": like.new_empty(2, 1, width),
        "temb_ca_audio_gate": like.new_empty(2, 1, audio_width),
        "video_rotary_emb": _rotary(block.attn1, tokens, width),
        "audio_rotary_emb": _rotary(block.audio_attn1, sounds, audio_width),
        "ca_video_rotary_emb": _rotary(between, tokens, between.inner_dim),
        "ca_audio_rotary_emb": _rotary(between, sounds, between.inner_dim),
        "self_attention_mask": None,
        "audio_self_attention_mask": None,
        "a2v_cross_attention_mask": None,
        "v2a_cross_attention_mask": None,
        "use_a2v_cross_attention": not form,
        "use_v2a_cross_attention": not form,
    }
    if block.cross_attn_adaln:
        examples["temb_prompt"] = like.new_empty(2, 1, 2 * width)
        examples["temb_prompt_audio"] = like.new_empty(2, 1, 2 * audio_width)
    return examples


def _rotary(attention: Any, tokens: int, width: int) -> tuple[Tensor, Tensor]:
    """Return rotary values of an attention: ``(B, N, D)``, or split among the heads."""
    shape: tuple[int, ...] = (2, tokens, width)
    if attention.rope_type == "split":
        shape = (2, attention.heads, tokens, width // attention.heads // 2)
    table = torch.empty(shape, dtype=torch.float16, device="meta")
    return table, table


def _rotary_rows(argument: str) -> tuple[Rows, Rows]:
    return (
        Rows(argument=argument, items=(0, 1), ndim=3),
        Rows(argument=argument, items=(0, 1), dim=2, ndim=4),
    )


def _rotary_places(module: str) -> tuple[Place, ...]:
    return tuple(
        Place(module=module, output=output, dim=dim, ndim=dim + 2)
        for output in (0, 1)
        for dim in (1, 2)
    )


def _grids(model: Any, call: Mapping[str, Any]) -> tuple[Grid, ...]:
    if call.get("video_self_attention_mask") is not None:
        raise InputError(
            "video_self_attention_mask masks single tokens of the video, which merging joins; "
            "leave it out, or call the untransformed model"
        )
    if model.prompt_modulation and not model.config.use_prompt_adaln_single:
        raise InputError(
            "this LTX-2 has use_prompt_adaln_single=False, whose blocks toma_fx does not merge; "
            "call the untransformed model"
        )
    return ltx.grids(model, call)


_MODULE = "diffusers.models.transformers.transformer_ltx2"

FAMILY = Family(
    name="ltx2",
    cls=f"{_MODULE}.LTX2VideoTransformer3DModel",
    title="LTX-2",
    blocks=(
        Block(
            cls=f"{_MODULE}.LTX2VideoTransformerBlock",
            # The sound has few tokens and stays unmerged.
            flow=TokenFlow(
                output=0,
                rows=(
                    *_rotary_rows("video_rotary_emb"),
                    *_rotary_rows("ca_video_rotary_emb"),
                    Rows(argument="temb", optional=True),
                    Rows(argument="temb_ca_scale_shift", optional=True),
                    Rows(argument="temb_ca_gate", optional=True),
                ),
                prefix=True,
            ),
            examples=_examples,
            form=Form(argument="use_a2v_cross_attention", of=_form_of, names=("", ISOLATED)),
            masks=(("encoder_attention_mask", "cross_attention"),),
            # Guidance that perturbs attention uses other branches of its code.
            key_examples={"all_perturbed": False, "perturbation_mask": None},
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
                Place(argument="hidden_states"),
                Place(argument="timestep", ndim=2),
                Place(argument="video_keyframes_mask"),
                *_rotary_places("rope"),
                *_rotary_places("cross_attn_rope"),
            ),
            leave=(Place(),),
            given_frames=ltx.given_frames,
            reads_given=partial(ltx.reads_given, given_last=True),
            given_tokens=ltx.given_tokens,
            given_last=True,
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
