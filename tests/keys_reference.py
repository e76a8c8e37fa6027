"""Attention to merged keys and values, written a second time: plain, slow, obvious.

It shares no code with ``toma_fx``. Diffusers' own model runs in raster order, with its own blocks
and processors; only the function that computes attention stands aside for another, which merges the
keys of one sample after another and adds the logarithms of the clusters' sizes to whole matrices of
logits.

Shapes: B batch, H heads, S tokens of the sequence that attention sees, N image tokens of it that
merge, M those that are left of them, K keys that are left of it, D width of a head.
"""

import inspect
import math
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.reference import Plan, ReferenceOptions, Regions, make_plan


@dataclass(frozen=True, kw_only=True)
class Kind:
    """A class of block with self-attention."""

    attentions: tuple[str, ...] = ("attn",)
    tokens: str = "hidden_states"
    text_first: bool = True
    """Whether text stands before the image, where attention sees both."""


KINDS: Mapping[str, Kind] = {
    "BasicTransformerBlock": Kind(attentions=("attn1",)),
    "FluxTransformerBlock": Kind(),
    "FluxSingleTransformerBlock": Kind(),
    "Flux2TransformerBlock": Kind(),
    "Flux2SingleTransformerBlock": Kind(),
    "Flux3ModeTransformerBlock": Kind(),
    "Flux3SingleTransformerBlock": Kind(),
    "QwenImageTransformerBlock": Kind(),
    "ZImageTransformerBlock": Kind(attentions=("attention",), tokens="x", text_first=False),
    "WanTransformerBlock": Kind(attentions=("attn1",)),
    "WanVACETransformerBlock": Kind(attentions=("attn1",), tokens="control_hidden_states"),
    "JointTransformerBlock": Kind(attentions=("attn", "attn2"), text_first=False),
    "ChromaTransformerBlock": Kind(),
    "ChromaSingleTransformerBlock": Kind(),
    "HunyuanVideoTransformerBlock": Kind(text_first=False),
    "HunyuanVideoSingleTransformerBlock": Kind(text_first=False),
    "HunyuanVideoTokenReplaceTransformerBlock": Kind(text_first=False),
    "HunyuanVideoTokenReplaceSingleTransformerBlock": Kind(text_first=False),
    "HunyuanVideo15TransformerBlock": Kind(text_first=False),
    "HunyuanImageTransformerBlock": Kind(text_first=False),
    "HunyuanImageSingleTransformerBlock": Kind(text_first=False),
    "LTXVideoTransformerBlock": Kind(attentions=("attn1",)),
    "LTX2VideoTransformerBlock": Kind(attentions=("attn1",)),
    "CogVideoXBlock": Kind(attentions=("attn1",)),
    "Krea2TransformerBlock": Kind(),
    "CosmosTransformerBlock": Kind(attentions=("attn1",)),
}
DISPATCH = "dispatch_attention_fn"
TEXT_ALONE = ("txt_mode_blocks", "context_refiner", "siglip_refiner")
"""Lists of blocks that see no image."""


Segments = Sequence[Regions] | Callable[[int], Sequence[Regions]]
"""The regions of each segment of the sequence, by places in the segment; of the token count, where
a model has several."""


@dataclass
class Group:
    """The blocks of one list, which share a plan."""

    unmerged: int
    segments: Segments
    options: ReferenceOptions
    plan: Plan | None = None
    regions: Regions = field(default_factory=list)

    def make(self, tokens_BSD: Tensor, text_first: bool) -> None:
        """The plan, of the tokens of the first block; some blocks take a part of the segments."""
        every = self.segments
        every = every(tokens_BSD.shape[1]) if callable(every) else every
        parts = [every, every[:1], every[1:]]
        part = next(p for p in parts if _tokens(p) + self.unmerged <= tokens_BSD.shape[1])
        start, self.regions = 0, []
        for segment in part:
            self.regions += [[start + place for place in region] for region in segment]
            start += _tokens([segment])
        text = tokens_BSD.shape[1] - self.unmerged - start
        image_BND = tokens_BSD[:, text:] if text_first else tokens_BSD[:, : self.unmerged + start]
        self.plan = make_plan(image_BND[:, self.unmerged :], self.regions, self.options)


def _tokens(segments: Sequence[Regions]) -> int:
    return sum(len(region) for regions in segments for region in regions)


