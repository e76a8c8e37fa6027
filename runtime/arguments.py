"""What the arguments of a block become when its tokens are merged: called by generated forwards."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx.node import has_side_effect

from toma_fx.errors import InputError
from toma_fx.runtime import merging, regions


def between(tokens: Tensor, before: int, after: int) -> Tensor:
    """Tokens without the first ``before`` and the last ``after`` of them."""
    return tokens[:, before : tokens.shape[1] - after]


def rows_if_given(
    values: Tensor | None, destinations: Tensor, dim: int, before: int, after: int
) -> Tensor | None:
    """`toma_fx.runtime.merging.rows` of an argument that may be None, or one row for all tokens."""
    if values is None or values.shape[dim] == 1:
        return values
    return merging.rows(values, destinations, dim, before, after)


def mask_of_keys(
    mask: Tensor | None, destinations: Tensor, layout: Sequence[int], after: int = 0
) -> Tensor | None:
    """A mask of keys, ``(B, ..., keys)``, when keys are merged: they take their destinations'."""
    if mask is None or mask.shape[-1] == 1:
        return mask
    before = mask.shape[-1] - regions.total_tokens(layout) - after
    return merging.rows(mask, destinations, -1, before, after)


def in_place(tensor: Tensor, method: str, *args: Any, **kwargs: Any) -> Any:
    """A method of a tensor that writes into it, as diffusers' code has it."""
    return getattr(tensor, method)(*args, **kwargs)


has_side_effect(in_place)  # whose result nobody need use


def expect_processor(attention: Any, name: str) -> Any:
    """The attention processor of a module, whose code the graph of a block holds.

    Raises:
        InputError: when it is another than the one that was captured.
    """
    processor = attention.processor
    if type(processor).__name__ != name:
        raise InputError(
            f"an attention was given a {type(processor).__name__} after the model was transformed "
            f"with placement='keys', which rewrote its {name}; toma_fx.restore, set it, and "
            "transform again"
        )
    return processor


has_side_effect(expect_processor)  # or a graph would drop the check where nothing is asked of it


def expect_value(value: Any, expected: Any, name: str) -> None:
    """Check an argument that decided the branches of a block's graph.

    Raises:
        InputError: when it is another than the one that the graph was made for.
    """
    if value is expected or (not isinstance(value, Tensor) and value == expected):
        return
    given = f"of shape {tuple(value.shape)}" if isinstance(value, Tensor) else repr(value)
    raise InputError(
        f"a merged block was given {name} {given}, and its graph is for {expected!r}; leave it "
        "out, or leave the block unmerged with skip"
    )


has_side_effect(expect_value)  # or a graph would drop the check, whose result nobody uses


class _RotaryError(InputError, AttributeError):
    """So that `hasattr` still answers."""


_ALL = slice(None)


class RotaryTable:
    """Rotary values with a batch dimension, in the place of diffusers' table without one.

    Attention indexes a ``(tokens, head_dim)`` table to give it the dimensions of batch and heads:
    ``table[None, :, None, :]`` or ``table.unsqueeze(1)`` where heads come after tokens,
    ``table[None, None, :, :]`` where they come before. Destinations differ from image to image, so
    this table answers the same with ``(B, tokens, 1, head_dim)`` or ``(B, 1, tokens, head_dim)``.
    Casts and moves, which processors of other libraries do first, give a table again.
    """

    __slots__ = ("values",)

    def __init__(self, values_BSD: Tensor) -> None:
        self.values = values_BSD

    def __getitem__(self, index: tuple[slice | None, ...]) -> Tensor:
        if index == (None, _ALL, None, _ALL):
            return self.values[:, :, None, :]
        if index == (None, None, _ALL, _ALL):
            return self.values[:, None, :, :]
        raise InputError(
            f"rotary index {index!r} is neither [None, :, None, :] nor [None, None, :, :]; use one "
            "of diffusers' own processors with merged tokens, or leave its blocks out with skip"
        )

    def unsqueeze(self, dim: int) -> Tensor:
        """As `torch.Tensor.unsqueeze`, for the dimension of the heads.

        Raises:
            InputError: when another dimension is asked for.
        """
        if dim != 1:
            raise InputError(
                f"rotary values on merged tokens have their heads at dimension 1, not {dim}; "
                "use one of diffusers' own processors, or leave its blocks out with skip"
            )
        return self.values[:, :, None, :]

    def view(self, *shape: int) -> Tensor:
        """As `torch.Tensor.view`, with the batch in the place of a first dimension of 1.

        Raises:
            InputError: when the first dimension asked for is another.
        """
        if shape[0] != 1:
            raise InputError(
                f"a view of shape {shape!r} leaves no dimension for the images of a batch, each of "
                "which has merged tokens of its own; leave its blocks out with skip"
            )
        return self.values.view(self.values.shape[0], *shape[1:])

    def to(self, *args: Any, **kwargs: Any) -> "RotaryTable":
        """As `torch.Tensor.to`."""
        return RotaryTable(self.values.to(*args, **kwargs))

    def float(self) -> "RotaryTable":
        """As `torch.Tensor.float`."""
        return RotaryTable(self.values.float())

    @property
    def shape(self) -> torch.Size:
        """``(tokens, head_dim)``, as of diffusers' table."""
        return self.values.shape[1:]

    @property
    def dtype(self) -> torch.dtype:
        """As of a tensor."""
        return self.values.dtype

    @property
    def device(self) -> torch.device:
        """As of a tensor."""
        return self.values.device

    def __getattr__(self, name: str) -> Any:
        raise _RotaryError(
            f"rotary values on merged tokens have no {name!r}, for they are one table for each "
            "image; use one of diffusers' own processors, or leave its blocks out with skip"
        )


def rotary_tables(*rows: Tensor) -> tuple[RotaryTable, ...]:
    """Rows of tables without a batch dimension, as attention takes them on merged tokens."""
    return tuple(RotaryTable(each) for each in rows)


def several(*parts: Any) -> tuple[Any, ...]:
    """An argument of a block that is a tuple, of which some parts have other rows now."""
    return parts
