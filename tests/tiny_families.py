"""Tiny FLUX.2, Qwen-Image, Z-Image and Wan models with random weights, and inputs that suit them.

The inputs have the names, shapes and types that diffusers' pipelines pass, but for `return_dict`.
Sizes are in tokens: of a picture 2x2 latents make one, be it in the pipeline or in the model.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal, NamedTuple

import torch
from diffusers import (
    Flux2Transformer2DModel,
    QwenImageTransformer2DModel,
    WanTransformer3DModel,
    WanVACETransformer3DModel,
    ZImageTransformer2DModel,
)
from torch import Tensor, nn

from tests.tiny import TEXT_TOKENS, TEXT_WIDTH, build, smooth_images

HEADS = 2
HEAD_WIDTH = 16
LATENT_CHANNELS = 4
IMAGE_WIDTH = 24
IMAGE_TOKENS = 5
WAN_TEXT_TOKENS = 512  # what comes before them is an image's
WAN_FRAMES_PER_LATENT = 4
WAN_PIXELS_PER_LATENT = 8

Size = tuple[int, int]


def _build_modulated(cls: Any, seed: int, config: dict[str, Any]) -> Any:
    """Builds a model whose timestep shifts, scales and gates by as much as a trained one's does.

    What modulates is called otherwise than in Flux, and FLUX.2 has no bias to carry it.
    """
    model = build(cls, seed, config)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed + 1)
        for name, module in model.named_modules():
            if isinstance(module, nn.Linear) and "mod" in name:
                nn.init.normal_(module.weight, std=0.3 if module.bias is not None else 2.0)
                if module.bias is not None:
                    nn.init.normal_(module.bias, std=0.3)
    return model


def tiny_flux2(
    guidance: bool = True,
    num_layers: int = 2,
    num_single_layers: int = 4,
    seed: int = 0,
    **changes: Any,
) -> Flux2Transformer2DModel:
    """FLUX.2 [dev]'s structure, or [klein]'s, which takes no guidance."""
    config = {
        "in_channels": 4 * LATENT_CHANNELS,
        "num_layers": num_layers,
        "num_single_layers": num_single_layers,
        "attention_head_dim": HEAD_WIDTH,
        "num_attention_heads": HEADS,
        "joint_attention_dim": TEXT_WIDTH,
        "timestep_guidance_channels": 32,
        "guidance_embeds": guidance,
        "axes_dims_rope": (4, 4, 4, 4),
        **changes,
    }
    return _build_modulated(Flux2Transformer2DModel, seed, config)


def tiny_qwen_image(
    num_layers: int = 4, zero_cond_t: bool = False, seed: int = 0, **changes: Any
) -> QwenImageTransformer2DModel:
    """Qwen-Image's structure; Edit 2511 modulates references by timestep 0 (`zero_cond_t`)."""
    config = {
        "in_channels": 4 * LATENT_CHANNELS,
        "out_channels": LATENT_CHANNELS,
        "num_layers": num_layers,
        "attention_head_dim": HEAD_WIDTH,
        "num_attention_heads": HEADS,
        "joint_attention_dim": TEXT_WIDTH,
        "axes_dims_rope": (4, 6, 6),
        "zero_cond_t": zero_cond_t,
        **changes,
    }
    return _build_modulated(QwenImageTransformer2DModel, seed, config)


def tiny_z_image(
    num_layers: int = 4, num_refiner_layers: int = 2, seed: int = 0, **changes: Any
) -> ZImageTransformer2DModel:
    """Z-Image's structure: refiners of picture and of caption, then blocks for both together."""
    config = {
        "in_channels": LATENT_CHANNELS,
        "dim": HEADS * HEAD_WIDTH,
        "n_layers": num_layers,
        "n_refiner_layers": num_refiner_layers,
        "n_heads": HEADS,
        "n_kv_heads": HEADS,
        "cap_feat_dim": TEXT_WIDTH,
        "axes_dims": [4, 6, 6],
        "axes_lens": [256, 64, 64],
        **changes,
    }
    return _build_modulated(ZImageTransformer2DModel, seed, config)


def _wan_config(num_layers: int) -> dict[str, Any]:
    return {
        "num_attention_heads": HEADS,
        "attention_head_dim": HEAD_WIDTH,
        "in_channels": LATENT_CHANNELS,
        "out_channels": LATENT_CHANNELS,
        "text_dim": TEXT_WIDTH,
        "freq_dim": 32,
        "ffn_dim": 64,
        "num_layers": num_layers,
        "rope_max_seq_len": 64,
    }


def tiny_wan(num_layers: int = 4, seed: int = 0, **changes: Any) -> WanTransformer3DModel:
    """Wan's structure for text to video, and for Wan 2.2's TI2V, which differs in its inputs."""
    return build(WanTransformer3DModel, seed, {**_wan_config(num_layers), **changes})


