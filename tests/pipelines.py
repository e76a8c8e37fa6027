"""Tiny complete pipelines of diffusers' and transformers' own classes, built without a download."""

import string
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from diffusers import (
    AutoencoderKL,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    StableDiffusionXLPipeline,
)
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)

from tests.tiny import TEXT_WIDTH, tiny_flux, tiny_sdxl_unet

PROMPT_TOKENS = 16
LETTERS = string.ascii_lowercase

Module = TypeVar("Module", bound=torch.nn.Module)


def seeded(build: Callable[[], Module]) -> Module:
    """A model whose random weights are always the same ones."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return build().eval()


def _clip_tokenizer() -> CLIPTokenizer:
    """Knows single letters, each within and at the end of a word."""
    tokens = [
        "<|startoftext|>",
        "<|endoftext|>",
        *LETTERS,
        *(f"{letter}</w>" for letter in LETTERS),
    ]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    return CLIPTokenizer(vocab=vocabulary, merges=[], model_max_length=PROMPT_TOKENS)


def t5_tokenizer() -> T5Tokenizer:
    """Knows single letters and the start of a word."""
    special = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    letters = [(letter, -2.0) for letter in ("\N{LOWER ONE EIGHTH BLOCK}", *LETTERS)]
    return T5Tokenizer(vocab=special + letters, extra_ids=0)


def _clip(cls: Any, width: int) -> Any:
    config = CLIPTextConfig(
        vocab_size=2 + 2 * len(LETTERS),
        hidden_size=width,
        intermediate_size=32,
        projection_dim=TEXT_WIDTH,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=PROMPT_TOKENS,
        bos_token_id=0,
        eos_token_id=1,
    )
    return seeded(lambda: cls(config))


def _t5() -> Any:
    config = T5Config(
        vocab_size=4 + len(LETTERS),
        d_model=TEXT_WIDTH,
        d_ff=32,
        d_kv=16,
        num_layers=2,
        num_heads=2,
        pad_token_id=0,
        eos_token_id=1,
    )
    return seeded(lambda: T5EncoderModel(config))


def tiny_vae() -> AutoencoderKL:
    """Eight pixels per latent along a side, as in the large models."""
    return seeded(
        lambda: AutoencoderKL(
            block_out_channels=(4, 4, 8, 8),
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            layers_per_block=1,
            latent_channels=4,
            norm_num_groups=2,
            shift_factor=0.1,
            force_upcast=False,
        )
    )


def tiny_sdxl_pipeline() -> StableDiffusionXLPipeline:
    """Stable Diffusion XL, each of whose two text encoders gives half of the text's width."""
    pipeline = StableDiffusionXLPipeline(
        vae=tiny_vae(),
        text_encoder=_clip(CLIPTextModel, TEXT_WIDTH // 2),
        text_encoder_2=_clip(CLIPTextModelWithProjection, TEXT_WIDTH // 2),
        tokenizer=_clip_tokenizer(),
        tokenizer_2=_clip_tokenizer(),
        unet=tiny_sdxl_unet(),
        scheduler=EulerDiscreteScheduler(),
        add_watermarker=False,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def tiny_flux_pipeline() -> FluxPipeline:
    """Flux, whose tokens are patches of 2x2 latents of 4 channels."""
    pipeline = FluxPipeline(
        vae=tiny_vae(),
        text_encoder=_clip(CLIPTextModel, TEXT_WIDTH),
        tokenizer=_clip_tokenizer(),
        text_encoder_2=_t5(),
        tokenizer_2=t5_tokenizer(),
        transformer=tiny_flux(),
        scheduler=FlowMatchEulerDiscreteScheduler(),
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline
