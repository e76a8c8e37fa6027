"""Tiny models from SD3 to PixArt: their calls, their tokens, and how their blocks take them."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch

from tests import tiny_more_families as tiny
from tests.families.block_reference import BlockKind, Grid

KINDS = {
    "JointTransformerBlock": BlockKind(output=1, each=("encoder_hidden_states", "temb")),
    "ChromaTransformerBlock": BlockKind(
        output=1,
        each=("encoder_hidden_states", "temb"),
        tables={"image_rotary_emb": True},
        mask="attention_mask",
    ),
    "ChromaSingleTransformerBlock": BlockKind(
        output=None,
        each=("temb",),
        tables={"image_rotary_emb": True},
        mask="attention_mask",
    ),
    **{
        f"HunyuanVideo{kind}TransformerBlock": BlockKind(
            output=0,
            each=("encoder_hidden_states", "temb", "token_replace_emb"),
            tables={rotary: False},
            mask="attention_mask",
            text_first=False,
        )
        for kind, rotary in {
            "": "freqs_cis",
            "Single": "image_rotary_emb",
            "TokenReplace": "freqs_cis",
            "TokenReplaceSingle": "image_rotary_emb",
        }.items()
    },
    "HunyuanVideo15TransformerBlock": BlockKind(
        output=0,
        each=("encoder_hidden_states", "temb", "attention_mask"),
        tables={"freqs_cis": False},
    ),
    **{
        f"HunyuanImage{kind}TransformerBlock": BlockKind(
            output=0,
            each=("encoder_hidden_states", "temb"),
            tables={"image_rotary_emb": False},
            mask="attention_mask",
            text_first=False,
        )
        for kind in ("", "Single")
    },
    "BasicTransformerBlock": BlockKind(
        output=None, each=("encoder_hidden_states", "encoder_attention_mask", "timestep")
    ),
}


class Case(NamedTuple):
    """A model, a call of it, and its tokens."""

    model: Callable[..., Any]
    inputs: Callable[..., dict[str, Any]]
    grid: Grid
    whole: bool = True
    """Whether diffusers' own model is one graph."""


def _unmasked(model: Any, **size: int) -> dict[str, Any]:
    return {**tiny.chroma_inputs(model, **size), "attention_mask": None}


def _image_masked(model: Any, **size: int) -> dict[str, Any]:
    """A mask that speaks of image tokens too: those of the lower half."""
    inputs = tiny.chroma_inputs(model, **size)
    inputs["attention_mask"][:, -128:] = 0.5
    return inputs


def _started(model: Any, **size: int) -> dict[str, Any]:
    """From an image: its latents, where they are, and its embeddings."""
    inputs = tiny.hunyuan_video15_inputs(model, **size)
    video, channels = inputs["hidden_states"], model.config.out_channels
    video[:, channels : 2 * channels, 0] = video[:, :channels, 0]
    video[:, -1, 0] = 1
    inputs["image_embeds"] = torch.ones_like(inputs["image_embeds"])
    return inputs


_IMAGE, _VIDEO, _GIVEN = Grid(1, 16, 16), Grid(3, 8, 8), Grid(3, 8, 8, given=1)
_CONCAT: dict[str, Any] = {
    "in_channels": 2 * tiny.LATENTS + 1,
    "image_condition_type": "latent_concat",
}

CASES = {
    "sd3": Case(tiny.tiny_sd3, tiny.sd3_inputs, _IMAGE),
    "sd3.5": Case(tiny.tiny_sd35, tiny.sd3_inputs, _IMAGE),
    "chroma": Case(tiny.tiny_chroma, tiny.chroma_inputs, _IMAGE),
    "chroma, no mask": Case(tiny.tiny_chroma, _unmasked, _IMAGE),
    "chroma, image mask": Case(tiny.tiny_chroma, _image_masked, _IMAGE),
    "hunyuan-video": Case(tiny.tiny_hunyuan_video, tiny.hunyuan_video_inputs, _VIDEO),
    "hunyuan-video, token replace": Case(
        tiny.tiny_hunyuan_video_i2v, tiny.hunyuan_video_inputs, _GIVEN
    ),
    "hunyuan-video, latent concat": Case(
        partial(tiny.tiny_hunyuan_video, **_CONCAT), tiny.hunyuan_video_inputs, _GIVEN
    ),
    "hunyuan-video-1.5": Case(
        tiny.tiny_hunyuan_video15, tiny.hunyuan_video15_inputs, _VIDEO, whole=False
    ),
    "hunyuan-video-1.5, image": Case(
        partial(tiny.tiny_hunyuan_video15, task_type="i2v"), _started, _GIVEN, whole=False
    ),
    "hunyuan-image": Case(tiny.tiny_hunyuan_image, tiny.hunyuan_image_inputs, _IMAGE, whole=False),
    "hunyuan-image, distilled": Case(
        partial(tiny.tiny_hunyuan_image, use_meanflow=True, guidance_embeds=True),
        tiny.hunyuan_image_inputs,
        _IMAGE,
        whole=False,
    ),
    "pixart": Case(tiny.tiny_pixart, tiny.pixart_inputs, _IMAGE),
}
