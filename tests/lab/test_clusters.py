"""Clusters of tokens whose structure is known."""

import pytest
import torch
from torch import Tensor

from tests.tiny import smooth_images
from toma_fx.config import MergeConfig
from toma_fx.lab.clusters import merged
from toma_fx.runtime.merging import weigh
from toma_fx.runtime.regions import WHOLE_IMAGE, layout
from toma_fx.runtime.selector import select
from toma_fx.runtime.token_order import tile_order


@pytest.fixture
def tokens() -> Tensor:
    images = smooth_images((1, 12, 16, 16), torch.Generator().manual_seed(0))
    return images.flatten(2).transpose(1, 2)[0]


@pytest.mark.parametrize("region", ["tile", "stripe", "image"])
def test_destinations_are_those_that_select_picks(tokens: Tensor, region: str) -> None:
    config = MergeConfig(ratio=0.75, region=region, region_tokens=16)  # type: ignore[arg-type]
    order = tile_order(tokens, 16, 16)
    its = merged(tokens, order, config)
    used = order if region == "tile" else torch.arange(256)
    cut = layout([256], WHOLE_IMAGE if region == "image" else 16, 0.75)
    picked = select(tokens[used][None], cut, "facility_location")
    assert its.destinations.tolist() == used[picked.flatten()].sort().values.tolist()
    assert len(its.destinations) == 64


def test_every_token_is_with_the_destination_that_it_gives_most_to(tokens: Tensor) -> None:
    config = MergeConfig(ratio=0.75, region_tokens=64)
    order = tile_order(tokens, 16, 16)
    its = merged(tokens, order, config)
    assert torch.equal(its.clusters.unique(), its.destinations)
    assert torch.equal(its.clusters[its.destinations], its.destinations)
    cut = layout([256], 64, 0.75)
    chosen = select(tokens[order][None], cut, "facility_location")
    _, spread = weigh(tokens[order][None], chosen, cut, 0.001, "region", "transpose")
    place = 100  # in tile order
    region, inside = divmod(place, 64)
    best = int(chosen[0, region, int(spread[0, region, inside].argmax())])
    assert int(its.clusters[order[place]]) == int(order[best])


def test_tokens_of_a_padded_grid_are_with_destinations_of_their_region() -> None:
    images = smooth_images((1, 12, 23, 29), torch.Generator().manual_seed(0))
    tokens = images.flatten(2).transpose(1, 2)[0]  # 667 of them, which 16 does not divide
    its = merged(tokens, torch.arange(667), MergeConfig(ratio=0.75, region_tokens=16))
    assert torch.equal(its.clusters.unique(), its.destinations)
    assert torch.equal(its.clusters[its.destinations], its.destinations)
    assert int((its.clusters - torch.arange(667)).abs().max()) < 16


def test_weights_over_the_image_may_leave_the_region(tokens: Tensor) -> None:
    order = tile_order(tokens, 16, 16)
    near = merged(tokens, order, MergeConfig(ratio=0.75, region_tokens=16))
    config = MergeConfig(ratio=0.75, region_tokens=16, merge_over="image")
    far = merged(tokens, order, config)
    assert torch.equal(near.destinations, far.destinations)
    assert not torch.equal(near.clusters, far.clusters)


def test_fixed_destinations_are_the_grid(tokens: Tensor) -> None:
    order = tile_order(tokens, 16, 16)
    fixed = merged(tokens, order, MergeConfig(selector="fixed"))
    grid = merged(tokens, order, MergeConfig(selector="grid"))
    assert torch.equal(fixed.destinations, grid.destinations)
