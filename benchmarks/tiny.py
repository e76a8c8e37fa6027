"""Configurations of models that are small enough to try a benchmark, and for tests."""

from collections.abc import Mapping
from typing import Any

from toma_fx.checkpoints import FAMILIES, RANDOM, model_class
from toma_fx.errors import ConfigError

_HEADS: dict[str, Any] = {"attention_head_dim": 16, "num_attention_heads": 2}
_STREAMS: dict[str, Any] = {"num_layers": 2, "num_single_layers": 2, "joint_attention_dim": 32}
_WAN: dict[str, Any] = {**_HEADS, "num_layers": 2, "ffn_dim": 32, "freq_dim": 32, "text_dim": 32}

TINY: Mapping[str, Mapping[str, Any]] = {
    "unet": {
        "sample_size": 16,
        "block_out_channels": (16, 32, 32),
        "norm_num_groups": 8,
        "layers_per_block": 1,
        "transformer_layers_per_block": (1, 1, 2),
        "attention_head_dim": (2, 2, 4),
        "cross_attention_dim": 32,
        "addition_time_embed_dim": 8,
        "projection_class_embeddings_input_dim": 32 + 6 * 8,
    },
    "flux": {**_HEADS, **_STREAMS, "axes_dims_rope": (4, 6, 6), "pooled_projection_dim": 32},
    "flux2": {**_HEADS, **_STREAMS, "axes_dims_rope": (4, 4, 4, 4)},
    "qwen_image": {
        **_HEADS,
        "num_layers": 2,
        "joint_attention_dim": 32,
        "axes_dims_rope": (4, 6, 6),
    },
    "z_image": {
        "dim": 32,
        "n_heads": 2,
        "n_kv_heads": 2,
        "n_layers": 2,
        "n_refiner_layers": 2,
        "cap_feat_dim": 32,
        "axes_dims": (4, 6, 6),
    },
    "wan": _WAN,
    "wan_vace": {**_WAN, "vace_layers": [0, 1]},
}
"""Configurations by family."""

WIDE_AS_THE_MODEL = ("added_kv_proj_dim",)
"""Fields that take the width of a small model, 32, if the published one has them at all."""


def tiny(model: str) -> dict[str, Any]:
    """The changes of a model's configuration that make it small enough for a test.

    Args:
        model: the name of a published model.

    Raises:
        ConfigError: when no small configuration is known.
    """
    known = [name for name in RANDOM if FAMILIES[name].name in TINY]
    if model not in known:
        raise ConfigError(
            f"--tiny is for random weights, of {', '.join(known)}; leave it out for {model}"
        )
    _, published = model_class(model)
    width = {name: 32 for name in WIDE_AS_THE_MODEL if name in published}
    return {**TINY[FAMILIES[model].name], **width}
