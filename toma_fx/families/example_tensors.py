"""Helpers for the example calls of all families."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from toma_fx.errors import ModelError


def random_tensors(like: Tensor) -> Callable[..., Tensor]:
    """Return a function that makes random tensors from shapes, the same values every time.

    Args:
        like: a tensor with the device and dtype. On the meta device there are no values.
    """
    # A generator of its own, because the global random state is the user's.
    generator = torch.Generator("cpu").manual_seed(0)

    def random(*shape: int) -> Tensor:
        if like.is_meta:
            return like.new_empty(shape)
        return torch.randn(shape, generator=generator, device="cpu").to(like)

    return random


def token_grid(height: int | None, width: int | None, native: int, step: int) -> tuple[int, int]:
    """Return the rows and columns of tokens of an image.

    Args:
        height: image height in pixels; ``native`` if omitted.
        width: image width in pixels; the height if omitted.
        native: the model's native size along a side, in pixels.
        step: pixels per token along a side.

    Raises:
        ModelError: when a side is not a multiple of ``step``.
    """
    height = native if height is None else height
    width = height if width is None else width
    check_size(height, width, step)
    return height // step, width // step


def image_ids(rows: int, columns: int, device: torch.device) -> Tensor:
    """Return image number, row and column of each token of an image, ``(rows * columns, 3)``."""
    row = torch.arange(rows, device=device)[:, None].expand(rows, columns)
    column = torch.arange(columns, device=device).expand(rows, columns)
    return torch.stack([torch.zeros_like(row), row, column], dim=-1).flatten(0, 1)


def rotary_tables(attention: Any, tokens: int) -> tuple[Tensor, Tensor]:
    """Return example tables of cosines and sines, ``(tokens, head_dim)``, for attention."""
    table = torch.empty(tokens, attention.inner_dim // attention.heads, device="meta")
    return table, table


def check_size(height: int, width: int, step: int) -> None:
    """Refuse an image size that tokens do not divide.

    Raises:
        ModelError: when a side, in pixels, is not a multiple of ``step``.
    """
    if height % step or width % step or height < step or width < step:
        raise ModelError(
            f"an image of {height} x {width} pixels must be a multiple of {step} pixels along each "
            f"side, such as {max(1, height // step) * step} x {max(1, width // step) * step}"
        )


def check_frames(frames: int, step: int) -> int:
    """Return the number of latent frames: one for the first frame, then one per ``step`` frames.

    Raises:
        ModelError: when ``frames`` is not 1 plus a multiple of ``step``.
    """
    if frames < 1 or (frames - 1) % step:
        nearest = max(0, frames - 1) // step * step + 1
        raise ModelError(
            f"a video of {frames} frames must have 1 plus a multiple of {step} frames, such as "
            f"{nearest} or {nearest + step}"
        )
    return (frames - 1) // step + 1
