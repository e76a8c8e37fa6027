"""Two ways to cut an image's tokens into clusters: k-means, and who merges into whom."""

from dataclasses import dataclass

import torch
from torch import Tensor

from toma_fx.config import MergeConfig
from toma_fx.recipe import plan_options
from toma_fx.runtime.merging import weigh
from toma_fx.runtime.regions import gathered, layout
from toma_fx.runtime.selector import select

ITERATIONS = 50
STARTS = 4
"""A single start ends now and then with two centres in one blob."""


@dataclass(frozen=True)
class Merged:
    """What a plan does with an image's tokens, in raster order."""

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
        config: of the merging. With ``selector="fixed"`` the clusters are those of its destinations
            by resemblance, since its own weights look at no token.
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
    else:  # whose weights have a row for each token, and none for padding
        nearest = nearest_Rn.flatten()
    clusters = torch.empty_like(order)
    clusters[order] = order[nearest]
    return Merged(order[chosen.flatten()].sort().values, clusters)


def kmeans(points_ND: Tensor, clusters: int, *, seed: int = 0) -> Tensor:
    """K-means clusters: the best of several k-means++ starts, by Lloyd's iterations.

    Args:
        points_ND: ``(N, D)``.
        clusters: ``K``, at most ``N``.
        seed: of the starts; the global random state is not touched.

    Returns:
        ``(N,)`` int64 labels in ``[0, K)``.
    """
    points = points_ND.float()
    generator = torch.Generator(device=points.device).manual_seed(seed)
    runs = [_lloyd(points, _start(points, clusters, generator)) for _ in range(STARTS)]
    return min(runs, key=lambda run: run[1])[0]


def _start(points_ND: Tensor, clusters: int, generator: torch.Generator) -> Tensor:
    """Centres ``(K, D)`` by k-means++: points, drawn by squared distance to those before."""
    first = torch.randint(len(points_ND), (1,), generator=generator, device=points_ND.device)
    centres = points_ND[first]
    while len(centres) < clusters:
        away = torch.cdist(points_ND, centres).amin(1).square()
        # Where every point is a centre already, any will do: its cluster stays empty.
        weights = away if away.any() else torch.ones_like(away)
        centres = torch.cat([centres, points_ND[weights.multinomial(1, generator=generator)]])
    return centres


def _lloyd(points_ND: Tensor, centres_KD: Tensor) -> tuple[Tensor, float]:
    """Labels, and the sum of squared distances to the centres."""
    labels = torch.cdist(points_ND, centres_KD).argmin(1)
    for _ in range(ITERATIONS):
        sums = torch.zeros_like(centres_KD).index_add_(0, labels, points_ND)
        sizes = labels.bincount(minlength=len(centres_KD))[:, None]
        centres_KD = torch.where(sizes > 0, sums / sizes.clamp(min=1), centres_KD)
        before, labels = labels, torch.cdist(points_ND, centres_KD).argmin(1)
        if torch.equal(before, labels):
            break
    return labels, float((points_ND - centres_KD[labels]).square().sum())
