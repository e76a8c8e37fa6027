"""Checks of a derived family: of its blocks, and of the order of its tokens."""

import functools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from toma_fx.errors import ModelError
from toma_fx.families.rows import Block, Grid, Place, TokenGrids, TokenSequence
from toma_fx.grids import method_in_order, run_in_order
from toma_fx.hooks import copied_without_hooks
from toma_fx.ordering import in_token_order
from toma_fx.passes.capture import capture_block
from toma_fx.passes.cleanup import Cleanup
from toma_fx.passes.leaf_values import run_on_examples
from toma_fx.passes.merge import Merge
from toma_fx.passes.one_plan import OnePlan
from toma_fx.passes.pipeline import run_passes
from toma_fx.passes.plan_nodes import PlanOptions, TokenFlow
from toma_fx.probes import BlockCall, Probe, first_tensor
from toma_fx.runtime import plan, regions

toma = torch.ops.toma

OPTIONS = PlanOptions(region_tokens=16, ratio=0.5)
TOLERANCE = 1e-3
"""Allowed error, relative to the largest value: rounding in float32 for another order of sums."""


def check_block(call: BlockCall, row: Block, count: int) -> None:
    """Check a derived row: compare the rewritten block with the block itself, sample by sample.

    Args:
        call: a call of a block of the row's class.
        row: the row of the class.
        count: number of image tokens in the call.

    Raises:
        ModelError: when they differ, or when the block cannot run on merged tokens.
    """
    try:
        pairs = zip(_rewritten(call, row, count), _by_sample(call, row.flow, count), strict=True)
    except Exception as error:  # a forward may raise anything on unexpected sizes
        raise ModelError(
            f"what was derived of {row.cls} does not hold: {call.path} cannot run on merged tokens "
            f"({type(error).__name__}: {error!s:.300}). Sizes of the example that are equal by "
            "chance are taken for tokens, so give an example of other sizes; or state the row of "
            "its class by hand, as the files in toma_fx/families do"
        ) from error
    for one, other in pairs:
        away, size = float((one - other).abs().max()), float(other.abs().max())
        if not away <= TOLERANCE * max(size, 1e-3):
            raise ModelError(
                f"what was derived of {row.cls} does not hold: on merged tokens {call.path} is "
                f"{away:.1e} away from the block itself, of {size:.1e}; state its row by hand, as "
                "the files in toma_fx/families do"
            )


@torch.no_grad()
def moves_with_tokens(call: BlockCall, flow: TokenFlow, count: int) -> bool:
    """Return whether moving all stated rows together changes only the order of the output.

    Args:
        call: a call of a block.
        flow: the statement about its arguments.
        count: number of image tokens in the call.
    """
    generator = torch.Generator().manual_seed(0)
    rows = {(row.argument, item): row.dim for row in flow.rows for item in row.items or (None,)}
    order = torch.randperm(count, generator=generator)

    def told_apart(value: Any, key: tuple[str, int | None]) -> Any:
        # A constant mask would tell nothing, so replace it by a random one.
        if not isinstance(value, Tensor) or key not in rows:
            return value
        if bool((value != value.flatten()[0]).any()):
            return value
        return torch.randint(2, value.shape, generator=generator).to(value)

    def moved(value: Any, key: tuple[str, int | None]) -> Any:
        if not isinstance(value, Tensor) or key not in rows:
            return value
        return _picked(value, rows[key], order, count, flow.image_first)

    def each(change: Any, arguments: Mapping[str, Any]) -> dict[str, Any]:
        return {
            name: tuple(change(part, (name, i)) for i, part in enumerate(value))
            if isinstance(value, tuple | list)
            else change(value, (name, None))
            for name, value in arguments.items()
        }

    forward = functools.partial(call.run, MethodType(type(call.block).forward, call.block))
    arguments = each(told_apart, call.arguments)
    try:
        shuffled = each(moved, arguments)
        shuffled[flow.tokens] = _picked(arguments[flow.tokens], 1, order, count, flow.image_first)
        expected, found = forward(arguments), forward(shuffled)
    except Exception:  # a forward may raise anything on wrongly identified rows
        return False
    expected, found = (
        each if isinstance(each, Tensor) else each[flow.output or 0] for each in (expected, found)
    )
    expected = _picked(expected, 1, order, count, flow.image_first)
    return bool((found - expected).abs().max() <= TOLERANCE * expected.abs().max())


def _rewritten(call: BlockCall, row: Block, count: int) -> list[Tensor]:
    """Return the result of the block's graph on merged tokens."""
    flow = row.flow
    gm = capture_block(
        call.block, row.examples(call.block), flow.attention_kwargs, run_on_examples,
        row.example_tokens,
    )  # fmt: skip
    run_passes(gm, (Merge(flow=flow, options=OPTIONS), OnePlan(), Cleanup()))
    scope = plan.CallScope(grids=(count,))
    arguments = dict(call.arguments)
    if flow.attention_kwargs is not None:
        kwargs = arguments.get(flow.attention_kwargs) or {}
        arguments[flow.attention_kwargs] = {**kwargs, plan.SCOPE: scope}
    before = plan.enter(scope)
    try:
        with torch.no_grad():
            return _tensors(call.run(gm, arguments))
    finally:
        plan.enter(before)


@torch.no_grad()
def _by_sample(call: BlockCall, flow: TokenFlow, count: int) -> list[Tensor]:
    """Return the result of the block on the merged tokens of each sample, concatenated."""
    tokens = call.arguments[flow.tokens]
    others = tokens.shape[1] - count
    before = 0 if flow.image_first else others
    image = tokens[:, before : before + count]
    layout = regions.layout((count,), OPTIONS.region_tokens, OPTIONS.ratio)
    destinations = toma.select(image, layout, OPTIONS.selector)
    how = (OPTIONS.temperature, OPTIONS.merge_over, OPTIONS.unmerge)
    merging, spreading = toma.weigh(image, destinations, layout, *how)
    after = others - before
    merged = toma.merge(tokens, merging, layout, after)
    samples = [
        _tensors(
            call.run(
                MethodType(type(call.block).forward, call.block),
                {
                    **_sample(call, flow, count, i, destinations[i].flatten()),
                    flow.tokens: merged[i : i + 1],
                },
            )
        )
        for i in range(tokens.shape[0])
    ]
    results = [torch.cat(parts) for parts in zip(*samples, strict=True)]
    index = 0 if flow.output is None else flow.output
    outputs = call.output if isinstance(call.output, tuple) else (call.output,)
    index = sum(isinstance(each, Tensor) for each in outputs[:index])
    update = toma.unmerge(results[index] - merged, spreading, layout, after)
    results[index] = tokens + update
    return results


def _sample(
    call: BlockCall, flow: TokenFlow, count: int, number: int, kept: Tensor
) -> dict[str, Any]:
    """Return the arguments of one sample, each with the rows of the kept tokens."""
    batch = call.arguments[flow.tokens].shape[0]
    rows = {(row.argument, item): row.dim for row in flow.rows for item in row.items or (None,)}

    def one(value: Any, key: tuple[str, int | None]) -> Any:
        if not isinstance(value, Tensor):
            return value
        if key in rows:
            value = _picked(value, rows[key], kept, count, flow.image_first)
        shared = rows.get(key) == 0 or not value.ndim or value.shape[0] % batch
        return value if shared else value[number::batch]

    def argument(name: str, value: Any) -> Any:
        if isinstance(value, tuple | list):
            return tuple(one(each, (name, index)) for index, each in enumerate(value))
        return one(value, (name, None))

    return {name: argument(name, value) for name, value in call.arguments.items()}


def _picked(values: Tensor, dim: int, kept: Tensor, count: int, image_first: bool) -> Tensor:
    others = values.shape[dim] - count
    before = 0 if image_first else others
    parts = torch.arange(before), kept + before, torch.arange(before + count, values.shape[dim])
    return values.index_select(dim, torch.cat([part.to(values.device) for part in parts]))


def _tensors(output: Any) -> list[Tensor]:
    outputs = output if isinstance(output, tuple) else (output,)
    return [each for each in outputs if isinstance(each, Tensor)]


def derived_border(
    model: nn.Module, call: Mapping[str, Any], image: str, count: int, probes: Sequence[Probe]
) -> TokenGrids | TokenSequence | None:
    """Find the image tokens of a model, and places where their order can change.

    Returns None if the grid is unknown. The result has no places if only the original order works.

    Args:
        model: the model; it is not changed.
        call: its keyword arguments.
        image: name of the argument with the image.
        count: number of image tokens.
        probes: probes of three calls: with running blocks, with blocks that pass tokens through,
            and the latter with another image.
    """
    ran, passed, moved = probes
    given = call[image]
    if isinstance(given, Tensor) and given.ndim == 3:
        return _derived_sequence(model, call, image, count, ran)
    patch = _patch(model, given, count)
    if patch is None:
        return None
    positions: list[Place] = []
    embedded: list[Place] = []
    for path, value in passed.others.items():
        places = list(_places(path, value, count))
        changes = places and not _same(value, moved.others[path])
        (embedded if changes else positions).extend(places)
    positions = [place for place in positions if not _is_inside(place, positions)]
    leave = (Place(patches=True),)
    first = [
        each for each in embedded if not isinstance(model.get_submodule(each.module), nn.Linear)
    ]
    for enter in ([Place(argument=image, patches=True)], first[:1]):
        border = TokenGrids(
            grids=_GridsOf(image, patch),
            enter=(*enter, *positions),
            leave=leave,
            patch=_Constant(patch),
        )
        if enter and _keeps_output(model, call, border, count, ran.output):
            return border
    return replace(border, enter=(), leave=())


def _patch(model: Any, image: Any, count: int) -> tuple[int, ...] | None:
    """Return the size of a token, if the image is a grid of tokens."""
    if not isinstance(image, Tensor) or image.ndim not in (4, 5):
        return None
    size = getattr(model.config, "patch_size", 1)
    sizes = tuple(size) if isinstance(size, tuple | list) else (size, size)
    if image.ndim == 5 and len(sizes) == 2:
        sizes = (getattr(model.config, "patch_size_t", None) or 1, *sizes)
    shape = image.shape[-len(sizes) :]
    tokens = 1
    for length, step in zip(shape, sizes, strict=True):
        tokens *= length // step
    return sizes if tokens == count and len(sizes) == image.ndim - 2 else None


def _places(path: str, value: Any, count: int) -> Iterator[Place]:
    """Yield the outputs of a module that have a row for each image token."""
    parts = enumerate(value) if isinstance(value, tuple | list) else [(None, value)]
    for index, tensor in parts:
        shape = tensor.shape if isinstance(tensor, Tensor) else ()
        dims = [dim for dim, size in enumerate(shape) if size == count]
        if len(dims) == 1:
            yield Place(module=path, output=index, dim=dims[0])


def _is_inside(place: Place, places: Sequence[Place]) -> bool:
    return any(place.module.startswith(f"{each.module}.") for each in places)


def _same(one: Any, other: Any) -> bool:
    return all(torch.equal(a, b) for a, b in zip(_leaves(one), _leaves(other), strict=True))


def _leaves(value: Any) -> list[Tensor]:
    return [each for each in pytree.tree_leaves(value) if isinstance(each, Tensor)]


def _keeps_output(
    model: nn.Module, call: Mapping[str, Any], border: TokenGrids, count: int, expected: Tensor
) -> bool:
    """Return whether the model gives the same output with its image tokens in another order."""
    copied: Any = copied_without_hooks(model, {id(p): p for p in model.parameters()})
    for path in {place.module for place in border.enter if place.module}:
        module = copied.get_submodule(path)
        enter = [place for place in border.enter if place.module == path]
        module.forward = MethodType(method_in_order(type(module).forward, enter, ()), module)
    order = torch.randperm(count, generator=torch.Generator().manual_seed(0)).to(expected.device)
    before = plan.enter(plan.CallScope(order=order))
    try:
        with torch.no_grad():
            output = run_in_order(copied, dict(call), border, order, copied.config)
    except Exception:  # a forward may raise anything on tokens in another order
        return False
    finally:
        plan.enter(before)
    found = first_tensor(output)
    error = (found - expected).abs().max()
    return bool(error <= TOLERANCE * expected.abs().max())


def _derived_sequence(
    model: nn.Module, call: Mapping[str, Any], image: str, count: int, ran: Probe
) -> TokenSequence | None:
    ids = [
        name
        for name, value in call.items()
        if name != image and isinstance(value, Tensor) and value.ndim in (2, 3)
        if value.shape[-2] == count and value.shape[-1] in (3, 4)
    ]
    for name in ids:
        border = TokenSequence(tokens=image, ids=name, enter="", leave="", positions="")
        with torch.no_grad():
            output = in_token_order(model, dict(call), border)
        error = (first_tensor(output) - ran.output).abs().max()
        if error <= TOLERANCE * ran.output.abs().max():
            return border
    return None


@dataclass(frozen=True)
class _GridsOf:
    """Callable for the grid of an image or video, in which each patch is a token."""

    image: str
    patch: tuple[int, ...]

    def __call__(self, model: Any, call: Mapping[str, Any]) -> tuple[Grid, ...]:
        shape = call[self.image].shape[-len(self.patch) :]
        *frames, rows, columns = (
            size // step for size, step in zip(shape, self.patch, strict=True)
        )
        return (Grid(rows, columns, *frames),)


@dataclass(frozen=True)
class _Constant:
    value: tuple[int, ...]

    def __call__(self, config: Any) -> tuple[int, ...]:
        return self.value
