"""Functions in generated forwards that adapt a block's arguments to merged tokens."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx.node import has_side_effect

from toma_fx.errors import InputError
from toma_fx.runtime import merging, regions


def between(tokens: Tensor, before: int, after: int) -> Tensor:
    """Return tokens without the first ``before`` and the last ``after`` of them."""
    return tokens[:, before : tokens.shape[1] - after]


def rows_if_given(
    values: Tensor | None, destinations: Tensor, dim: int, before: int, after: int
) -> Tensor | None:
    """Call `merging.rows`, unless the argument is None or has one row for all tokens."""
    if values is None or values.shape[dim] == 1:
        return values
    return merging.rows(values, destinations, dim, before, after)


def mask_of_keys(
    mask: Tensor | None, destinations: Tensor, layout: Sequence[int], after: int = 0
) -> Tensor | None:
    """Take the destinations' columns of a key mask, ``(B, ..., keys)``, when keys are merged."""
    if mask is None or mask.shape[-1] == 1:
        return mask
    before = mask.shape[-1] - regions.total_tokens(layout) - after
    return merging.rows(mask, destinations, -1, before, after)


def in_place(tensor: Tensor, method: str, *args: Any, **kwargs: Any) -> Any:
    """Call a method of a tensor that writes into it, as diffusers' code does."""
    return getattr(tensor, method)(*args, **kwargs)


has_side_effect(in_place)  # its result may be unused


def expect_processor(attention: Any, name: str) -> Any:
    """Return the attention processor of a module, whose code the graph of a block contains.

    Raises:
        InputError: when it is not of the class that was captured.
    """
    processor = attention.processor
    if type(processor).__name__ != name:
        raise InputError(
            f"an attention got a {type(processor).__name__} after the model was transformed with "
            f"placement='keys', which rewrote its {name}; call toma_fx.restore, set the processor, "
            "and transform again"
        )
    return processor


has_side_effect(expect_processor)  # otherwise a graph would drop the check if its result is unused


def expect_value(value: Any, expected: Any, name: str) -> None:
    """Check an argument that selected the branches of a block's graph.

    Raises:
        InputError: when it differs from the value for which the graph was made.
    """
    if value is expected or (not isinstance(value, Tensor) and value == expected):
        return
    given = f"of shape {tuple(value.shape)}" if isinstance(value, Tensor) else repr(value)
    raise InputError(
        f"a merged block got {name} {given}, but its graph was made for {expected!r}; leave it "
        "out, or leave the block unmerged with skip"
    )


has_side_effect(expect_value)  # otherwise a graph would drop the check, as its result is unused


class _RotaryError(InputError, AttributeError):
    """Error for a missing attribute, which `hasattr` understands."""


_ALL = slice(None)


class RotaryTable:
    """Rotary values with a batch dimension, in place of diffusers' table without one.

    Attention indexes a ``(tokens, head_dim)`` table to add the dimensions of batch and heads:
    ``table[None, :, None, :]`` or ``table.unsqueeze(1)`` if heads come after tokens,
    ``table[None, None, :, :]`` if they come before. Destinations differ from image to image, so
    this table returns ``(B, tokens, 1, head_dim)`` or ``(B, 1, tokens, head_dim)`` instead. Casts
    and moves, which processors of other libraries do first, return a table again.
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
        """Same as `torch.Tensor.unsqueeze`, for the dimension of the heads.

        Raises:
            InputError: when ``dim`` is not 1.
        """
        if dim != 1:
            raise InputError(
                f"rotary values on merged tokens have their heads at dimension 1, not {dim}; "
                "use one of diffusers' own processors, or leave its blocks out with skip"
            )
        return self.values[:, :, None, :]

    def view(self, *shape: int) -> Tensor:
        """Same as `torch.Tensor.view`, with the batch in place of a first dimension of 1.

        Raises:
            InputError: when the first dimension is not 1.
        """
        if shape[0] != 1:
            raise InputError(
                f"a view of shape {shape!r} leaves no dimension for the images of a batch, each of "
                "which has its own merged tokens; leave its blocks out with skip"
            )
        return self.values.view(self.values.shape[0], *shape[1:])

    def to(self, *args: Any, **kwargs: Any) -> "RotaryTable":
        """Same as `torch.Tensor.to`."""
        return RotaryTable(self.values.to(*args, **kwargs))

    def float(self) -> "RotaryTable":
        """Same as `torch.Tensor.float`."""
        return RotaryTable(self.values.float())

    @property
    def shape(self) -> torch.Size:
        """``(tokens, head_dim)``, the shape of diffusers' table."""
        return self.values.shape[1:]

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the values."""
        return self.values.dtype

    @property
    def device(self) -> torch.device:
        """Device of the values."""
        return self.values.device

    def __getattr__(self, name: str) -> Any:
        raise _RotaryError(
            f"rotary values on merged tokens have no {name!r}, because each image has its own "
            "table; use one of diffusers' own processors, or leave its blocks out with skip"
        )


def rotary_tables(*rows: Tensor) -> tuple[RotaryTable, ...]:
    """Wrap rows of tables without a batch dimension for attention on merged tokens."""
    return tuple(RotaryTable(each) for each in rows)


def several(*parts: Any) -> tuple[Any, ...]:
    """Pack a tuple argument of a block, some parts of which have new rows."""
    return parts