def tiny_wan_image_to_video(
    num_layers: int = 4,
    image_embeds: bool = False,
    last_image: bool = False,
    seed: int = 0,
    **changes: Any,
) -> WanTransformer3DModel:
    """Wan's structure for image to video, with image embeddings as in 2.1, or without as in 2.2.

    Of a first and a last image (2.1's FLF2V) both are embedded, and told apart by their place.
    """
    config = {"in_channels": 2 * LATENT_CHANNELS + WAN_FRAMES_PER_LATENT}
    if image_embeds or last_image:
        config |= {"image_dim": IMAGE_WIDTH, "added_kv_proj_dim": HEADS * HEAD_WIDTH}
    if last_image:
        config["pos_embed_seq_len"] = 2 * IMAGE_TOKENS
    return tiny_wan(num_layers, seed, **config, **changes)


def tiny_wan_vace(
    num_layers: int = 4, vace_layers: Sequence[int] = (0, 2), seed: int = 0, **changes: Any
) -> WanVACETransformer3DModel:
    """Wan VACE's structure: blocks for a control video, each of which adds to one main block."""
    config = {
        **_wan_config(num_layers),
        "vace_layers": list(vace_layers),
        "vace_in_channels": 2 * LATENT_CHANNELS + WAN_PIXELS_PER_LATENT**2,
        **changes,
    }
    return build(WanVACETransformer3DModel, seed, config)


def smooth_videos(shape: tuple[int, int, int, int, int], generator: torch.Generator) -> Tensor:
    """Videos ``(B, C, F, H, W)`` of a few slow waves that wander, and some noise."""
    batch, channels, frames, height, width = shape
    times_F11 = torch.arange(frames)[:, None, None] / frames
    rows_H1 = torch.arange(height)[:, None] / height
    columns_W = torch.arange(width) / width
    videos_BCFHW = 0.2 * torch.randn(shape, generator=generator)
    for _ in range(4):
        later, down, right, phase = torch.rand(4, batch, channels, 1, 1, 1, generator=generator)
        cycles = later * times_F11 + 2 * down * rows_H1 + 2 * right * columns_W + phase
        videos_BCFHW += torch.cos(2 * math.pi * cycles)
    return videos_BCFHW


def _image_tokens(
    batch: int, channels: int, sizes: Sequence[Size], generator: torch.Generator
) -> Tensor:
    """The tokens ``(B, N, C)`` of smooth images of these sizes, one after the other."""
    images = [smooth_images((batch, channels, *size), generator) for size in sizes]
    return torch.cat([image.flatten(2) for image in images], dim=2).transpose(1, 2).contiguous()


def _texts(batch: int, lengths: Sequence[int], text: int, generator: torch.Generator) -> Tensor:
    """Embeddings ``(B, L, D)`` of texts, with zeros behind the last token of each."""
    texts_BLD = torch.randn(batch, text, TEXT_WIDTH, generator=generator)
    for text_LD, length in zip(texts_BLD, lengths, strict=True):
        text_LD[length:] = 0
    return texts_BLD


def flux2_inputs(
    model: Flux2Transformer2DModel,
    batch: int = 2,
    height: int = 16,
    width: int = 12,
    references: Sequence[Size] = (),
    text: int = TEXT_TOKENS,
    seed: int = 0,
) -> dict[str, Any]:
    """Keyword arguments of a call of FLUX.2, in its dtype, with reference images of these sizes.

    An id is of a token's time, row, column and place in the text, where references have times
    10, 20 and so on.
    """
    generator = torch.Generator().manual_seed(seed)
    sizes = [(height, width), *references]
    none = torch.zeros(1, dtype=torch.long)
    ids = [
        torch.cartesian_prod(none + 10 * index, torch.arange(rows), torch.arange(columns), none)
        for index, (rows, columns) in enumerate(sizes)
    ]
    hidden_BNC = _image_tokens(batch, model.config.in_channels, sizes, generator)
    texts_BLD = torch.randn(batch, text, TEXT_WIDTH, generator=generator)
    guidance = torch.full((1,), 4.0).expand(batch) if model.config.guidance_embeds else None
    return {
        "hidden_states": hidden_BNC.to(model.dtype),
        "timestep": torch.tensor(0.5, dtype=model.dtype).expand(batch),
        "guidance": guidance,
        "encoder_hidden_states": texts_BLD.to(model.dtype),
        "txt_ids": torch.cartesian_prod(none, none, none, torch.arange(text)).repeat(batch, 1, 1),
        "img_ids": torch.cat(ids).repeat(batch, 1, 1),
        "joint_attention_kwargs": None,
    }


