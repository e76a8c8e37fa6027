"""The transformer of Z-Image: turbo and base."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from toma_fx.errors import InputError
from toma_fx.families import noise
from toma_fx.families.example_tensors import check_size, random_tensors
from toma_fx.families.rows import NOT_MEASURED, Block, Family, Grid, KeyMask, Place, TokenGrids
from toma_fx.passes.plan_nodes import Rows, TokenFlow
from toma_fx.passes.sites import Site

NATIVE_PIXELS = 1024
PIXELS_PER_LATENT = 8
LATENTS_PER_TOKEN = 2
"""Latents per token along a side."""
TEXT_TOKENS = 128
"""Number of tokens of a long prompt. Each caption of a batch has its own length."""
PADDED_TO = 32
"""The model pads each image and each caption to a multiple of this many tokens."""

SCHEDULER: dict[str, Any] = {"shift": 3.0}
"""The configuration of Z-Image-Turbo's scheduler; the base model's has a shift of 6."""

ARCHITECTURES: dict[str, dict[str, Any]] = {"z-image": {"axes_lens": (1536, 512, 512)}}
"""Configurations of published transformers, where they differ from diffusers' defaults; turbo and
base are alike."""

_noise_level = noise.level_of_clean_share


def _run_levels(scheduler: Any, steps: int, call: Mapping[str, Any]) -> list[float]:
    planned = noise.flow_scheduler(**SCHEDULER) if scheduler is None else scheduler
    mu = noise.shift_of_size(planned, _tokens(call["x"][0]))
    return noise.levels_of_flow(planned, steps, sigmas=noise.even_sigmas(steps), mu=mu)


def _tokens(latents_CFHW: Tensor) -> int:
    frames, height, width = latents_CFHW.shape[-3:]
    return frames * (height // LATENTS_PER_TOKEN) * (width // LATENTS_PER_TOKEN)


def _sequence_lengths(call: Mapping[str, Any]) -> set[int]:
    images = [_padded(_tokens(each)) for each in call["x"]]
    captions = [_padded(len(each)) for each in call["cap_feats"]]
    joint = [image + caption for image, caption in zip(images, captions, strict=True)]
    return {max(images), max(captions), max(joint)}


def _padded(tokens: int) -> int:
    return -(-tokens // PADDED_TO) * PADDED_TO


def _image(call: Mapping[str, Any]) -> Tensor:
    """Return a tensor shaped like the batch of images, with the first image's values: a view."""
    images: list[Tensor] = call["x"]
    return images[0].expand(len(images), *images[0].shape)


def _timestep(call: Mapping[str, Any]) -> Tensor:
    timestep: Tensor = call["t"]
    return timestep


def example_call(
    model: Any, like: Tensor, *, batch: int, height: int | None, width: int | None
) -> dict[str, Any]:
    """Make up the keyword arguments of a call of a Z-Image transformer, with arbitrary values.

    Args:
        model: the transformer; its tensors may be without data.
        like: an empty tensor with the device and dtype in which the transformer computes.
        batch: number of images.
        height: image height in pixels; 1024 if omitted.
        width: image width in pixels; the height if omitted.

    Raises:
        ModelError: when the size is not a multiple of a token's size.
    """
    config = model.config
    height = NATIVE_PIXELS if height is None else height
    width = height if width is None else width
    check_size(height, width, PIXELS_PER_LATENT * LATENTS_PER_TOKEN)
    rows, columns = height // PIXELS_PER_LATENT, width // PIXELS_PER_LATENT
    random = random_tensors(like)
    return {
        "x": [random(config.in_channels, 1, rows, columns) for _ in range(batch)],
        "t": torch.full((batch,), 0.5, device=like.device, dtype=torch.float32),
        "cap_feats": [random(TEXT_TOKENS, config.cap_feat_dim) for _ in range(batch)],
    }


_MODULE = "diffusers.models.transformers.transformer_z_image"
EXAMPLE_TOKENS = 64


def _examples(block: Any) -> dict[str, Any]:
    like = torch.empty(0, dtype=torch.float16, device="meta")
    tokens = EXAMPLE_TOKENS + 8
    width = block.dim
    modulation = block.adaLN_modulation[0].in_features if block.modulation else 0
    return {
        "x": like.new_empty(2, tokens, width),
        "freqs_cis": like.new_empty(2, tokens, block.head_dim // 2, dtype=torch.complex64),
        "adaln_input": like.new_empty(2, modulation) if block.modulation else None,
        "noise_mask": None,
        "adaln_noisy": None,
        "adaln_clean": None,
    }


def _grids(model: Any, call: Mapping[str, Any]) -> tuple[Grid, ...]:
    images = call["x"]
    if any(isinstance(each, list) for each in images):
        raise InputError(
            "x holds lists of images, as the omni pipeline passes them, so tokens do not belong to "
            "one image; call the untransformed model"
        )
    if len({each.shape for each in images}) > 1:
        sizes = [tuple(each.shape) for each in images]
        raise InputError(
            f"x holds images of sizes {sizes}, but one plan serves them all; call the model once "
            "for each size"
        )
    frames, height, width = images[0].shape[-3:]
    size = call.get("patch_size", LATENTS_PER_TOKEN)
    return (Grid(height // size, width // size, frames // call.get("f_patch_size", 1)),)


FAMILY = Family(
    name="z_image",
    cls=f"{_MODULE}.ZImageTransformer2DModel",
    title="Z-Image and Z-Image-Turbo",
    blocks=(
        Block(
            cls=f"{_MODULE}.ZImageTransformerBlock",
            flow=TokenFlow(
                tokens="x",
                joint=True,
                image_first=True,
                rows=(
                    Rows(argument="freqs_cis", joint=True),
                    Rows(argument="attn_mask", joint=True, optional=True),
                ),
            ),
            examples=_examples,
            example_tokens=EXAMPLE_TOKENS,
            key_mask=KeyMask(argument="attn_mask", shape=(2, EXAMPLE_TOKENS + 8)),
            sites=(
                Site(components=("self_attention",), enter=("attention",), leave="attention"),
                Site(components=("mlp",), enter=("feed_forward",), leave="feed_forward"),
            ),
        ),
    ),
    borders=(
        TokenGrids(
            grids=_grids,
            enter=(
                Place(method="patchify_and_embed", output=0, dim=0, listed=True),
                Place(method="patchify_and_embed", output=3, dim=0, listed=True),
                Place(argument="controlnet_block_samples", listed=True),
            ),
            leave=(Place(method="unpatchify", argument="x", dim=0, listed=True),),
        ),
    ),
    timestep=_timestep,
    time_rises=True,
    prompt=("cap_feats",),
    unmerged_by_default={"noise_refiner": (1, 4), "layers": (1, 4)},
    unmerged_because=NOT_MEASURED,
    never_merged={
        "context_refiner.*": "its tokens are those of the text",
        "siglip_refiner.*": "its tokens are those of an image to look at",
    },
    noise_level=_noise_level,
    run_levels=_run_levels,
    example_call=example_call,
    sequence_lengths=_sequence_lengths,
    image=_image,
    architectures=ARCHITECTURES,
    block_counts={"noise_refiner": "n_refiner_layers", "layers": "n_layers"},
)
