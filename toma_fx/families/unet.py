"""The UNet of Stable Diffusion 1.5, 2.1 and XL, and of models derived from them."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from diffusers.models.embeddings import (
    ImageProjection,
    IPAdapterFaceIDImageProjection,
    IPAdapterFaceIDPlusImageProjection,
    IPAdapterFullImageProjection,
    IPAdapterPlusImageProjection,
    MultiIPAdapterImageProjection,
)
from torch import Tensor, nn

from toma_fx.errors import ModelError
from toma_fx.families import noise
from toma_fx.families.example_tensors import check_size, random_tensors
from toma_fx.families.rows import Block, Family, Stage
from toma_fx.passes.plan_nodes import TokenFlow
from toma_fx.passes.sites import Site

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

VAE_SCALE = 8
"""Pixels per latent along a side."""
CLIP_TOKENS = 77
CHATGLM_TOKENS = 256
"""Number of text tokens in Kolors, whose text encoder is ChatGLM."""
IMAGE_TOKENS = 257
"""Number of tokens of an image in CLIP's hidden states."""


def _examples(block: Any) -> dict[str, Any]:
    # float16, as in all families: some forwards do extra work for it.
    like = torch.empty(0, dtype=torch.float16, device="meta")
    return {"hidden_states": like.new_empty(2, 64, block.dim)}


def _run_levels(scheduler: Any, steps: int, call: Mapping[str, Any]) -> list[float]:
    timesteps = noise.levels_of_run(scheduler, steps, scale=1)
    if timesteps is None:  # evenly spaced, as those of SDXL's own scheduler
        return [(steps - step) / steps - 1 / (2 * steps) for step in range(steps)]
    return [noise.level_of_thousand(t, scheduler) for t in timesteps]


def _sequence_lengths(call: Mapping[str, Any]) -> set[int]:
    height, width = call["sample"].shape[-2:]
    lengths = set()
    while height * width > 1:
        lengths.add(height * width)
        height, width = (height + 1) // 2, (width + 1) // 2
    return lengths