def qwen_image_inputs(
    model: QwenImageTransformer2DModel,
    batch: int = 2,
    height: int = 16,
    width: int = 12,
    references: Sequence[Size] = (),
    lengths: Sequence[int] | None = None,
    text: int = TEXT_TOKENS,
    seed: int = 0,
) -> dict[str, Any]:
    """Keyword arguments of a call of Qwen-Image, in its dtype, with references of these sizes.

    Each row of the batch has its text's length; where all are full, pipelines pass no mask.
    """
    generator = torch.Generator().manual_seed(seed)
    sizes = [(height, width), *references]
    lengths = [text] * batch if lengths is None else lengths
    mask_BL = torch.arange(text) < torch.tensor(lengths)[:, None]
    hidden_BNC = _image_tokens(batch, model.config.in_channels, sizes, generator)
    return {
        "hidden_states": hidden_BNC.to(model.dtype),
        "timestep": torch.tensor(0.5, dtype=model.dtype).expand(batch),
        "guidance": None,
        "encoder_hidden_states_mask": None if mask_BL.all() else mask_BL.long(),
        "encoder_hidden_states": _texts(batch, lengths, text, generator).to(model.dtype),
        "img_shapes": [[(1, rows, columns) for rows, columns in sizes]] * batch,
        "attention_kwargs": {},
    }


def z_image_inputs(
    model: ZImageTransformer2DModel,
    batch: int = 2,
    height: int = 16,
    width: int = 12,
    lengths: Sequence[int] | None = None,
    text: int = TEXT_TOKENS,
    seed: int = 0,
) -> dict[str, Any]:
    """Arguments of a call of Z-Image, in its dtype, by name, in the order in which they come.

    Pipelines pass the first three by place. Each caption has its length, and the model itself pads
    picture and caption to multiples of 32 tokens. Time runs from 0, which is noise, to 1.
    """
    generator = torch.Generator().manual_seed(seed)
    shape = (batch, model.config.in_channels, 2 * height, 2 * width)
    images_BC1HW = smooth_images(shape, generator).unsqueeze(2).to(model.dtype)
    lengths = [text] * batch if lengths is None else lengths
    captions = [torch.randn(length, TEXT_WIDTH, generator=generator) for length in lengths]
    return {
        "x": list(images_BC1HW.unbind()),
        "t": torch.tensor(0.5).expand(batch),
        "cap_feats": [caption_LD.to(model.dtype) for caption_LD in captions],
        "joint_attention_kwargs": None,
    }


def _wan_condition(
    shape: tuple[int, int, int, int, int], given: Sequence[int], generator: torch.Generator
) -> Tensor:
    """What Wan is told of given frames: a mask for each frame of a latent, and the latents.

    Of a latent frame behind the first, the last frame is given.
    """
    batch, _, frames, height, width = shape
    mask = torch.zeros(batch, WAN_FRAMES_PER_LATENT, frames, height, width)
    for frame in given:
        mask[:, 0 if frame == 0 else -1 :, frame] = 1
    return torch.cat([mask, smooth_videos(shape, generator)], dim=1)


def _wan_timestep(times: str, batch: int, frames: int, tokens_per_frame: int) -> Tensor:
    if times == "one":
        return torch.tensor(500).expand(batch)
    timestep_FN = torch.full((frames, tokens_per_frame), 500.0)
    if times == "after the first frame":
        timestep_FN[0] = 0
    return timestep_FN.flatten().expand(batch, -1)


def wan_inputs(
    model: WanTransformer3DModel,
    batch: int = 2,
    frames: int = 5,
    height: int = 8,
    width: int = 12,
    times: Literal["one", "each token", "after the first frame"] = "one",
    text: int = TEXT_TOKENS,
    seed: int = 0,
    given: Sequence[int] | None = None,
) -> dict[str, Any]:
    """Keyword arguments of a call of Wan, in its dtype; frames are latent frames.

    Frames that are given are the first, and the last if the model is made for it, unless others
    are. Wan 2.2's TI2V has a timestep for each token, and from an image its first frame's is 0.
    With an image's embeddings the text has to have 512 tokens, whatever was asked for.
    """
    generator = torch.Generator().manual_seed(seed)
    _, down, right = model.config.patch_size
    shape = (batch, model.config.out_channels, frames, down * height, right * width)
    hidden = smooth_videos(shape, generator)
    from_image = model.config.in_channels > model.config.out_channels
    if from_image:
        if given is None:
            given = (0,) if model.config.pos_embed_seq_len is None else (0, frames - 1)
        hidden = torch.cat([hidden, _wan_condition(shape, given, generator)], dim=1)
    has_embeds = model.config.image_dim is not None
    text = WAN_TEXT_TOKENS if has_embeds else text
    lengths = [min(text, TEXT_TOKENS) - row % 2 for row in range(batch)]
    inputs = {
        "hidden_states": hidden.to(model.dtype),
        "timestep": _wan_timestep(times, batch, frames, height * width),
        "encoder_hidden_states": _texts(batch, lengths, text, generator).to(model.dtype),
        "attention_kwargs": None,
    }
    if from_image or times == "after the first frame":
        images = batch if model.config.pos_embed_seq_len is None else 2 * batch
        embeds = torch.randn(images, IMAGE_TOKENS, IMAGE_WIDTH, generator=generator)
        inputs["encoder_hidden_states_image"] = embeds.to(model.dtype) if has_embeds else None
    return inputs


