"""Inputs of a whole model at a given image size, for reports, traces and benchmarks.

Their values mean nothing; their shapes are those that diffusers' pipelines pass to SDXL base and
Flux. Other models get inputs that fit them.
"""

from typing import Any

import torch

# What a model computes in, which is not the dtype of weights that are cast or quantised.
from diffusers.models.modeling_utils import get_parameter_dtype
from torch import Tensor, nn

from toma_fx.errors import ModelError
from toma_fx.hooks import copied_without_hooks, is_cast

VAE_SCALE = 8
"""Pixels per latent along a side, in every model that toma_fx knows."""
FLUX_PATCH = 2
"""Latents per token along a side, in Flux."""
CLIP_TOKENS = 77
FLUX_TEXT_TOKENS = 512


def random_inputs(
    model: nn.Module, *, height: int | None = None, width: int | None = None, batch: int = 1
) -> dict[str, Any]:
    """Keyword arguments for a call of ``model``, on its device and in its dtype.

    Args:
        model: a UNet or a Flux transformer.
        height: of the image, in pixels; the model's native size when left out.
        width: of the image, in pixels; like ``height`` when left out.
        batch: images.

    Raises:
        ModelError: when the size is no multiple of what a token covers.
    """
    device = next(model.parameters()).device
    like = torch.empty(0, device=device, dtype=get_parameter_dtype(model))
    flux = hasattr(model, "single_transformer_blocks")
    config: Any = model.config
    native = 1024 if flux else _square(config.sample_size) * VAE_SCALE
    height = native if height is None else height
    width = height if width is None else width
    step = VAE_SCALE * (FLUX_PATCH if flux else 1)
    if height % step or width % step or height < step or width < step:
        raise ModelError(
            f"an image of {height} x {width} pixels must be a multiple of {step} pixels along each "
            f"side, such as {max(1, height // step) * step} x {max(1, width // step) * step}"
        )
    make = _flux_inputs if flux else _unet_inputs
    return make(config, like, batch, height // step, width // step)


def _square(sample_size: Any) -> int:
    return int(sample_size if isinstance(sample_size, int) else max(sample_size))


def _random(like: Tensor, *shape: int) -> Tensor:
    # A generator of its own: the global random state is the user's.
    if like.device.type == "meta":
        return like.new_empty(shape)
    values = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    return values.to(like)


def _unet_inputs(config: Any, like: Tensor, batch: int, rows: int, columns: int) -> dict[str, Any]:
    width = config.cross_attention_dim
    inputs: dict[str, Any] = {
        "sample": _random(like, batch, config.in_channels, rows, columns),
        "timestep": torch.tensor(500.0, device=like.device),
        "encoder_hidden_states": _random(
            like, batch, CLIP_TOKENS, width if isinstance(width, int) else width[0]
        ),
    }
    if config.addition_embed_type == "text_time":
        ids = 6
        pooled = config.projection_class_embeddings_input_dim - ids * config.addition_time_embed_dim
        inputs["added_cond_kwargs"] = {
            "text_embeds": _random(like, batch, pooled),
            "time_ids": _random(like, batch, ids),
        }
    return inputs


def _flux_inputs(config: Any, like: Tensor, batch: int, rows: int, columns: int) -> dict[str, Any]:
    device = like.device
    row = torch.arange(rows, device=device)[:, None].expand(rows, columns)
    column = torch.arange(columns, device=device).expand(rows, columns)
    ids = torch.stack([torch.zeros_like(row), row, column], dim=-1).flatten(0, 1)
    inputs = {
        "hidden_states": _random(like, batch, rows * columns, config.in_channels),
        "encoder_hidden_states": _random(like, batch, FLUX_TEXT_TOKENS, config.joint_attention_dim),
        "pooled_projections": _random(like, batch, config.pooled_projection_dim),
        "timestep": torch.full((batch,), 0.5, device=device, dtype=like.dtype),
        "img_ids": ids.to(like.dtype),
        "txt_ids": torch.zeros(FLUX_TEXT_TOKENS, 3, device=device, dtype=like.dtype),
    }
    if config.guidance_embeds:
        inputs["guidance"] = torch.full((batch,), 3.5, device=device, dtype=torch.float32)
    return inputs


def weightless(model: nn.Module) -> nn.Module:
    """A copy with shapes but no data, and no hooks, to count or trace a call that is not run.

    Weights under layerwise casting have the dtype that they are computed in.
    """
    computed = get_parameter_dtype(model) if is_cast(model) else None

    def empty(tensor: Tensor) -> Tensor:
        return tensor.to("meta", computed if tensor.is_floating_point() else None)

    memo: dict[int, Tensor] = {id(buffer): empty(buffer) for buffer in model.buffers()}
    memo |= {id(p): nn.Parameter(empty(p), requires_grad=False) for p in model.parameters()}
    return copied_without_hooks(model, memo)
