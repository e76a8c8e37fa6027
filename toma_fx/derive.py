"""Inference of a family, for a model that toma_fx does not know, from an example call.

If all sizes in a call differ, shapes tell which arguments of a block have a row for each token, and
in which dimension. A second call with another image tells which rows belong to the image. The
result is checked before use: each kind of block against itself on merged tokens, and the places
where tokens are reordered against the model's own output.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from toma_fx.derived_checks import check_block, derived_border, moves_with_tokens
from toma_fx.errors import InputError, ModelError
from toma_fx.families.rows import (
    NOT_MEASURED,
    Block,
    DerivedBlock,
    DerivedFamily,
    Family,
    qualified_name,
)
from toma_fx.passes.plan_nodes import Rows, TokenFlow
from toma_fx.passes.sites import Site
from toma_fx.probes import BlockCall, call_with_probes


def derive(model: nn.Module, example: Mapping[str, Any], *, image: str | None = None) -> Family:
    """Derive a family for `toma_fx.transform` from a model of a class that toma_fx does not know.

    The model is called three times or more, so use a small example; a small model of the same class
    works too. ``print`` the family to see the result.

    Args:
        model: a model like those of diffusers: transformer blocks in lists, tokens ``(B, N, D)``.
        example: keyword arguments of a call, with data. The numbers of image tokens, of text tokens
            and of both together must differ from all other sizes.
        image: name of the argument that holds the image; the first with a tensor if omitted.

    Returns:
        A family for ``toma_fx.transform(model, family=family)``. It knows no noise levels and makes
        no example calls: give `toma_fx.report` the ``inputs`` of a call.

    Raises:
        ModelError: when no block takes the image's tokens, when sizes do not identify the tokens,
            or when a block on merged tokens does not compute the same as by itself.
    """
    name = _image_argument(example) if image is None else image
    if name not in example:
        raise ModelError(f"image={name!r} is no argument of the example, which has {[*example]}")
    ran = call_with_probes(model, example)
    try:
        passed = call_with_probes(model, example, ran.blocks)
        moved = call_with_probes(model, {**example, name: _other(example[name])}, ran.blocks)
    except Exception as error:  # a forward may raise anything if its blocks return other values
        raise ModelError(
            f"a {type(model).__name__} cannot be called with blocks that pass their tokens through "
            f"({type(error).__name__}: {error!s:.200}), so its image tokens cannot be recognised; "
            "state its family by hand, as the files in toma_fx/families do"
        ) from error
    tokens = {
        path: found
        for path, call in passed.blocks.items()
        if (found := _image_rows(call, moved.blocks[path])) is not None
    }
    if not tokens:
        raise ModelError(
            f"no block of this {type(model).__name__} takes tokens (B, N, D) that change with "
            f"{name!r}; name the argument that holds the image: derive(..., image=...)"
        )
    calls: dict[type, list[tuple[BlockCall, _ImageRows]]] = {}
    for path, found in tokens.items():
        calls.setdefault(type(ran.blocks[path].block), []).append((ran.blocks[path], found))
    rows = [_row_of_class(each) for each in calls.values()]
    count = next(iter(tokens.values())).count
    lists = dict.fromkeys(path.rpartition(".")[0] for path in ran.blocks)
    merged = dict.fromkeys(path.rpartition(".")[0] for path in tokens)
    border = derived_border(model, example, name, count, (ran, passed, moved))
    return DerivedFamily(
        name=f"derived from {type(model).__name__}",
        cls=qualified_name(type(model)),
        title=type(model).__name__,
        blocks=tuple(rows),
        borders=() if border is None else (border,),
        timestep=_Argument(("timestep", "timesteps", "t")),
        prompt=tuple(each for each in example if "encoder_hidden_states" in each or "cap" in each),
        unmerged_by_default=dict.fromkeys(merged, (1, 4)),
        unmerged_because=NOT_MEASURED,
        never_merged={
            f"{path}.*": "its tokens are not the image's" for path in lists if path not in merged
        },
        noise_level=_unknown_level,
        run_levels=_unknown_levels,
        example_call=_no_example,
        sequence_lengths=_unknown_lengths,
        image=_Argument((name,)),
        architectures={},
    )


@dataclass(frozen=True)
class _ImageRows:
    """Image tokens among the tokens of a block.

    Attributes:
        argument: name of the argument that holds the tokens.
        first: index of the first image token.
        count: number of image tokens.
        total: number of all tokens.
    """

    argument: str
    first: int
    count: int
    total: int


def _image_argument(example: Mapping[str, Any]) -> str:
    for name, value in example.items():
        if any(isinstance(each, Tensor) for each in pytree.tree_leaves(value)):
            return name
    raise ModelError("the example holds no tensor; give the keyword arguments of a call, with data")


def _other(image: Any) -> Any:
    """Return another image of the same size."""
    generator = torch.Generator().manual_seed(0)

    def other(tensor: Tensor) -> Tensor:
        return tensor + torch.randn(tensor.shape, generator=generator).to(tensor)

    return pytree.tree_map_only(Tensor, other, image)


def _image_rows(call: BlockCall, moved: BlockCall) -> _ImageRows | None:
    for name, value in call.arguments.items():
        if not isinstance(value, Tensor) or value.ndim != 3 or not value.is_floating_point():
            continue
        changed = (value != moved.arguments[name]).any(dim=-1).any(dim=0).nonzero().flatten()
        if len(changed) == 0:
            continue
        first, count = int(changed[0]), len(changed)
        total = value.shape[1]
        if int(changed[-1]) - first + 1 != count or (first and first + count != total):
            raise ModelError(
                f"the image tokens of {call.path} are rows {first} to {int(changed[-1])} of "
                f"{total}, {count} of them: neither first nor last; state the row of its class by "
                "hand, as the files in toma_fx/families do"
            )
        return _ImageRows(name, first, count, total)
    return None


def _row_of_class(calls: list[tuple[BlockCall, _ImageRows]]) -> Block:
    """Return the row of a block class, whose lists may be called in several ways."""

    def given(each: tuple[BlockCall, _ImageRows]) -> tuple[bool, int]:
        call, found = each
        return found.count != found.total, sum(v is not None for v in call.arguments.values())

    fullest, found = max(calls, key=given)
    row = _block_row(fullest, found)
    missing = {n for call, _ in calls for n, value in call.arguments.items() if value is None}
    flow = replace(
        row.flow,
        rows=tuple(
            replace(each, optional=each.argument in missing and not each.items)
            for each in row.flow.rows
        ),
    )
    orders = (flow.image_first,) if flow.joint else (False, True)
    flows = [replace(flow, image_first=first) for first in orders]
    right = [each for each in flows if moves_with_tokens(fullest, each, found.count)]
    if not right:
        raise ModelError(
            f"the output of {fullest.path} does not follow its image tokens when they change their "
            f"order together with {', '.join(each.argument for each in flow.rows) or 'nothing'}: "
            f"other arguments of {row.cls} have a row for each token, the block mixes neighbours "
            "(as a convolution over the grid does), or sizes of the example are equal by chance. "
            "Give an example of other sizes, or state the row of its class by hand"
        )
    row = replace(row, flow=right[0])
    kinds = {
        tuple(getattr(value, "ndim", value is None) for value in call.arguments.values()): call
        for call, _ in reversed(calls)
    }
    for call in kinds.values():
        check_block(call, row, next(rows.count for each, rows in calls if each is call))
    return row


def _block_row(call: BlockCall, found: _ImageRows) -> Block:
    joint = found.count != found.total
    text = None if joint else _text(call, found)
    others = found.total - found.count if joint else _length(call, text)
    sizes = {found.count: False}
    if others:
        sizes[found.count + others] = True
    taken = {found.argument, text}
    rows = [row for name in call.arguments if name not in taken for row in _rows(call, name, sizes)]
    if text is not None and not any(row.joint for row in rows):
        text = None  # not of one sequence with the image: a cross-attention's
    kwargs = [name for name in call.arguments if name.endswith("attention_kwargs")]
    return DerivedBlock(
        cls=qualified_name(type(call.block)),
        flow=TokenFlow(
            attention_kwargs=kwargs[0] if kwargs else None,
            tokens=found.argument,
            output=_output(call, found),
            text=text,
            joint=joint,
            image_first=joint and found.first == 0,
            rows=tuple(rows),
        ),
        examples=_Examples(_without_data(call.arguments, kwargs)),
        example_tokens=found.count,
        sites=tuple(_sites(call)),
    )


def _text(call: BlockCall, found: _ImageRows) -> str | None:
    width = call.arguments[found.argument].shape[-1]
    for name, value in call.arguments.items():
        tokens = isinstance(value, Tensor) and value.ndim == 3 and value.shape[-1] == width
        if name != found.argument and tokens and value.shape[1] not in (1, found.count):
            return name
    return None


def _length(call: BlockCall, text: str | None) -> int:
    return 0 if text is None else int(call.arguments[text].shape[1])


def _rows(call: BlockCall, name: str, sizes: Mapping[int, bool]) -> Iterator[Rows]:
    value = call.arguments[name]
    items = list(enumerate(value)) if isinstance(value, tuple | list) else [(None, value)]
    found: dict[tuple[int, bool], list[int]] = {}
    for index, tensor in items:
        if not isinstance(tensor, Tensor):
            continue
        dims = [dim for dim, size in enumerate(tensor.shape) if size in sizes]
        if len(dims) > 1:
            raise ModelError(
                f"{name} of {call.path} has shape {tuple(tensor.shape)}, in which several sizes "
                f"are those of tokens, {[*sizes]}; give an example with other sizes"
            )
        for dim in dims:
            key = dim if dim < 2 else -1, sizes[tensor.shape[dim]]
            found.setdefault(key, []).append(0 if index is None else index)
    for (dim, joint), indices in found.items():
        listed = isinstance(value, tuple | list)
        yield Rows(argument=name, items=tuple(indices) if listed else (), dim=dim, joint=joint)


def _output(call: BlockCall, found: _ImageRows) -> int | None:
    """Return the index of the output that holds the image tokens; None for a single output."""
    if isinstance(call.output, Tensor):
        return None
    shape = call.arguments[found.argument].shape
    alike = [i for i, o in enumerate(call.output) if isinstance(o, Tensor) and o.shape == shape]
    if len(alike) != 1:
        raise ModelError(
            f"{call.path} returns {len(alike)} outputs of shape {tuple(shape)}, but exactly one "
            "must be the image tokens; state the row of its class by hand"
        )
    return alike[0]


def _sites(call: BlockCall) -> Iterator[Site]:
    """Yield the attention and MLP sites that can be recognised by their names."""
    kinds = (("attn1", "self_attention"), ("attn", "self_attention"), ("attn2", "cross_attention"))
    children = dict(call.block.named_children())
    seen = set()
    for name, component in (*kinds, ("ff", "mlp"), ("ffn", "mlp"), ("feed_forward", "mlp")):
        if name in children and component not in seen and not _is_joint(children[name]):
            seen.add(component)
            yield Site(components=(component,), enter=(name,), leave=name)


def _is_joint(module: nn.Module) -> bool:
    """Return whether attention also returns text tokens, so that its outputs must be stated."""
    return getattr(module, "add_k_proj", None) is not None


def _without_data(arguments: Mapping[str, Any], kwargs: list[str]) -> dict[str, Any]:
    """Return arguments without data, in float16, for which some forwards do extra work."""

    def empty(tensor: Tensor) -> Tensor:
        return tensor.to("meta", torch.float16 if tensor.is_floating_point() else None)

    given = {name: value for name, value in arguments.items() if name not in kwargs}
    made: dict[str, Any] = pytree.tree_map_only(Tensor, empty, given)
    return {name: tuple(v) if isinstance(v, list) else v for name, v in made.items()}


@dataclass(frozen=True, eq=False)
class _Examples:
    """Example arguments of a block, taken from the call that it was derived from."""

    arguments: Mapping[str, Any]

    def __call__(self, block: Any) -> dict[str, Any]:
        return dict(self.arguments)


@dataclass(frozen=True)
class _Argument:
    """Callable that returns the first argument of a call that has one of the given names."""

    names: tuple[str, ...]

    def __call__(self, call: Mapping[str, Any]) -> Any:
        for name in self.names:
            if name in call:
                value = call[name]
                return value[0] if isinstance(value, list) else value
        raise InputError(f"the call has none of {', '.join(self.names)}; it has {', '.join(call)}")


def _unknown_lengths(call: Mapping[str, Any]) -> set[int]:
    return set()  # no mask in the attention kwargs is assumed to cover all tokens


def _unknown_level(timestep: float, scheduler: Any) -> float:
    raise InputError(
        f"a derived family does not know the noise level of timestep {timestep:g}; merge at every "
        "step, merge_below=1, or define it: dataclasses.replace(family, noise_level=...)"
    )


def _unknown_levels(scheduler: Any, steps: int, call: Mapping[str, Any]) -> list[float]:
    return [1 - step / steps for step in range(steps)]  # a derived family uses none of these


def _no_example(model: nn.Module, like: Tensor, **size: Any) -> dict[str, Any]:
    raise ModelError(
        f"a derived family cannot make up a call of {type(model).__name__}; give the keyword "
        "arguments of a call of yours as a dictionary: inputs={...}"
    )