def example_call(
    model: Any, like: Tensor, *, batch: int, height: int | None, width: int | None
) -> dict[str, Any]:
    """Make up the keyword arguments of a call of a UNet, with arbitrary values.

    Args:
        model: the UNet; its tensors may be without data.
        like: an empty tensor with the device and dtype in which the UNet computes.
        batch: number of images.
        height: image height in pixels; the model's native size if omitted.
        width: image width in pixels; the height if omitted, or the native size if both are.

    Raises:
        ModelError: when the size is not a multiple of a latent's size, or when it is omitted and
            the model's config has none.
    """
    config = model.config
    height, width = _size(config.sample_size, height, width)
    random = random_tensors(like)
    added = _added(model, random, batch, height, width)
    labels = _class_labels(model, random, like.device, batch)
    call: dict[str, Any] = {
        "sample": random(batch, _channels(model), height // VAE_SCALE, width // VAE_SCALE),
        "timestep": torch.tensor(500.0, device=like.device),
        "encoder_hidden_states": _text(config, random, batch),
    }
    if labels is not None:
        call["class_labels"] = labels
    if config.time_cond_proj_dim is not None:
        call["timestep_cond"] = random(batch, config.time_cond_proj_dim)
    if added:
        call["added_cond_kwargs"] = added
    return call


def _size(native: Any, height: int | None, width: int | None) -> tuple[int, int]:
    if height is None and native is None:
        raise ModelError(
            "the model's config has no sample_size, so the image size is unknown; pass height and "
            "width, or inputs={...}, the keyword arguments of a call"
        )
    if height is None:
        rows, columns = (native, native) if isinstance(native, int) else native
        height, width = rows * VAE_SCALE, columns * VAE_SCALE if width is None else width
    width = height if width is None else width
    check_size(height, width, VAE_SCALE)
    return height, width


def _channels(model: Any) -> int:
    # Ask the layer, because code that widens it for inpainting may leave the config unchanged. Ask
    # its weight, because a LoRA layer around it has no in_channels.
    channels = int(model.conv_in.weight.shape[1])
    if model.config.addition_embed_type == "image_hint":
        channels -= model.add_embedding.input_hint_block[-1].out_channels
    return channels


def _text(config: Any, random: Callable[..., Tensor], batch: int) -> Tensor | None:
    widths = config.cross_attention_dim
    widths = {widths} if isinstance(widths, int) else set(widths)
    if config.encoder_hid_dim_type == "image_proj" or len(widths) > 1:
        return None  # Kandinsky 2.2 attends to images, and AudioLDM to the tokens themselves
    kolors = config.addition_embed_type == "text_time" and config.encoder_hid_dim is not None
    tokens = CHATGLM_TOKENS if kolors else CLIP_TOKENS
    return random(batch, tokens, config.encoder_hid_dim or widths.pop())


def _class_labels(
    model: Any, random: Callable[..., Tensor], device: torch.device, batch: int
) -> Tensor | None:
    config = model.config
    kind = config.class_embed_type
    if kind in ("projection", "simple_projection"):
        return random(batch, config.projection_class_embeddings_input_dim)
    if kind == "identity":
        return random(batch, model.time_embedding.linear_2.out_features)
    if kind == "timestep" or config.num_class_embeds is not None:
        return torch.zeros(batch, dtype=torch.long, device=device)
    return None


def _added(
    model: Any, random: Callable[..., Tensor], batch: int, height: int, width: int
) -> dict[str, Any]:
    config = model.config
    kind = config.addition_embed_type
    added: dict[str, Any] = {}
    if kind == "text_time":
        ids = _size_ids(config, height, width)
        pooled = (
            config.projection_class_embeddings_input_dim - len(ids) * config.addition_time_embed_dim
        )
        added["text_embeds"] = random(batch, pooled)
        added["time_ids"] = added["text_embeds"].new_tensor(ids).repeat(batch, 1)
    if kind == "text_image":
        added["text_embeds"] = random(batch, config.cross_attention_dim)
    if kind == "image_hint":
        added["hint"] = random(batch, 3, height, width)
    if isinstance(model.encoder_hid_proj, MultiIPAdapterImageProjection):
        adapters = model.encoder_hid_proj.image_projection_layers
        added["image_embeds"] = [_image_embeds(each, random, batch) for each in adapters]
    elif kind in ("text_image", "image", "image_hint"):
        added["image_embeds"] = random(batch, model.add_embedding.image_proj.in_features)
    elif config.encoder_hid_dim_type in ("text_image_proj", "image_proj"):
        added["image_embeds"] = random(batch, model.encoder_hid_proj.image_embeds.in_features)
    return added


def _size_ids(config: Any, height: int, width: int) -> list[float]:
    """Return SDXL's size before the crop, crop corner, and target size (in the refiner: a score).

    The refiner's only text encoder gives both text tokens and pooled text, equally wide.
    """
    known = config.projection_class_embeddings_input_dim - 5 * config.addition_time_embed_dim
    target = [6.0] if known == config.cross_attention_dim else [height, width]
    return [height, width, 0, 0, *target]


_IMAGE_EMBEDS: dict[type[nn.Module], tuple[str, tuple[int, ...]]] = {
    ImageProjection: ("image_embeds", ()),
    IPAdapterPlusImageProjection: ("proj_in", (IMAGE_TOKENS,)),
    IPAdapterFullImageProjection: ("ff.net.0.proj", (IMAGE_TOKENS,)),
    IPAdapterFaceIDImageProjection: ("ff.net.0.proj", (1,)),
    IPAdapterFaceIDPlusImageProjection: ("proj.net.0.proj", (1,)),
}
"""For each IP-Adapter projection: the layer that takes an image's embedding, and the shape of the
embedding without its width."""


def _image_embeds(projection: nn.Module, random: Callable[..., Tensor], batch: int) -> Tensor:
    path, shape = _IMAGE_EMBEDS[type(projection)]
    layer: Any = projection.get_submodule(path)
    images = 1
    # FaceID Plus keeps CLIP's embeddings of all images of a batch, and needs as many of faces.
    if (kept := getattr(projection, "clip_embeds", None)) is not None:
        images = max(1, kept.shape[0] * kept.shape[1] // batch)
    return random(batch, images, *shape, layer.in_features)


def _attention(module: object, hidden_states: Tensor, *args: object, **kwargs: object) -> Tensor:
    """Return the output shape without the processor, which may fail on tensors without data."""
    return hidden_states.new_empty(hidden_states.shape)


FAMILY = Family(
    name="unet",
    regretted="",
    cls="diffusers.models.unets.unet_2d_condition.UNet2DConditionModel",
    title="Stable Diffusion XL, 2.1 and 1.5",
    blocks=(
        Block(
            cls="diffusers.models.attention.BasicTransformerBlock",
            flow=TokenFlow(attention_kwargs="cross_attention_kwargs"),
            examples=_examples,
            masks=(
                ("attention_mask", "self_attention"),
                ("encoder_attention_mask", "cross_attention"),
            ),
            refused=("gligen",),
            refused_by_attention=("ip_adapter_masks", "attention_mask"),
            sites=(
                Site(components=("self_attention",), enter=("attn1",), leave="attn1"),
                Site(components=("cross_attention",), enter=("attn2",), leave="attn2"),
                Site(components=("mlp",), enter=("ff",), leave="ff"),
            ),
        ),
    ),
    borders=(
        Stage(
            cls="diffusers.models.transformers.transformer_2d.Transformer2DModel",
            enter="_operate_on_continuous_inputs",
            leave="_get_output_for_continuous_inputs",
        ),
    ),
    attention_kwargs="cross_attention_kwargs",
    leaf_values={"diffusers.models.attention_processor.Attention": _attention},
    prompt=("encoder_hidden_states", "added_cond_kwargs", "class_labels"),
    theta=0.5,
    noise_level=noise.level_of_thousand,
    run_levels=_run_levels,
    example_call=example_call,
    sequence_lengths=_sequence_lengths,
    image=lambda call: call["sample"],
    architectures={"sdxl": SDXL},
)