def wan_vace_inputs(
    model: WanVACETransformer3DModel,
    batch: int = 2,
    frames: int = 5,
    height: int = 8,
    width: int = 12,
    references: int = 0,
    text: int = TEXT_TOKENS,
    seed: int = 0,
) -> dict[str, Any]:
    """Keyword arguments of a call of Wan VACE, in its dtype; frames are latent frames.

    The control video has the latents of what is kept and of what is to be made anew, here the right
    half, and the mask that tells them apart, pixel by pixel. Reference images are frames before
    the first one. Pipelines have a batch of 1.
    """
    generator = torch.Generator().manual_seed(seed)
    inputs = wan_inputs(model, batch, references + frames, height, width, "one", text, seed + 1)
    shape = inputs["hidden_states"].shape
    mask = torch.zeros(batch, WAN_PIXELS_PER_LATENT**2, *shape[2:])
    mask[:, :, references:, :, shape[-1] // 2 :] = 1
    kept, anew = smooth_videos(shape, generator), smooth_videos(shape, generator)
    anew[:, :, :references] = 0
    layers = len(model.config.vace_layers)
    return {
        **inputs,
        "control_hidden_states": torch.cat([kept, anew, mask], dim=1).to(model.dtype),
        "control_hidden_states_scale": torch.ones(layers, dtype=model.dtype),
    }


class FamilyModel(NamedTuple):
    """How to build a model, the keyword arguments of a call of it, and which one is the picture."""

    build: Callable[..., Any]
    inputs: Callable[..., dict[str, Any]]
    picture: str = "hidden_states"


REFERENCE = ((8, 6),)
TWO_REFERENCES = ((8, 6), (4, 10))

FAMILY_MODELS = {
    "FLUX.2": FamilyModel(tiny_flux2, flux2_inputs),
    "FLUX.2 edit": FamilyModel(tiny_flux2, partial(flux2_inputs, references=TWO_REFERENCES)),
    "FLUX.2 klein": FamilyModel(partial(tiny_flux2, guidance=False), flux2_inputs),
    "Qwen-Image": FamilyModel(tiny_qwen_image, qwen_image_inputs),
    "Qwen-Image, texts of two lengths": FamilyModel(
        tiny_qwen_image, partial(qwen_image_inputs, lengths=(TEXT_TOKENS, 4))
    ),
    "Qwen-Image-Edit": FamilyModel(
        tiny_qwen_image, partial(qwen_image_inputs, references=REFERENCE)
    ),
    "Qwen-Image-Edit 2509": FamilyModel(
        tiny_qwen_image, partial(qwen_image_inputs, references=TWO_REFERENCES)
    ),
    "Qwen-Image-Edit 2511": FamilyModel(
        partial(tiny_qwen_image, zero_cond_t=True),
        partial(qwen_image_inputs, references=TWO_REFERENCES),
    ),
    "Z-Image": FamilyModel(tiny_z_image, z_image_inputs, "x"),
    "Z-Image, captions of two lengths": FamilyModel(
        tiny_z_image, partial(z_image_inputs, lengths=(TEXT_TOKENS, 40)), "x"
    ),
    "Wan": FamilyModel(tiny_wan, wan_inputs),
    "Wan 2.2 TI2V": FamilyModel(tiny_wan, partial(wan_inputs, times="each token")),
    "Wan 2.2 TI2V from an image": FamilyModel(
        tiny_wan, partial(wan_inputs, times="after the first frame")
    ),
    "Wan 2.1 I2V": FamilyModel(partial(tiny_wan_image_to_video, image_embeds=True), wan_inputs),
    "Wan 2.1 FLF2V": FamilyModel(partial(tiny_wan_image_to_video, last_image=True), wan_inputs),
    "Wan 2.2 I2V": FamilyModel(tiny_wan_image_to_video, wan_inputs),
    "Wan VACE": FamilyModel(tiny_wan_vace, wan_vace_inputs),
    "Wan VACE with a reference": FamilyModel(tiny_wan_vace, partial(wan_vace_inputs, references=1)),
}
