"""Whole images: pipelines are transformed in place, and every image is as on a fresh model."""

import copy
from typing import Any

import pytest
import torch
from diffusers import EulerDiscreteScheduler
from torch import Tensor

from tests.pipelines import PROMPT_TOKENS, tiny_flux_pipeline, tiny_sdxl_pipeline
from tests.tiny import tiny_sdxl_unet, unet_inputs
from toma_fx import MergeConfig, Schedule, restore, transform

# diffusers' Euler scheduler hands a tensor to NumPy in a way that NumPy 2 is about to change.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

CONFIGS = {
    "default": MergeConfig(),
    "scheduled": MergeConfig(schedule=Schedule(select_every=3, weigh_every=2)),
    "toma": MergeConfig.preset("toma"),
}
PIPELINES = {"sdxl": tiny_sdxl_pipeline, "flux": tiny_flux_pipeline}


@pytest.fixture(params=PIPELINES)
def pipeline(request: pytest.FixtureRequest) -> Any:
    return PIPELINES[request.param]()


@pytest.fixture(params=CONFIGS)
def config(request: pytest.FixtureRequest) -> MergeConfig:
    return CONFIGS[request.param]


def part_of(pipeline: Any) -> str:
    """The name of the denoising model in the pipeline."""
    return "unet" if "unet" in pipeline.components else "transformer"


def model_of(pipeline: Any) -> Any:
    """The denoising model."""
    return getattr(pipeline, part_of(pipeline))


def image(pipeline: Any, seed: int = 0, **options: Any) -> Tensor:
    """An image of 8x8 tokens in 4 steps, unless the options say otherwise."""
    options = {"prompt": "a cat", "num_inference_steps": 4, "height": 128, "width": 128, **options}
    if part_of(pipeline) == "transformer":
        options["max_sequence_length"] = PROMPT_TOKENS
    generator = torch.Generator().manual_seed(seed)
    result: Tensor = pipeline(**options, generator=generator, output_type="pt").images
    return result


def test_pipeline_is_transformed_in_place_and_restored(pipeline: Any, config: MergeConfig) -> None:
    model, untouched = model_of(pipeline), image(pipeline)
    assert untouched.shape == (1, 3, 128, 128)
    assert transform(pipeline, config) is pipeline
    assert model_of(pipeline) is not model
    merged = image(pipeline)
    assert merged.shape == untouched.shape
    assert merged.isfinite().all()
    assert not torch.allclose(merged, untouched, atol=1e-2)
    assert torch.equal(image(pipeline), merged)
    transformed = model_of(pipeline)
    assert restore(pipeline) is pipeline
    assert model_of(pipeline) is transformed
    assert type(transformed) is type(model)
    assert torch.equal(image(pipeline), untouched)


def denoise(*images: tuple[Any, int], steps: int = 6) -> list[Tensor]:
    """The latents of images, each of a model and a seed, that take turns step by step."""
    runs = []
    for model, seed in images:
        scheduler = EulerDiscreteScheduler()
        scheduler.set_timesteps(steps)
        runs.append((model, scheduler, unet_inputs(model, height=16, width=16, seed=seed)))
    for step in range(steps):
        for model, scheduler, call in runs:
            timestep, latents = scheduler.timesteps[step], call["sample"]
            scaled = scheduler.scale_model_input(latents, timestep)
            noise = model(**{**call, "sample": scaled, "timestep": timestep}).sample
            call["sample"] = scheduler.step(noise, timestep, latents).prev_sample
    return [call["sample"] for _, _, call in runs]


@torch.no_grad()
def test_models_may_take_turns(config: MergeConfig) -> None:
    unet = tiny_sdxl_unet()
    one, other = transform(unet, config), transform(unet, config)
    alone = [*denoise((copy.deepcopy(one), 0)), *denoise((copy.deepcopy(one), 1))]
    in_turns = denoise((one, 0), (other, 1))
    for latents, expected in zip(in_turns, alone, strict=True):
        assert torch.equal(latents, expected)


@torch.no_grad()
def test_other_prompts_never_use_a_kept_plan() -> None:
    scheduled = transform(tiny_sdxl_unet(), CONFIGS["scheduled"])
    alone = [*denoise((copy.deepcopy(scheduled), 0)), *denoise((copy.deepcopy(scheduled), 1))]
    in_turns = denoise((scheduled, 0), (scheduled, 1))
    for latents, expected in zip(in_turns, alone, strict=True):
        assert torch.equal(latents, expected)
