"""Merged keys and values, with each key weighted by the number of tokens that it represents.

Attention to ``s`` equal keys equals attention to one of them with its logit raised by ``log s``. So
a merged key's logit is raised by the logarithm of its cluster's size. The logarithm is passed as an
extra channel, 1 in queries and ``log s / scale`` in keys, so that attention kernels without
additive masks work too.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from toma_fx.runtime import merging

CHANNELS = 8
"""Head widths are padded to a multiple of this, which fused attention kernels prefer."""


def log_sizes(unmerge_weight: Tensor) -> Tensor:
    """Return the logarithm of the number of tokens that each destination represents.

    Args:
        unmerge_weight: ``(B, R, n, m)``, the share of each token in each destination, ``A^T``.

    Returns:
        ``(B, R * m)``, float32.
    """
    return unmerge_weight.float().sum(-2).log().flatten(1)


def merge_heads(
    heads: Tensor, weight: Tensor, layout: Sequence[int], dim: int, after: int = 0
) -> Tensor:
    """Merge the keys or values of every head with `toma_fx.runtime.merging.merge`.

    Args:
        heads: ``(B, P + N + after, H, D)`` for ``dim=1``, ``(B, H, P + N + after, D)`` for
            ``dim=2``.
        weight: ``(B, R, m, n)`` merge weight of `toma_fx.runtime.merging.weigh`.
        layout: the layout that the weight was made with.
        dim: dimension of the tokens.
        after: number of tokens after those that merge.

    Returns:
        The same with ``P + R * m + after`` tokens.

    Raises:
        InputError: under the same conditions as `toma_fx.runtime.merging.merge`.
    """
    tokens = heads if dim == 1 else heads.transpose(1, 2)
    merged = merging.merge(tokens.flatten(2), weight, layout, after)
    by_head: Tensor = merged.unflatten(2, tokens.shape[2:])
    return by_head if dim == 1 else by_head.transpose(1, 2)


def with_sizes(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    log_sizes: Tensor,
    scale: float,
    dim: int,
    after: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Extend queries, keys and values so that each merged key counts as its number of tokens.

    Args:
        query: ``(B, S, H, D)`` for ``dim=1``, ``(B, H, S, D)`` for ``dim=2``.
        key: ``P + M + after`` tokens, of which ``M`` were merged.
        value: like ``key``.
        log_sizes: ``(B, M)`` from `log_sizes`.
        scale: attention's factor for logits; attention to the result must be given it explicitly,
            because the result is wider.
        dim: dimension of the tokens.
        after: number of tokens after the merged ones.

    Returns:
        The three tensors, widened equally to a multiple of 8. The extra channels of the
        attention's output are empty.
    """
    width = key.shape[-1]
    more = CHANNELS - width % CHANNELS
    before = key.shape[dim] - log_sizes.shape[1] - after
    bias = F.pad(log_sizes / scale, (before, after)).to(key.dtype)
    column = F.pad(bias[..., None], (0, more - 1)).unsqueeze(3 - dim)
    one = F.pad(query.new_ones(1), (0, more - 1))
    return (
        torch.cat([query, one.expand(*query.shape[:-1], more)], dim=-1),
        torch.cat([key, column.expand(*key.shape[:-1], more)], dim=-1),
        F.pad(value, (0, width + more - value.shape[-1])),
    )
