"""Timesteps of diffusers' schedulers as noise levels: 1 for noise and 0 for the image."""

import math
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    EDMDPMSolverMultistepScheduler,
    EDMEulerScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    LCMScheduler,
)

from toma_fx.errors import InputError
from toma_fx.families import load_family
from toma_fx.families.noise import level_of_sigma, level_of_thousand, levels_of_run

# numpy, of how diffusers hands it a tensor.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

SD: dict[str, Any] = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
"""How Stable Diffusion was trained."""

OF_THE_UNET: dict[str, Callable[[], Any]] = {
    "euler": lambda: EulerDiscreteScheduler(**SD),
    "euler, trailing": lambda: EulerDiscreteScheduler(**SD, timestep_spacing="trailing"),
    "karras": lambda: EulerDiscreteScheduler(**SD, use_karras_sigmas=True),
    "ddim": lambda: DDIMScheduler(**SD),
    "lcm": lambda: LCMScheduler(**SD),
    "edm euler": EDMEulerScheduler,
    "edm dpm-solver": EDMDPMSolverMultistepScheduler,
    # Those of CosXL and Stable Video Diffusion.
    "continuous": lambda: EulerDiscreteScheduler(
        **SD,
        timestep_type="continuous",
        prediction_type="v_prediction",
        use_karras_sigmas=True,
        sigma_min=0.002,
        sigma_max=700.0,
    ),
}
OF_FLUX: dict[str, Callable[[], Any]] = {
    "flow matching": FlowMatchEulerDiscreteScheduler,
    "shifted": lambda: FlowMatchEulerDiscreteScheduler(shift=3.0),
    "shifted by size": lambda: FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
}


def levels(family: str, scheduler: Any, steps: int = 20) -> list[float]:
    call = {"hidden_states": torch.empty(1, 1024, 4), "sample": torch.empty(1, 4, 8, 8)}
    return load_family(family).run_levels(scheduler, steps, call)


@pytest.mark.parametrize(
    ("family", "make"),
    [
        *(pytest.param("unet", make, id=f"unet, {name}") for name, make in OF_THE_UNET.items()),
        *(pytest.param("flux", make, id=f"flux, {name}") for name, make in OF_FLUX.items()),
        pytest.param("unet", lambda: None, id="unet, no scheduler"),
        pytest.param("flux", lambda: None, id="flux, no scheduler"),
    ],
)
def test_the_noise_of_a_run_falls_from_noise_to_the_image(
    family: str, make: Callable[[], Any]
) -> None:
    run = levels(family, make())
    assert len(run) == 20
    assert all(0 <= level <= 1 for level in run)
    assert all(first >= second for first, second in pairwise(run))
    assert len(set(run)) >= 10
    assert run[0] > 0.9
    assert run[-1] < 0.4


@pytest.mark.parametrize("make", OF_THE_UNET.values(), ids=OF_THE_UNET)
def test_planning_a_run_leaves_the_scheduler_alone(make: Callable[[], Any]) -> None:
    scheduler = make()
    before = scheduler.timesteps.clone(), scheduler.config
    levels_of_run(scheduler, 7, scale=1)
    assert torch.equal(scheduler.timesteps, before[0])
    assert scheduler.config == before[1]


@pytest.mark.parametrize("edm", [EDMEulerScheduler, EDMDPMSolverMultistepScheduler])
def test_edm_has_the_level_of_euler_at_the_same_sigma(edm: Callable[[], Any]) -> None:
    euler = EulerDiscreteScheduler(**SD)
    euler.set_timesteps(20)
    for timestep, sigma in zip(euler.timesteps, euler.sigmas, strict=False):
        expected = level_of_thousand(float(timestep), euler)
        given = level_of_thousand(0.25 * math.log(float(sigma)), edm())
        assert given == pytest.approx(expected, abs=2e-3)


def test_the_timesteps_of_edm_are_quarters_of_logarithms() -> None:
    """What the level is computed from is what diffusers hands the model."""
    edm = EDMEulerScheduler()
    edm.set_timesteps(10)
    given = [0.25 * math.log(float(sigma)) for sigma in edm.sigmas[:-1]]
    torch.testing.assert_close(edm.timesteps, torch.tensor(given), rtol=1e-4, atol=1e-4)


def test_a_shift_gives_more_steps_to_high_noise() -> None:
    even, shifted = (levels("flux", FlowMatchEulerDiscreteScheduler(shift=s)) for s in (1.0, 3.0))
    assert all(a <= b for a, b in zip(even, shifted, strict=True))
    assert sum(level > 0.5 for level in shifted) > sum(level > 0.5 for level in even)
    sigmas = FlowMatchEulerDiscreteScheduler(shift=3.0)
    sigmas.set_timesteps(20, sigmas=[1 - step / 20 for step in range(20)])  # as Flux's pipeline
    assert shifted == pytest.approx(sigmas.sigmas[:-1].tolist(), rel=1e-5)


@pytest.mark.parametrize("timestep", [-0.3, -1.6, 1000.5, 3000.0])
@pytest.mark.parametrize("make", [lambda: None, lambda: EulerDiscreteScheduler(**SD)])
def test_a_timestep_that_is_no_step_of_training(timestep: float, make: Callable[[], Any]) -> None:
    with pytest.raises(InputError, match=r"is not in \[0, 1000\].*transform the pipeline"):
        level_of_thousand(timestep, make())


@pytest.mark.parametrize("timestep", [-1.6, -0.3, 0.0, 1.09])
def test_under_edm_a_timestep_below_0_is_one(timestep: float) -> None:
    assert 0 <= level_of_thousand(timestep, EDMEulerScheduler()) <= 1


def test_a_timestep_that_is_no_logarithm() -> None:
    with pytest.raises(InputError, match=r"999 is not a quarter .* which EDMEulerScheduler"):
        level_of_thousand(999.0, EDMEulerScheduler())


@pytest.mark.parametrize("timestep", [-0.1, 1.5, 500.0])
def test_a_timestep_that_is_no_share_of_noise(timestep: float) -> None:
    with pytest.raises(InputError, match=r"is not a share of noise; .* divided by 1000"):
        level_of_sigma(timestep, None)
    assert level_of_sigma(timestep / 1000 if timestep > 0 else 0.0, None) <= 1
