"""Which tokens to keep: destinations, chosen region by region (Eq. 5, Alg. 1 and 2)."""

import logging
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

# Private, and the only way to write a loop whose trip count is no part of the graph.
from torch._functorch import config as functorch_config
from torch._higher_order_ops.while_loop import while_loop_op
from torch.fx.experimental.proxy_tensor import get_proxy_mode

from toma_fx.errors import InputError
from toma_fx.runtime.regions import kept_tokens, region_size

logger = logging.getLogger(__name__)

GAIN_STEPS = 2.0**12
"""Gains are compared in steps of ``1 / GAIN_STEPS``. Two tokens that are nearest to each other
have exactly the same gain, ``1 + S_ij - c_i - c_j``, so ties are the rule; without the steps
rounding would decide them, and eager, compiled and exported models would pick differently."""

KERNEL_TOKENS = 256
"""The largest region whose destinations a GPU kernel picks; see `kernels`."""


def unit_tokens(tokens_BND: Tensor) -> Tensor:
    """Tokens of length 1 in float32, ``(B, N, D)``: their products are cosine similarities.

    float32 because one bf16 step of a cosine near 1 is 0.004, four logits at a temperature of
    0.001. Detached because a plan is a choice, not a function to differentiate.
    """
    return F.normalize(tokens_BND.detach().float(), dim=-1)


def cosines(unit: Tensor, others: Tensor) -> Tensor:
    """Cosine similarities ``(..., n, m)`` of unit tokens ``(..., n, D)`` and ``(..., m, D)``.

    In their float32 under autocast too, which would round them as `unit_tokens` must not be.
    """
    device = unit.device.type
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
        with torch.autocast(device, enabled=False):
            return unit @ others.transpose(-1, -2)
    return unit @ others.transpose(-1, -2)


def facility_location(similarity: Tensor, keep: int, *sized: Tensor) -> Tensor:
    """Greedy maximisation of ``f(T) = sum_i max_{j in T} S_ij`` (Eq. 5) in every group at once.

    Each pick is the token with the largest gain ``sum_i max(0, S_ij - c_i)``, where ``c_i`` is the
    best similarity of token ``i`` to the picks so far, -1 before the first. A picked token is
    masked: in flat areas all gains are 0, and an unmasked maximum would repeat itself.

    In eager mode the picks are a Python loop over all groups at once; in a graph they are one loop
    node, compiled once whatever the number of picks.

    Args:
        similarity: ``(G, n, n)`` float32, symmetric, at least -1 everywhere, no NaN.
        keep: picks per group, at most ``n``.
        *sized: tensors that have the symbols of a symbolic ``G`` among their own sizes. The loop
            takes them along, since Inductor must find every symbol in what a loop is given.

    Returns:
        ``(G, keep)`` int64, in the order of picking, without repetition.
    """

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
    # A loop node asks whether it is done, and would wait for a GPU; Python's loop never asks.
    device = torch.device("cpu") if looped else similarity.device
    start: tuple[Tensor, ...] = (
        torch.zeros((), dtype=torch.int64, device=device),
        similarity.new_full((groups, tokens), -1.0),
        similarity.new_zeros((groups, tokens)),
        similarity.new_zeros((groups, keep), dtype=torch.int64),
    )
    if looped:
        loop: Any = while_loop_op  # typed for carried values of one kind
        picks: Tensor = loop(unfinished, pick, start, (similarity, *sized))[3]
        return picks
    if similarity.is_meta:
        return start[3]  # shapes are all that a search without data could find
    for _ in range(keep):
        start = pick(*start, similarity)
    return start[3]


def similarities(tokens_BND: Tensor, size: int) -> Tensor:
    """Cosine similarities of the tokens of each region, ``(B * R, n, n)`` float32, no NaN."""
    unit = unit_tokens(tokens_BND.unflatten(1, (-1, size)).flatten(0, 1))
    # A token with NaN resembles nothing, so it is picked last; its NaN still shows in the output.
    return cosines(unit, unit).nan_to_num(nan=-1.0)


