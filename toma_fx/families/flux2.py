"""The transformer of FLUX.2: dev and klein."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from toma_fx.families import noise
from toma_fx.families.example_tensors import image_ids, random_tensors, token_grid
from toma_fx.families.rows import NOT_MEASURED, Block, Family, References, TokenSequence
from toma_fx.passes.plan_nodes import Rows, TokenFlow
from toma_fx.passes.sites import Site

NATIVE_PIXELS = 1024
PIXELS_PER_TOKEN = 16
"""Pixels per token along a side: 8 per latent times 2 latents per token."""
TEXT_TOKENS = 512

SCHEDULER: dict[str, Any] = {"use_dynamic_shifting": True}
"""The configuration of the published models' schedulers."""

ARCHITECTURES: dict[str, dict[str, Any]] = {
    "flux2-dev": {},
    "flux2-klein-4b": {
        "num_layers": 5,
        "num_single_layers": 20,
        "num_attention_heads": 24,
        "joint_attention_dim": 7680,
        "guidance_embeds": False,
    },
    "flux2-klein-9b": {
        "num_layers": 8,
        "num_single_layers": 24,
        "num_attention_heads": 32,
        "joint_attention_dim": 12288,
        "guidance_embeds": False,
    },
}
"""Configurations of published transformers, where they differ from diffusers' defaults."""

_noise_level = noise.level_of_sigma


def _run_levels(scheduler: Any, steps: int, call: Mapping[str, Any]) -> list[float]:
    planned = noise.flow_scheduler(**SCHEDULER) if scheduler is None else scheduler
    mu = _shift(call["hidden_states"].shape[1], steps)
    return noise.levels_of_flow(planned, steps, sigmas=noise.even_sigmas(steps), mu=mu)


def _shift(tokens: int, steps: int) -> float:
    """Return the shift of a run: diffusers' ``compute_empirical_mu``, fitted to authors' runs."""
    of_200 = 0.00016927 * tokens + 0.45666666
    if tokens > 4300:
        return of_200
    of_10 = 8.73809524e-05 * tokens + 1.89833333
    return of_200 + (of_200 - of_10) / 190 * (steps - 200)


def _sequence_lengths(call: Mapping[str, Any]) -> set[int]:
    image, text = call["hidden_states"].shape[1], call["encoder_hidden_states"].shape[1]
    return {image + text}


