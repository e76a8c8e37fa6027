"""The tokens of an image that merge into each destination."""

from dataclasses import dataclass

import torch
from torch import Tensor

from toma_fx.config import MergeConfig
from toma_fx.recipe import plan_options
from toma_fx.runtime.merging import weigh
from toma_fx.runtime.regions import gathered, layout
from toma_fx.runtime.selector import select


@dataclass(frozen=True)
class Grid:
    """The places of an image's tokens."""

    height: int
    width: int
    tile_order: Tensor
    """``(height * width,)`` int64: the raster index of each token in the model's tile order."""


@dataclass(frozen=True)
class Merged:
    """The destinations and clusters that a plan makes of an image's tokens, in raster order."""

    destinations: Tensor
    """``(M,)`` int64: the tokens that are kept, in increasing order."""
    clusters: Tensor
    """``(N,)`` int64: for every token, the destination that it gives most of its weight to."""


def merged(tokens_ND: Tensor, tile_order: Tensor, config: MergeConfig) -> Merged:
    """The destinations that a configuration chooses among tokens, and their clusters.

    The same operators decide as in a transformed model whose block has these tokens.

    Args:
        tokens_ND: ``(N, D)`` in raster order.
        tile_order: ``(N,)`` int64: the raster index of each token in tile order; see `Grid`.
        config: the options of the merging. The weights of ``selector="fixed"`` look at no token,
            so each of its clusters holds the tokens that resemble the destination most.
    """
    options = plan_options(config, config.ratio)
    raster = torch.arange(len(tokens_ND), device=tokens_ND.device)
    order = tile_order if config.region == "tile" else raster
    tokens = tokens_ND[order][None]
    selector = "grid" if options.selector == "fixed" else options.selector
    cut = layout([len(raster)], options.region_tokens, options.ratio)
    chosen = select(tokens, cut, selector)
    _, spread_BRnm = weigh(
        tokens.float(), chosen, cut, options.temperature, options.merge_over, "transpose"
    )
    by_region = chosen.reshape(spread_BRnm.shape[1], -1)
    nearest_Rn = by_region.gather(1, spread_BRnm[0].argmax(-1))
    if options.merge_over == "region":
        nearest = gathered(nearest_Rn[None, :, :, None], cut).flatten()
    else:  # the weights have a row for each token, and none for padding
        nearest = nearest_Rn.flatten()
    clusters = torch.empty_like(order)
    clusters[order] = order[nearest]
    return Merged(order[chosen.flatten()].sort().values, clusters)
