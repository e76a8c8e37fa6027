"""Merged blocks in plain PyTorch: each block of diffusers, sample by sample, on merged tokens."""

import inspect
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from toma_fx import MergeConfig
from toma_fx.runtime import regions

toma = torch.ops.toma


class Rows(NamedTuple):
    """Arguments of a block that have a row for each token, with the dimension of the rows."""

    tables: Mapping[str, int]
    """Shared by the samples."""
    each: Mapping[str, int]
    """Behind a dimension of samples."""
    output: int | None = None


BLOCKS = {
    "LTXVideoTransformerBlock": Rows({}, {"temb": 1, "image_rotary_emb": 1}),
    "LTX2VideoTransformerBlock": Rows(
        {},
        {
            "temb": 1,
            "temb_ca_scale_shift": 1,
            "temb_ca_gate": 1,
            "video_rotary_emb": -2,
            "ca_video_rotary_emb": -2,
        },
        0,
    ),
    "CogVideoXBlock": Rows({"image_rotary_emb": 0}, {}, 0),
    "Krea2TransformerBlock": Rows({"image_rotary_emb": 0}, {"attention_mask": -1}),
    "CosmosTransformerBlock": Rows({"image_rotary_emb": 0}, {"embedded_timestep": 1, "temb": 1}),
    "Flux3ModeTransformerBlock": Rows({"image_rotary_emb": 0}, {"temb_mod": 1}),
    "Flux3SingleTransformerBlock": Rows({"image_rotary_emb": 0}, {"temb_mod": 1}, 1),
}


def merge_by_hand(
    model: nn.Module, unmerged: int, segments: tuple[int, ...], region_tokens: int
) -> None:
    """Let every block run on half of the tokens, one sample after another.

    Args:
        model: of diffusers, which is changed.
        unmerged: image tokens, from the first, that stay.
        segments: tokens of each segment behind those; some blocks take the first, or all but it.
        region_tokens: tokens of a region, which divides the segments.
    """
    for path, block in model.named_modules():
        rows = BLOCKS.get(type(block).__name__)
        if rows is not None and not path.startswith("txt_mode_blocks"):
            block.forward = _by_hand(block, rows, unmerged, segments, region_tokens)


def _by_hand(
    block: nn.Module, rows: Rows, unmerged: int, every: tuple[int, ...], region_tokens: int
) -> Callable[..., Any]:
    forward, signature = block.forward, inspect.signature(block.forward)

    def merged_forward(*args: Any, **kwargs: Any) -> Any:
        call = signature.bind(*args, **kwargs).arguments
        tokens = call["hidden_states"]
        segments = next(
            part
            for part in (every, every[:1], every[1:])
            if sum(part) + unmerged <= tokens.shape[1]
        )
        before = tokens.shape[1] - sum(segments)
        image = tokens[:, before:]
        layout = regions.layout(segments, region_tokens, 0.5)
        places = toma.select(image, layout, "facility_location")
        down, up = toma.weigh(
            image, places, layout, MergeConfig().temperature, "region", "transpose"
        )
        outputs = [
            sample(call, index, before, places[index].flatten(), down[index], up[index])
            for index in range(len(tokens))
        ]
        return pytree.tree_map(lambda *each: torch.cat(each), *outputs)

    def sample(
        call: Mapping[str, Any], index: int, before: int, places: Tensor, down: Tensor, up: Tensor
    ) -> Any:
        tokens = call["hidden_states"][index]
        kept = torch.cat([torch.arange(before), before + places])
        image = tokens[before:].unflatten(0, (down.shape[0], -1))
        merged = torch.cat([tokens[:before], (down @ image).flatten(0, 1)])
        mine = {
            name: pytree.tree_map(
                lambda value, name=name: of_sample(name, value, index, len(tokens), kept), value
            )
            for name, value in call.items()
        }
        output = forward(**{**mine, "hidden_states": merged[None]})
        result = output if rows.output is None else output[rows.output]
        update = (result[0] - merged)[before:].unflatten(0, (up.shape[0], -1))
        spread = (up @ update).flatten(0, 1)
        whole = torch.cat([result[0][:before], tokens[before:] + spread])[None]
        if rows.output is None:
            return whole
        return tuple(whole if i == rows.output else each for i, each in enumerate(output))

    def of_sample(name: str, value: Any, index: int, tokens: int, kept: Tensor) -> Any:
        if not isinstance(value, Tensor):
            return value
        table = name in rows.tables
        value = value if table else value[index : index + 1]
        dim = {**rows.tables, **rows.each}.get(name)
        if dim is None or value.shape[dim] < tokens:
            return value
        text = value.shape[dim] - tokens
        return value.index_select(dim, torch.cat([torch.arange(text), text + kept]))

    return merged_forward
