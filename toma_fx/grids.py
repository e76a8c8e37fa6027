"""Models whose token grids follow from the shapes of a call: their segments, their order, places.

Before a model's first block and behind its last, every tensor with a row for each image token
stands at a `toma_fx.families.rows.Place`. Where regions are tiles, all of them are put in token
order: those of the model's own call here, those inside it where a class stands in for a module's.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import wraps
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

from toma_fx.border import Border
from toma_fx.calls import Arguments, named_arguments
from toma_fx.config import MergeConfig
from toma_fx.families.rows import Grid, Place, TokenGrids
from toma_fx.runtime import plan

toma = torch.ops.toma


class ImageSequence(NamedTuple):
    """The image tokens of a call."""

    grids: tuple[Grid, ...]
    first: int
    """Frames, from the first, before chunks of frames begin."""
    chunk: int
    """Frames of a chunk."""
    given_frames: tuple[int, ...]
    """Frames of the first grid that stay as they are, which come before its others."""
    given_tokens: int
    """Tokens of no grid, which come first of all, and stay as they are."""
    segments: tuple[int, ...]
    """Tokens of each segment behind those; no region holds tokens of two segments."""

    @property
    def unmerged(self) -> int:
        """Tokens, from the first in token order, that stay as they are."""
        return self.given_tokens + self.grids[0].area * len(self.given_frames)


def image_sequence(
    border: TokenGrids,
    config: MergeConfig,
    model: Any,
    call: Mapping[str, Any],
    given: Sequence[bool] | None = None,
) -> ImageSequence:
    """The image tokens of a call, from the shapes of its arguments.

    A grid of one frame is a segment. Of a video, the first frame is one, and so is each chunk of
    ``region_frames`` frames behind it; frames that are given, and not drawn, stay unmerged.

    Args:
        border: where tokens are.
        config: of the model.
        model: that is called.
        call: its arguments by name.
        given: whether each frame is given, as the values of the call told.
    """
    grids = border.grids(model, call)
    video, *others = grids
    frames = _given_frames(border.given_frames(model, call), given, video.frames)
    chunk = 1 if border.frames_apart(model, call) else config.region_frames
    leading = next((place for place, each in enumerate(frames) if each != place), len(frames))
    first = max(1, leading)
    if config.region != "tile":
        drawn = [video.frames - len(frames)]
    else:
        starts = [*range(first), *range(first, video.frames, chunk), video.frames]
        drawn = [
            end - start - sum(start <= each < end for each in frames)
            for start, end in pairwise(starts)
        ]
    every = (*(video.area * count for count in drawn), *(grid.tokens for grid in others))
    segments = tuple(each for each in every if each)
    return ImageSequence(grids, first, chunk, frames, border.given_tokens(model, call), segments)


def _given_frames(
    shaped: tuple[int, ...], read: Sequence[bool] | None, frames: int
) -> tuple[int, ...]:
    """The frames that are given, in their order, as shapes and as values tell."""
    if not shaped and read is None:
        return ()
    every = [False] * frames if read is None else list(read)
    for each in shaped:
        every[each] = True
    return tuple(frame for frame, is_given in enumerate(every) if is_given)


def sequence_in(
    model: Any, call: Mapping[str, Any], given: Sequence[bool] | None = None
) -> ImageSequence | None:
    """The image tokens of a call of a transformed model; None where shapes do not tell."""
    border = model.toma_key.grids if isinstance(model, Border) else None
    if border is None:
        return None
    return image_sequence(border, model.toma_key.config, model, call, given)


def token_order(
    sequence: ImageSequence, like: Tensor, config: MergeConfig, given_last: bool = False
) -> Tensor | None:
    """The order of the image tokens, ``(N,)`` int64; None where they stay as they are.

    Args:
        sequence: of the call.
        like: any tensor on the device of the result.
        config: whose region says which order.
        given_last: whether the tokens of no grid come last in the call.
    """
    in_tiles, frames = config.region == "tile", sequence.given_frames
    moved = given_last and sequence.given_tokens > 0
    if not in_tiles and not moved and frames == tuple(range(len(frames))):
        return None
    orders, before = [], 0
    if sequence.given_tokens:
        start = sum(grid.tokens for grid in sequence.grids) if given_last else 0
        orders.append(torch.arange(start, start + sequence.given_tokens, device=like.device))
        before = 0 if given_last else sequence.given_tokens
    for number, grid in enumerate(sequence.grids):
        given = frames if number == 0 else ()
        if not in_tiles:
            order = _given_first(grid, given, like)
        elif grid.frames == 1:
            order = toma.tile_order(like, grid.rows, grid.columns)
        else:
            sizes = (grid.frames, grid.rows, grid.columns)
            order = toma.video_order(like, *sizes, sequence.first, sequence.chunk, given)
        orders.append(order + before if before else order)
        before += grid.tokens
    return torch.cat(orders) if len(orders) > 1 else orders[0]


def _given_first(grid: Grid, frames: tuple[int, ...], like: Tensor) -> Tensor:
    """The tokens of a grid as they are, but for those of some frames, which come before."""
    tokens = torch.arange(grid.tokens, device=like.device)
    edges = [-1, *frames, grid.frames]
    spans = [(each, each + 1) for each in frames] + [(a + 1, b) for a, b in pairwise(edges)]
    return torch.cat([tokens[start * grid.area : end * grid.area] for start, end in spans])


def run_in_order(
    forward: Callable[..., Any],
    call: Arguments,
    border: TokenGrids,
    order: Tensor,
    config: Any,
) -> Any:
    """Call a model whose image tokens are in an order; what comes out is in the caller's.

    Args:
        forward: of the model.
        call: its arguments, by name.
        border: where its tokens are.
        order: ``(N,)`` int64.
        config: of the model, for the size of a token.
    """
    patch = border.patch(config)
    output = forward(**rows_in_order(call, border, order, patch=patch))
    back = order.argsort()
    for place in border.leave:
        if not place.module and place.method == "forward":
            output = _output_in_order(output, place, back, patch)
    return output


def rows_in_order(
    call: Arguments,
    border: TokenGrids,
    order: Tensor,
    rows: int | None = None,
    patch: tuple[int, ...] = (),
) -> Arguments:
    """A call whose arguments have their rows for tokens in an order.

    Args:
        call: of the model, by name.
        border: where its tokens are.
        order: ``(n,)`` int64: rows that are left, in their order.
        rows: how many there are; as many as ``order`` has when left out.
        patch: the size of a token, for an argument that is the image itself.
    """
    call = dict(call)
    for place in border.enter:
        if not place.module and place.method == "forward" and place.argument is not None:
            given = call.get(place.argument)
            call[place.argument] = _in_order(given, place, order, patch, rows)
    return call


def _output_in_order(output: Any, place: Place, order: Tensor, patch: tuple[int, ...]) -> Any:
    if isinstance(output, Tensor) or (isinstance(output, list) and place.listed):
        return _in_order(output, place, order, patch)
    if isinstance(output, tuple):
        index = place.output or 0
        placed = _in_order(output[index], place, order, patch)
        return (*output[:index], placed, *output[index + 1 :])
    output.sample = _in_order(output.sample, place, order, patch)
    return output


def _in_order(
    value: Any, place: Place, order: Tensor, patch: tuple[int, ...], rows: int | None = None
) -> Any:
    """What stands at a place, in another order; None, or what has no rows there, as it is."""
    if place.listed and isinstance(value, dict):
        return {key: _in_order(each, place, order, patch, rows) for key, each in value.items()}
    if place.listed and isinstance(value, list | tuple):
        each_moved = [_in_order(each, place, order, patch, rows) for each in value]
        return tuple(each_moved) if isinstance(value, tuple) else each_moved
    if place.listed and isinstance(value, Mapping):
        return {key: _in_order(each, place, order, patch, rows) for key, each in value.items()}
    if not isinstance(value, Tensor) or (place.ndim is not None and value.ndim != place.ndim):
        return value
    if place.patches:
        return _patches_in_order(value, order, patch)
    if place.dims > 1:
        last = place.dim + place.dims - 1
        moved = value.flatten(place.dim, last).index_select(place.dim, order)
        return moved.unflatten(place.dim, value.shape[place.dim : last + 1])
    tokens = order.shape[0] if rows is None else rows
    if value.shape[place.dim] == 1:  # one row for all tokens
        return value
    others = value.shape[place.dim] - tokens
    if others == 0:
        return value.index_select(place.dim, order)
    if place.last:
        head, tail = value.split([others, tokens], place.dim)
        return torch.cat([head, tail.index_select(place.dim, order)], place.dim)
    head, tail = value.split([tokens, others], place.dim)
    return torch.cat([head.index_select(place.dim, order), tail], place.dim)


def _patches_in_order(image: Tensor, order: Tensor, patch: tuple[int, ...]) -> Tensor:
    lead = image.ndim - len(patch)
    for dim, step in enumerate(patch, lead):
        if image.shape[dim] % step != 0:  # what is left over makes no token
            image = image.narrow(dim, 0, image.shape[dim] // step * step)
    sizes: list[Any] = [*image.shape[:lead]]
    for size, step in zip(image.shape[lead:], patch, strict=True):
        sizes += [size // step, step]
    steps = range(lead, len(sizes), 2)
    dims = [*range(lead), *steps, *(step + 1 for step in steps)]
    split = image.reshape(sizes).permute(dims)
    grid = split.shape[lead : lead + len(patch)]
    moved = split.flatten(lead, lead + len(patch) - 1).index_select(lead, order)
    back = sorted(range(len(dims)), key=dims.__getitem__)
    placed: Tensor = moved.unflatten(lead, grid).permute(back).reshape(image.shape)
    return placed


def method_in_order(
    method: Callable[..., Any], enter: Sequence[Place], leave: Sequence[Place]
) -> Callable[..., Any]:
    """A method of a model or of a module in it, whose rows are those of tokens in order.

    Args:
        method: of diffusers.
        enter: places among its arguments or outputs where tokens come into order.
        leave: those where they leave it.
    """
    named = named_arguments(method)

    @wraps(method)
    def in_order(self: Any, *args: Any, **kwargs: Any) -> Any:
        scope = plan.current()
        if scope is None or scope.order is None:
            return method(self, *args, **kwargs)
        order = scope.order
        call = named(args, kwargs)
        ways = [(place, order) for place in enter] + [(p, order.argsort()) for p in leave]
        rows, whole = scope.rows, scope.whole or {}
        for place, way in ways:
            if place.argument is not None:
                call[place.argument] = _in_order(call.get(place.argument), place, way, (), rows)
            if place.told is not None and place.told[1] in whole:
                call[place.told[0]] = whole[place.told[1]]
        output = method(self, **call)
        for place, way in ways:
            if place.argument is None:
                output = _part_in_order(output, place, way, rows)
        return output

    return in_order


def _part_in_order(output: Any, place: Place, order: Tensor, rows: int | None) -> Any:
    if place.output is None:
        return _in_order(output, place, order, (), rows)
    parts = list(output)
    parts[place.output] = _in_order(parts[place.output], place, order, (), rows)
    return tuple(parts)
