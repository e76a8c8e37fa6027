"""Selection of destinations, the tokens to keep, region by region (Eq. 5, Alg. 1 and 2)."""

import functools
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from toma_fx.errors import InputError
from toma_fx.runtime.regions import (
    expect_tokens,
    is_padded,
    placed,
    places_of,
    real_places,
    total_regions,
)

logger = logging.getLogger(__name__)

GAIN_STEPS = 2.0**12
"""Gains are compared in steps of ``1 / GAIN_STEPS``. Two tokens that are nearest to each other
have exactly the same gain, ``1 + S_ij - c_i - c_j``, so ties are common. Without the steps,
rounding would decide them, and eager, compiled and exported models would pick differently."""

PADDING_GAIN = -1e30
"""Gain of padding: less than that of any token, more than that of a picked token."""

KERNEL_TOKENS = 256
"""Size in tokens of the largest region whose destinations a GPU kernel picks; see `kernels`."""


def unit_tokens(tokens_BND: Tensor) -> Tensor:
    """Normalise tokens to length 1 in float32, ``(B, N, D)``: products are cosine similarities.

    float32 because one bf16 step of a cosine near 1 is 0.004, four logits at a temperature of
    0.001. Detached because a plan is a choice, not a function to differentiate.
    """
    return F.normalize(tokens_BND.detach().float(), dim=-1)


def cosines(unit: Tensor, others: Tensor) -> Tensor:
    """Return cosine similarities ``(..., n, m)`` of unit tokens ``(..., n, D)``, ``(..., m, D)``.

    They stay float32 under autocast too, which would round them (see `unit_tokens`).
    """
    device = unit.device.type
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
        with torch.autocast(device, enabled=False):
            return unit @ others.transpose(-1, -2)
    return unit @ others.transpose(-1, -2)


def facility_location(
    similarity: Tensor, keep: int, *sized: Tensor, real_Gn: Tensor | None = None
) -> Tensor:
    """Maximise ``f(T) = sum_i max_{j in T} S_ij`` (Eq. 5) greedily in every group at once.

    Each pick is the token with the largest gain ``sum_i max(0, S_ij - c_i)``, where ``c_i`` is the
    best similarity of token ``i`` to the picks so far, -1 before the first. Picked tokens are
    masked: in flat areas all gains are 0, and an unmasked maximum would repeat itself.

    In eager mode, a Python loop picks in all groups at once. In a graph, the picks are one loop
    node, compiled once for any number of picks.

    Args:
        similarity: ``(G, n, n)`` float32, symmetric, at least -1 everywhere, no NaN.
        keep: picks per group, at most ``n``.
        *sized: tensors whose sizes contain the symbols of a symbolic ``G``. They are passed to the
            loop, because Inductor must find every symbol in the inputs of a loop.
        real_Gn: ``(G, n)`` bool: False marks padding, picked only when nothing else is left.

    Returns:
        ``(G, keep)`` int64, in the order of picking, without repetition.
    """
    # Private API, but the only way to write a loop whose trip count is not part of the graph.
    # Imported here because torch may not have imported its tracer yet.
    from torch._higher_order_ops.while_loop import while_loop_op
    from torch.fx.experimental.proxy_tensor import get_proxy_mode

    def unfinished(step: Tensor, *_: Tensor) -> Tensor:
        return step < keep

    def pick(*state: Tensor) -> tuple[Tensor, ...]:
        step, covered, free, picks, similarity, *_ = state
        gain = (similarity - covered[:, None, :]).relu().sum(-1)
        best = ((gain * GAIN_STEPS).round() + free).argmax(-1, keepdim=True)
        row = similarity.gather(1, best[:, :, None].expand(-1, -1, similarity.shape[2])).squeeze(1)
        here = torch.arange(picks.shape[1], device=picks.device) == step.to(picks.device)
        return (
            step + 1,
            torch.maximum(covered, row),
            free.scatter(1, best, float("-inf")),
            torch.where(here, best, picks),
        )

    groups, tokens, _ = similarity.shape
    looped = torch.compiler.is_compiling() or get_proxy_mode() is not None
    # A loop node reads its condition and would wait for a GPU; Python's loop does not read it.
    device = torch.device("cpu") if looped else similarity.device
    free = similarity.new_zeros((groups, tokens))
    if real_Gn is not None:
        free = free.masked_fill(~real_Gn, PADDING_GAIN)
    start: tuple[Tensor, ...] = (
        torch.zeros((), dtype=torch.int64, device=device),
        similarity.new_full((groups, tokens), -1.0),
        free,
        similarity.new_zeros((groups, keep), dtype=torch.int64),
    )
    if looped:
        loop: Any = while_loop_op  # its types allow carried values of one kind only
        picks: Tensor = loop(unfinished, pick, start, (similarity, *sized))[3]
        return picks
    if similarity.is_meta:
        return start[3]  # without data, a search could find nothing but shapes
    for _ in range(keep):
        start = pick(*start, similarity)
    return start[3]


