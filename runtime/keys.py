"""Keys and values of fewer tokens, each key with the weight of the tokens that it stands for.

Attention of a query to ``s`` equal keys is attention to one of them, its logit raised by ``log s``.
So a merged key's logit is raised by the logarithm of its cluster's size. The logarithm goes in as
one more channel, 1 in queries and ``log s / scale`` in keys: kernels of attention that know no
additive mask need not be told.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from toma_fx.runtime import merging

CHANNELS = 8
"""What the width of a head is made a multiple of, as fused kernels of attention like it."""


def log_sizes(unmerge_weight: Tensor) -> Tensor:
    """The logarithm of how many tokens each destination stands for.

    Args:
        unmerge_weight: ``(B, R, n, m)``, the share of each token in each destination, ``A^T``.

    Returns:
        ``(B, R * m)``, float32.
    """
    return unmerge_weight.float().sum(-2).log().flatten(1)


def merge_heads(
    heads: Tensor, weight: Tensor, layout: Sequence[int], dim: int, after: int = 0
) -> Tensor:
    """Keys or values of merged tokens: `toma_fx.runtime.merging.merge` of every head.

    Args:
        heads: ``(B, P + N + after, H, D)`` for ``dim=1``, ``(B, H, P + N + after, D)`` for
            ``dim=2``.
        weight: ``(B, R, m, n)`` merge weight of `toma_fx.runtime.merging.weigh`.
        layout: the one that the weight was made with.
        dim: where the tokens are.
        after: how many tokens stand behind those that merge.

    Returns:
        The same with ``P + R * m + after`` tokens.

    Raises:
        InputError: as `toma_fx.runtime.merging.merge`.
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
    """Queries, keys and values whose attention counts each merged key as often as it stands for.

    Args:
        query: ``(B, S, H, D)`` for ``dim=1``, ``(B, H, S, D)`` for ``dim=2``.
        key: of ``P + M + after`` tokens, of which ``M`` were merged.
        value: like ``key``.
        log_sizes: ``(B, M)`` of `log_sizes`.
        scale: by which attention multiplies logits; attention to what is returned needs it too,
            since it is wider.
        dim: where the tokens are.
        after: how many tokens stand behind the merged ones.

    Returns:
        The three of them, wider by as many channels, a multiple of 8 in all. The additional
        channels of the attention's output hold nothing.
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
