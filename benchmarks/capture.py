"""The tokens that a model's blocks see while it draws, by layer and step."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from torch import Tensor, nn

from toma_fx.build import recipe_of
from toma_fx.config import MergeConfig
from toma_fx.errors import ModelError
from toma_fx.lab.clusters import Grid
from toma_fx.runtime.token_order import tile_order, tile_order_of_ids

See = Callable[[str, int, Tensor, Grid], None]
"""Called with a layer, a step from 0, its tokens ``(N, D)`` in raster order, and their grid."""


def layers_of(model: nn.Module, config: MergeConfig, count: int) -> tuple[str, ...]:
    """Paths of the blocks to look at: evenly spaced ones of those that a configuration merges.

    If there are enough groups, as in a UNet, these are the first blocks of groups, which make the
    plans. Otherwise, as in Flux, they are any merged blocks.

    Args:
        model: an untouched model.
        config: the options of the merging.
        count: the largest number of blocks.
    """
    groups = {block.path: block.group for block in recipe_of(model, config).merged}
    # In the order of the computation; a UNet lists its middle last.
    blocks = sorted(groups, key=_is_up)
    firsts = {groups[path]: path for path in reversed(blocks)}
    first = [path for path in blocks if path in firsts.values()]
    candidates = first if len(first) >= count else blocks
    count = min(count, len(candidates))
    last = len(candidates) - 1
    return tuple(candidates[round(i * last / max(1, count - 1))] for i in range(count))


def _is_up(path: str) -> bool:
    return path.startswith("up_blocks.")


@contextmanager
def watching(model: nn.Module, layers: Sequence[str], see: See) -> Iterator[None]:
    """Show ``see`` the tokens that enter layers, at every call of an untouched model.

    In a batch, the last image counts: with guidance, the one with the prompt.

    Args:
        model: a UNet or a Flux transformer.
        layers: paths of transformer blocks.
        see: the function to call. A new timestep begins a step. When a step makes several calls, as
            with Flux's true guidance, it sees only the first, which has the prompt.

    Raises:
        ModelError: when Flux is given tokens of more than one image, as Kontext is.
    """
    watch = _Watch()
    with ExitStack() as stack:

        def hook(module: nn.Module, function: Any) -> None:
            handle = module.register_forward_pre_hook(function, with_kwargs=True)
            stack.callback(handle.remove)

        hook(model, watch.call)
        for path, module in model.named_modules():
            if isinstance(module, Transformer2DModel):
                hook(module, watch.stage(path))
        for layer in layers:
            hook(model.get_submodule(layer), watch.block(layer, see))
        yield


@dataclass
class _Watch:
    step: int = -1
    timestep: float | None = None
    first: bool = True
    """Whether this is the first call at its timestep."""
    grids: dict[str, Grid] = field(default_factory=dict)
    """Grids by the path of a stage. Flux has one grid throughout, under ""."""

    def call(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        timestep = kwargs["timestep"] if "timestep" in kwargs else args[1]
        timestep = float(torch.as_tensor(timestep).flatten()[0])
        self.first = timestep != self.timestep
        self.timestep = timestep
        self.step += self.first
        ids = kwargs.get("img_ids")
        if ids is not None:
            self.grids[""] = _grid_of_ids(ids if ids.ndim == 2 else ids[0])

    def stage(self, path: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            maps_BCHW = args[0] if args else kwargs["hidden_states"]
            height, width = maps_BCHW.shape[-2:]
            self.grids[path] = Grid(height, width, tile_order(maps_BCHW, height, width))

        return hook

    def block(self, layer: str, see: See) -> Any:
        stage = layer.rpartition(".")[0].rpartition(".")[0]

        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            tokens_BND = args[0] if args else kwargs["hidden_states"]
            if self.first:
                see(layer, self.step, tokens_BND[-1].detach(), self.grids[stage])

        return hook


def _grid_of_ids(ids: Tensor) -> Grid:
    height, width = (int(ids[:, axis].max()) + 1 for axis in (1, 2))
    raster = torch.arange(len(ids), device=ids.device)
    if len(ids) != height * width or not torch.equal(
        ids[:, 1:].long(), torch.stack([raster // width, raster % width], dim=-1)
    ):
        raise ModelError(
            f"{len(ids)} image tokens are no raster of {height} x {width}; this looks at one "
            "image, without others as reference"
        )
    return Grid(height, width, tile_order_of_ids(ids))