def similarities(tokens_BND: Tensor, size: int, real_Rn: Tensor | None = None) -> Tensor:
    """Return cosine similarities of the places of each region, ``(B * R, n, n)`` float32, no NaN.

    Args:
        tokens_BND: tokens in their places, ``R * size`` of them.
        size: places per region.
        real_Rn: ``(R, n)`` bool: which places are not padding; None if there is no padding.
    """
    batch, places, _ = tokens_BND.shape
    unit = unit_tokens(tokens_BND.unflatten(1, (places // size, size)).flatten(0, 1))
    # A token with NaN is similar to nothing, so it is picked last; its NaN shows in the output.
    similarity = cosines(unit, unit).nan_to_num(nan=-1.0)
    if real_Rn is None:
        return similarity
    # Padding is similar to nothing either, so it adds nothing to any gain.
    padded = ~(real_Rn[:, :, None] & real_Rn[:, None, :])
    by_image: Tensor = similarity.unflatten(0, (batch, places // size))
    return by_image.masked_fill(padded, -1.0).flatten(0, 1)


def facility_location_by_loop(
    tokens_BND: Tensor, size: int, keep: int, counts: Tensor | None = None, *sized: Tensor
) -> Tensor:
    """Run `facility_location` in regions of ``size`` places, on any device: ``(B, R, keep)`` int64.

    Args:
        tokens_BND: tokens in their places, ``R * size`` of them.
        size: places per region.
        keep: picks per region.
        counts: ``(R,)`` int64: number of places per region that are not padding; None for all.
        *sized: see `facility_location`.
    """
    batch, places, _ = tokens_BND.shape
    real_Rn = real_Gn = None
    if counts is not None:
        real_Rn = torch.arange(size, device=tokens_BND.device) < counts[:, None]
        real_Gn = real_Rn.expand(batch, -1, -1).flatten(0, 1)
    similarity = similarities(tokens_BND, size, real_Rn)
    picks = facility_location(similarity, keep, tokens_BND, *sized, real_Gn=real_Gn)
    return picks.reshape(batch, places // size, keep)


def _facility_location(tokens_BND: Tensor, layout: Sequence[int]) -> Tensor:
    keep, size = layout[:2]
    places = placed(tokens_BND, layout)
    counts = places_of(layout, tokens_BND).counts if is_padded(layout) else None
    if not _has_kernel(tokens_BND, size):
        sized = () if counts is None else (tokens_BND,)
        return facility_location_by_loop(places, size, keep, counts, *sized)
    # Imported here because triton and its needs in torch's compiler take over a second to import.
    from toma_fx.runtime import kernels as kernels  # defines the operator

    picks: Tensor = torch.ops.toma.facility_location(places.detach(), size, keep, counts)
    return picks


def _has_kernel(tokens_BND: Tensor, size: int) -> bool:
    # With one region for any image size, the size is symbolic and not an int.
    if not isinstance(size, int) or size > KERNEL_TOKENS or not _runs_kernels(tokens_BND.device):
        return False
    from torch._functorch import config  # a part of torch's compiler

    # A program that is exported, or lowered for export, must load without this package.
    return bool(config.decompose_custom_triton_ops)


def _runs_kernels(device: torch.device) -> bool:
    """Return whether the device is a GPU that triton supports, and triton is installed.

    ROCm is excluded, because its triton lacks the matrix products that the kernels use.
    """
    return (
        device.type == "cuda"
        and torch.version.hip is None
        and _finds_triton()
        and torch.cuda.get_device_capability(device) >= (8, 0)
    )


@functools.cache
def _finds_triton() -> bool:
    return find_spec("triton") is not None


def _random(tokens_BND: Tensor, layout: Sequence[int]) -> Tensor:
    keep, size = layout[:2]
    number = pseudo_random(tokens_BND, (total_regions(layout), size))
    if is_padded(layout):
        number = number + ~real_places(layout, tokens_BND)
    return number.argsort(dim=-1)[:, :keep].expand(tokens_BND.shape[0], -1, -1)


def _grid(tokens_BND: Tensor, layout: Sequence[int]) -> Tensor:
    keep, size = layout[:2]
    place = 2 * torch.arange(keep, device=tokens_BND.device) + 1
    if is_padded(layout):
        place = place * places_of(layout, tokens_BND).counts[:, None] // (2 * keep)
    else:
        place = place * size // (2 * keep)
    return place.expand(tokens_BND.shape[0], total_regions(layout), -1)


def pseudo_random(like: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Return fixed float32 numbers in [0, 1), the same at every call: hashes of element indices.

    `torch.rand` is not used, because the global random state is the user's.
    """
    count = 1
    for size in shape:
        count *= size
    x = torch.arange(1, count + 1, device=like.device)
    for multiplier in (0x45D9F3B, 0x119DE1F3):
        x = ((x ^ (x >> 16)) * multiplier) & 0xFFFFFFFF
    return ((x ^ (x >> 16)) & 0xFFFFFF).reshape(shape).float() / 2**24


@dataclass(frozen=True, kw_only=True)
class Selector:
    """A method of choosing destinations."""

    pick: Callable[[Tensor, Sequence[int]], Tensor]
    """Maps ``(B, N, D)`` and a layout to ``(B, R, m)`` int64 places in the region."""
    fixed_weights: bool = False
    """True if the weights are `merging.fixed_weights`, which do not depend on the tokens either."""


SELECTORS = {
    "facility_location": Selector(pick=_facility_location),
    "random": Selector(pick=_random),
    "grid": Selector(pick=_grid),
    "fixed": Selector(pick=_grid, fixed_weights=True),
}


def select(tokens: Tensor, layout: Sequence[int], selector: str) -> Tensor:
    """Select the destinations of every region.

    Args:
        tokens: ``(B, N, D)`` in token order, any floating dtype.
        layout: division of the tokens into regions; see `toma_fx.runtime.regions.layout`.
        selector: a key of `SELECTORS`.

    Returns:
        ``(B, R, m)`` int64 indices into the ``N`` tokens, distinct within a region of at least
        ``m`` tokens. A smaller region lists all its tokens, some more than once.

    Raises:
        InputError: when ``tokens`` do not fit ``layout``, or when ``selector`` is unknown.
    """
    expect_tokens("select", tokens, layout)
    if selector not in SELECTORS:
        raise InputError(f"select: selector={selector!r} must be one of {', '.join(SELECTORS)}")
    keep, size = layout[:2]
    if not torch.compiler.is_compiling() and logger.isEnabledFor(logging.DEBUG):
        logger.debug(
            "%s keeps %s of %s tokens in each region of (B, N, D) = %s",
            selector,
            keep,
            size,
            tuple(tokens.shape),
        )
    inside = SELECTORS[selector].pick(tokens, layout)
    if is_padded(layout):
        token_Rn: Tensor = places_of(layout, tokens).token_of_place.unflatten(
            0, (total_regions(layout), size)
        )
        return token_Rn.expand(tokens.shape[0], -1, -1).gather(-1, inside)
    first = size * torch.arange(inside.shape[1], device=tokens.device)
    return inside + first[:, None]
