"""Division of tokens into regions: equal, contiguous runs of each grid of the sequence.

A sequence holds the output image's token grid, then the grids of its references. No region holds
tokens of two grids. If the wanted length does not divide a grid, the grid is cut into runs whose
lengths differ by at most one token, and the shorter runs are padded. The operators know nothing
else: a tile, a stripe and the whole image differ only in the order of the tokens (`token_order`)
and in the length of a run.

Shape suffixes, here and in every file of this folder: ``B`` batch, ``P`` tokens before the image
tokens (text), ``N`` image tokens, ``R`` regions, ``n`` places of a region (those without a token
are padding), ``m`` destinations of a region, ``M = R * m`` destinations, ``D`` width.
"""

import functools
import math
from collections.abc import Sequence
from operator import index
from typing import NamedTuple

import torch
from torch import Tensor

from toma_fx.errors import InputError

WHOLE_IMAGE = 0
"""Value of ``region_tokens`` for one region that holds every token."""


def layout(segments: Sequence[int], region_tokens: int, ratio: float) -> tuple[int, ...]:
    """Return the division of a sequence's grids into regions.

    Region ``i`` of a grid holds its tokens from ``i * N // R`` up to ``(i + 1) * N // R``.

    Grids of many regions get regions of ``region_tokens`` places whatever their sizes, so that one
    graph serves them all. For a small grid, the exact number of tokens matters: a single grid is
    cut at a divisor near ``region_tokens``, without padding; if there is none, or if there are
    several grids, each is cut into the nearest number of regions.

    Args:
        segments: tokens of each grid, in the order of the sequence; may be symbolic.
        region_tokens: wanted number of tokens per region, or `WHOLE_IMAGE`.
        ratio: share of the tokens that is merged away, in [0, 1).

    Returns:
        ``(m, n, N_1, R_1, N_2, R_2, ...)``: destinations and places of every region, then tokens
        and regions of each grid. It is flat, because an operator takes a list of integers.

    >>> layout([4096], 64, 0.5), layout([4087], 64, 0.5)
    ((32, 64, 4096, 64), (32, 64, 4087, 64))
    >>> layout([38 * 26], 64, 0.5), layout([997], 64, 0.5), layout([988, 500], 64, 0.5)
    ((38, 76, 988, 13), (31, 63, 997, 16), (32, 66, 988, 15, 500, 8))
    >>> layout([4096, 4087], WHOLE_IMAGE, 0.5)
    (4092, 8183, 8183, 1)
    """
    if not segments:  # nothing merges in a video whose frames are all given
        return 1, 1
    if region_tokens == WHOLE_IMAGE:
        total = sum(segments)
        return kept_tokens(total, ratio), total, total, 1
    keep = kept_tokens(region_tokens, ratio)
    # Padding keeps less than m tokens too many: with this many regions, less than 3 % of the
    # tokens. In integers, because Dynamo makes a symbol of a float constant.
    many = max(17, -(-100 * keep // (3 * region_tokens)))
    fits = keep <= many * region_tokens // (many + 1)  # the minimum number of tokens per region
    if all(
        tokens % region_tokens == 0 or (fits and tokens >= many * region_tokens)
        for tokens in segments
    ):
        regions = [
            # Two expressions for one number, so that a graph can tell where nothing is padded.
            tokens // region_tokens + (0 if tokens % region_tokens == 0 else 1)
            for tokens in segments
        ]
        return _flat(keep, region_tokens, segments, regions)
    # Under symbolic shapes, the counts become part of the graph here. `int` would not do, because
    # Dynamo takes its result for another symbol.
    return _counted_layout([index(tokens) for tokens in segments], region_tokens, ratio)


def _counted_layout(segments: list[int], region_tokens: int, ratio: float) -> tuple[int, ...]:
    if len(segments) == 1:
        size = _nearest_divisor(segments[0], region_tokens)
        if region_tokens <= 2 * size and size <= 2 * region_tokens:
            return _flat(kept_tokens(size, ratio), size, segments, [segments[0] // size])
    regions = [max(1, (2 * tokens + region_tokens) // (2 * region_tokens)) for tokens in segments]
    places = max(-(-tokens // count) for tokens, count in zip(segments, regions, strict=True))
    keep = int((1 - ratio) * sum(segments) / sum(regions) + 0.5)
    return _flat(min(max(1, keep), places), places, segments, regions)


def _nearest_divisor(tokens: int, wanted: int) -> int:
    small = [d for d in range(1, math.isqrt(tokens) + 1) if tokens % d == 0]
    divisors = small + [tokens // d for d in reversed(small)]
    return min(divisors, key=lambda d: max(d / wanted, wanted / d))


def _flat(
    keep: int, places: int, segments: Sequence[int], regions: Sequence[int]
) -> tuple[int, ...]:
    pairs = zip(segments, regions, strict=True)
    return (keep, places, *(number for pair in pairs for number in pair))


def kept_tokens(tokens: int, ratio: float) -> int:
    """Return how many of ``tokens`` tokens are kept when ``ratio`` is merged away: at least 1.

    >>> kept_tokens(64, 0.5), kept_tokens(76, 0.25), kept_tokens(3, 0.99)
    (32, 57, 1)
    """
    return max(1, int(tokens * (1 - ratio) + 0.5))


def total_tokens(layout: Sequence[int]) -> int:
    """Return ``N``, the number of tokens of all grids."""
    return sum(layout[2::2])


def total_regions(layout: Sequence[int]) -> int:
    """Return ``R``, the number of regions of all grids."""
    return sum(layout[3::2])


def kept(layout: Sequence[int]) -> int:
    """Return ``M``, the number of tokens that are left after merging."""
    return layout[0] * total_regions(layout)


def is_padded(layout: Sequence[int]) -> bool:
    """Return whether there are more places than tokens."""
    return any(
        tokens != regions * layout[1]
        for tokens, regions in zip(layout[2::2], layout[3::2], strict=True)
    )


def expect_tokens(operator: str, tokens: Tensor, layout: Sequence[int]) -> None:
    """Check that tokens ``(B, N, D)`` fit a layout.

    Raises:
        InputError: when they do not.
    """
    if tokens.ndim != 3:
        raise InputError(f"{operator}: tokens of shape {tuple(tokens.shape)} must be (B, N, D)")
    if tokens.shape[1] != total_tokens(layout):
        raise InputError(
            f"{operator}: tokens of shape {tuple(tokens.shape)} (B, N, D) do not fit a layout of "
            f"grids of {list(layout[2::2])} tokens; make the layout from the grids of these tokens"
        )


class Places(NamedTuple):
    """Positions of the tokens in a padded layout."""

    token_of_place: Tensor
    """``(R * n,)`` int64: index of the token at each place. A padded place repeats the last token
    of its own region, so that a bad value in a token, such as NaN, stays in its region."""
    place_of_token: Tensor
    """``(N,)`` int64: place of each token."""
    counts: Tensor
    """``(R,)`` int64: number of tokens in each region."""


def _find_places(layout: Sequence[int], device: torch.device) -> Places:
    size = layout[1]
    first, end, place_of_token = [], [], []
    tokens_before = regions_before = 0
    for tokens, regions in zip(layout[2::2], layout[3::2], strict=True):
        region = torch.arange(regions, device=device)
        first.append(tokens_before + region * tokens // regions)
        end.append(tokens_before + (region + 1) * tokens // regions)
        token = torch.arange(tokens, device=device)
        region = (token * regions + (regions - 1)) // tokens
        place = token - region * tokens // regions
        place_of_token.append((regions_before + region) * size + place)
        tokens_before, regions_before = tokens_before + tokens, regions_before + regions
    first_R, end_R = torch.cat(first), torch.cat(end)
    token_Rn = first_R[:, None] + torch.arange(size, device=device)
    token_Rn = torch.minimum(token_Rn, end_R[:, None] - 1)
    return Places(token_Rn.flatten(), torch.cat(place_of_token), end_R - first_R)


def kept_for(like: Tensor) -> tuple[torch.device, int] | None:
    """Return the device and CUDA stream under which an index made for ``like`` may be cached.

    None if it may not: under tracing an index belongs to that trace, and in a CUDA graph to its
    memory. The stream matters, because another stream could read the index before it is complete.
    """
    on_gpu = like.device.type == "cuda"
    if type(like) is not Tensor or (on_gpu and torch.cuda.is_current_stream_capturing()):
        return None
    return like.device, torch.cuda.current_stream(like.device).cuda_stream if on_gpu else 0


@functools.lru_cache(maxsize=64)
def _cached_places(layout: tuple[int, ...], device: torch.device, stream: int) -> Places:
    # A call that records gradients could not use an inference tensor later.
    with torch.inference_mode(mode=False):
        return _find_places(layout, device)


def places_of(layout: Sequence[int], like: Tensor) -> Places:
    """Return the positions of a padded layout's tokens, on the device of ``like``."""
    key = kept_for(like)
    if key is None:
        return _find_places(layout, like.device)
    return _cached_places(tuple(layout), *key)


def real_places(layout: Sequence[int], like: Tensor) -> Tensor:
    """Return which places are not padding, ``(R, n)`` bool, on the device of ``like``."""
    place = torch.arange(layout[1], device=like.device)
    return place < places_of(layout, like).counts[:, None]


def placed(tokens_BND: Tensor, layout: Sequence[int]) -> Tensor:
    """Put tokens into their places, ``(B, R * n, D)``; returns the input if nothing is padded."""
    if not is_padded(layout):
        return tokens_BND
    return tokens_BND.index_select(1, places_of(layout, tokens_BND).token_of_place)


def spread(tokens_BND: Tensor, layout: Sequence[int]) -> Tensor:
    """Divide tokens by region, ``(B, R, n, D)``; returns a view if nothing is padded.

    >>> spread(torch.arange(7).reshape(1, 7, 1), (1, 4, 7, 2)).squeeze(-1)
    tensor([[[0, 1, 2, 2],
             [3, 4, 5, 6]]])
    """
    regions: Tensor = placed(tokens_BND, layout).unflatten(1, (total_regions(layout), layout[1]))
    return regions


def gathered(places_BRnD: Tensor, layout: Sequence[int]) -> Tensor:
    """Take tokens out of their places, ``(B, N, D)``; undoes `spread`."""
    places = places_BRnD.flatten(1, 2)
    if not is_padded(layout):
        return places
    return places.index_select(1, places_of(layout, places).place_of_token)
