"""The tokens that a transformed model keeps while it draws an image."""

import math
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from toma_fx.build import recipe_of_transformed
from toma_fx.config import MergeConfig
from toma_fx.lab.clusters import Grid, Merged, merged
from toma_fx.lab.paint import Picture, paint_merged
from toma_fx.runtime import plan
from toma_fx.runtime.current_order import token_order


@dataclass(frozen=True, kw_only=True)
class Kept:
    """The tokens that one block kept, as its last plan chose them."""

    block: str
    """Path of the block in the model."""
    step: int
    """Step of the denoising run, from 1."""
    grid: Grid
    merged: Merged

    def painted(self, image: Image.Image) -> Picture:
        """The image with a dot on every kept token and a border around its cluster."""
        return paint_merged(image, self.merged, self.grid)


@dataclass
class Planned:
    """The tokens that enter the blocks that make plans, at the last step at which each made one."""

    config: MergeConfig
    step: int = 1
    """The current step, from 1; the caller counts it."""
    seen: dict[str, tuple[int, Tensor, Tensor | None]] = field(default_factory=dict)
    """The step, the tokens ``(N, D)`` and their order, by the path of a block."""

    def kept(self, height: int, width: int) -> Kept | None:
        """The tokens that the block with the finest grid kept, the last such block in the model.

        Args:
            height: height of the image in pixels.
            width: width of the image in pixels.

        Returns:
            None when no plan was made, or the tokens are no grid of the image's shape, as in a
            block whose sequence holds text too.
        """
        grids = {
            block: grid
            for block, (_, tokens, order) in self.seen.items()
            if (grid := _grid(tokens, order, height, width)) is not None
        }
        if not grids:
            return None
        block = max(reversed(grids), key=lambda each: grids[each].height)
        step, tokens, order = self.seen[block]
        grid = grids[block]
        rows = tokens
        if order is not None:
            rows = torch.empty_like(tokens)
            rows[order] = tokens
        return Kept(
            block=block, step=step, grid=grid, merged=merged(rows, grid.tile_order, self.config)
        )


@contextmanager
def planning(model: nn.Module) -> Iterator[Planned]:
    """Record the tokens that plans are made from, in every call of a transformed model.

    In a batch, the last image counts: with guidance, the one with the prompt. When a step makes
    several calls, the first counts, which true guidance makes with the prompt.

    Args:
        model: a transformed model that is not compiled.
    """
    recipe = recipe_of_transformed(model)
    planned = Planned(config=recipe.config)
    with ExitStack() as stack:
        for block in recipe.merged if recipe.makes_plans else ():
            if block.role != "follow":
                module = model.get_submodule(block.module)
                handle = module.register_forward_pre_hook(
                    _seeing(planned, block.path), with_kwargs=True
                )
                stack.callback(handle.remove)
        yield planned


def _seeing(planned: Planned, block: str) -> Any:
    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        scope = plan.current()
        if scope is None or scope.variant not in (plan.MERGED, plan.REMEMBER):
            return
        if block in planned.seen and planned.seen[block][0] == planned.step:
            return
        tokens_BND = args[0] if args else kwargs["hidden_states"]
        planned.seen.pop(block, None)  # the order of the dictionary is that of the last calls
        planned.seen[block] = planned.step, tokens_BND[-1].detach(), token_order()

    hook.any_tokens = True  # type: ignore[attr-defined]
    return hook


def _grid(tokens: Tensor, order: Tensor | None, height: int, width: int) -> Grid | None:
    count = len(tokens)
    rows = round(math.sqrt(count * height / width))
    columns = round(math.sqrt(count * width / height))
    if rows * columns != count or (order is not None and len(order) != count):
        return None
    raster = torch.arange(count, device=tokens.device)
    return Grid(rows, columns, raster if order is None else order)
