"""Captured tokens are those that the model's own blocks select from."""

from typing import Any

import pytest
import torch
from torch import Tensor

import toma_fx
from benchmarks.capture import layers_of, watching
from tests.tiny import flux_inputs, tiny_flux, tiny_sd_unet, tiny_sdxl_unet, unet_inputs
from toma_fx.config import MergeConfig
from toma_fx.errors import ModelError
from toma_fx.lab.clusters import Grid, merged
from toma_fx.runtime import selector


def look(model: Any, inputs: dict[str, Any], layers: tuple[str, ...], calls: int = 1) -> Any:
    seen: dict[tuple[str, int], tuple[Tensor, Grid]] = {}

    def see(layer: str, step: int, tokens: Tensor, grid: Grid) -> None:
        seen[layer, step] = tokens, grid

    with torch.no_grad(), watching(model, layers, see):
        for call in range(calls):
            model(**{**inputs, "timestep": inputs["timestep"] * (1 - call / calls)})
    hooks = [m for m in model.modules() if m._forward_pre_hooks]
    assert not hooks
    return seen


def test_layers_are_evenly_spaced() -> None:
    unet = tiny_sdxl_unet()
    leaders = layers_of(unet, MergeConfig(), 5)
    assert len(leaders) == 5
    assert all(path.endswith("transformer_blocks.0") for path in leaders)
    stages = [path.partition("_")[0] for path in leaders]
    assert stages == sorted(stages, key=["down", "mid", "up"].index)
    assert layers_of(unet, MergeConfig(), 2) == (leaders[0], leaders[-1])
    flux = layers_of(tiny_flux(), MergeConfig(skip=("transformer_blocks.0",)), 9)
    assert flux == (
        "transformer_blocks.1",
        *(f"single_transformer_blocks.{number}" for number in range(3)),
    )


@pytest.mark.parametrize("build", [tiny_sdxl_unet, tiny_sd_unet])
def test_a_unets_stage_has_its_own_grid(build: Any) -> None:
    unet = build()
    layers = layers_of(unet, MergeConfig(), 5)
    seen = look(unet, unet_inputs(unet, height=16, width=32), layers, calls=2)
    assert {step for _, step in seen} == {0, 1}
    for layer in layers:
        tokens, grid = seen[layer, 0]
        assert tokens.ndim == 2 and len(tokens) == grid.height * grid.width
        assert grid.width == 2 * grid.height


def test_flux_has_one_grid() -> None:
    model = tiny_flux()
    layers = layers_of(model, MergeConfig(skip=()), 9)
    seen = look(model, flux_inputs(model, height=4, width=8), layers)
    for tokens, grid in seen.values():
        assert (grid.height, grid.width) == (4, 8) and tokens.shape[0] == 32


@pytest.mark.parametrize("region", ["tile", "stripe"])
@pytest.mark.parametrize("build", [tiny_sdxl_unet, tiny_flux])
def test_the_first_layers_destinations_are_the_transformed_models(
    build: Any, region: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = build()
    inputs = unet_inputs(model) if build is tiny_sdxl_unet else flux_inputs(model)
    config = MergeConfig(ratio=0.5, region=region, region_tokens=16, skip=())
    (layer,) = layers_of(model, config, 1)
    tokens, grid = look(model, inputs, (layer,))[layer, 0]
    ours = merged(tokens, grid.tile_order, config)
    picks: list[Tensor] = []
    real = selector.facility_location

    def note(similarity: Tensor, keep: int, *sized: Tensor, **padding: Any) -> Tensor:
        chosen = real(similarity, keep, **padding)
        if not similarity.is_meta:  # while it is captured
            picks.append(chosen)
        return chosen

    monkeypatch.setattr(selector, "facility_location", note)
    with torch.no_grad():
        toma_fx.transform(model, config)(**inputs)
    regions = len(tokens) // 16
    inside = picks[0].unflatten(0, (-1, regions))[-1]  # of the batch's last image
    places = (inside + 16 * torch.arange(regions)[:, None]).flatten()
    order = grid.tile_order if region == "tile" else torch.arange(len(tokens))
    assert torch.equal(order[places].sort().values, ours.destinations)


def test_of_two_calls_at_a_timestep_the_first_is_seen() -> None:
    model = tiny_flux()
    inputs = flux_inputs(model, height=4, width=4)
    layer = "transformer_blocks.0"
    seen: list[tuple[int, Tensor]] = []
    with (
        torch.no_grad(),
        watching(model, (layer,), lambda _, step, x, grid: seen.append((step, x))),
    ):
        for timestep in (0.75, 0.5):
            for scale in (1, -1):
                hidden_states = scale * inputs["hidden_states"]
                timesteps = torch.full_like(inputs["timestep"], timestep)
                model(**{**inputs, "hidden_states": hidden_states, "timestep": timesteps})
    assert [step for step, _ in seen] == [0, 1]
    assert torch.equal(seen[0][1], look(model, inputs, (layer,))[layer, 0][0])


def test_reference_images_are_refused() -> None:
    model = tiny_flux()
    inputs = flux_inputs(model, height=4, width=4)
    inputs["img_ids"][8:, 0] = 1
    inputs["img_ids"][8:, 1] -= 2
    with pytest.raises(ModelError, match="16 image tokens are no raster of 2 x 4"):
        look(model, inputs, ("transformer_blocks.0",))
