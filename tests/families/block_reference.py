"""Merging once around blocks, written a second time: one sample, one list of indices at a time.

Diffusers' own model runs in raster order, with its own blocks. A block in which tokens merge runs
sample by sample on merged tokens; plain indexing picks the rows of all else that belongs to tokens.

Shapes: B batch, N image tokens, M those that are left, D width, P text tokens.
"""

import copy
import inspect
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from tests.reference import Plan, ReferenceOptions, Regions, hilbert_index, make_plan


@dataclass(frozen=True, kw_only=True)
class BlockKind:
    """How a class of block takes and returns its tokens."""

    output: int | None
    """Which output is the image."""
    each: tuple[str, ...]
    """Arguments of which a sample has its own."""
    tables: Mapping[str, bool] = field(default_factory=dict)
    """Pairs of tables that samples share, and whether they begin with rows for the text."""
    mask: str | None = None
    """A mask of keys, in the last dimension."""
    text_first: bool = True
    """Whether text stands before the image where both are in one sequence."""


class Grid(NamedTuple):
    """The tokens of an image or a video."""

    frames: int
    rows: int
    columns: int
    given: int = 0
    """Frames that stay unmerged."""


def regions_of(grid: Grid, region: str, region_tokens: int, region_frames: int) -> Regions:
    """The regions behind the given frames: raster indices, in the order that breaks ties."""
    area = grid.rows * grid.columns
    cells = [
        (f, y, x) for f in range(grid.frames) for y in range(grid.rows) for x in range(grid.columns)
    ]
    cells = cells[area * grid.given :]
    if region == "tile":
        first = max(1, grid.given)
        cells.sort(
            key=lambda c: (
                max(-1, (c[0] - first) // region_frames),
                hilbert_index(c[2], c[1]),
                c[0],
            )
        )
    order = [(f - grid.given) * area + y * grid.columns + x for f, y, x in cells]
    assert len(order) % region_tokens == 0
    return [order[i : i + region_tokens] for i in range(0, len(order), region_tokens)]


class MergedList:
    """What the merged blocks of one list share: the plan that the first of them makes."""

    def __init__(self, grid: Grid, regions: Regions, options: ReferenceOptions) -> None:
        self.given = grid.given * grid.rows * grid.columns
        self.count = grid.frames * grid.rows * grid.columns
        self._regions, self._options = regions, options
        self.plan: Plan | None = None

    def make(self, image_BND: Tensor) -> None:
        self.plan = make_plan(image_BND[:, self.given :], self._regions, self._options)


def merge_model(
    model: nn.Module,
    kinds: Mapping[str, BlockKind],
    grid: Grid,
    regions: Regions,
    options: ReferenceOptions,
) -> Any:
    """A copy of a model whose blocks merge, but for the first quarter of each list."""
    merged: Any = copy.deepcopy(model)
    lists = [m for m in merged.modules() if isinstance(m, nn.ModuleList)]
    for blocks in lists:
        if type(blocks[0]).__name__ not in kinds:
            continue
        shared = MergedList(grid, regions, options)
        for place, block in enumerate(blocks[len(blocks) // 4 :]):
            block.forward = _merged_forward(block, kinds, shared, leads=place == 0)
    return merged


def _merged_forward(
    block: nn.Module, kinds: Mapping[str, BlockKind], shared: MergedList, leads: bool
) -> Any:
    kind = kinds[type(block).__name__]
    own = block.forward
    signature = inspect.signature(own)

    def forward(*args: Any, **kwargs: Any) -> Any:
        call = dict(signature.bind(*args, **kwargs).arguments)
        tokens_BSD = call["hidden_states"]
        before = tokens_BSD.shape[1] - shared.count  # text before the image
        image_BND = tokens_BSD[:, before:]
        if leads:
            shared.make(image_BND)
        assert shared.plan is not None
        outputs = []
        for b in range(len(image_BND)):
            one = _of_sample(call, kind, shared, b)
            text_PD, image_ND = tokens_BSD[b, :before], image_BND[b]
            merged_MD = _merge(shared, b, image_ND)
            one["hidden_states"] = torch.cat([text_PD, merged_MD])[None]
            more = one.pop("args", ())
            result = own(*one.values(), *more) if more else own(**one)  # more come by place alone
            parts = list(result) if kind.output is not None else [result]
            place = kind.output or 0
            text_1PD, new_MD = parts[place][:, :before], parts[place][0, before:]
            spread_ND = image_ND + _unmerge(shared, b, new_MD - merged_MD)
            parts[place] = torch.cat([text_1PD, spread_ND[None]], dim=1)
            outputs.append(parts)
        every = zip(*outputs, strict=True)
        batch = tuple(None if each[0] is None else torch.cat(each) for each in every)
        return batch if kind.output is not None else batch[0]

    return forward


def _merge(shared: MergedList, b: int, image_ND: Tensor) -> Tensor:
    assert shared.plan is not None
    merged = shared.plan.merge_BMN[b].to(image_ND.dtype) @ image_ND[shared.given :]
    return torch.cat([image_ND[: shared.given], merged])


def _unmerge(shared: MergedList, b: int, update_MD: Tensor) -> Tensor:
    assert shared.plan is not None
    spread = shared.plan.unmerge_BNM[b].to(update_MD.dtype) @ update_MD[shared.given :]
    return torch.cat([update_MD[: shared.given], spread])


def _of_sample(
    call: Mapping[str, Any], kind: BlockKind, shared: MergedList, b: int
) -> dict[str, Any]:
    """The arguments of one sample, with rows for the tokens that are left."""
    assert shared.plan is not None
    left = [*range(shared.given), *(shared.plan.destinations_BM[b] + shared.given).tolist()]
    one = dict(call)
    for name in kind.each:
        if call.get(name) is not None:
            one[name] = call[name][b : b + 1]
    for name, with_text in kind.tables.items():
        text = len(call[name][0]) - shared.count if with_text else 0
        rows = [*range(text), *(text + i for i in left)]
        one[name] = tuple(table[rows] for table in call[name])
    if kind.mask is not None and call.get(kind.mask) is not None:
        mask = call[kind.mask][b : b + 1]
        text = mask.shape[-1] - shared.count
        if kind.text_first:
            keys = [*range(text), *(text + i for i in left)]
        else:
            keys = [*left, *range(shared.count, shared.count + text)]
        one[kind.mask] = mask[..., keys]
    return one
