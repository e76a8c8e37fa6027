"""Merge weights, merge and unmerge (Eq. 6 and 7)."""

from collections.abc import Sequence

import torch
from torch import Tensor

from toma_fx.errors import InputError
from toma_fx.runtime.regions import (
    expect_tokens,
    gathered,
    is_padded,
    kept,
    real_places,
    spread,
    total_regions,
    total_tokens,
)
from toma_fx.runtime.selector import cosines, pseudo_random, unit_tokens


def gather(tokens: Tensor, destinations: Tensor) -> Tensor:
    """Return the destinations' rows of ``tokens``.

    Args:
        tokens: ``(B, N, D)``, or ``(N, D)`` for a table shared by the batch.
        destinations: ``(B, R, m)`` int64 indices into the ``N`` rows.

    Returns:
        ``(B, R * m, D)``.
    """
    index = destinations.flatten(1)
    if tokens.ndim == 2:
        return tokens[index]
    return tokens.gather(1, index[:, :, None].expand(-1, -1, tokens.shape[-1]))


def rows(values: Tensor, destinations: Tensor, dim: int, before: int, after: int = 0) -> Tensor:
    """Return the rows for the tokens that are left: those of destinations, and those around them.

    Args:
        values: a row for each of ``S`` tokens, of which those that merge are between others:
            ``(S, ...)`` for ``dim=0``, a table shared by the batch; ``(B, S, ...)`` or
            ``(1, S, ...)`` for ``dim=1``; ``(B, ..., S)`` for ``dim=-1``, a key mask.
        destinations: ``(B, R, m)`` int64 indices into the tokens that merge.
        dim: dimension of the rows.
        before: number of rows before the tokens that merge; all of them stay.
        after: number of rows after the tokens that merge; all of them stay.

    Returns:
        ``(B, before + R * m + after, ...)``, or the same in another dimension.
    """
    batch = destinations.shape[0]
    if dim == 0:
        values, dim = values.unsqueeze(0), 1
    values = values.expand(batch, *values.shape[1:])
    if dim != 1:
        return rows(values.movedim(dim, 1), destinations, 1, before, after).movedim(1, dim)
    index = destinations.flatten(1) + before
    index = index.reshape(*index.shape, *[1] * (values.ndim - 2))
    merged = values.gather(1, index.expand(-1, -1, *values.shape[2:]))
    if all(isinstance(each, int) and each == 0 for each in (before, after)):
        return merged  # no copy, and no guard on a symbol
    return torch.cat([values[:, :before], merged, values[:, values.shape[1] - after :]], dim=1)


def weigh(
    tokens: Tensor,
    destinations: Tensor,
    layout: Sequence[int],
    temperature: float,
    merge_over: str,
    unmerge: str,
) -> tuple[Tensor, Tensor]:
    """Compute merge and unmerge weights.

    ``A = softmax over destinations of (X_T X^T / tau)`` on cosine similarities. The merge is
    ``A~``, ``A`` with its rows normalised (Eq. 6); the unmerge is ``A^T`` or the pseudo-inverse
    (Eq. 7). The paper prints the pseudo-inverse of ``A`` in Eq. 7, but a merge by ``A~`` is undone
    by that of ``A~``, ``A~^T (A~ A~^T)^-1``, which returns a constant field unchanged.

    Args:
        tokens: ``(B, N, D)``, any floating dtype; similarities are float32.
        destinations: ``(B, R, m)`` int64 indices into the ``N`` tokens.
        layout: the layout that the destinations were selected with.
        temperature: tau, above 0.
        merge_over: ``"region"``, or ``"image"`` to spread a token over all ``M`` destinations.
        unmerge: ``"transpose"`` or ``"pinv"``.

    Returns:
        merge weight ``(B, R, m, n)``, whose rows sum to 1, and unmerge weight ``(B, R, n, m)``,
        in the dtype of ``tokens``; 0 for padding in both. With ``merge_over="image"``, ``R`` is 1,
        ``m`` is ``M`` and ``n`` is ``N``.

    Raises:
        InputError: when ``destinations`` or ``layout`` do not fit ``tokens``.
    """
    _expect_destinations("weigh", tokens, destinations, layout)
    unit = unit_tokens(tokens)
    by_image = merge_over == "image"
    source = unit.unsqueeze(1) if by_image else spread(unit, layout)
    shape = (1, kept(layout)) if by_image else tuple(destinations.shape[1:])
    destination = gather(unit, destinations).unflatten(1, shape)
    # A^T: (B, R, n, m). Spreading an identity with attention gives the same, at one more product.
    weight = (cosines(source, destination) / temperature).softmax(-1)
    padded = not by_image and is_padded(layout)
    if padded:
        weight = weight.masked_fill(~real_places(layout, tokens)[:, :, None], 0.0)
    merge = (weight / weight.sum(-2, keepdim=True)).transpose(-1, -2)
    if unmerge == "pinv":
        weight = torch.linalg.pinv(merge)
        if padded:  # rounding leaves small values there
            weight = weight.masked_fill(~real_places(layout, tokens)[:, :, None], 0.0)
    return merge.to(tokens.dtype), weight.to(tokens.dtype)