@contextmanager
def merging_keys(
    model: nn.Module, unmerged: int, segments: Segments, options: ReferenceOptions
) -> Iterator[None]:
    """Within it, a model of diffusers merges the keys and values of every self-attention.

    Args:
        model: in raster order.
        unmerged: image tokens, from the first, that stay.
        segments: the regions of each segment behind those.
        options: of the method.
    """
    running: list[tuple[Group, Kind]] = []
    handles = []
    groups: dict[str, Group] = {}
    for path, block in model.named_modules():
        kind, parent = KINDS.get(type(block).__name__), path.rpartition(".")[0]
        if kind is None or parent.endswith(TEXT_ALONE):
            continue
        group = groups.setdefault(parent, Group(unmerged, segments, options))
        leads = path.endswith(".0")
        handles.append(
            block.register_forward_pre_hook(_planner(kind, group, leads), with_kwargs=True)
        )
        for name in kind.attentions:
            attention = getattr(block, name, None)
            if attention is not None:
                handles += _watch(attention, running, (group, kind))

    modules = [m for n, m in sys.modules.items() if n.startswith("diffusers.models.")]
    with ExitStack() as patched:
        for module, name, dim in [
            (F, "scaled_dot_product_attention", 2),
            *((m, DISPATCH, 1) for m in modules if DISPATCH in vars(m)),
        ]:
            stand_in = _instead(getattr(module, name), dim, running)
            patched.enter_context(mock.patch.object(module, name, stand_in))
        yield
    for handle in handles:
        handle.remove()


def _instead(own: Any, dim: int, running: list[tuple[Group, Kind]]) -> Any:
    """Attention for those that run, with tokens in some dimension."""

    def attend(query: Tensor, key: Tensor, value: Tensor, **kwargs: Any) -> Tensor:
        if not running:
            result: Tensor = own(query, key, value, **kwargs)
            return result
        if dim == 1:
            query, key, value = (each.transpose(1, 2) for each in (query, key, value))
        mask, scale = kwargs.get("attn_mask"), kwargs.get("scale")
        output = attend_to_merged(query, key, value, mask, scale, *running[-1])
        return output.transpose(1, 2) if dim == 1 else output

    return attend


def _planner(kind: Kind, group: Group, leads: bool) -> Any:
    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if leads:
            call = inspect.signature(module.forward).bind(*args, **kwargs).arguments
            group.make(call[kind.tokens], kind.text_first)

    return hook


def _watch(attention: nn.Module, running: list[Any], entry: Any) -> list[Any]:
    def enter(*_: Any) -> None:
        running.append(entry)

    def leave(*_: Any) -> None:
        running.pop()

    return [attention.register_forward_pre_hook(enter), attention.register_forward_hook(leave)]


def attend_to_merged(
    query_BHSD: Tensor,
    key_BHSD: Tensor,
    value_BHSD: Tensor,
    mask: Tensor | None,
    scale: float | None,
    group: Group,
    kind: Kind,
) -> Tensor:
    """Attention of all queries to merged keys, each as heavy as its cluster."""
    assert group.plan is not None
    plan = group.plan
    count, left = plan.merge_BMN.shape[2], plan.merge_BMN.shape[1]
    text = key_BHSD.shape[2] - group.unmerged - count
    before = group.unmerged + (text if kind.text_first else 0)
    after = 0 if kind.text_first else text
    outputs = []
    for b in range(len(query_BHSD)):
        merge_KS = torch.block_diag(
            torch.eye(before), plan.merge_BMN[b].float(), torch.eye(after)
        ).to(key_BHSD.dtype)
        sizes_K = torch.ones(len(merge_KS))
        sizes_K[before : before + left] = plan.unmerge_BNM[b].float().sum(dim=0)
        key_HKD = torch.einsum("ks,hsd->hkd", merge_KS, key_BHSD[b])
        value_HKD = torch.einsum("ks,hsd->hkd", merge_KS, value_BHSD[b])
        factor = 1 / math.sqrt(key_BHSD.shape[-1]) if scale is None else scale
        logits_HSK = torch.einsum("hsd,hkd->hsk", query_BHSD[b], key_HKD) * factor
        logits_HSK = logits_HSK + sizes_K.log()
        if mask is not None:
            kept = [
                *range(before),
                *(before + place for place in plan.destinations_BM[b].tolist()),
                *range(before + count, before + count + after),
            ]
            mine = mask[min(b, len(mask) - 1)][..., kept]
            if mine.dtype == torch.bool:
                mine = torch.zeros(mine.shape).masked_fill(~mine, -math.inf)
            logits_HSK = logits_HSK + mine
        share_HSK = logits_HSK.softmax(dim=-1).nan_to_num(0)  # of a query that sees nothing
        outputs.append(torch.einsum("hsk,hkd->hsd", share_HSK, value_HKD))
    return torch.stack(outputs)
