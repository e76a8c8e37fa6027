"""Complete small pipelines of diffusers' and transformers' own classes, before any training.

SDXL and Flux draw pictures of 128 x 128 pixels from latents of 32 x 32, and SDXL of 256 x 256 after
more training with ``--detailed``. Wan draws clips of 17
frames of 96 x 96 pixels from 5 x 24 x 24 latents. The sizes are chosen for an hour or two of
training on one CPU core; the structure is that of the large models.
"""

from collections.abc import Callable
from typing import Any, Literal

import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderKLWan,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
    UniPCMultistepScheduler,
    WanPipeline,
    WanTransformer3DModel,
)
from torch import nn
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    T5Config,
    T5EncoderModel,
    UMT5Config,
    UMT5EncoderModel,
)

from examples.small_models.text import PROMPT_TOKENS, clip_tokenizer, t5_tokenizer

Kind = Literal["sdxl", "flux"]
KINDS: tuple[Kind, ...] = ("sdxl", "flux")


def pipeline(kind: Kind, *, tiny: bool = False, seed: int = 0) -> Any:
    """An untrained pipeline; ``tiny`` is for tests.

    Returns:
        A ``StableDiffusionXLPipeline`` or a ``FluxPipeline``.
    """
    return _seeded(_sdxl if kind == "sdxl" else _flux, tiny, seed)


def video_pipeline(*, tiny: bool = False, seed: int = 0) -> WanPipeline:
    """An untrained ``WanPipeline``; ``tiny`` is for tests."""
    made: WanPipeline = _seeded(_wan, tiny, seed)
    return made


def _seeded(build: Callable[[bool], Any], tiny: bool, seed: int) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        made = build(tiny)
    made.set_progress_bar_config(disable=True)
    return made


def vae(kind: Kind, *, tiny: bool = False) -> AutoencoderKL:
    """Four pixels per latent along a side; Flux's has more channels and no quantisation layers."""
    flux = kind == "flux"
    return AutoencoderKL(
        block_out_channels=(4, 4, 8) if tiny else (16, 32, 64),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        layers_per_block=1,
        latent_channels=16 if flux else 4,
        norm_num_groups=2 if tiny else 8,
        sample_size=128,
        shift_factor=0.0 if flux else None,
        use_quant_conv=not flux,
        use_post_quant_conv=not flux,
        mid_block_add_attention=False,
        force_upcast=False,
    )


def video_vae(*, tiny: bool = False) -> AutoencoderKLWan:
    """Four pixels per latent along a side, and four frames, of which the first is by itself."""
    return AutoencoderKLWan(
        base_dim=4 if tiny else 16,
        z_dim=16,
        dim_mult=[1, 1, 1] if tiny else [1, 2, 2],
        num_res_blocks=1,
        temperal_downsample=[True, True],
        scale_factor_spatial=4,
    )


def _sdxl(tiny: bool) -> StableDiffusionXLPipeline:
    width = 16 if tiny else 64
    unet = UNet2DConditionModel(
        sample_size=32,
        block_out_channels=(16, 16, 32) if tiny else (64, 96, 120),
        norm_num_groups=8,
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 1, 1) if tiny else (1, 2, 3),
        attention_head_dim=(2, 2, 4) if tiny else (2, 3, 5),
        use_linear_projection=True,
        cross_attention_dim=2 * width,
        addition_embed_type="text_time",
        addition_time_embed_dim=16,
        projection_class_embeddings_input_dim=width + 6 * 16,
    )
    return StableDiffusionXLPipeline(
        vae=vae("sdxl", tiny=tiny),
        text_encoder=_clip(CLIPTextModel, width, layers=3),
        text_encoder_2=_clip(CLIPTextModelWithProjection, width, layers=4),
        tokenizer=clip_tokenizer(),
        tokenizer_2=clip_tokenizer(),
        unet=unet,
        scheduler=EulerDiscreteScheduler(
            beta_start=0.00085,
            beta_end=0.012,
            beta_schedule="scaled_linear",
            prediction_type="v_prediction",
            timestep_spacing="trailing",
        ),
        force_zeros_for_empty_prompt=True,
        add_watermarker=False,
    )


def _flux(tiny: bool) -> FluxPipeline:
    pooled, width = (16, 32) if tiny else (64, 128)
    transformer = FluxTransformer2DModel(
        in_channels=64,
        num_layers=1 if tiny else 3,
        num_single_layers=1 if tiny else 6,
        attention_head_dim=16 if tiny else 48,
        num_attention_heads=2 if tiny else 4,
        joint_attention_dim=width,
        pooled_projection_dim=pooled,
        guidance_embeds=True,
        axes_dims_rope=(4, 6, 6) if tiny else (8, 20, 20),
    )
    _close_gates(transformer)
    return FluxPipeline(
        vae=vae("flux", tiny=tiny),
        text_encoder=_clip(CLIPTextModel, pooled, layers=2),
        tokenizer=clip_tokenizer(),
        text_encoder_2=T5EncoderModel(T5Config(**_t5(width, tiny))),
        tokenizer_2=t5_tokenizer(),
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, shift=3.0),
    )


def _wan(tiny: bool) -> WanPipeline:
    text, width = (32, 32) if tiny else (128, 256)
    transformer = WanTransformer3DModel(
        num_attention_heads=2 if tiny else 4,
        attention_head_dim=width // (2 if tiny else 4),
        text_dim=text,
        freq_dim=width,
        ffn_dim=3 * width,
        num_layers=2 if tiny else 6,
        rope_max_seq_len=64,
    )
    _close_gates(transformer)
    return WanPipeline(
        vae=video_vae(tiny=tiny),
        text_encoder=UMT5EncoderModel(UMT5Config(**_t5(text, tiny))),
        tokenizer=t5_tokenizer(),
        transformer=transformer,
        scheduler=UniPCMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
        ),
    )


def _t5(width: int, tiny: bool) -> dict[str, Any]:
    return {
        "vocab_size": len(t5_tokenizer()),
        "d_model": width,
        "d_ff": 2 * width,
        "d_kv": width // 4,
        "num_layers": 1 if tiny else 3,
        "num_heads": 4,
        "dropout_rate": 0.0,
        "feed_forward_proj": "gated-gelu",
        "pad_token_id": 0,
        "eos_token_id": 1,
    }


def _close_gates(transformer: nn.Module) -> None:
    """Starts each block as the identity (adaLN-Zero), from where training is quickest.

    Wan's gates stay a little open, by its tables.
    """
    last = ("norm.linear", "norm1.linear", "norm1_context.linear", "time_proj")
    for name, module in transformer.named_modules():
        if isinstance(module, nn.Linear) and (name == "proj_out" or name.endswith(last)):
            nn.init.zeros_(module.weight)
            nn.init.zeros_(module.bias)


def _clip(cls: Any, width: int, layers: int) -> Any:
    encoder = cls(
        CLIPTextConfig(
            vocab_size=len(clip_tokenizer()),
            hidden_size=width,
            intermediate_size=4 * width,
            projection_dim=width,
            num_hidden_layers=layers,
            num_attention_heads=width // 16,
            max_position_embeddings=PROMPT_TOKENS,
            bos_token_id=0,
            eos_token_id=1,
            pad_token_id=1,
        )
    )
    # CLIP's own start is so small that the image model would long see no text: SDXL reads hidden
    # states that no norm has scaled.
    embeddings = getattr(encoder, "text_model", encoder).embeddings
    nn.init.normal_(embeddings.token_embedding.weight, std=0.5)
    nn.init.normal_(embeddings.position_embedding.weight, std=0.2)
    return encoder
