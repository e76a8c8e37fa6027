"""Token order: an order in which every contiguous run of tokens is a compact patch of the image.

The paper gives up speed on tiles because each merge reshuffles the tokens (section 4.3.1). No layer
of a transformer block minds the order of its tokens, so it is changed once, where the tokens enter
the model or the stage, and changed back where they leave.

The order follows a Hilbert curve. A run of ``4**k`` tokens that starts at a multiple of ``4**k`` is
exactly a square tile of side ``2**k``, and a run of any other length, on a grid that tiles do not
divide, is still a patch of neighbours or two, so no size needs padding or a special case.
"""

import functools

import torch
from torch import Tensor

_ID_BITS = 8
"""Levels of the curve over position ids, whose largest value is not known. Images of more than 256
tokens a side get one curve for each square of 256 x 256, one square after another."""


def _hilbert_index(row: Tensor, column: Tensor, bits: int) -> Tensor:
    """Position along the Hilbert curve of a ``2**bits`` square, int64, same shape as ``row``."""
    position = torch.zeros_like(row)
    for bit in reversed(range(bits)):
        down = (row >> bit) & 1
        right = (column >> bit) & 1
        position = position * 4 + ((3 * right) ^ down)
        # The quadrant fixes how the curve inside it is turned: swapped, mirrored on the right.
        mirrored = right == 1
        swapped = down == 0
        flip = torch.where(mirrored & swapped, (1 << bit) - 1, 0)
        row, column = row ^ flip, column ^ flip
        row, column = torch.where(swapped, column, row), torch.where(swapped, row, column)
    return position


def _grid_order(height: int, width: int, device: torch.device) -> Tensor:
    token = torch.arange(height * width, device=device)
    bits = max(height - 1, width - 1, 1).bit_length()
    return _hilbert_index(token // width, token % width, bits).argsort()


@functools.lru_cache(maxsize=64)
def _cached_grid_order(height: int, width: int, device: torch.device) -> Tensor:
    # An inference tensor could not be used later by a call that records gradients.
    with torch.inference_mode(mode=False):
        return _grid_order(height, width, device)


def tile_order(like: Tensor, height: int, width: int) -> Tensor:
    """Tile order of a token grid.

    Args:
        like: any tensor on the device of the result.
        height: rows of the token grid.
        width: columns of the token grid.

    Returns:
        ``(height * width,)`` int64: for each place in tile order, the token's raster index.

    >>> tile_order(torch.empty(0), 4, 4).reshape(4, 4)
    tensor([[ 0,  1,  5,  4],
            [ 8, 12, 13,  9],
            [10, 14, 15, 11],
            [ 7,  6,  2,  3]])
    """
    # Only a plain tensor may be cached: under tracing the result belongs to that trace.
    if type(like) is Tensor:
        return _cached_grid_order(height, width, like.device)
    return _grid_order(height, width, like.device)


def tile_order_of_ids(ids: Tensor) -> Tensor:
    """Tile order of tokens that carry position ids, as Flux's image tokens do.

    Args:
        ids: ``(N, 3)``: image number, row and column of each token. Tokens of different images
            (Kontext's reference tokens have number 1) stay apart.

    Returns:
        ``(N,)`` int64: for each place in tile order, the token's index.
    """
    image, row, column = ids.round().to(torch.int64).unbind(-1)
    inside = _hilbert_index(row, column, _ID_BITS)
    square = ((image << 16) + (row >> _ID_BITS) << 16) + (column >> _ID_BITS)
    return ((square << 2 * _ID_BITS) + inside).argsort(stable=True)


def reorder(tokens: Tensor, order: Tensor) -> Tensor:
    """Tokens in another order.

    Args:
        tokens: ``(B, N, D)``.
        order: ``(N,)`` int64: index of the token that comes to each place.

    Returns:
        ``(B, N, D)``. ``reorder(reorder(x, order), order.argsort())`` is ``x``.
    """
    return tokens.index_select(1, order)
