"""Conversion of timesteps to noise levels under a scheduler."""

import copy
import math
from collections.abc import Mapping
from functools import cache
from typing import Any

from torch import Tensor

from toma_fx.errors import InputError


def level_of_thousand(timestep: float, scheduler: Any) -> float:
    """Return the noise level of a timestep that counts training steps, 0 to 1000.

    EDM schedulers pass a quarter of the logarithm of sigma instead of a step. Its level is that of
    the step with the same sigma in Stable Diffusion's own training.

    Args:
        timestep: as the model takes it.
        scheduler: the pipeline's scheduler; None if unknown.

    Raises:
        InputError: when the timestep is not a step and the scheduler does not tell its meaning.
    """
    if scheduler is not None and _is_log_sigma(scheduler):
        if abs(timestep) > 25:  # a sigma of e to the 100
            raise InputError(
                f"timestep {timestep:g} is not a quarter of the logarithm of a sigma, which "
                f"{type(scheduler).__name__} passes to the model; pass that scheduler's timesteps"
            )
        return _level_of_sigma(math.exp(4 * timestep))
    steps = 1000 if scheduler is None else scheduler.config.get("num_train_timesteps", 1000)
    if not 0 <= timestep <= steps:
        raise InputError(
            f"timestep {timestep:g} is not in [0, {steps}], so its noise level is unknown; "
            "transform the pipeline instead of its model, so that its scheduler tells what "
            "timesteps mean, or merge at every step: merge_below=1"
        )
    return timestep / steps


def level_of_sigma(timestep: float, scheduler: Any) -> float:
    """Return the noise level of a timestep that is the share of noise, as in flow matching.

    Raises:
        InputError: when the timestep is not in [0, 1].
    """
    if not 0 <= timestep <= 1:
        raise InputError(
            f"timestep {timestep:g} is not a share of noise; the model takes timesteps of 0 to 1, "
            "those of diffusers' schedulers divided by 1000"
        )
    return timestep


def level_of_clean_share(timestep: float, scheduler: Any) -> float:
    """Return the noise level of a timestep that is the share of the image, 0 for pure noise.

    Raises:
        InputError: when the timestep is not in [0, 1].
    """
    if not 0 <= timestep <= 1:
        raise InputError(
            f"timestep {timestep:g} is not a share of the image; the model takes timesteps of 0 to "
            "1, (1000 - t) / 1000 for t of diffusers' schedulers"
        )
    return 1 - timestep


def timestep_of_last_token(call: Mapping[str, Any]) -> Tensor:
    """Return the timestep of each video in a batch; if tokens have timesteps, the last token's.

    With an image to start from, models keep the tokens of the first frame at timestep 0.
    """
    timestep: Tensor = call["timestep"]
    return timestep if timestep.ndim < 2 else timestep[:, -1]


def levels_of_run(scheduler: Any, steps: int, scale: float, **options: Any) -> list[float] | None:
    """Return the timesteps of a scheduler for a run, as the model takes them.

    Args:
        scheduler: the pipeline's scheduler; it is copied, not changed. None gives None.
        steps: number of steps of the run.
        scale: the pipeline's divisor for timesteps.
        **options: further arguments of ``scheduler.set_timesteps``.
    """
    if scheduler is None:
        return None
    return [float(t) / scale for t in planned(scheduler, steps, **options).timesteps]


def planned(scheduler: Any, steps: int, **options: Any) -> Any:
    """Return a copy of a scheduler that is set to a run.

    Args:
        scheduler: the pipeline's scheduler.
        steps: number of steps of the run.
        **options: further arguments of ``scheduler.set_timesteps``.
    """
    copied = copy.deepcopy(scheduler)
    copied.set_timesteps(steps, **options)
    return copied


def flow_scheduler(**config: Any) -> Any:
    """Make a flow-matching scheduler, for families whose own scheduler is unknown in a run.

    Args:
        **config: the family's published configuration.
    """
    # Imported here because families are loaded before any scheduler is needed.
    from diffusers import FlowMatchEulerDiscreteScheduler

    return FlowMatchEulerDiscreteScheduler(**config)


def even_sigmas(steps: int) -> list[float]:
    """Return the sigmas of a run before its scheduler shifts them, as most pipelines pass them."""
    return [1 - step / steps for step in range(steps)]


def shift_of_size(scheduler: Any, tokens: int) -> float:
    """Return the shift ``mu`` of diffusers' ``calculate_shift``, larger for larger images.

    Args:
        scheduler: its configuration has the numbers.
        tokens: number of image tokens.
    """
    config = scheduler.config
    few, most = config.get("base_image_seq_len", 256), config.get("max_image_seq_len", 4096)
    low, high = config.get("base_shift", 0.5), config.get("max_shift", 1.15)
    return float(low + (high - low) * (tokens - few) / (most - few))


def levels_of_flow(
    scheduler: Any, steps: int, *, sigmas: list[float] | None = None, mu: float | None = None
) -> list[float]:
    """Return the noise levels of a flow-matching run, with scheduler timesteps from 0 to 1000.

    Args:
        scheduler: made by ``flow_scheduler``, or the pipeline's; it is copied, not changed.
        steps: number of steps of the run.
        sigmas: as the pipeline passes them; a scheduler with its own flow sigmas needs none.
        mu: the shift, for schedulers that take it.
    """
    options: dict[str, Any] = {}
    if sigmas is not None and not scheduler.config.get("use_flow_sigmas"):
        options["sigmas"] = sigmas
    if mu is not None and scheduler.config.get("use_dynamic_shifting"):
        options["mu"] = mu
    trained = scheduler.config.get("num_train_timesteps", 1000)
    return [float(t) / trained for t in planned(scheduler, steps, **options).timesteps]


def _is_log_sigma(scheduler: Any) -> bool:
    config = scheduler.config
    return type(scheduler).__name__.startswith(("EDM", "CMStochasticIterative")) or (
        config.get("timestep_type") == "continuous"
        and config.get("prediction_type") == "v_prediction"
    )


def _level_of_sigma(sigma: float) -> float:
    """Return the level of the Stable Diffusion training step with the same sigma."""
    sigmas = _training_sigmas()
    below = sum(each <= sigma for each in sigmas)
    return below / len(sigmas)


@cache
def _training_sigmas() -> tuple[float, ...]:
    low, high, steps = 0.00085**0.5, 0.012**0.5, 1000
    kept, sigmas = 1.0, []
    for step in range(steps):
        beta = (low + (high - low) * step / (steps - 1)) ** 2
        kept *= 1 - beta
        sigmas.append(((1 - kept) / kept) ** 0.5)
    return tuple(sigmas)
