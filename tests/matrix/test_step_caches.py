"""Rows: caches, by which a step uses what an earlier one computed."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers.hooks import (
    FasterCacheConfig,
    FirstBlockCacheConfig,
    MagCacheConfig,
    PyramidAttentionBroadcastConfig,
    TaylorSeerCacheConfig,
)
from diffusers.hooks.mag_cache import FLUX_MAG_RATIOS

from tests.matrix.frame import Cell, difference, row
from tests.matrix.pictures import drawing, holding, lossless, model_of, pipeline
from toma_fx import MergeConfig, transform
from toma_fx.errors import ModelError

SECTION = "Memory and speed"
ORDER = pytest.mark.parametrize("when", ["before", "after"])
STEPS = drawing(num_inference_steps=8)
NO_GRAPH = "its hooks break graphs, merged or not"

CacheConfig = Callable[[Any], Any]

BLOCK_CACHES: dict[str, CacheConfig] = {
    "First-block cache": lambda pipe: FirstBlockCacheConfig(threshold=0.4),
    "MagCache": lambda pipe: MagCacheConfig(
        threshold=1.0, max_skip_steps=2, num_inference_steps=8, mag_ratios=FLUX_MAG_RATIOS
    ),
}
ATTENTION_CACHES: dict[str, CacheConfig] = {
    "TaylorSeer": lambda pipe: TaylorSeerCacheConfig(
        cache_interval=2, disable_cache_before_step=2, taylor_factors_dtype=torch.float32
    ),
    "Pyramid attention broadcast": lambda pipe: PyramidAttentionBroadcastConfig(
        spatial_attention_block_skip_range=2,
        spatial_attention_timestep_skip_range=(-1, 1001),
        current_timestep_callback=lambda: pipe.current_timestep,
    ),
    "FasterCache": lambda pipe: FasterCacheConfig(
        spatial_attention_block_skip_range=2,
        spatial_attention_timestep_skip_range=(-1, 901),
        unconditional_batch_skip_range=2,
        unconditional_batch_timestep_skip_range=(-1, 901),
        attention_weight_callback=lambda _: 0.5,
        is_guidance_distilled=True,
        current_timestep_callback=lambda: pipe.current_timestep,
    ),
}


def check_cache(cell: Cell, config: CacheConfig, when: str, options: MergeConfig) -> None:
    """Assert that a cache does with merged tokens what it does with all, and can be taken off."""
    pipe = pipeline(cell.family)
    plain = STEPS(pipe, 0)
    model = model_of(pipe)
    without = transform(model, options)
    with holding(pipe, without):
        uncached = STEPS(pipe, 0)
    cached = copy.deepcopy(model)
    cached.enable_cache(config(pipe))

    def both(options: MergeConfig) -> Any:
        if when == "before":
            return transform(cached, options)
        made = transform(model, options)
        made.enable_cache(config(pipe))
        return made

    with holding(pipe, cached):
        expected = STEPS(pipe, 0)
    assert difference(expected, plain) > 1e-4
    with holding(pipe, both(lossless(options))):
        assert difference(STEPS(pipe, 0), expected) < 1e-3 * difference(expected, plain)
    with holding(pipe, both(options)):
        drawn = STEPS(pipe, 0)
        assert difference(drawn, expected) > 1e-2
        assert difference(drawn, uncached) > 1e-4
        assert difference(STEPS(pipe, 1), drawn) > 1e-2
        cell.agree(STEPS(pipe, 0), drawn)
        model_of(pipe).disable_cache()
        cell.agree(STEPS(pipe, 0), uncached)


@ORDER
@pytest.mark.parametrize("cache", BLOCK_CACHES)
@row(
    "{cache}, enabled {when} `transform`",
    section=SECTION,
    families=("flux",),
    modes=("eager",),
    note=NO_GRAPH,
)
def test_block_cache(cell: Cell, cache: str, when: str) -> None:
    check_cache(cell, BLOCK_CACHES[cache], when, MergeConfig())


@ORDER
@pytest.mark.parametrize("cache", ATTENTION_CACHES)
@row(
    "{cache} with `selector='grid'`, enabled {when} `transform`",
    section=SECTION,
    families=("flux",),
    modes=("eager",),
    note=NO_GRAPH,
)
def test_attention_cache(cell: Cell, cache: str, when: str) -> None:
    check_cache(cell, ATTENTION_CACHES[cache], when, MergeConfig(selector="grid"))


@ORDER
@pytest.mark.parametrize("cache", ATTENTION_CACHES)
@row("{cache}, enabled {when} `transform`", section=SECTION, families=("flux",), modes=("eager",))
def test_attention_cache_of_changing_tokens(cell: Cell, cache: str, when: str) -> None:
    pipe = pipeline(cell.family)
    config = ATTENTION_CACHES[cache](pipe)
    if when == "before":
        model_of(pipe).enable_cache(config)
    with cell.refuses(ModelError, match="transform with selector='grid'"):
        transform(pipe)
        model_of(pipe).enable_cache(config)
    if when == "after":
        assert not model_of(pipe).is_cache_enabled
        cell.agree(STEPS(pipe, 0), STEPS(transform(pipeline(cell.family)), 0))