def example_call(
    model: Any, like: Tensor, *, batch: int, height: int | None, width: int | None
) -> dict[str, Any]:
    """Make up the keyword arguments of a call of a FLUX.2 transformer, with arbitrary values.

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
    device, dtype = like.device, like.dtype
    rows, columns = token_grid(height, width, NATIVE_PIXELS, PIXELS_PER_TOKEN)
    random = random_tensors(like)
    call: dict[str, Any] = {
        "hidden_states": random(batch, rows * columns, config.in_channels),
        "encoder_hidden_states": random(batch, TEXT_TOKENS, config.joint_attention_dim),
        "timestep": torch.full((batch,), 0.5, device=device, dtype=dtype),
        "img_ids": _image_ids(rows, columns, device).expand(batch, -1, -1),
        "txt_ids": _text_ids(device).expand(batch, -1, -1),
    }
    if config.guidance_embeds:
        call["guidance"] = torch.full((batch,), 4.0, device=device, dtype=torch.float32)
    return call


def _image_ids(rows: int, columns: int, device: torch.device) -> Tensor:
    """Return image number, row, column, and a position in text, which is 0."""
    return functional.pad(image_ids(rows, columns, device), (0, 1))


def _text_ids(device: torch.device) -> Tensor:
    position = torch.arange(TEXT_TOKENS, device=device)
    zero = torch.zeros_like(position)
    return torch.stack([zero, zero, zero, position], dim=-1)


def _edit_call(call: Mapping[str, Any]) -> dict[str, Any]:
    """Make a call with a reference, whose image number is 10."""
    tokens, ids = call["hidden_states"], call["img_ids"]
    number = torch.tensor([10, 0, 0, 0], device=ids.device, dtype=ids.dtype)
    both = torch.cat([tokens, tokens], dim=1)
    return {**call, "hidden_states": both, "img_ids": torch.cat([ids, ids + number], dim=1)}


_MODULE = "diffusers.models.transformers.transformer_flux2"
_ROTARY = Rows(argument="image_rotary_emb", items=(0, 1), dim=0, joint=True)
EXAMPLE_TOKENS = 64


def _like() -> Tensor:
    # float16, because FLUX.2 clips float16 overflow, and the graph must show it.
    return torch.empty(0, dtype=torch.float16, device="meta")


def _double_examples(block: Any) -> dict[str, Any]:
    like, width = _like(), block.norm1.normalized_shape[0]
    rotary = like.new_empty(8 + EXAMPLE_TOKENS, block.attn.head_dim)
    return {
        "hidden_states": like.new_empty(2, EXAMPLE_TOKENS, width),
        "encoder_hidden_states": like.new_empty(2, 8, width),
        "temb_mod_img": like.new_empty(2, 6 * width),
        "temb_mod_txt": like.new_empty(2, 6 * width),
        "image_rotary_emb": (rotary, rotary),
    }


def _single_examples(block: Any) -> dict[str, Any]:
    like, width = _like(), block.norm.normalized_shape[0]
    rotary = like.new_empty(8 + EXAMPLE_TOKENS, block.attn.head_dim)
    return {
        "hidden_states": like.new_empty(2, 8 + EXAMPLE_TOKENS, width),
        "encoder_hidden_states": None,
        "temb_mod": like.new_empty(2, 3 * width),
        "image_rotary_emb": (rotary, rotary),
        "split_hidden_states": False,
        "text_seq_len": None,
    }


FAMILY = Family(
    name="flux2",
    cls=f"{_MODULE}.Flux2Transformer2DModel",
    title="FLUX.2 dev and klein",
    blocks=(
        Block(
            cls=f"{_MODULE}.Flux2TransformerBlock",
            flow=TokenFlow(
                attention_kwargs="joint_attention_kwargs",
                output=1,
                text="encoder_hidden_states",
                rows=(_ROTARY,),
            ),
            refused=("kv_cache",),
            refused_by_attention=("attention_mask",),
            examples=_double_examples,
            sites=(
                Site(components=("self_attention",), enter=("attn",), leave="attn", outputs=(0,)),
                Site(components=("mlp",), enter=("ff",), leave="ff"),
            ),
        ),
        Block(
            cls=f"{_MODULE}.Flux2SingleTransformerBlock",
            flow=TokenFlow(attention_kwargs="joint_attention_kwargs", joint=True, rows=(_ROTARY,)),
            refused=("kv_cache",),
            refused_by_attention=("attention_mask",),
            examples=_single_examples,
            example_tokens=EXAMPLE_TOKENS,
            # Attention and MLP are one layer, whose input projections are fused.
            sites=(Site(components=("self_attention", "mlp"), enter=("attn",), leave="attn"),),
        ),
    ),
    borders=(
        TokenSequence(
            tokens="hidden_states",
            ids="img_ids",
            enter="x_embedder",
            leave="proj_out",
            positions="pos_embed",
        ),
    ),
    references=References(
        # Arguments for a cache of references, which then come first and have their own modulation.
        refused=("kv_cache", "kv_cache_mode"),
        example=_edit_call,
    ),
    attention_kwargs="joint_attention_kwargs",
    prompt=("encoder_hidden_states",),
    unmerged_by_default={"transformer_blocks": (1, 4), "single_transformer_blocks": (1, 4)},
    unmerged_because=NOT_MEASURED,
    noise_level=_noise_level,
    run_levels=_run_levels,
    example_call=example_call,
    sequence_lengths=_sequence_lengths,
    architectures=ARCHITECTURES,
    block_counts={
        "transformer_blocks": "num_layers",
        "single_transformer_blocks": "num_single_layers",
    },
)
