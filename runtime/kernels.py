"""Facility location on a GPU: all picks of all regions in one launch.

The loop of `selector.facility_location` costs several launches per pick, hundreds per plan. Here a
program keeps its search data on chip and makes every pick itself.

* Regions of up to 128 tokens: similarities are computed from the tokens (two passes over them, one
  for their lengths, one for their products) and stay in registers: 16 KiB for 64 tokens, 64 KiB for
  128 tokens. Regions below 64 tokens share a program, because the matrix units work on
  tiles of 64 rows; pairs across regions count as -1, which adds nothing to any gain.
* Regions of 129 to 256 tokens: 256 KiB would fill a whole register file, half-precision storage
  would round by more than the steps in which gains are compared, and recomputing similarities for
  each pick would read all tokens each time. So similarities are one matrix product in memory, small
  enough for the L2 cache; every pick reads it once, strip by strip.
* Larger regions use the loop, which spreads the work of each pick over the whole GPU.

Padding also counts as -1 to every token. It is never picked while a token is left: it ranks below
all tokens, by its place only.

Similarities are float32 products of normalised tokens, as in `selector`; three products of TF32
parts give the matrix units float32 precision. A rank combines two numbers in one integer: the gain,
counted in the steps of `selector` and rounded like `torch.round`, then the token's place, counted
down. So one maximum finds the largest gain, and the first token among equals.

This module needs triton, so `selector` imports it only where kernels run.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from toma_fx.runtime import selector

_STEPS = tl.constexpr(selector.GAIN_STEPS)
# Adding and subtracting 1.5 * 2**23 rounds a float32 below 2**22 to the nearest integer, half to
# even. The largest gain is 2 for each of 256 tokens, which is 2**21 steps.
_ROUND = tl.constexpr(1.5 * 2**23)

_REGISTER_TOKENS = 128
_TILE = 64


@triton.jit  # type: ignore[untyped-decorator]
def _rank(gain, free, real, place, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    steps = ((gain * _STEPS + _ROUND) - _ROUND).to(tl.int32)
    return tl.where(free, tl.where(real, steps + 1, 0) * BLOCK + (BLOCK - 1 - place), -1)


@triton.jit  # type: ignore[untyped-decorator]
def _pick_by_tokens(  # type: ignore[no-untyped-def]
    tokens,
    counts,
    picks,
    batch_stride,
    token_stride,
    channel_stride,
    groups,
    regions,
    size,
    width,
    keep,
    REGIONS: tl.constexpr,
    BLOCK: tl.constexpr,
    CHANNELS: tl.constexpr,
    PADDED: tl.constexpr,
):
    row = tl.arange(0, REGIONS * BLOCK)
    place = row % BLOCK
    group = tl.program_id(0).to(tl.int64) * REGIONS + row // BLOCK
    inside = (group < groups) & (place < size)
    real = inside
    if PADDED:
        real = inside & (place < tl.load(counts + group % regions, group < groups, 0))
    token = group // regions * batch_stride + (group % regions * size + place) * token_stride
    token = tokens + token[:, None]
    channel = tl.arange(0, CHANNELS)[None, :]

    squares = tl.zeros([REGIONS * BLOCK, CHANNELS], tl.float32)
    for start in range(0, width, CHANNELS):
        at = start + channel
        values = tl.load(token + at * channel_stride, real[:, None] & (at < width), 0.0)
        values = values.to(tl.float32)
        squares += values * values
    length = tl.maximum(tl.sqrt_rn(tl.sum(squares, 1)), 1e-12)[:, None]

    similarity = tl.zeros([REGIONS * BLOCK, REGIONS * BLOCK], tl.float32)
    for start in range(0, width, CHANNELS):
        at = start + channel
        values = tl.load(token + at * channel_stride, real[:, None] & (at < width), 0.0)
        unit = values.to(tl.float32) / length
        similarity = tl.dot(unit, tl.trans(unit), similarity, input_precision="tf32x3")
    pair = (group[:, None] == group[None, :]) & real[None, :]
    not_nan = similarity == similarity
    similarity = tl.where(pair & not_nan, similarity, -1.0)

    covered = tl.full([REGIONS * BLOCK], -1.0, tl.float32)
    free = inside
    for step in range(keep):
        gain = tl.sum(tl.maximum(similarity - covered[None, :], 0.0), 1)
        rank = _rank(gain, free, real, place, BLOCK)
        best = tl.max(tl.reshape(rank, [REGIONS, BLOCK]), 1, keep_dims=True)
        best = tl.reshape(tl.broadcast_to(best, [REGIONS, BLOCK]), [REGIONS * BLOCK])
        picked = rank == best
        covered = tl.maximum(covered, tl.max(tl.where(picked[:, None], similarity, -1.0), 0))
        free = free & (rank != best)
        tl.store(picks + group * keep + step, place.to(tl.int64), picked & inside)


@triton.jit  # type: ignore[untyped-decorator]
def _pick_by_similarity(  # type: ignore[no-untyped-def]
    similarity,
    counts,
    picks,
    regions,
    size,
    keep,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    PADDED: tl.constexpr,
):
    group = tl.program_id(0).to(tl.int64)
    similarity += group * size * size
    place = tl.arange(0, BLOCK)
    line = tl.arange(0, ROWS)
    strip = tl.arange(0, BLOCK // ROWS)[:, None]
    place_in_strips = strip * ROWS + line[None, :]

    covered = tl.full([BLOCK // ROWS, ROWS], -1.0, tl.float32)
    free = place < size
    real = free
    if PADDED:
        real = place < tl.load(counts + group % regions)
    for step in range(keep):
        gains = tl.zeros([ROWS, BLOCK], tl.float32)
        for number in range(BLOCK // ROWS):
            row = number * ROWS + line[:, None]
            inside = (row < size) & (place < size)[None, :]
            values = tl.load(similarity + row * size + place[None, :], inside, -1.0)
            bar = tl.max(tl.where(strip == number, covered, -1.0), 0)
            gains += tl.maximum(values - bar[:, None], 0.0)
        best = BLOCK - 1 - tl.max(_rank(tl.sum(gains, 0), free, real, place, BLOCK), 0) % BLOCK
        inside = place_in_strips < size
        values = tl.load(similarity + best * size + place_in_strips, inside, -1.0)
        covered = tl.maximum(covered, values)
        free = free & (place != best)
        tl.store(picks + group * keep + step, best.to(tl.int64))


def _launch(
    by_tokens: Any,
    by_similarity: Any,
    tokens: Tensor,
    size: int,
    keep: int,
    counts: Tensor | None = None,
) -> Tensor:
    batch, places, width = tokens.shape
    regions = places // size
    groups = batch * regions
    picks = tokens.new_empty((batch, regions, keep), dtype=torch.int64)
    block = max(16, triton.next_power_of_2(size))
    if size > _REGISTER_TOKENS:
        real = (
            None if counts is None else torch.arange(size, device=tokens.device) < counts[:, None]
        )
        similarity = selector.similarities(tokens, size, real)
        by_similarity[(groups,)](
            similarity,
            similarity if counts is None else counts,  # not read without padding
            picks,
            regions,
            size,
            keep,
            BLOCK=block,
            ROWS=64,
            PADDED=counts is not None,
            num_warps=16,
        )
        return picks
    together = max(1, _TILE // block)
    by_tokens[(triton.cdiv(groups, together),)](
        tokens,
        tokens if counts is None else counts,  # not read without padding
        picks,
        *tokens.stride(),
        groups,
        regions,
        size,
        width,
        keep,
        REGIONS=together,
        BLOCK=block,
        CHANNELS=32,
        PADDED=counts is not None,
        num_warps=4 if block <= _TILE else 8,
    )
    return picks


@torch.library.triton_op("toma::facility_location", mutates_args=())
def facility_location(tokens: Tensor, size: int, keep: int, counts: Tensor | None = None) -> Tensor:
    """Pick like `selector.facility_location` in every region of every image.

    Args:
        tokens: ``(B, R * size, D)`` float32, bfloat16 or float16, with any strides.
        size: places per region, at most `selector.KERNEL_TOKENS`.
        keep: picks per region, at most ``size``.
        counts: ``(R,)`` int64: number of places in each region before its padding; None for all.

    Returns:
        ``(B, R, keep)`` int64 places in the region, in the order of picking.
    """
    by_tokens = torch.library.wrap_triton(_pick_by_tokens)
    by_similarity = torch.library.wrap_triton(_pick_by_similarity)
    return _launch(by_tokens, by_similarity, tokens, size, keep, counts)


@facility_location.register_fake  # type: ignore[untyped-decorator]
def _picks_of_shape(tokens: Tensor, size: int, keep: int, counts: Tensor | None = None) -> Tensor:
    return tokens.new_empty((tokens.shape[0], tokens.shape[1] // size, keep), dtype=torch.int64)


@facility_location.register_kernel("cpu")  # type: ignore[untyped-decorator]
def _on_cpu(tokens: Tensor, size: int, keep: int, counts: Tensor | None = None) -> Tensor:
    return selector.facility_location_by_loop(tokens, size, keep, counts)


@facility_location.register_kernel("cuda")  # type: ignore[untyped-decorator]
def _on_cuda(tokens: Tensor, size: int, keep: int, counts: Tensor | None = None) -> Tensor:
    with torch.cuda.device(tokens.device):  # triton launches on the current device
        return _launch(_pick_by_tokens, _pick_by_similarity, tokens, size, keep, counts)
