"""The share of the correction that memory believes, measured on images."""

from typing import Any

import numpy as np
import pytest
import torch

import toma_fx
from tests.pipelines import tiny_flux_pipeline, tiny_sdxl_pipeline
from toma_fx import Memory, MergeConfig
from toma_fx.errors import ConfigError, ModelError
from toma_fx.transform import model_of

CONFIG = MergeConfig(ratio=0.75, skip=(), memory=Memory(every=2))
THETAS = (0.0, 0.5, 1.0)


def draw(pipe: Any) -> Any:
    size = {"height": 128, "width": 128, "num_inference_steps": 4, "output_type": "np"}
    return pipe(["a cat", "b"], generator=torch.Generator().manual_seed(0), **size).images


@pytest.mark.parametrize("build", [tiny_sdxl_pipeline, tiny_flux_pipeline])
def test_theta_is_the_one_whose_images_are_closest(build: Any) -> None:
    pipe, said = build(), list[str]()
    untouched = draw(pipe)
    found = toma_fx.calibrate_theta(
        pipe, draw, CONFIG, thetas=THETAS, progress=lambda done, total, what: said.append(what)
    )
    assert said == ["untouched", "untouched again", "theta 0", "theta 0.5", "theta 1"]
    assert not hasattr(model_of(pipe), "toma_recipe")
    errors = {}
    for theta in THETAS:
        toma_fx.transform(pipe, ratio=0.75, skip=(), memory=Memory(every=2, theta=theta))
        squares = ((draw(pipe).astype(np.float64) - untouched) ** 2).mean((1, 2, 3))
        squares = np.maximum(squares, 1e-8 * untouched.astype(np.float64).var())
        errors[theta] = float(np.sqrt(squares.prod()))
        toma_fx.restore(pipe)
    assert found.errors == pytest.approx(errors, rel=1e-4)
    assert len(set(errors.values())) == 3
    best = min(errors, key=errors.__getitem__)
    assert found.theta == best
    assert found.config == MergeConfig(ratio=0.75, skip=(), memory=Memory(every=2, theta=best))


def test_the_pipeline_is_given_back_when_drawing_fails() -> None:
    pipe, count = tiny_sdxl_pipeline(), 0

    def fails(pipe: Any) -> Any:
        nonlocal count
        count += 1
        if count == 3:
            raise RuntimeError("no more")
        return np.zeros((1, 2, 2, 3))

    with pytest.raises(RuntimeError, match="no more"):
        toma_fx.calibrate_theta(pipe, fails, CONFIG)
    assert not hasattr(model_of(pipe), "toma_recipe")


def test_what_cannot_be_measured_is_refused() -> None:
    pipe = tiny_sdxl_pipeline()
    with pytest.raises(ConfigError, match="memory=None has no theta"):
        toma_fx.calibrate_theta(pipe, draw, MergeConfig())
    with pytest.raises(ConfigError, match="holds no value to try"):
        toma_fx.calibrate_theta(pipe, draw, CONFIG, thetas=())
    with pytest.raises(ModelError, match="needs a pipeline, not a UNet2DConditionModel"):
        toma_fx.calibrate_theta(pipe.unet, draw, CONFIG)
    with pytest.raises(ConfigError, match="find ratios with memory=None"):
        toma_fx.calibrate(pipe, draw, CONFIG)


def test_what_draws_other_images_each_time_is_refused() -> None:
    images = iter(np.arange(2.0))
    with pytest.raises(ModelError, match="other images when it was called again"):
        toma_fx.calibrate_theta(tiny_sdxl_pipeline(), lambda pipe: [next(images)], CONFIG)