def facility_location_by_loop(tokens_BND: Tensor, size: int, keep: int) -> Tensor:
    """`facility_location` in regions of ``size`` tokens, on any device: ``(B, R, keep)`` int64."""
    batch, tokens, _ = tokens_BND.shape
    picks = facility_location(similarities(tokens_BND, size), keep, tokens_BND)
    return picks.reshape(batch, tokens // size, keep)


def _facility_location(tokens_BND: Tensor, size: int, keep: int) -> Tensor:
    if _has_kernel(tokens_BND, size):
        picks: Tensor = torch.ops.toma.facility_location(tokens_BND.detach(), size, keep)
        return picks
    return facility_location_by_loop(tokens_BND, size, keep)


def _has_kernel(tokens_BND: Tensor, size: int) -> bool:
    return (
        isinstance(size, int)  # the symbolic size of one region for any image is not
        and size <= KERNEL_TOKENS
        # A program that is exported, or lowered for export, must load without this package.
        and functorch_config.decompose_custom_triton_ops
        and _runs_kernels(tokens_BND.device)
    )


def _runs_kernels(device: torch.device) -> bool:
    """Whether `ops` found triton and the device is a GPU that triton supports."""
    return (
        device.type == "cuda"
        and hasattr(torch.ops.toma, "facility_location")
        and torch.cuda.get_device_capability(device) >= (8, 0)
    )


def _random(tokens_BND: Tensor, size: int, keep: int) -> Tensor:
    batch, tokens, _ = tokens_BND.shape
    order = pseudo_random(tokens_BND, (tokens // size, size)).argsort(dim=-1)
    return order[:, :keep].expand(batch, -1, -1)


def _grid(tokens_BND: Tensor, size: int, keep: int) -> Tensor:
    batch, tokens, _ = tokens_BND.shape
    place = torch.arange(keep, device=tokens_BND.device)
    return ((2 * place + 1) * size // (2 * keep)).expand(batch, tokens // size, -1)


def pseudo_random(like: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Fixed numbers in [0, 1), float32, the same at every call: a hash of each element's index.

    Not `torch.rand`, because the global random state is the user's.
    """
    count = 1
    for size in shape:
        count *= size
    x = torch.arange(1, count + 1, device=like.device)
    for multiplier in (0x45D9F3B, 0x119DE1F3):
        x = ((x ^ (x >> 16)) * multiplier) & 0xFFFFFFFF
    return ((x ^ (x >> 16)) & 0xFFFFFF).reshape(shape).float() / 2**24


SELECTORS = {"facility_location": _facility_location, "random": _random, "grid": _grid}
"""Each ``(B, N, D), n, m -> (B, R, m)`` indices inside the region."""


def select(tokens: Tensor, region_tokens: int, ratio: float, selector: str) -> Tensor:
    """Destinations of every region.

    Args:
        tokens: ``(B, N, D)`` in token order, any floating dtype.
        region_tokens: tokens wanted in a region; see `region_size`. 0: one region.
        ratio: share of a region's tokens that is merged away, in [0, 1).
        selector: ``"facility_location"``, ``"random"`` or ``"grid"``.

    Returns:
        ``(B, R, m)`` int64: indices into the ``N`` tokens, distinct within a region.

    Raises:
        InputError: when ``tokens`` is not 3-dimensional or ``selector`` is unknown.
    """
    if tokens.ndim != 3:
        raise InputError(f"select: tokens of shape {tuple(tokens.shape)} must be (B, N, D)")
    if selector not in SELECTORS:
        raise InputError(f"select: selector={selector!r} must be one of {', '.join(SELECTORS)}")
    size = region_size(tokens.shape[1], region_tokens)
    keep = kept_tokens(size, ratio)
    if not torch.compiler.is_compiling() and logger.isEnabledFor(logging.DEBUG):
        logger.debug(
            "%s keeps %s of %s tokens in each region of (B, N, D) = %s",
            selector,
            keep,
            size,
            tuple(tokens.shape),
        )
    inside = SELECTORS[selector](tokens, size, keep)
    first = size * torch.arange(inside.shape[1], device=tokens.device)
    return inside + first[:, None]
