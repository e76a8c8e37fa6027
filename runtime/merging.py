"""Merge weights, merge and unmerge (Eq. 6 and 7)."""

import torch
from torch import Tensor

from toma_fx.errors import InputError
from toma_fx.runtime.selector import cosines, pseudo_random, unit_tokens


def gather(tokens: Tensor, destinations: Tensor) -> Tensor:
    """The destinations' rows of ``tokens``.

    Args:
        tokens: ``(B, N, D)``, or ``(N, D)`` for a table that the batch shares.
        destinations: ``(B, R, m)`` int64 indices into the ``N`` rows.

    Returns:
        ``(B, R * m, D)``.
    """
    index = destinations.flatten(1)
    if tokens.ndim == 2:
        return tokens[index]
    return tokens.gather(1, index[:, :, None].expand(-1, -1, tokens.shape[-1]))


def weigh(
    tokens: Tensor, destinations: Tensor, temperature: float, merge_over: str, unmerge: str
) -> tuple[Tensor, Tensor]:
    """Merge and unmerge weights.

    ``A = softmax over destinations of (X_T X^T / tau)`` on cosine similarities. The merge is
    ``A~``, ``A`` with its rows normalised (Eq. 6); the unmerge is ``A^T`` or the pseudo-inverse
    (Eq. 7). Eq. 7 prints the pseudo-inverse of ``A``; what undoes a merge by ``A~`` is that of
    ``A~``, ``A~^T (A~ A~^T)^-1``, with which a constant field comes back unchanged.

    Args:
        tokens: ``(B, N, D)``, any floating dtype; similarities are float32.
        destinations: ``(B, R, m)`` int64 indices into the ``N`` tokens.
        temperature: tau, above 0.
        merge_over: ``"region"``, or ``"image"`` to spread a token over all ``M`` destinations.
        unmerge: ``"transpose"`` or ``"pinv"``.

    Returns:
        merge weight ``(B, R, m, n)``, whose rows sum to 1, and unmerge weight ``(B, R, n, m)``,
        in the dtype of ``tokens``. With ``merge_over="image"``, ``R`` is 1 and ``m`` is ``M``.

    Raises:
        InputError: when ``destinations`` does not fit ``tokens``.
    """
    batch, regions, keep = destinations.shape
    if tokens.shape[0] != batch or tokens.shape[1] % regions:
        raise InputError(
            f"weigh: destinations of shape {tuple(destinations.shape)} (B, R, m) do not fit tokens "
            f"of shape {tuple(tokens.shape)} (B, N, D); make them with select on these tokens"
        )
    if merge_over == "image":
        regions, keep = 1, regions * keep
    unit = unit_tokens(tokens)
    source = unit.unflatten(1, (regions, -1))
    destination = gather(unit, destinations).unflatten(1, (regions, keep))
    # A^T: (B, R, n, m). Attention that spreads an identity is the same, and one product more.
    spread = (cosines(source, destination) / temperature).softmax(-1)
    merge = (spread / spread.sum(-2, keepdim=True)).transpose(-1, -2)
    if unmerge == "pinv":
        spread = torch.linalg.pinv(merge)
    return merge.to(tokens.dtype), spread.to(tokens.dtype)


def fixed_weights(tokens: Tensor, destinations: Tensor) -> tuple[Tensor, Tensor]:
    """Random merge and unmerge weights that never look at a token: the paper's lower bound of time.

    Args:
        tokens: ``(B, N, D)``; only its shape, dtype and device are used.
        destinations: ``(B, R, m)``; only its shape is used.

    Returns:
        merge weight ``(B, R, m, n)`` and unmerge weight ``(B, R, n, m)`` with positive entries,
        the rows of both summing to 1, as `weigh` returns them.
    """
    batch, regions, keep = destinations.shape
    size = tokens.shape[1] // regions
    spread = pseudo_random(tokens, (regions, size, keep)) + 2**-24
    merge = (spread / spread.sum(-2, keepdim=True)).transpose(-1, -2)
    spread = spread / spread.sum(-1, keepdim=True)
    return (
        merge.to(tokens.dtype).expand(batch, -1, -1, -1),
        spread.to(tokens.dtype).expand(batch, -1, -1, -1),
    )


def _mix(operator: str, tokens_BPND: Tensor, weight_BRon: Tensor) -> Tensor:
    """Weighted sums of the tokens of each region; tokens before the first region pass through."""
    batch, regions, _, size = weight_BRon.shape
    prefix = tokens_BPND.shape[1] - regions * size
    if tokens_BPND.shape[0] != batch or prefix < 0:
        raise InputError(
            f"{operator}: weight of shape {tuple(weight_BRon.shape)} is for batch {batch} and "
            f"{regions} regions of {size} tokens, but the tokens have shape "
            f"{tuple(tokens_BPND.shape)}; use the plan made from these tokens"
        )
    image = tokens_BPND[:, prefix:].unflatten(1, (regions, size))
    mixed = (weight_BRon @ image).flatten(1, 2)
    return mixed if prefix == 0 else torch.cat([tokens_BPND[:, :prefix], mixed], dim=1)


def merge(tokens: Tensor, weight: Tensor) -> Tensor:
    """Fewer tokens: each destination becomes a weighted mean of its region (Eq. 6).

    Args:
        tokens: ``(B, P + N, D)``; the first ``P`` (text) tokens pass through.
        weight: ``(B, R, m, n)`` merge weight of `weigh`.

    Returns:
        ``(B, P + R * m, D)``.

    Raises:
        InputError: when the weight was made for another batch, or for more tokens than there are;
            surplus tokens are taken for text.
    """
    return _mix("merge", tokens, weight)


def unmerge(tokens: Tensor, weight: Tensor) -> Tensor:
    """All tokens again: each source takes from the destinations that it was spread over (Eq. 7).

    Args:
        tokens: ``(B, P + R * m, D)``; the first ``P`` (text) tokens pass through.
        weight: ``(B, R, n, m)`` unmerge weight of `weigh`.

    Returns:
        ``(B, P + N, D)``.

    Raises:
        InputError: when the weight was made for another batch, or for more tokens than there are;
            surplus tokens are taken for text.
    """
    return _mix("unmerge", tokens, weight)