def fixed_weights(
    tokens: Tensor, destinations: Tensor, layout: Sequence[int]
) -> tuple[Tensor, Tensor]:
    """Return random weights that do not depend on the tokens: the paper's lower bound of time.

    Args:
        tokens: ``(B, N, D)``; only its shape, dtype and device are used.
        destinations: ``(B, R, m)``; only its shape is used.
        layout: the layout that the destinations were selected with.

    Returns:
        merge weight ``(B, R, m, n)`` and unmerge weight ``(B, R, n, m)`` as from `weigh`: positive
        entries, but 0 for padding; the rows of both sum to 1.

    Raises:
        InputError: when ``destinations`` or ``layout`` do not fit ``tokens``.
    """
    _expect_destinations("fixed_weights", tokens, destinations, layout)
    batch, regions, keep = destinations.shape
    weight = pseudo_random(tokens, (regions, layout[1], keep)) + 2**-24
    unmerge = weight / weight.sum(-1, keepdim=True)
    if is_padded(layout):
        padded = ~real_places(layout, tokens)[:, :, None]
        weight, unmerge = weight.masked_fill(padded, 0.0), unmerge.masked_fill(padded, 0.0)
    merge = (weight / weight.sum(-2, keepdim=True)).transpose(-1, -2)
    return (
        merge.to(tokens.dtype).expand(batch, -1, -1, -1),
        unmerge.to(tokens.dtype).expand(batch, -1, -1, -1),
    )


def _expect_destinations(
    operator: str, tokens: Tensor, destinations: Tensor, layout: Sequence[int]
) -> None:
    expect_tokens(operator, tokens, layout)
    expected = (tokens.shape[0], total_regions(layout), layout[0])
    if tuple(destinations.shape) != expected:
        raise InputError(
            f"{operator}: destinations of shape {tuple(destinations.shape)} do not fit tokens of "
            f"shape {tuple(tokens.shape)} (B, N, D) and their layout, for which (B, R, m) is "
            f"{expected}; make them with select on these tokens and this layout"
        )


def _is_by_region(
    operator: str, weight: Tensor, places: int, keep: int, layout: Sequence[int]
) -> bool:
    """Return whether a weight is by region, rather than over the whole image without regions."""
    given = (weight.shape[1], places, keep)
    by_region = (total_regions(layout), layout[1], layout[0])
    if given == by_region:
        return True
    over_image = (1, total_tokens(layout), kept(layout))
    if given == over_image:
        return False
    raise InputError(
        f"{operator}: weight of shape {tuple(weight.shape)} has (R, n, m) = {given}, but its "
        f"layout has {by_region}, or {over_image} over the image; use the layout that the weight "
        "was made with"
    )


def _split(
    operator: str, tokens: Tensor, weight: Tensor, taken: int, after: int
) -> tuple[Tensor | None, Tensor, Tensor | None]:
    """Split into tokens before (None if there are none), ``taken`` tokens, and ``after`` tokens."""
    prefix = tokens.shape[1] - taken - after
    if tokens.shape[0] != weight.shape[0] or prefix < 0:
        raise InputError(
            f"{operator}: weight of shape {tuple(weight.shape)} is for batch {weight.shape[0]} and "
            f"{taken} tokens, but the tokens have shape {tuple(tokens.shape)}; use the plan made "
            "from these tokens"
        )
    first = None if prefix == 0 else tokens[:, :prefix]
    if isinstance(after, int) and after == 0:  # no guard on a symbol
        return first, tokens[:, prefix:], None
    return first, tokens[:, prefix : prefix + taken], tokens[:, prefix + taken :]


def _join(first: Tensor | None, image: Tensor, last: Tensor | None) -> Tensor:
    parts = [part for part in (first, image, last) if part is not None]
    return image if len(parts) == 1 else torch.cat(parts, dim=1)


def merge(tokens: Tensor, weight: Tensor, layout: Sequence[int], after: int = 0) -> Tensor:
    """Merge tokens: each destination becomes a weighted mean of its region (Eq. 6).

    Args:
        tokens: ``(B, P + N + after, D)``; tokens around the ``N`` that merge, such as text, pass
            through.
        weight: ``(B, R, m, n)`` merge weight of `weigh`.
        layout: the layout that the weight was made with.
        after: number of tokens after those that merge.

    Returns:
        ``(B, P + R * m + after, D)``.

    Raises:
        InputError: when the weight was made for another batch or layout, or for more tokens than
            there are; surplus tokens count as text.
    """
    _, regions, keep, size = weight.shape
    by_region = _is_by_region("merge", weight, size, keep, layout)
    first, image, last = _split("merge", tokens, weight, total_tokens(layout), after)
    places = spread(image, layout) if by_region else image.unflatten(1, (regions, size))
    return _join(first, (weight @ places).flatten(1, 2), last)


def unmerge(tokens: Tensor, weight: Tensor, layout: Sequence[int], after: int = 0) -> Tensor:
    """Unmerge tokens: each source is a mix of the destinations it was spread over (Eq. 7).

    Args:
        tokens: ``(B, P + R * m + after, D)``; tokens around the merged ones, such as text, pass
            through.
        weight: ``(B, R, n, m)`` unmerge weight of `weigh`.
        layout: the layout that the weight was made with.
        after: number of tokens after the merged ones.

    Returns:
        ``(B, P + N + after, D)``.

    Raises:
        InputError: when the weight was made for another batch or layout, or for more tokens than
            there are; surplus tokens count as text.
    """
    _, regions, size, keep = weight.shape
    by_region = _is_by_region("unmerge", weight, size, keep, layout)
    first, merged, last = _split("unmerge", tokens, weight, regions * keep, after)
    places = weight @ merged.unflatten(1, (regions, keep))
    image = gathered(places, layout) if by_region else places.flatten(1, 2)
    return _join(first, image, last)
