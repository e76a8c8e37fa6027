"""Models whose token grids follow from the shapes of a call: their segments, their order, places.

Before a model's first block and behind its last, every tensor with a row for each image token
stands at a `toma_fx.families.rows.Place`. Where regions are tiles, all of them are put in token
order: those of the model's own call here, those inside it where a class stands in for a module's.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import wraps
from typing import Any, NamedTuple

import torch
from torch import Tensor

from toma_fx.border import Border
from toma_fx.calls import Arguments, named_arguments
from toma_fx.config import MergeConfig
from toma_fx.errors import InputError
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
    last: bool
    """Whether the last frame is given, and comes before all chunks."""
    given: int
    """Tokens of no grid, which come first in token order, and stay as they are."""
    unmerged: int
    """Tokens, from the first, that stay as they are, those of no grid among them."""
    segments: tuple[int, ...]
    """Tokens of each segment behind those; no region holds tokens of two segments."""

    @property
    def unmerged_frames(self) -> int:
        """Frames, from the first, that stay as they are."""
        return (self.unmerged - self.given) // self.grids[0].area


def image_sequence(
    border: TokenGrids, config: MergeConfig, model: Any, call: Mapping[str, Any]
) -> ImageSequence:
    """The image tokens of a call, from the shapes of its arguments.

    A grid of one frame is a segment. Of a video, the first frame is one, and so is each chunk of
    ``region_frames`` frames behind it; frames that are given, and not drawn, stay unmerged.

    Raises:
        InputError: when tokens that stay as they are come last, and the region is no tile.
    """
    grids = border.grids(model, call)
    frames = border.unmerged_frames(model, call)
    given = border.given_tokens(model, call)
    if given and border.given_last and config.region != "tile":
        raise InputError(
            f"{given} tokens of given frames stand behind those of the video, and only "
            f"region='tile' brings them before it, not {config.region!r}; transform with that"
        )
    last = config.region == "tile" and border.last_frame_given(model, call)
    chunk = 1 if border.frames_apart(model, call) else config.region_frames
    video, *others = grids
    first = max(1, frames)
    area = video.area
    if config.region != "tile":
        drawn: tuple[int, ...] = (area * (video.frames - frames),)
    else:
        end = video.frames - last
        sizes = [min(chunk, end - start) for start in range(first, end, chunk)]
        drawn = tuple(area * size for size in ([] if frames else [1]) + sizes)
    every = (*drawn, *(grid.tokens for grid in others))
    segments = tuple(each for each in every if each)
    unmerged = given + area * (frames + last)
    return ImageSequence(grids, first, chunk, last, given, unmerged, segments)


def sequence_in(model: Any, call: Mapping[str, Any]) -> ImageSequence | None:
    """The image tokens of a call of a transformed model; None where shapes do not tell."""
    border = model.toma_key.grids if isinstance(model, Border) else None
    return None if border is None else image_sequence(border, model.toma_key.config, model, call)


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
    if config.region != "tile":
        return None
    orders, before = [], 0
    if sequence.given:
        start = sum(grid.tokens for grid in sequence.grids) if given_last else 0
        orders.append(torch.arange(start, start + sequence.given, device=like.device))
        before = 0 if given_last else sequence.given
    for grid in sequence.grids:
        if grid.frames == 1:
            order = toma.tile_order(like, grid.rows, grid.columns)
        else:
            order = _video_order(sequence, grid, like)
        orders.append(order + before if before else order)
        before += grid.tokens
    return torch.cat(orders) if len(orders) > 1 else orders[0]


def _video_order(sequence: ImageSequence, grid: Grid, like: Tensor) -> Tensor:
    frames = grid.frames - sequence.last
    sizes = (frames, grid.rows, grid.columns)
    order: Tensor = toma.video_order(like, *sizes, sequence.first, sequence.chunk)
    if not sequence.last:
        return order
    last = torch.arange(frames * grid.area, grid.tokens, device=like.device)
    start = sequence.first * grid.area
    first, rest = order[:start], order[start:]
    return torch.cat([first, last, rest])


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
