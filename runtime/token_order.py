"""Token order: an order in which every contiguous run of tokens is a compact patch of the image.

The paper gives up speed on tiles because each merge reshuffles the tokens (section 4.3.1). The
layers of a transformer block do not depend on the order of its tokens, so the order is changed
once, where the tokens enter the model or the stage, and changed back where they leave.

The order follows a Hilbert curve. A run of ``4**k`` tokens that starts at a multiple of ``4**k`` is
exactly a square tile of side ``2**k``. A run of any other length, on a grid that tiles do not
divide, still consists of one or two patches of neighbours, so no size needs padding or a special
case.
"""

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from toma_fx.runtime.regions import kept_for

_LEVELS = 8
"""Levels of the curve: the same for every image, so that one graph can order images of many sizes.
An image of more than 256 tokens a side gets one curve per square of 256 x 256 tokens, one square
after another."""

_SQUARES = 4
"""Bits for the row and for the column of a square: 16 squares, or 4096 tokens, per side."""

_TIES = 20
"""Bits for the index of a token in the sequence; 19 bits are left for the number of an image."""


def _turns() -> int:
    """Return the curve as a table of 16 entries of 4 bits, by a square's orientation and quadrant.

    A square is traversed as drawn, swapped over its diagonal (1), mirrored at both (2), or both
    (3). An entry is the quadrant's position on the curve (2 bits) and the quadrant's own
    orientation (2 bits).
    """
    table = 0
    for turn in range(4):
        for quadrant in range(4):
            row, column = quadrant >> 1, quadrant & 1
            down, right = (column, row) if turn & 1 else (row, column)
            if turn & 2:
                down, right = 1 - down, 1 - right
            inside = turn if down else turn ^ (3 if right else 1)
            table |= (inside << 2 | (3 * right) ^ down) << 4 * (4 * turn + quadrant)
    return table - (table >> 63 << 64)  # as int64


_TURNS = _turns()

_BEFORE_ALL = 1 << 62
"""More than any place number."""


def _hilbert_index(row: Tensor, column: Tensor) -> Tensor:
    """Return the position along the Hilbert curve in a square, int64, same shape as ``row``."""
    # Each step reads the previous step once. Inductor expands pointwise chains into one expression,
    # and a second read would double it at every level.
    position, turn = torch.zeros_like(row), torch.zeros_like(row)
    table = torch.full_like(row, _TURNS)
    for level in reversed(range(_LEVELS)):
        quadrant = (row >> level & 1) << 1 | (column >> level & 1)
        entry = torch.bitwise_right_shift(table, 4 * (4 * turn + quadrant))
        position = position << 2 | (entry & 3)
        turn = entry >> 2 & 3
    return position


def _place(image: Tensor | int, row: Tensor, column: Tensor) -> Tensor:
    """Return a number that rises along the curves, from square to square and image to image."""
    square = ((image << _SQUARES) + (row >> _LEVELS) << _SQUARES) + (column >> _LEVELS)
    return (square << 2 * _LEVELS) + _hilbert_index(row, column)


def _grid_order(height: int, width: int, device: torch.device) -> Tensor:
    token = torch.arange(height * width, device=device)
    return _place(0, token // width, token % width).argsort()


@functools.lru_cache(maxsize=64)
def _cached_grid_order(height: int, width: int, device: torch.device, stream: int) -> Tensor:
    # A call that records gradients could not use an inference tensor later.
    with torch.inference_mode(mode=False):
        return _grid_order(height, width, device)


def tile_order(like: Tensor, height: int, width: int) -> Tensor:
    """Return the tile order of a token grid.

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
    key = kept_for(like)
    if key is None:
        return _grid_order(height, width, like.device)
    return _cached_grid_order(height, width, *key)


def _video_order(
    frames: int,
    height: int,
    width: int,
    first: int,
    chunk: int,
    given: tuple[int, ...],
    device: torch.device,
) -> Tensor:
    token = torch.arange(frames * height * width, device=device)
    frame, position = token // (height * width), token % (height * width)
    inside = (frame - first) % chunk
    start = torch.where(frame < first, frame, frame - inside)
    inside = torch.where(frame < first, 0, inside)
    place = _place(start, position // width, position % width) * chunk + inside
    for each in given:
        place = torch.where(frame == each, place - _BEFORE_ALL, place)
    return place.argsort()


@functools.lru_cache(maxsize=64)
def _cached_video_order(
    frames: int,
    height: int,
    width: int,
    first: int,
    chunk: int,
    given: tuple[int, ...],
    device: torch.device,
    stream: int,
) -> Tensor:
    with torch.inference_mode(mode=False):
        return _video_order(frames, height, width, first, chunk, given, device)


def video_order(
    like: Tensor,
    frames: int,
    height: int,
    width: int,
    first: int,
    chunk: int,
    given: Sequence[int] = (),
) -> Tensor:
    """Return the token order of a video: each chunk of frames lies on one Hilbert curve.

    A run of ``chunk * 4**k`` tokens is a patch of ``2**k`` by ``2**k`` tokens through the frames of
    a chunk. The frames before the first chunk are in tile order one by one, because a video's first
    latent frame stands for one frame while all others stand for several.

    Args:
        like: any tensor on the device of the result.
        frames: frames of the token grid.
        height: rows of a frame.
        width: columns of a frame.
        first: number of frames before the first chunk.
        chunk: frames per chunk; the last chunk may have fewer.
        given: indices of frames that come before all others, wherever they are in the video.

    Returns:
        ``(frames * height * width,)`` int64: for each place, the token's raster index.

    >>> video_order(torch.empty(0), 3, 2, 2, 1, 2).tolist()
    [0, 1, 3, 2, 4, 8, 5, 9, 7, 11, 6, 10]
    >>> video_order(torch.empty(0), 3, 2, 2, 1, 2, [2]).tolist()
    [8, 9, 11, 10, 0, 1, 3, 2, 4, 5, 7, 6]
    """
    key = kept_for(like)
    if key is None:
        return _video_order(frames, height, width, first, chunk, tuple(given), like.device)
    return _cached_video_order(frames, height, width, first, chunk, tuple(given), *key)


def tile_order_of_ids(ids: Tensor) -> Tensor:
    """Return the tile order of tokens that carry position ids, as Flux's image tokens do.

    Args:
        ids: ``(N, 3)`` or wider: image number, row and column of each token; further columns are
            ignored. Tokens of different images (Kontext's reference tokens have number 1) stay
            apart. Rows and columns are below 4096, image numbers below 2**19, and there are at
            most 2**20 tokens.

    Returns:
        ``(N,)`` int64: for each place in tile order, the token's index.
    """
    place = _place(*ids[:, :3].round().to(torch.int64).unbind(-1))
    # Tokens with equal ids keep their order; the index is needed because ONNX has no stable sort.
    return ((place << _TIES) + torch.arange(place.shape[0], device=ids.device)).argsort()


def reorder(tokens: Tensor, order: Tensor) -> Tensor:
    """Reorder tokens.

    Args:
        tokens: ``(B, N, D)``.
        order: ``(N,)`` int64: for each place, the index of its token.

    Returns:
        ``(B, N, D)``. ``reorder(reorder(x, order), order.argsort())`` is ``x``.
    """
    return tokens.index_select(1, order)
