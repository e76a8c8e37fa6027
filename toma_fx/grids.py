"""Models whose token grids follow from the shapes of a call: segments, order and places.

Before a model's first block and after its last, every tensor with a row for each image token is at
a `toma_fx.families.rows.Place`. If regions are tiles, all these tensors are put in token order:
those of the model's own call here, those inside the model by classes that replace its modules'.
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
    """Number of frames before the first chunk of frames."""
    chunk: int
    """Number of frames per chunk."""
    given_frames: tuple[int, ...]
    """Indices of the first grid's frames that stay unmerged; they come before its other frames."""
    given_tokens: int
    """Number of tokens outside all grids; they come first of all, and stay unmerged."""
    segments: tuple[int, ...]
    """Tokens of each segment after those; no region holds tokens of two segments."""

    @property
    def unmerged(self) -> int:
        """Number of tokens at the start of the token order that stay unmerged."""
        return self.given_tokens + self.grids[0].area * len(self.given_frames)


def image_sequence(
    border: TokenGrids,
    config: MergeConfig,
    model: Any,
    call: Mapping[str, Any],
    given: Sequence[bool] | None = None,
) -> ImageSequence:
    """Return the image tokens of a call, according to the shapes of its arguments.

    A grid of one frame is a segment. In a video, the first frame is a segment, and so is each later
    chunk of ``region_frames`` frames; given (not generated) frames stay unmerged.

    Args:
        border: grids and places of the model.
        config: the model's options.
        model: the called model.
        call: its arguments by name.
        given: whether each frame is given, according to the values of the call.
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
    """Return the indices of given frames, in order, according to shapes and values."""
    if not shaped and read is None:
        return ()
    every = [False] * frames if read is None else list(read)
    for each in shaped:
        every[each] = True
    return tuple(frame for frame, is_given in enumerate(every) if is_given)


def sequence_in(
    model: Any, call: Mapping[str, Any], given: Sequence[bool] | None = None
) -> ImageSequence | None:
    """Return the image tokens of a transformed model's call; None if shapes do not tell."""
    border = model.toma_key.grids if isinstance(model, Border) else None
    if border is None:
        return None
    return image_sequence(border, model.toma_key.config, model, call, given)


def token_order(
    sequence: ImageSequence, like: Tensor, config: MergeConfig, given_last: bool = False
) -> Tensor | None:
    """Return the order of the image tokens, ``(N,)`` int64; None if they stay in their order.

    Args:
        sequence: image tokens of the call.
        like: any tensor on the device of the result.
        config: options; the region determines the order.
        given_last: whether the tokens outside all grids come last in the call.
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
    """Return the raster order of a grid, with the tokens of given frames moved to the front."""
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
    """Call a model on image tokens in a given order; its output is in the caller's order.

    Args:
        forward: forward of the model.
        call: its arguments, by name.
        border: grids and places of the model.
        order: ``(N,)`` int64.
        config: config of the model, for the size of a token.
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
    """Return a call whose arguments have their token rows in a given order.

    Args:
        call: arguments of the model, by name.
        border: grids and places of the model.
        order: ``(n,)`` int64: indices of the rows that are left, in order.
        rows: number of rows in the arguments; the length of ``order`` if omitted.
        patch: size of a token, for an argument that is the image itself.
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
    """Reorder the value at a place; return None, or a value without token rows, unchanged."""
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
        if image.shape[dim] % step != 0:  # the remainder makes no token
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
    """Wrap a method of a model or a submodule so that it runs on rows in token order.

    Args:
        method: the method of diffusers.
        enter: places among its arguments or outputs where tokens enter token order.
        leave: places where they leave it.
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
