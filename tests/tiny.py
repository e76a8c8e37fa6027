"""Tiny models of diffusers' own classes, with random weights, and inputs that suit them."""

import math
from typing import Any

import torch
from diffusers import FluxTransformer2DModel, UNet2DConditionModel
from torch import Tensor, nn

from toma_fx import MergeConfig

TEXT_WIDTH = 32
TEXT_TOKENS = 7


def liven(model: nn.Module) -> None:
    """Gives a model the parts that only training does.

    diffusers leaves the AdaLN gates of an untrained model near 0, so that its blocks hardly
    change their input, and biases or norms at exactly 0 or 1, which hides a forgotten one.
    """
    for name, parameter in model.named_parameters():
        if ("norm" in name and name.endswith("linear.bias")) or not parameter.any():
            nn.init.normal_(parameter, std=0.3)
        elif bool((parameter == 1).all()):
            nn.init.normal_(parameter, mean=1.0, std=0.1)


def build(cls: Any, seed: int, config: dict[str, Any]) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = cls(**config)
        with torch.no_grad():
            liven(model)
    return model.eval()


def tiny_sdxl_unet(seed: int = 0, **changes: Any) -> UNet2DConditionModel:
    """SDXL's structure: no attention at the first resolution, 5 stages with 1 and 2 blocks."""
    config = {
        "sample_size": 32,
        "block_out_channels": (16, 32, 32),
        "norm_num_groups": 8,
        "layers_per_block": 1,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "transformer_layers_per_block": (1, 1, 2),
        "attention_head_dim": (2, 2, 4),
        "use_linear_projection": True,
        "cross_attention_dim": TEXT_WIDTH,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 8,
        "projection_class_embeddings_input_dim": TEXT_WIDTH + 6 * 8,
        **changes,
    }
    return build(UNet2DConditionModel, seed, config)


def tiny_sd_unet(seed: int = 0) -> UNet2DConditionModel:
    """SD 1.5's structure: attention from the first resolution on, projections by convolution."""
    config = {
        "sample_size": 32,
        "block_out_channels": (16, 32, 32),
        "norm_num_groups": 8,
        "layers_per_block": 1,
        "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        "attention_head_dim": 2,
        "cross_attention_dim": TEXT_WIDTH,
    }
    return build(UNet2DConditionModel, seed, config)


def tiny_flux(
    guidance: bool = True,
    num_layers: int = 2,
    num_single_layers: int = 3,
    seed: int = 0,
    **changes: Any,
) -> FluxTransformer2DModel:
    """Flux's structure: double-stream blocks, then single-stream blocks."""
    config = {
        "in_channels": 16,
        "num_layers": num_layers,
        "num_single_layers": num_single_layers,
        "attention_head_dim": 16,
        "num_attention_heads": 2,
        "joint_attention_dim": TEXT_WIDTH,
        "pooled_projection_dim": TEXT_WIDTH,
        "guidance_embeds": guidance,
        "axes_dims_rope": (4, 6, 6),
        **changes,
    }
    return build(FluxTransformer2DModel, seed, config)


def smallest_unet() -> UNet2DConditionModel:
    """One block at the first resolution, and two that share a plan at the second."""
    config = {
        "block_out_channels": (16, 16),
        "norm_num_groups": 4,
        "layers_per_block": 1,
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "UpBlock2D"),
        "transformer_layers_per_block": (1, 2),
        "attention_head_dim": 2,
        "cross_attention_dim": TEXT_WIDTH,
    }
    return build(UNet2DConditionModel, 0, config)


def smallest_flux() -> FluxTransformer2DModel:
    """One double-stream block, and two single-stream blocks that share a plan."""
    return tiny_flux(num_layers=1, num_single_layers=2)


def lossless(preset: str = "default", **options: Any) -> MergeConfig:
    """Options with which every token is kept and stands for itself alone.

    Merging then only moves tokens about, and whatever belongs to a token has to move with it. Users
    cannot ask for this: a ratio that merges nothing is refused.
    """
    config = MergeConfig.preset(preset, **{"temperature": 1e-6, **options})
    object.__setattr__(config, "ratio", 1e-3)
    return config


def smooth_images(shape: tuple[int, int, int, int], generator: torch.Generator) -> Tensor:
    """Images ``(B, C, H, W)`` of a few slow waves and some noise.

    On pure noise all tokens would be equally unlike each other, and any choice of destinations
    as good as any other.
    """
    batch, channels, height, width = shape
    rows_H1 = torch.arange(height)[:, None] / height
    columns_W = torch.arange(width) / width
    images_BCHW = 0.2 * torch.randn(shape, generator=generator)
    for _ in range(4):
        down, right, phase = torch.rand(3, batch, channels, 1, 1, generator=generator)
        cycles = 2 * down * rows_H1 + 2 * right * columns_W + phase
        images_BCHW += torch.cos(2 * math.pi * cycles)
    return images_BCHW


def unet_inputs(
    unet: UNet2DConditionModel, batch: int = 2, height: int = 32, width: int = 32, seed: int = 0
) -> dict[str, Any]:
    """Keyword arguments of a call of the UNet, in its dtype; sizes in latent pixels."""
    generator = torch.Generator().manual_seed(seed)
    shape = (batch, unet.config.in_channels, height, width)
    inputs: dict[str, Any] = {
        "sample": smooth_images(shape, generator).to(unet.dtype),
        "timestep": torch.tensor(500),
        "encoder_hidden_states": torch.randn(
            batch, TEXT_TOKENS, TEXT_WIDTH, generator=generator
        ).to(unet.dtype),
    }
    if unet.config.addition_embed_type == "text_time":
        size = (8.0 * height, 8.0 * width)
        inputs["added_cond_kwargs"] = {
            "text_embeds": torch.randn(batch, TEXT_WIDTH, generator=generator).to(unet.dtype),
            "time_ids": torch.tensor([*size, 0.0, 0.0, *size], dtype=unet.dtype).repeat(batch, 1),
        }
    return inputs


def flux_inputs(
    model: FluxTransformer2DModel,
    batch: int = 2,
    height: int = 16,
    width: int = 16,
    text: int = 6,
    seed: int = 0,
) -> dict[str, Any]:
    """Keyword arguments of a call of Flux, in its dtype; sizes in tokens."""
    generator = torch.Generator().manual_seed(seed)
    images_BCHW = smooth_images((batch, model.config.in_channels, height, width), generator)
    img_ids = torch.zeros(height, width, 3, dtype=model.dtype)
    img_ids[..., 1] += torch.arange(height)[:, None]
    img_ids[..., 2] += torch.arange(width)
    inputs: dict[str, Any] = {
        "hidden_states": images_BCHW.flatten(2).transpose(1, 2).contiguous().to(model.dtype),
        "encoder_hidden_states": torch.randn(batch, text, TEXT_WIDTH, generator=generator).to(
            model.dtype
        ),
        "pooled_projections": torch.randn(batch, TEXT_WIDTH, generator=generator).to(model.dtype),
        "timestep": torch.full((batch,), 0.5, dtype=model.dtype),
        "img_ids": img_ids.flatten(0, 1),
        "txt_ids": torch.zeros(text, 3, dtype=model.dtype),
    }
    if model.config.guidance_embeds:
        inputs["guidance"] = torch.full((batch,), 3.5, dtype=model.dtype)
    return inputs
