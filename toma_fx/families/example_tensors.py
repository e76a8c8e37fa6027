"""What the example calls of all families have in common."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from toma_fx.errors import ModelError


def random_tensors(like: Tensor) -> Callable[..., Tensor]:
    """A function from a shape to random values, the same ones at every call, in the type of one.

    Args:
        like: a tensor with the device and dtype. On the meta device there are no values.
    """
    # A generator of its own: the global random state is the user's.
    generator = torch.Generator("cpu").manual_seed(0)

    def random(*shape: int) -> Tensor:
        if like.is_meta:
            return like.new_empty(shape)
        return torch.randn(shape, generator=generator, device="cpu").to(like)

    return random


def token_grid(height: int | None, width: int | None, native: int, step: int) -> tuple[int, int]:
    """Rows and columns of tokens of an image.

    Args:
        height: in pixels; ``native`` when left out.
        width: in pixels; the height when left out.
        native: the model's own size along a side.
        step: pixels of a token along a side.

    Raises:
        ModelError: when a side is no multiple of a token's.
    """
    height = native if height is None else height
    width = height if width is None else width
    check_size(height, width, step)
    return height // step, width // step


def image_ids(rows: int, columns: int, device: torch.device) -> Tensor:
    """Image number, row and column of each token of one image, ``(rows * columns, 3)`` int64."""
    row = torch.arange(rows, device=device)[:, None].expand(rows, columns)
    column = torch.arange(columns, device=device).expand(rows, columns)
    return torch.stack([torch.zeros_like(row), row, column], dim=-1).flatten(0, 1)


def rotary_tables(attention: Any, tokens: int) -> tuple[Tensor, Tensor]:
    """Example tables of cosines and sines, ``(tokens, head_dim)``, for diffusers' attention."""
    table = torch.empty(tokens, attention.inner_dim // attention.heads, device="meta")
    return table, table


def check_size(height: int, width: int, step: int) -> None:
    """Refuse an image size that tokens do not cover.

    Raises:
        ModelError: when a side, in pixels, is no multiple of ``step``.
    """
    if height % step or width % step or height < step or width < step:
        raise ModelError(
            f"an image of {height} x {width} pixels must be a multiple of {step} pixels along each "
            f"side, such as {max(1, height // step) * step} x {max(1, width // step) * step}"
        )


def check_frames(frames: int, step: int) -> int:
    """The number of latent frames of a video: one for its first frame, then one for each ``step``.

    Raises:
        ModelError: when there is no such number.
    """
    if frames < 1 or (frames - 1) % step:
        nearest = max(0, frames - 1) // step * step + 1
        raise ModelError(
            f"a video of {frames} frames must have one frame and a multiple of {step} more, such "
            f"as {nearest} or {nearest + step}"
        )
    return (frames - 1) // step + 1
