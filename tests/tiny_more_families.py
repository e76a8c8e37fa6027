"""Tiny models of diffusers' transformers with random weights, and calls as their pipelines make.

Sizes of inputs are in tokens, and in latent frames for videos. Samples of a batch have texts of
different lengths wherever a model takes a mask.
"""

import math
import warnings
from collections.abc import Callable
from typing import Any

import diffusers
import torch
from diffusers.models.embeddings import get_3d_rotary_pos_embed
from torch import Tensor

from tests.tiny import TEXT_WIDTH, liven, smooth_images

LATENTS = 4
"""Channels of a latent pixel."""

HEADS: dict[str, int] = {"num_attention_heads": 2, "attention_head_dim": 16}
WIDTH = 32
"""Channels of a token: those of all heads."""

AXES = (4, 6, 6)
"""Channels of a head that turn with a token's frame, row and column."""


def _build(name: str, seed: int, config: dict[str, Any]) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = getattr(diffusers, name)(**config)
        with torch.no_grad():
            liven(model)
    return model.eval()


def smooth_videos(shape: tuple[int, int, int, int, int], generator: torch.Generator) -> Tensor:
    """Videos ``(B, C, F, H, W)`` of a few slow waves that move slowly, and some noise."""
    batch, channels, frames, height, width = shape
    frames_F11 = torch.arange(frames)[:, None, None] / frames
    rows_H1 = torch.arange(height)[:, None] / height
    columns_W = torch.arange(width) / width
    videos_BCFHW = 0.2 * torch.randn(shape, generator=generator)
    for _ in range(4):
        parts = torch.rand(4, batch, channels, 1, 1, 1, generator=generator)
        later, down, right, phase = parts
        cycles = later * frames_F11 / 2 + 2 * down * rows_H1 + 2 * right * columns_W + phase
        videos_BCFHW += torch.cos(2 * math.pi * cycles)
    return videos_BCFHW


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _normal(model: Any, generator: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(shape, generator=generator).to(model.dtype)


def _image(
    model: Any, generator: torch.Generator, batch: int, channels: int, height: int, width: int
) -> Tensor:
    return smooth_images((batch, channels, height, width), generator).to(model.dtype)


def _video(model: Any, generator: torch.Generator, *shape: int) -> Tensor:
    batch, channels, frames, height, width = shape
    return smooth_videos((batch, channels, frames, height, width), generator).to(model.dtype)


def _packed(images: Tensor) -> Tensor:
    """Tokens ``(B, N, C)`` of images or videos, one per latent pixel."""
    return images.flatten(2).transpose(1, 2).contiguous()


def _mask(batch: int, text: int, dtype: torch.dtype) -> Tensor:
    """Which tokens of a text are words ``(B, P)``: all but one of the first sample's, and so on."""
    lengths_B1 = text - 1 - torch.arange(batch)[:, None] % (text - 1)
    return (torch.arange(text) < lengths_B1).to(dtype)


def _grid_ids(height: int, width: int) -> Tensor:
    """Positions ``(N, 3)`` of an image's tokens: 0, row and column."""
    ids = torch.zeros(height, width, 3)
    ids[..., 1] += torch.arange(height)[:, None]
    ids[..., 2] += torch.arange(width)
    return ids.flatten(0, 1)


def tiny_sd3(num_layers: int = 4, seed: int = 0, **changes: Any) -> Any:
    """Stable Diffusion 3: joint blocks only, whose last one returns no text."""
    config = {
        "sample_size": 32,
        "in_channels": LATENTS,
        "out_channels": LATENTS,
        "num_layers": num_layers,
        **HEADS,
        "joint_attention_dim": TEXT_WIDTH,
        "caption_projection_dim": WIDTH,
        "pooled_projection_dim": 2 * TEXT_WIDTH,
        "pos_embed_max_size": 32,
        **changes,
    }
    return _build("SD3Transformer2DModel", seed, config)


def tiny_sd35(num_layers: int = 4, seed: int = 0, **changes: Any) -> Any:
    """Stable Diffusion 3.5: the first half of the blocks attend twice."""
    dual = {"dual_attention_layers": tuple(range(num_layers // 2)), "qk_norm": "rms_norm"}
    return tiny_sd3(num_layers, seed, **{**dual, **changes})


def sd3_inputs(
    model: Any, batch: int = 2, height: int = 16, width: int = 16, text: int = 7, seed: int = 0
) -> dict[str, Any]:
    """A call of Stable Diffusion 3, whose tokens are patches of 2x2 latent pixels."""
    generator = _generator(seed)
    return {
        "hidden_states": _image(
            model, generator, batch, model.config.in_channels, 2 * height, 2 * width
        ),
        "timestep": torch.full((batch,), 500.0),
        "encoder_hidden_states": _normal(model, generator, batch, text, TEXT_WIDTH),
        "pooled_projections": _normal(model, generator, batch, model.config.pooled_projection_dim),
        "joint_attention_kwargs": None,
    }


def tiny_chroma(
    num_layers: int = 4, num_single_layers: int = 4, seed: int = 0, **changes: Any
) -> Any:
    """Chroma: Flux whose modulation is made outside of its blocks, with a mask of the text."""
    config = {
        "in_channels": 4 * LATENTS,
        "num_layers": num_layers,
        "num_single_layers": num_single_layers,
        **HEADS,
        "joint_attention_dim": TEXT_WIDTH,
        "axes_dims_rope": AXES,
        "approximator_num_channels": 16,
        "approximator_hidden_dim": 32,
        "approximator_layers": 2,
        **changes,
    }
    with warnings.catch_warnings():  # diffusers has Chroma import what it moved to another place
        warnings.filterwarnings("ignore", "`FluxPosEmbed` is deprecated", FutureWarning)
        return _build("ChromaTransformer2DModel", seed, config)


def chroma_inputs(
    model: Any, batch: int = 2, height: int = 16, width: int = 16, text: int = 7, seed: int = 0
) -> dict[str, Any]:
    """A call of Chroma: its pipeline leaves one token of padding in the mask."""
    generator = _generator(seed)
    image = _image(model, generator, batch, model.config.in_channels, height, width)
    words_BP = _mask(batch, text, model.dtype)
    words_BP[torch.arange(batch), words_BP.sum(1).long()] = 1
    return {
        "hidden_states": _packed(image),
        "timestep": torch.full((batch,), 0.5, dtype=model.dtype),
        "encoder_hidden_states": _normal(model, generator, batch, text, TEXT_WIDTH),
        "txt_ids": torch.zeros(text, 3, dtype=model.dtype),
        "img_ids": _grid_ids(height, width).to(model.dtype),
        "attention_mask": torch.cat([words_BP, words_BP.new_ones(batch, height * width)], 1),
        "joint_attention_kwargs": {},
    }


def tiny_hunyuan_video(
    num_layers: int = 4, num_single_layers: int = 4, seed: int = 0, **changes: Any
) -> Any:
    """HunyuanVideo: joint blocks of either kind, image first, text with a mask."""
    config = {
        "in_channels": LATENTS,
        "out_channels": LATENTS,
        **HEADS,
        "num_layers": num_layers,
        "num_single_layers": num_single_layers,
        "num_refiner_layers": 1,
        "mlp_ratio": 2.0,
        "patch_size": 2,
        "patch_size_t": 1,
        "guidance_embeds": True,
        "text_embed_dim": TEXT_WIDTH,
        "pooled_projection_dim": TEXT_WIDTH,
        "rope_axes_dim": AXES,
        **changes,
    }
    return _build("HunyuanVideoTransformer3DModel", seed, config)


def tiny_hunyuan_video_i2v(
    num_layers: int = 4, num_single_layers: int = 4, seed: int = 0, **changes: Any
) -> Any:
    """HunyuanVideo from an image, whose latents stand in place of the first frame."""
    kind = {"image_condition_type": "token_replace"}
    return tiny_hunyuan_video(num_layers, num_single_layers, seed, **{**kind, **changes})


def hunyuan_video_inputs(
    model: Any,
    batch: int = 2,
    frames: int = 3,
    height: int = 8,
    width: int = 8,
    text: int = 7,
    seed: int = 0,
) -> dict[str, Any]:
    """A call of HunyuanVideo, of either kind: the first frame needs no argument of its own."""
    generator = _generator(seed)
    channels = model.config.in_channels
    pooled = model.config.pooled_projection_dim
    return {
        "hidden_states": _video(model, generator, batch, channels, frames, 2 * height, 2 * width),
        "timestep": torch.full((batch,), 500.0),
        "encoder_hidden_states": _normal(model, generator, batch, text, TEXT_WIDTH),
        "encoder_attention_mask": _mask(batch, text, model.dtype),
        "pooled_projections": _normal(model, generator, batch, pooled),
        "guidance": torch.full((batch,), 6000.0, dtype=model.dtype),
        "attention_kwargs": None,
    }


def tiny_hunyuan_video15(num_layers: int = 4, seed: int = 0, **changes: Any) -> Any:
    """HunyuanVideo 1.5: joint blocks of one kind, one token per latent pixel."""
    config = {
        "in_channels": 2 * LATENTS + 1,
        "out_channels": LATENTS,
        **HEADS,
        "num_layers": num_layers,
        "num_refiner_layers": 1,
        "mlp_ratio": 2.0,
        "patch_size": 1,
        "patch_size_t": 1,
        "text_embed_dim": TEXT_WIDTH,
        "text_embed_2_dim": TEXT_WIDTH,
        "image_embed_dim": TEXT_WIDTH,
        "rope_axes_dim": AXES,
        "task_type": "t2v",
        **changes,
    }
    return _build("HunyuanVideo15Transformer3DModel", seed, config)


def hunyuan_video15_inputs(
    model: Any,
    batch: int = 2,
    frames: int = 3,
    height: int = 8,
    width: int = 8,
    text: int = 7,
    glyphs: int = 5,
    seed: int = 0,
) -> dict[str, Any]:
    """A call of HunyuanVideo 1.5 from text: no frame is given, and the image's embeddings are 0."""
    generator = _generator(seed)
    shape = (frames, height, width)
    video = _video(model, generator, batch, model.config.out_channels, *shape)
    given = video.new_zeros(batch, model.config.out_channels + 1, *shape)
    return {
        "hidden_states": torch.cat([video, given], dim=1),
        "timestep": torch.full((batch,), 500.0, dtype=model.dtype),
        "encoder_hidden_states": _normal(model, generator, batch, text, TEXT_WIDTH),
        "encoder_attention_mask": _mask(batch, text, model.dtype),
        "encoder_hidden_states_2": _normal(model, generator, batch, glyphs, TEXT_WIDTH),
        "encoder_attention_mask_2": _mask(batch, glyphs, model.dtype),
        "image_embeds": video.new_zeros(batch, 3, model.config.image_embed_dim),
        "attention_kwargs": None,
    }


def tiny_hunyuan_image(
    num_layers: int = 4, num_single_layers: int = 4, seed: int = 0, **changes: Any
) -> Any:
    """HunyuanImage 2.1: joint blocks of either kind, image first, two texts with masks."""
    config = {
        "in_channels": LATENTS,
        "out_channels": LATENTS,
        **HEADS,
        "num_layers": num_layers,
        "num_single_layers": num_single_layers,
        "num_refiner_layers": 1,
        "mlp_ratio": 2.0,
        "patch_size": (1, 1),
        "text_embed_dim": TEXT_WIDTH,
        "text_embed_2_dim": TEXT_WIDTH,
        "rope_axes_dim": (8, 8),
        **changes,
    }
    return _build("HunyuanImageTransformer2DModel", seed, config)


def hunyuan_image_inputs(
    model: Any,
    batch: int = 2,
    height: int = 16,
    width: int = 16,
    text: int = 7,
    glyphs: int = 5,
    seed: int = 0,
) -> dict[str, Any]:
    """A call of HunyuanImage; of the distilled one, if the model is such a one."""
    generator = _generator(seed)
    config = model.config
    distilled = torch.full((batch,), 3250.0, dtype=model.dtype)
    later = torch.full((batch,), 400.0, dtype=model.dtype)
    return {
        "hidden_states": _image(model, generator, batch, config.in_channels, height, width),
        "timestep": torch.full((batch,), 500.0, dtype=model.dtype),
        "timestep_r": later if config.use_meanflow else None,
        "guidance": distilled if config.guidance_embeds else None,
        "attention_kwargs": {},
        "encoder_hidden_states": _normal(model, generator, batch, text, TEXT_WIDTH),
        "encoder_attention_mask": _mask(batch, text, torch.int64),
        "encoder_hidden_states_2": _normal(model, generator, batch, glyphs, TEXT_WIDTH),
        "encoder_attention_mask_2": _mask(batch, glyphs, torch.int64),
    }


def tiny_ltx(num_layers: int = 4, seed: int = 0, **changes: Any) -> Any:
    """LTX-Video: attention to the video, then to the text; tokens arrive packed."""
    config = {
        "in_channels": LATENTS,
        "out_channels": LATENTS,
        **HEADS,
        "cross_attention_dim": WIDTH,
        "num_layers": num_layers,
        "caption_channels": TEXT_WIDTH,
        **changes,
    }
    return _build("LTXVideoTransformer3DModel", seed, config)


def ltx_inputs(
    model: Any,
    batch: int = 2,
    frames: int = 3,
    height: int = 8,
    width: int = 8,
    text: int = 7,
    seed: int = 0,
) -> dict[str, Any]:
    """A call of LTX-Video from text: 8 frames and 32x32 pixels to a token, 25 frames a second."""
    generator = _generator(seed)
    video = _video(model, generator, batch, model.config.in_channels, frames, height, width)
    return {
        "hidden_states": _packed(video),
        "encoder_hidden_states": _normal(model, generator, batch, text, TEXT_WIDTH),
        "timestep": torch.full((batch,), 500.0),
        "encoder_attention_mask": _mask(batch, text, torch.bool),
        "num_frames": frames,
        "height": height,
        "width": width,
        "rope_interpolation_scale": (8 / 25, 32, 32),
        "attention_kwargs": None,
    }


def ltx_conditioned_inputs(
    model: Any,
    batch: int = 2,
    frames: int = 3,
    height: int = 8,
    width: int = 8,
    text: int = 7,
    seed: int = 0,
) -> dict[str, Any]:
    """A call of LTX-Video from an image: a timestep for each token, 0 in the first frame."""
    inputs = ltx_inputs(model, batch, frames, height, width, text, seed)
    inputs["timestep"] = torch.full((batch, frames * height * width), 500.0)
    inputs["timestep"][:, : height * width] = 0.0
    return inputs


def ltx_keyframe_inputs(
    model: Any,
    batch: int = 2,
    frames: int = 3,
    height: int = 8,
    width: int = 8,
    text: int = 7,
    seed: int = 0,
) -> dict[str, Any]:
    """A call of LTX-Video with a given last frame: its tokens stand before those of the video.

    Positions come from the pipeline, in seconds and pixels.
    """
    inputs = ltx_inputs(model, batch, frames, height, width, text, seed)
    for name in ("num_frames", "height", "width", "rope_interpolation_scale"):
        del inputs[name]
    video_BNC = inputs["hidden_states"]
    given = height * width
    times = (8 * torch.arange(frames) - 7).clamp(min=0).tolist()
    places = [
        [time / 25, 32.0 * row, 32.0 * column]
        for time in (times[-1], *times)
        for row in range(height)
        for column in range(width)
    ]
    timestep = torch.full((batch, given + frames * given), 500.0)
    timestep[:, :given] = 0.0
    return {
        **inputs,
        "hidden_states": torch.cat([video_BNC[:, -given:], video_BNC], dim=1),
        "timestep": timestep,
        "video_coords": torch.tensor(places).T.repeat(batch, 1, 1),
    }


def tiny_ltx2(num_layers: int = 4, seed: int = 0, **changes: Any) -> Any:
    """LTX-2: a stream of video and one of sound in each block, which attend to each other."""
    config = {
        "in_channels": LATENTS,
        "out_channels": LATENTS,
        **HEADS,
        "cross_attention_dim": WIDTH,
        "audio_in_channels": 8,
        "audio_out_channels": 8,
        "audio_num_attention_heads": 2,
        "audio_attention_head_dim": 8,
        "audio_cross_attention_dim": 16,
        "num_layers": num_layers,
        "caption_channels": TEXT_WIDTH,
        "rope_double_precision": False,
        **changes,
    }
    return _build("LTX2VideoTransformer3DModel", seed, config)


def tiny_ltx23(num_layers: int = 4, seed: int = 0, **changes: Any) -> Any:
    """LTX-2.3: gates on attention, and a text that each block modulates."""
    config = {
        "gated_attn": True,
        "cross_attn_mod": True,
        "audio_gated_attn": True,
        "audio_cross_attn_mod": True,
        "use_prompt_embeddings": False,
        "perturbed_attn": True,
        "rope_type": "split",
        **changes,
    }
    return tiny_ltx2(num_layers, seed, **config)


def ltx2_inputs(
    model: Any,
    batch: int = 2,
    frames: int = 3,
    height: int = 8,
    width: int = 8,
    text: int = 7,
    sounds: int = 11,
    seed: int = 0,
) -> dict[str, Any]:
    """A call of LTX-2 from text; the connectors before it leave no padding in the text."""
    generator = _generator(seed)
    config = model.config
    video = _video(model, generator, batch, config.in_channels, frames, height, width)
    widths = (TEXT_WIDTH, TEXT_WIDTH) if config.use_prompt_embeddings else (WIDTH, 16)
    timestep = torch.full((batch,), 500.0)
    words = torch.ones(batch, text, dtype=torch.int64)
    return {
        "hidden_states": _packed(video),
        "audio_hidden_states": _normal(model, generator, batch, sounds, config.audio_in_channels),
        "encoder_hidden_states": _normal(model, generator, batch, text, widths[0]),
        "audio_encoder_hidden_states": _normal(model, generator, batch, text, widths[1]),
        "timestep": timestep,
        "sigma": timestep,
        "encoder_attention_mask": words,
        "audio_encoder_attention_mask": words,
        "num_frames": frames,
        "height": height,
        "width": width,
        "fps": 24.0,
        "audio_num_frames": sounds,
        "video_coords": model.rope.prepare_video_coords(
            batch, frames, height, width, torch.device("cpu"), fps=24.0
        ),
        "audio_coords": model.audio_rope.prepare_audio_coords(batch, sounds, torch.device("cpu")),
        "isolate_modalities": False,
        "spatio_temporal_guidance_blocks": None,
        "perturbation_mask": None,
        "use_cross_timestep": True,
        "attention_kwargs": None,
    }


def ltx2_conditioned_inputs(
    model: Any,
    batch: int = 2,
    frames: int = 3,
    height: int = 8,
    width: int = 8,
    text: int = 7,
    sounds: int = 11,
    seed: int = 0,
) -> dict[str, Any]:
    """A call of LTX-2 from an image: a timestep for each token of the video, none for the sound."""
    inputs = ltx2_inputs(model, batch, frames, height, width, text, sounds, seed)
    inputs["audio_timestep"] = inputs["timestep"]
    inputs["timestep"] = torch.full((batch, frames * height * width), 500.0)
    inputs["timestep"][:, : height * width] = 0.0
    return inputs


def tiny_cogvideox(num_layers: int = 4, seed: int = 0, **changes: Any) -> Any:
    """CogVideoX 5B: joint blocks, text first, positions that the pipeline makes."""
    config = {
        **HEADS,
        "in_channels": LATENTS,
        "out_channels": LATENTS,
        "time_embed_dim": 16,
        "text_embed_dim": TEXT_WIDTH,
        "num_layers": num_layers,
        "sample_width": 16,
        "sample_height": 16,
        "sample_frames": 9,
        "max_text_seq_length": 7,
        "use_rotary_positional_embeddings": True,
        **changes,
    }
    return _build("CogVideoXTransformer3DModel", seed, config)


def tiny_cogvideox_2b(num_layers: int = 4, seed: int = 0, **changes: Any) -> Any:
    """CogVideoX 2B: sines are added to the tokens, and none are turned."""
    config = {"use_rotary_positional_embeddings": False, **changes}
    return tiny_cogvideox(num_layers, seed, **config)


def tiny_cogvideox15(num_layers: int = 4, seed: int = 0, **changes: Any) -> Any:
    """CogVideoX 1.5: patches of two latent frames."""
    return tiny_cogvideox(num_layers, seed, **{"patch_size_t": 2, "patch_bias": False, **changes})


def cogvideox_inputs(
    model: Any,
    batch: int = 2,
    frames: int = 3,
    height: int = 8,
    width: int = 8,
    text: int = 7,
    seed: int = 0,
) -> dict[str, Any]:
    """A call of CogVideoX, whose videos are ``(B, F, C, H, W)``."""
    generator = _generator(seed)
    config = model.config
    deep = config.patch_size_t or 1
    shape = (batch, config.in_channels, deep * frames, 2 * height, 2 * width)
    turns = None
    if config.use_rotary_positional_embeddings:
        turns = get_3d_rotary_pos_embed(
            embed_dim=config.attention_head_dim,
            crops_coords=((0, 0), (height, width)),
            grid_size=(height, width),
            temporal_size=frames,
        )
    return {
        "hidden_states": _video(model, generator, *shape).transpose(1, 2).contiguous(),
        "encoder_hidden_states": _normal(model, generator, batch, text, TEXT_WIDTH),
        "timestep": torch.full((batch,), 500, dtype=torch.int64),
        "image_rotary_emb": turns,
        "attention_kwargs": None,
    }


def tiny_krea2(num_layers: int = 4, seed: int = 0, **changes: Any) -> Any:
    """Krea 2: one sequence of text and image, and a text of several layers of its encoder."""
    config = {
        "in_channels": 4 * LATENTS,
        "num_layers": num_layers,
        **HEADS,
        "num_key_value_heads": 1,
        "intermediate_size": 64,
        "timestep_embed_dim": 16,
        "text_hidden_dim": TEXT_WIDTH,
        "num_text_layers": 2,
        "text_num_attention_heads": 2,
        "text_num_key_value_heads": 2,
        "text_intermediate_size": 48,
        "num_layerwise_text_blocks": 1,
        "num_refiner_text_blocks": 1,
        "axes_dims_rope": AXES,
        **changes,
    }
    return _build("Krea2Transformer2DModel", seed, config)


def krea2_inputs(
    model: Any, batch: int = 2, height: int = 16, width: int = 16, text: int = 7, seed: int = 0
) -> dict[str, Any]:
    """A call of Krea 2: the padding is inside the text, before the end of its template."""
    generator = _generator(seed)
    config = model.config
    image = _image(model, generator, batch, config.in_channels, height, width)
    words_BP = _mask(batch, text, torch.bool)
    words_BP[:, -1] = True
    return {
        "hidden_states": _packed(image),
        "encoder_hidden_states": _normal(
            model, generator, batch, text, config.num_text_layers, config.text_hidden_dim
        ),
        "timestep": torch.full((batch,), 0.5, dtype=model.dtype),
        "position_ids": torch.cat([torch.zeros(text, 3), _grid_ids(height, width)]),
        "encoder_attention_mask": words_BP,
        "attention_kwargs": None,
    }


def tiny_cosmos(num_layers: int = 4, seed: int = 0, **changes: Any) -> Any:
    """Cosmos Predict 2 and Anima: attention to the image, then to the text.

    The real ones add the padding mask to the channels, and resize it with torchvision. Here it is
    taken and left alone.
    """
    config = {
        "in_channels": LATENTS,
        "out_channels": LATENTS,
        **HEADS,
        "num_layers": num_layers,
        "mlp_ratio": 2.0,
        "text_embed_dim": TEXT_WIDTH,
        "adaln_lora_dim": 8,
        "max_size": (8, 64, 64),
        "concat_padding_mask": False,
        "extra_pos_embed_type": None,
        **changes,
    }
    return _build("CosmosTransformer3DModel", seed, config)


def tiny_cosmos_video(num_layers: int = 4, seed: int = 0, **changes: Any) -> Any:
    """Cosmos Predict 2 from an image: a mask of the given frames is a channel of its input."""
    return tiny_cosmos(num_layers, seed, **{"in_channels": LATENTS + 1, **changes})


def cosmos_inputs(
    model: Any, batch: int = 2, height: int = 16, width: int = 16, text: int = 7, seed: int = 0
) -> dict[str, Any]:
    """A call of Anima or of Cosmos for an image, a video of one frame."""
    generator = _generator(seed)
    shape = (batch, model.config.in_channels, 1, 2 * height, 2 * width)
    return {
        "hidden_states": _video(model, generator, *shape),
        "timestep": torch.full((batch,), 0.5, dtype=model.dtype),
        "padding_mask": torch.zeros(1, 1, 16 * height, 16 * width, dtype=model.dtype),
        "encoder_hidden_states": _normal(model, generator, batch, text, TEXT_WIDTH),
    }


def cosmos_video_inputs(
    model: Any,
    batch: int = 2,
    frames: int = 3,
    height: int = 8,
    width: int = 8,
    text: int = 7,
    seed: int = 0,
) -> dict[str, Any]:
    """A call of Cosmos for a video from an image: a timestep for each frame, less in the first."""
    generator = _generator(seed)
    shape = (batch, model.config.out_channels, frames, 2 * height, 2 * width)
    given = torch.zeros(batch, 1, *shape[2:], dtype=model.dtype)
    given[:, :, 0] = 1.0
    timestep = torch.full((batch, 1, frames, 1, 1), 0.5, dtype=model.dtype)
    timestep[:, :, 0] = 1e-4
    return {
        "hidden_states": _video(model, generator, *shape),
        "timestep": timestep,
        "encoder_hidden_states": _normal(model, generator, batch, text, TEXT_WIDTH),
        "fps": 16,
        "condition_mask": given,
        "padding_mask": torch.zeros(1, 1, 16 * height, 16 * width, dtype=model.dtype),
    }


def tiny_flux3(
    num_layers: int = 4, num_single_layers: int = 4, seed: int = 0, **changes: Any
) -> Any:
    """FLUX.3: blocks of the image alone and of the text alone, then joint ones."""
    config = {
        "in_channels": 4 * LATENTS,
        "cond_in_channels": 4 * LATENTS,
        "num_layers": num_layers,
        "num_single_layers": num_single_layers,
        **HEADS,
        "joint_attention_dim": TEXT_WIDTH,
        "timestep_channels": 16,
        "axes_dims_rope": (4, 4, 4, 4),
        **changes,
    }
    return _build("Flux3Transformer2DModel", seed, config)


def _flux3_ids(height: int, width: int, reference: int = 0) -> Tensor:
    ids_N3 = _grid_ids(height, width) * 0.5
    return torch.cat([ids_N3, torch.full((len(ids_N3), 1), -float(reference))], dim=1)


def flux3_inputs(
    model: Any, batch: int = 2, height: int = 16, width: int = 16, text: int = 7, seed: int = 0
) -> dict[str, Any]:
    """A call of FLUX.3; of the distilled one, if the model is such a one."""
    generator = _generator(seed)
    image = _image(model, generator, batch, model.config.in_channels, height, width)
    inputs: dict[str, Any] = {
        "hidden_states": _packed(image),
        "timestep": torch.full((batch,), 0.5, dtype=model.dtype),
        "img_ids": _flux3_ids(height, width),
        "encoder_hidden_states": _normal(model, generator, batch, text, TEXT_WIDTH),
        "txt_ids": torch.cat([torch.zeros(text, 3), torch.arange(text)[:, None].float()], dim=1),
    }
    if model.config.flow_map:
        inputs["target_timestep"] = torch.full((batch,), 0.4, dtype=model.dtype)
    return inputs


def flux3_edit_inputs(
    model: Any, batch: int = 2, height: int = 16, width: int = 16, text: int = 7, seed: int = 0
) -> dict[str, Any]:
    """A call of FLUX.3 with a reference image of half the height."""
    inputs = flux3_inputs(model, batch, height, width, text, seed)
    channels = model.config.cond_in_channels
    image = _image(model, _generator(seed + 1), batch, channels, height // 2, width)
    inputs["image_cond_hidden_states"] = _packed(image)
    inputs["image_cond_ids"] = _flux3_ids(height // 2, width, reference=1)
    return inputs


def tiny_pixart(num_layers: int = 4, seed: int = 0, **changes: Any) -> Any:
    """PixArt-Sigma: attention to the image, then to the text, whose noise comes with a variance."""
    config = {
        **HEADS,
        "in_channels": LATENTS,
        "out_channels": 2 * LATENTS,
        "num_layers": num_layers,
        "cross_attention_dim": WIDTH,
        "sample_size": 32,
        "caption_channels": TEXT_WIDTH,
        **changes,
    }
    return _build("PixArtTransformer2DModel", seed, config)


def pixart_inputs(
    model: Any, batch: int = 2, height: int = 16, width: int = 16, text: int = 7, seed: int = 0
) -> dict[str, Any]:
    """A call of PixArt-Sigma, whose tokens are patches of 2x2 latent pixels."""
    generator = _generator(seed)
    return {
        "hidden_states": _image(
            model, generator, batch, model.config.in_channels, 2 * height, 2 * width
        ),
        "encoder_hidden_states": _normal(model, generator, batch, text, TEXT_WIDTH),
        "encoder_attention_mask": _mask(batch, text, torch.int64),
        "timestep": torch.full((batch,), 500, dtype=torch.int64),
        "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
    }


def tiny_lumina2(num_layers: int = 4, seed: int = 0, **changes: Any) -> Any:
    """Lumina Image 2: one sequence of a text without its padding and the image."""
    config = {
        "sample_size": 32,
        "in_channels": LATENTS,
        "hidden_size": WIDTH,
        "num_layers": num_layers,
        "num_refiner_layers": 1,
        "num_attention_heads": 2,
        "num_kv_heads": 1,
        "multiple_of": 16,
        "axes_dim_rope": AXES,
        "axes_lens": (64, 64, 64),
        "cap_feat_dim": TEXT_WIDTH,
        **changes,
    }
    return _build("Lumina2Transformer2DModel", seed, config)


def lumina2_inputs(
    model: Any, batch: int = 2, height: int = 16, width: int = 16, text: int = 7, seed: int = 0
) -> dict[str, Any]:
    """A call of Lumina Image 2, whose timestep is 0 for noise and 1 for the image."""
    generator = _generator(seed)
    channels = model.config.in_channels
    return {
        "hidden_states": _image(model, generator, batch, channels, 2 * height, 2 * width),
        "timestep": torch.full((batch,), 0.5),
        "encoder_hidden_states": _normal(model, generator, batch, text, TEXT_WIDTH),
        "encoder_attention_mask": _mask(batch, text, torch.int64),
        "attention_kwargs": None,
    }


def tiny_auraflow(
    num_layers: int = 4, num_single_layers: int = 4, seed: int = 0, **changes: Any
) -> Any:
    """AuraFlow: joint blocks of either kind, with 8 learned tokens before the text."""
    config = {
        "sample_size": 32,
        "in_channels": LATENTS,
        "out_channels": LATENTS,
        "num_mmdit_layers": num_layers,
        "num_single_dit_layers": num_single_layers,
        **HEADS,
        "joint_attention_dim": TEXT_WIDTH,
        "caption_projection_dim": WIDTH,
        **changes,
    }
    return _build("AuraFlowTransformer2DModel", seed, config)


def auraflow_inputs(
    model: Any, batch: int = 2, height: int = 16, width: int = 16, text: int = 7, seed: int = 0
) -> dict[str, Any]:
    """A call of AuraFlow, whose tokens are patches of 2x2 latent pixels."""
    generator = _generator(seed)
    channels = model.config.in_channels
    return {
        "hidden_states": _image(model, generator, batch, channels, 2 * height, 2 * width),
        "encoder_hidden_states": _normal(model, generator, batch, text, TEXT_WIDTH),
        "timestep": torch.full((batch,), 0.5, dtype=model.dtype),
        "attention_kwargs": None,
    }


def tiny_bria(
    num_layers: int = 4, num_single_layers: int = 4, seed: int = 0, **changes: Any
) -> Any:
    """Bria 3: Flux whose single blocks take the text and the image apart."""
    config = {
        "in_channels": 4 * LATENTS,
        "num_layers": num_layers,
        "num_single_layers": num_single_layers,
        **HEADS,
        "joint_attention_dim": TEXT_WIDTH,
        "axes_dims_rope": list(AXES),
        **changes,
    }
    return _build("BriaTransformer2DModel", seed, config)


def bria_inputs(
    model: Any, batch: int = 2, height: int = 16, width: int = 16, text: int = 7, seed: int = 0
) -> dict[str, Any]:
    """A call of Bria 3, whose timesteps count to 1000."""
    generator = _generator(seed)
    image = _image(model, generator, batch, model.config.in_channels, height, width)
    return {
        "hidden_states": _packed(image),
        "timestep": torch.full((batch,), 500.0),
        "encoder_hidden_states": _normal(model, generator, batch, text, TEXT_WIDTH),
        "attention_kwargs": None,
        "txt_ids": torch.zeros(text, 3, dtype=model.dtype),
        "img_ids": _grid_ids(height, width).to(model.dtype),
    }


def tiny_ovis_image(
    num_layers: int = 4, num_single_layers: int = 4, seed: int = 0, **changes: Any
) -> Any:
    """Ovis-Image: Flux whose single blocks take the text and the image apart."""
    config = {
        "in_channels": 4 * LATENTS,
        "out_channels": 4 * LATENTS,
        "num_layers": num_layers,
        "num_single_layers": num_single_layers,
        **HEADS,
        "joint_attention_dim": TEXT_WIDTH,
        "axes_dims_rope": AXES,
        **changes,
    }
    return _build("OvisImageTransformer2DModel", seed, config)


def ovis_image_inputs(
    model: Any, batch: int = 2, height: int = 16, width: int = 16, text: int = 7, seed: int = 0
) -> dict[str, Any]:
    """A call of Ovis-Image, whose text stands on the diagonal of the image."""
    generator = _generator(seed)
    image = _image(model, generator, batch, model.config.in_channels, height, width)
    return {
        "hidden_states": _packed(image),
        "timestep": torch.full((batch,), 0.5, dtype=model.dtype),
        "encoder_hidden_states": _normal(model, generator, batch, text, TEXT_WIDTH),
        "txt_ids": _diagonal_ids(text).to(model.dtype),
        "img_ids": _grid_ids(height, width).to(model.dtype),
        "joint_attention_kwargs": None,
    }


def _diagonal_ids(text: int) -> Tensor:
    steps_P = torch.arange(text).float()
    return torch.stack([torch.zeros(text), steps_P, steps_P], dim=1)


def tiny_longcat_image(
    num_layers: int = 4, num_single_layers: int = 4, seed: int = 0, **changes: Any
) -> Any:
    """LongCat-Image: Flux whose single blocks take the text and the image apart."""
    config = {
        "in_channels": 4 * LATENTS,
        "num_layers": num_layers,
        "num_single_layers": num_single_layers,
        **HEADS,
        "joint_attention_dim": TEXT_WIDTH,
        "pooled_projection_dim": TEXT_WIDTH,
        "axes_dims_rope": list(AXES),
        **changes,
    }
    return _build("LongCatImageTransformer2DModel", seed, config)


def longcat_image_inputs(
    model: Any, batch: int = 2, height: int = 16, width: int = 16, text: int = 7, seed: int = 0
) -> dict[str, Any]:
    """A call of LongCat-Image, whose image begins where the longest text would end."""
    generator = _generator(seed)
    image = _image(model, generator, batch, model.config.in_channels, height, width)
    return {
        "hidden_states": _packed(image),
        "timestep": torch.full((batch,), 0.5, dtype=model.dtype),
        "guidance": None,
        "encoder_hidden_states": _normal(model, generator, batch, text, TEXT_WIDTH),
        "txt_ids": _diagonal_ids(text),
        "img_ids": _grid_ids(height, width) + torch.tensor([1.0, 512.0, 512.0]),
    }


def tiny_cogview4(num_layers: int = 4, seed: int = 0, **changes: Any) -> Any:
    """CogView 4: joint blocks, text first, sizes among the conditions."""
    config = {
        "in_channels": LATENTS,
        "out_channels": LATENTS,
        "num_layers": num_layers,
        **HEADS,
        "text_embed_dim": TEXT_WIDTH,
        "time_embed_dim": 16,
        "condition_dim": 8,
        "pos_embed_max_size": 32,
        "sample_size": 32,
        "rope_axes_dim": (32, 32),
        **changes,
    }
    return _build("CogView4Transformer2DModel", seed, config)


def cogview4_inputs(
    model: Any, batch: int = 2, height: int = 16, width: int = 16, text: int = 7, seed: int = 0
) -> dict[str, Any]:
    """A call of CogView 4, of which a token is 16x16 pixels."""
    generator = _generator(seed)
    channels = model.config.in_channels
    size = torch.tensor([[16 * height, 16 * width]], dtype=model.dtype).repeat(batch, 1)
    return {
        "hidden_states": _image(model, generator, batch, channels, 2 * height, 2 * width),
        "encoder_hidden_states": _normal(model, generator, batch, text, TEXT_WIDTH),
        "timestep": torch.full((batch,), 500.0),
        "original_size": size,
        "target_size": size,
        "crop_coords": torch.zeros(batch, 2, dtype=model.dtype),
        "attention_kwargs": None,
    }


def tiny_glm_image(num_layers: int = 4, seed: int = 0, **changes: Any) -> Any:
    """GLM-Image: a language model's tokens of the image are added to it."""
    config = {
        "in_channels": LATENTS,
        "out_channels": LATENTS,
        "num_layers": num_layers,
        **HEADS,
        "text_embed_dim": TEXT_WIDTH,
        "time_embed_dim": 16,
        "condition_dim": 8,
        "prior_vq_quantizer_codebook_size": 32,
        **changes,
    }
    return _build("GlmImageTransformer2DModel", seed, config)


def glm_image_inputs(
    model: Any, batch: int = 2, height: int = 16, width: int = 16, text: int = 7, seed: int = 0
) -> dict[str, Any]:
    """A call of GLM-Image from text: the cache of its pipeline is there, and nothing in it."""
    from diffusers.models.transformers.transformer_glm_image import GlmImageKVCache

    generator = _generator(seed)
    channels = model.config.in_channels
    shape = (batch, height * width)
    codes = model.config.prior_vq_quantizer_codebook_size
    size = torch.tensor([[16 * height, 16 * width]], dtype=model.dtype).repeat(batch, 1)
    return {
        "hidden_states": _image(model, generator, batch, channels, 2 * height, 2 * width),
        "encoder_hidden_states": _normal(model, generator, batch, text, TEXT_WIDTH),
        "prior_token_id": torch.randint(codes, shape, generator=generator),
        "prior_token_drop": torch.zeros(shape, dtype=torch.bool),
        "timestep": torch.full((batch,), 499.0),
        "target_size": size,
        "crop_coords": torch.zeros(batch, 2, dtype=model.dtype),
        "attention_kwargs": None,
        "kv_caches": GlmImageKVCache(num_layers=model.config.num_layers),
    }


def tiny_skyreels_v2(num_layers: int = 4, seed: int = 0, **changes: Any) -> Any:
    """SkyReels V2: Wan with another block."""
    config = {
        **HEADS,
        "in_channels": LATENTS,
        "out_channels": LATENTS,
        "text_dim": TEXT_WIDTH,
        "freq_dim": 16,
        "ffn_dim": 64,
        "num_layers": num_layers,
        "rope_max_seq_len": 32,
        **changes,
    }
    return _build("SkyReelsV2Transformer3DModel", seed, config)


def skyreels_v2_inputs(
    model: Any,
    batch: int = 2,
    frames: int = 3,
    height: int = 8,
    width: int = 8,
    text: int = 7,
    seed: int = 0,
) -> dict[str, Any]:
    """A call of SkyReels V2 from text."""
    generator = _generator(seed)
    shape = (batch, model.config.in_channels, frames, 2 * height, 2 * width)
    return {
        "hidden_states": _video(model, generator, *shape),
        "timestep": torch.full((batch,), 500, dtype=torch.int64),
        "encoder_hidden_states": _normal(model, generator, batch, text, TEXT_WIDTH),
        "attention_kwargs": None,
    }


def tiny_kandinsky5(num_layers: int = 4, seed: int = 0, **changes: Any) -> Any:
    """Kandinsky 5 for videos, of which a frame may be given."""
    config = {
        "in_visual_dim": LATENTS,
        "in_text_dim": TEXT_WIDTH,
        "in_text_dim2": TEXT_WIDTH,
        "time_dim": 16,
        "out_visual_dim": LATENTS,
        "model_dim": WIDTH,
        "ff_dim": 64,
        "num_text_blocks": 1,
        "num_visual_blocks": num_layers,
        "axes_dims": AXES,
        "visual_cond": True,
        **changes,
    }
    return _build("Kandinsky5Transformer3DModel", seed, config)


def kandinsky5_inputs(
    model: Any,
    batch: int = 2,
    frames: int = 3,
    height: int = 8,
    width: int = 8,
    text: int = 7,
    seed: int = 0,
) -> dict[str, Any]:
    """A call of Kandinsky 5 from text, whose videos are ``(B, F, H, W, C)``: no frame is given."""
    generator = _generator(seed)
    channels = model.config.in_visual_dim
    video = _video(model, generator, batch, channels, frames, 2 * height, 2 * width)
    given = video.new_zeros(batch, channels + 1, *video.shape[2:])
    return {
        "hidden_states": torch.cat([video, given], dim=1).movedim(1, -1).contiguous(),
        "encoder_hidden_states": _normal(model, generator, batch, text, TEXT_WIDTH),
        "pooled_projections": _normal(model, generator, batch, TEXT_WIDTH),
        "timestep": torch.full((batch,), 500.0, dtype=model.dtype),
        "visual_rope_pos": [torch.arange(size) for size in (frames, height, width)],
        "text_rope_pos": torch.arange(text),
        "scale_factor": (1.0, 1.0, 1.0),
        "sparse_params": None,
    }


def tiny_qwen_image21(num_layers: int = 4, seed: int = 0, **changes: Any) -> Any:
    """Qwen-Image 2.1: one sequence of text and images, whose last one is made."""
    config = {
        "in_channels": 4 * LATENTS,
        "out_channels": 4 * LATENTS,
        "num_layers": num_layers,
        **HEADS,
        "context_in_dim": TEXT_WIDTH,
        "axes_dims_rope": AXES,
        **changes,
    }
    return _build("QwenImage21Transformer2DModel", seed, config)


def qwen_image21_inputs(
    model: Any, batch: int = 2, height: int = 16, width: int = 16, text: int = 7, seed: int = 0
) -> dict[str, Any]:
    """A call of Qwen-Image 2.1 from text; four tokens of the image are one of its mask."""
    generator = _generator(seed)
    image = _image(model, generator, batch, model.config.in_channels, height, width)
    places = torch.zeros(batch, text + height * width // 4, dtype=torch.bool)
    places[:, text:] = True
    return {
        "hidden_states": _packed(image),
        "timestep": torch.full((batch,), 0.5, dtype=model.dtype),
        "encoder_hidden_states": _normal(model, generator, batch, text, TEXT_WIDTH),
        "encoder_hidden_states_mask": _mask(batch, text, torch.int64),
        "img_shapes": [[(1, height, width)]] * batch,
        "img_mask": places,
        "attention_kwargs": None,
        "kv_cache": None,
        "kv_cache_mode": None,
    }


def tiny_hidream_image(
    num_layers: int = 4, num_single_layers: int = 4, seed: int = 0, **changes: Any
) -> Any:
    """HiDream: joint blocks of either kind, each with a text of its own, and experts."""
    config = {
        "patch_size": 2,
        "in_channels": LATENTS,
        "out_channels": LATENTS,
        "num_layers": num_layers,
        "num_single_layers": num_single_layers,
        **HEADS,
        "caption_channels": [TEXT_WIDTH, TEXT_WIDTH],
        "text_emb_dim": TEXT_WIDTH,
        "num_routed_experts": 2,
        "num_activated_experts": 1,
        "axes_dims_rope": AXES,
        "max_resolution": (32, 32),
        "llama_layers": [layer % 2 for layer in range(num_layers + num_single_layers)],
        **changes,
    }
    return _build("HiDreamImageTransformer2DModel", seed, config)


def hidream_image_inputs(
    model: Any, batch: int = 2, height: int = 16, width: int = 16, text: int = 7, seed: int = 0
) -> dict[str, Any]:
    """A call of HiDream: the text as T5 and as two layers of Llama see it."""
    generator = _generator(seed)
    channels = model.config.in_channels
    return {
        "hidden_states": _image(model, generator, batch, channels, 2 * height, 2 * width),
        "timesteps": torch.full((batch,), 500.0),
        "encoder_hidden_states_t5": _normal(model, generator, batch, text, TEXT_WIDTH),
        "encoder_hidden_states_llama3": _normal(model, generator, 2, batch, text, TEXT_WIDTH),
        "pooled_embeds": _normal(model, generator, batch, TEXT_WIDTH),
        "attention_kwargs": None,
    }


def tiny_mochi(num_layers: int = 4, seed: int = 0, **changes: Any) -> Any:
    """Mochi: joint blocks with learned turns, whose last one returns no text."""
    config = {
        **HEADS,
        "num_layers": num_layers,
        "pooled_projection_dim": 16,
        "in_channels": LATENTS,
        "text_embed_dim": TEXT_WIDTH,
        "time_embed_dim": 16,
        **changes,
    }
    return _build("MochiTransformer3DModel", seed, config)


def mochi_inputs(
    model: Any,
    batch: int = 2,
    frames: int = 3,
    height: int = 8,
    width: int = 8,
    text: int = 7,
    seed: int = 0,
) -> dict[str, Any]:
    """A call of Mochi, whose timestep is 0 for noise and 1000 for the video."""
    generator = _generator(seed)
    shape = (batch, model.config.in_channels, frames, 2 * height, 2 * width)
    return {
        "hidden_states": _video(model, generator, *shape),
        "encoder_hidden_states": _normal(model, generator, batch, text, TEXT_WIDTH),
        "timestep": torch.full((batch,), 500.0, dtype=model.dtype),
        "encoder_attention_mask": _mask(batch, text, torch.bool),
        "attention_kwargs": None,
    }


def tiny_sana(num_layers: int = 4, seed: int = 0, **changes: Any) -> Any:
    """Sana: linear attention to the image, and convolutions in place of a feed-forward."""
    config = {
        "in_channels": LATENTS,
        "out_channels": LATENTS,
        **HEADS,
        "num_layers": num_layers,
        "num_cross_attention_heads": 2,
        "cross_attention_head_dim": 16,
        "cross_attention_dim": WIDTH,
        "caption_channels": TEXT_WIDTH,
        "sample_size": 16,
        **changes,
    }
    return _build("SanaTransformer2DModel", seed, config)


def sana_inputs(
    model: Any, batch: int = 2, height: int = 16, width: int = 16, text: int = 7, seed: int = 0
) -> dict[str, Any]:
    """A call of Sana, whose tokens are latent pixels."""
    generator = _generator(seed)
    channels = model.config.in_channels
    return {
        "hidden_states": _image(model, generator, batch, channels, height, width),
        "encoder_hidden_states": _normal(model, generator, batch, text, TEXT_WIDTH),
        "encoder_attention_mask": _mask(batch, text, torch.int64),
        "timestep": torch.full((batch,), 500.0),
        "attention_kwargs": None,
    }


Model = Callable[..., Any]
Inputs = Callable[..., dict[str, Any]]

_ROWS: list[tuple[str, str, Model, Inputs]] = [
    ("sd3", "SD3Transformer2DModel", tiny_sd3, sd3_inputs),
    ("sd3.5", "SD3Transformer2DModel", tiny_sd35, sd3_inputs),
    ("chroma", "ChromaTransformer2DModel", tiny_chroma, chroma_inputs),
    (
        "hunyuan-video",
        "HunyuanVideoTransformer3DModel",
        tiny_hunyuan_video,
        hunyuan_video_inputs,
    ),
    (
        "hunyuan-video-i2v",
        "HunyuanVideoTransformer3DModel",
        tiny_hunyuan_video_i2v,
        hunyuan_video_inputs,
    ),
    (
        "hunyuan-video-1.5",
        "HunyuanVideo15Transformer3DModel",
        tiny_hunyuan_video15,
        hunyuan_video15_inputs,
    ),
    (
        "hunyuan-image",
        "HunyuanImageTransformer2DModel",
        tiny_hunyuan_image,
        hunyuan_image_inputs,
    ),
    ("ltx", "LTXVideoTransformer3DModel", tiny_ltx, ltx_inputs),
    ("ltx-i2v", "LTXVideoTransformer3DModel", tiny_ltx, ltx_conditioned_inputs),
    ("ltx-keyframe", "LTXVideoTransformer3DModel", tiny_ltx, ltx_keyframe_inputs),
    ("ltx-2", "LTX2VideoTransformer3DModel", tiny_ltx2, ltx2_inputs),
    ("ltx-2-i2v", "LTX2VideoTransformer3DModel", tiny_ltx2, ltx2_conditioned_inputs),
    ("ltx-2.3", "LTX2VideoTransformer3DModel", tiny_ltx23, ltx2_inputs),
    ("cogvideox", "CogVideoXTransformer3DModel", tiny_cogvideox, cogvideox_inputs),
    ("cogvideox-2b", "CogVideoXTransformer3DModel", tiny_cogvideox_2b, cogvideox_inputs),
    ("cogvideox-1.5", "CogVideoXTransformer3DModel", tiny_cogvideox15, cogvideox_inputs),
    ("krea-2", "Krea2Transformer2DModel", tiny_krea2, krea2_inputs),
    ("cosmos", "CosmosTransformer3DModel", tiny_cosmos, cosmos_inputs),
    ("cosmos-video", "CosmosTransformer3DModel", tiny_cosmos_video, cosmos_video_inputs),
    ("flux.3", "Flux3Transformer2DModel", tiny_flux3, flux3_inputs),
    ("flux.3-edit", "Flux3Transformer2DModel", tiny_flux3, flux3_edit_inputs),
    ("pixart", "PixArtTransformer2DModel", tiny_pixart, pixart_inputs),
    ("lumina-2", "Lumina2Transformer2DModel", tiny_lumina2, lumina2_inputs),
    ("auraflow", "AuraFlowTransformer2DModel", tiny_auraflow, auraflow_inputs),
    ("bria", "BriaTransformer2DModel", tiny_bria, bria_inputs),
    ("ovis-image", "OvisImageTransformer2DModel", tiny_ovis_image, ovis_image_inputs),
    (
        "longcat-image",
        "LongCatImageTransformer2DModel",
        tiny_longcat_image,
        longcat_image_inputs,
    ),
    ("cogview-4", "CogView4Transformer2DModel", tiny_cogview4, cogview4_inputs),
    ("glm-image", "GlmImageTransformer2DModel", tiny_glm_image, glm_image_inputs),
    ("skyreels-v2", "SkyReelsV2Transformer3DModel", tiny_skyreels_v2, skyreels_v2_inputs),
    ("kandinsky-5", "Kandinsky5Transformer3DModel", tiny_kandinsky5, kandinsky5_inputs),
    (
        "qwen-image-2.1",
        "QwenImage21Transformer2DModel",
        tiny_qwen_image21,
        qwen_image21_inputs,
    ),
    (
        "hidream-image",
        "HiDreamImageTransformer2DModel",
        tiny_hidream_image,
        hidream_image_inputs,
    ),
    ("mochi", "MochiTransformer3DModel", tiny_mochi, mochi_inputs),
    ("sana", "SanaTransformer2DModel", tiny_sana, sana_inputs),
]

MORE_FAMILIES: dict[str, tuple[Model, Inputs]] = {
    name: (model, inputs)
    for name, class_name, model, inputs in _ROWS
    if class_name in dir(diffusers)
}
"""What makes a tiny model and what makes a call of it, of the classes that diffusers has."""
