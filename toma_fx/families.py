"""The table of model families and block structures. A new family is a row here, and a test."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import diffusers
import torch
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.normalization import AdaLayerNormZero, AdaLayerNormZeroSingle
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from diffusers.models.transformers.transformer_flux import (
    FluxAttention,
    FluxIPAdapterAttnProcessor,
    FluxSingleTransformerBlock,
    FluxTransformerBlock,
)
from torch import Tensor, nn

from toma_fx import models
from toma_fx.errors import ModelError
from toma_fx.passes.sites import Site
from toma_fx.runtime.schedule import PlanMemory


@dataclass(frozen=True, kw_only=True)
class Block:
    """How one class of transformer block treats its tokens."""

    cls: type[nn.Module]
    sites: tuple[Site, ...]
    """What can be merged; the sites of one component before those of several."""
    width: Callable[[Any], int]
    """Width of a block's tokens."""
    attention_kwargs: str
    """The argument with the attention kwargs, which also carries the plan."""
    output: int | None = None
    """Which output is the image tokens, when the block returns several."""
    text: str | None = None
    """The argument with text tokens that go through the block beside the image tokens."""
    text_first: bool = False
    """Whether inside the block the text tokens precede the image tokens in one sequence."""
    rotary: str | None = None
    """The argument with rotary values, text tokens first."""
    masks: Mapping[str, str] = field(default_factory=dict)
    """The component that each attention mask argument goes to."""


@dataclass(frozen=True, kw_only=True)
class Family:
    """A model class and the blocks in it."""

    name: str
    cls: type[nn.Module]
    blocks: tuple[Block, ...]
    borders: Mapping[type[nn.Module], type[nn.Module]]
    """Classes that bring the tokens into tile order and back, each in place of diffusers' own."""
    spared: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    """Blocks left unmerged unless ``skip`` says otherwise: of the list at a path, the first ``a``
    of ``b``, and as large a share of a list of another length."""


def _normed_with_modulation(count: int) -> Callable[..., tuple[Tensor, ...]]:
    def value(module: nn.Module, hidden_states: Tensor, *, emb: Tensor) -> tuple[Tensor, ...]:
        return (hidden_states, *[emb] * count)

    return value


def _flux_attention(
    module: Any, *, hidden_states: Tensor, encoder_hidden_states: Tensor | None = None, **_: Any
) -> Any:
    if encoder_hidden_states is None:
        return hidden_states
    adapters = isinstance(module.processor, FluxIPAdapterAttnProcessor)
    return (hidden_states, encoder_hidden_states) + (hidden_states,) * adapters


_LEAF_VALUES: dict[type[nn.Module], Callable[..., Any]] = {
    AdaLayerNormZero: _normed_with_modulation(4),
    AdaLayerNormZeroSingle: _normed_with_modulation(1),
    FluxAttention: _flux_attention,
    PlanMemory: lambda module, tokens, step, run: module.blank(tokens),
}


def leaf_value(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """An example of what a block's submodule returns, without running it.

    Not running it is what lets offloaded, quantised and adapted layers be captured like any other.
    Unless the table says otherwise, a layer returns tokens like those it takes, as wide as its
    ``out_features``.
    """
    for cls, value in _LEAF_VALUES.items():
        if isinstance(module, cls):
            return value(module, *args, **kwargs)
    tokens = args[0] if args else kwargs["hidden_states"]
    width = getattr(module, "out_features", tokens.shape[-1])
    return tokens.new_empty(*tokens.shape[:-1], width)


def example_inputs(row: Block, block: nn.Module) -> dict[str, Any]:
    """Example inputs of a block: what the graph's branches and example values are decided by.

    float16, because Flux clips float16 overflow, and the graph must show it.
    """
    width = row.width(block)
    like = torch.empty(0, dtype=torch.float16, device="meta")
    examples: dict[str, Any] = {"hidden_states": like.new_empty(2, 64, width)}
    if row.text is not None:
        examples |= {row.text: like.new_empty(2, 8, width), "temb": like.new_empty(2, width)}
    if row.rotary is not None:
        examples[row.rotary] = (like.new_empty(72, 16), like.new_empty(72, 16))
    return examples


UNET = Family(
    name="UNet (SDXL, SD 2.1, SD 1.5)",
    cls=diffusers.UNet2DConditionModel,
    blocks=(
        Block(
            cls=BasicTransformerBlock,
            width=lambda block: block.dim,
            attention_kwargs="cross_attention_kwargs",
            masks={
                "attention_mask": "self_attention",
                "encoder_attention_mask": "cross_attention",
            },
            sites=(
                Site(
                    components=("self_attention",),
                    enter=("attn1",),
                    leave="attn1",
                ),
                Site(
                    components=("cross_attention",),
                    enter=("attn2",),
                    leave="attn2",
                ),
                Site(components=("mlp",), enter=("ff",), leave="ff"),
            ),
        ),
    ),
    borders={
        diffusers.UNet2DConditionModel: models.UNet2DConditionModel,
        Transformer2DModel: models.Transformer2DModel,
    },
)

FLUX = Family(
    name="Flux",
    cls=diffusers.FluxTransformer2DModel,
    blocks=(
        Block(
            cls=FluxTransformerBlock,
            width=lambda block: block.norm2.normalized_shape[0],
            attention_kwargs="joint_attention_kwargs",
            output=1,
            text="encoder_hidden_states",
            rotary="image_rotary_emb",
            sites=(
                Site(components=("self_attention",), enter=("attn",), leave="attn", outputs=(0, 2)),
                Site(components=("mlp",), enter=("ff",), leave="ff"),
            ),
        ),
        Block(
            cls=FluxSingleTransformerBlock,
            width=lambda block: block.proj_out.out_features,
            attention_kwargs="joint_attention_kwargs",
            output=1,
            text="encoder_hidden_states",
            text_first=True,
            rotary="image_rotary_emb",
            sites=(
                Site(components=("self_attention",), enter=("attn",), leave="attn"),
                Site(components=("mlp",), enter=("proj_mlp",), leave="act_mlp"),
                Site(
                    components=("self_attention", "mlp"),
                    enter=("attn", "proj_mlp"),
                    leave="proj_out",
                ),
            ),
        ),
    ),
    borders={diffusers.FluxTransformer2DModel: models.FluxTransformer2DModel},
    # The first 5 of 19 double-stream and the first 5 of 38 single-stream blocks: the paper's "first
    # 10 blocks" in its authors' configuration.
    spared={"transformer_blocks": (5, 19), "single_transformer_blocks": (5, 38)},
)

FAMILIES = (UNET, FLUX)


def family_of(model: nn.Module) -> Family:
    """The row of a model.

    Raises:
        ModelError: when the model is of no known family.
    """
    for family in FAMILIES:
        if isinstance(model, family.cls):
            return family
    known = ", ".join(family.cls.__name__ for family in FAMILIES)
    raise ModelError(
        f"{type(model).__name__} is not a model that toma_fx knows; it knows {known}. Pass one of "
        "them, or add a row for yours to toma_fx/families.py, as the README says"
    )
