"""Models to report on and to time: a checkpoint of the user's, or a real architecture at real size.

Time does not depend on the weights, so random ones will do where no checkpoint is at hand.
"""

import os
from typing import Any

import diffusers
import torch
from torch import nn

from toma_fx.errors import ModelError
from toma_fx.transform import PIPELINE_PARTS

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
"""By the names that the command line takes."""

SDXL: dict[str, Any] = {
    "sample_size": 128,
    "block_out_channels": (320, 640, 1280),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 2, 10),
    "attention_head_dim": (5, 10, 20),
    "cross_attention_dim": 2048,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
    "use_linear_projection": True,
}
"""The configuration of stable-diffusion-xl-base-1.0's UNet."""

FLUX: dict[str, Any] = {"guidance_embeds": True}
"""The configuration of FLUX.1-dev's transformer, where it differs from diffusers' defaults."""

RANDOM = {
    "sdxl": (diffusers.UNet2DConditionModel, SDXL),
    "flux": (diffusers.FluxTransformer2DModel, FLUX),
}


def load_model(
    name: str, *, dtype: torch.dtype = torch.bfloat16, device: str = "cpu", **changes: Any
) -> nn.Module:
    """A denoising model, ready for inference.

    Args:
        name: ``"sdxl"`` or ``"flux"`` for random weights; otherwise a folder or hub name of a
            pipeline or of its model alone, as ``from_pretrained`` takes it.
        dtype: of the weights.
        device: where they go.
        **changes: of the configuration, for random weights only, such as ``num_layers=3``.

    Raises:
        ModelError: when there is neither a pipeline nor a model under that name.
    """
    if name in RANDOM:
        cls, config = RANDOM[name]
        return random_weights(cls, {**config, **changes}, dtype, device)
    try:
        index = diffusers.DiffusionPipeline.load_config(name)
        part = {"subfolder": next(part for part in PIPELINE_PARTS if part in index)}
    except (OSError, StopIteration):
        part = {}
    try:
        model: nn.Module = diffusers.AutoModel.from_pretrained(name, torch_dtype=dtype, **part)
    except (OSError, ValueError) as error:
        raise ModelError(
            f"no model could be loaded from {name!r}: {error}; give {', '.join(RANDOM)}, a folder, "
            "or the name of a diffusers pipeline or model"
        ) from error
    return model.to(device).eval().requires_grad_(False)


def architecture(name: str) -> nn.Module:
    """A model without weights, on the meta device: enough to transform and to report on.

    Args:
        name: ``"sdxl"`` or ``"flux"``.
    """
    cls, config = RANDOM[name]
    with torch.device("meta"):
        model: nn.Module = cls(**config)
    return model


def random_weights(
    cls: Any, config: dict[str, Any], dtype: torch.dtype, device: str = "cpu"
) -> nn.Module:
    """A model with weights that keep activations finite, filled in seconds at any size."""
    with torch.device("meta"):
        model: nn.Module = cls(**config)
    for module in model.modules():  # not model.to(dtype), whose advice is for pretrained weights
        for name, parameter in module.named_parameters(recurse=False):
            empty = torch.empty_like(parameter, dtype=dtype, device=device)
            setattr(module, name, nn.Parameter(empty, requires_grad=False))
    pool = torch.randn(2**22, generator=torch.Generator().manual_seed(0)).to(device, dtype)
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1:
            parameter.fill_(1.0 if name.endswith("weight") else 0.0)
            continue
        scale = 0.5 * parameter[0].numel() ** -0.5
        flat, scaled = parameter.view(-1), pool * scale
        for start in range(0, flat.numel(), pool.numel()):
            piece = flat[start : start + pool.numel()]
            piece.copy_(scaled[: piece.numel()])
    return model.eval()


def available_memory() -> int:
    """Bytes of memory that a new model can use."""
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
