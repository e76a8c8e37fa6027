"""Tokens and regions for tests of the runtime."""

from collections.abc import Sequence

import torch
from torch import Tensor

from toma_fx.runtime.regions import layout


def random_tokens(*shape: int, seed: int = 0) -> Tensor:
    """Tokens of no structure, the same at every call."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def signs(batch: int, count: int, width: int, seed: int) -> Tensor:
    """Tokens of 1 and -1. With a power of four of them, no product or sum of theirs is rounded.

    So there is one right answer to which gains are equal, and most of them are.
    """
    return random_tokens(batch, count, width, seed=seed).sign()


def cut(tokens: Tensor, region_tokens: int = 16, ratio: float = 0.5) -> tuple[int, ...]:
    """The layout of tokens ``(B, N, D)`` of one grid."""
    return layout([tokens.shape[1]], region_tokens, ratio)


def regions_of(layout: Sequence[int]) -> list[range]:
    """The tokens of each region, written out."""
    regions: list[range] = []
    start = 0
    for tokens, count in zip(layout[2::2], layout[3::2], strict=True):
        ends = [start + i * tokens // count for i in range(count + 1)]
        regions += map(range, ends, ends[1:])
        start += tokens
    return regions
