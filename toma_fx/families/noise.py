"""Noise levels: what a timestep means under a scheduler."""

import copy
import math
from collections.abc import Mapping
from functools import cache
from typing import Any

from torch import Tensor

from toma_fx.errors import InputError


def level_of_thousand(timestep: float, scheduler: Any) -> float:
    """The noise level of a timestep that counts the steps of training, 0 to 1000.

    Schedulers of EDM hand the model a quarter of the logarithm of sigma in place of a step. Its
    level is that of the step with the same sigma in Stable Diffusion's own training.

    Args:
        timestep: as the model takes it.
        scheduler: of the pipeline; None where it is not known.

    Raises:
        InputError: when the timestep is no step and no scheduler says what else it is.
    """
    if scheduler is not None and _is_log_sigma(scheduler):
        if abs(timestep) > 25:  # a sigma of e to the 100
            raise InputError(
                f"timestep {timestep:g} is no quarter of the logarithm of a sigma, which is what "
                f"{type(scheduler).__name__} hands the model; pass the timesteps of that scheduler"
            )
        return _level_of_sigma(math.exp(4 * timestep))
    steps = 1000 if scheduler is None else scheduler.config.get("num_train_timesteps", 1000)
    if not 0 <= timestep <= steps:
        raise InputError(
            f"timestep {timestep:g} is no step of {steps}, so its noise level is unknown; "
            "transform the pipeline rather than its model alone, so that its scheduler says what "
            "timesteps mean, or merge at every step: merge_below=1"
        )
    return timestep / steps


def level_of_sigma(timestep: float, scheduler: Any) -> float:
    """The noise level of a timestep that is the share of noise itself, as in flow matching.

    Raises:
        InputError: when the timestep is none.
    """
    if not 0 <= timestep <= 1:
        raise InputError(
            f"timestep {timestep:g} is no share of noise; the model takes timesteps of 0 to 1, "
            "those of diffusers' schedulers divided by 1000"
        )
    return timestep


def level_of_clean_share(timestep: float, scheduler: Any) -> float:
    """The noise level of a timestep that is the share of the image, 0 for pure noise.

    Raises:
        InputError: when the timestep is none.
    """
    if not 0 <= timestep <= 1:
        raise InputError(
            f"timestep {timestep:g} is no share of the image; the model takes timesteps of 0 to 1, "
            "(1000 - t) / 1000 for t of diffusers' schedulers"
        )
    return 1 - timestep


def timestep_of_last_token(call: Mapping[str, Any]) -> Tensor:
    """The timestep of each video in a batch; of those that tokens have, the last token's.

    With an image to start from, models hold the tokens of the first frame at timestep 0.
    """
    timestep: Tensor = call["timestep"]
    return timestep if timestep.ndim < 2 else timestep[:, -1]


def levels_of_run(scheduler: Any, steps: int, scale: float, **options: Any) -> list[float] | None:
    """The timesteps that a scheduler makes for a run, as the model takes them.

    Args:
        scheduler: of a pipeline; it is copied, not changed. None gives None.
        steps: of the run.
        scale: what the pipeline divides them by.
        **options: what the scheduler takes beside the number of steps.
    """
    if scheduler is None:
        return None
    return [float(t) / scale for t in planned(scheduler, steps, **options).timesteps]


def planned(scheduler: Any, steps: int, **options: Any) -> Any:
    """A copy of a scheduler, set to a run.

    Args:
        scheduler: of a pipeline.
        steps: of the run.
        **options: what the scheduler takes beside the number of steps.
    """
    copied = copy.deepcopy(scheduler)
    copied.set_timesteps(steps, **options)
    return copied


def flow_scheduler(**config: Any) -> Any:
    """A scheduler of flow matching, for families whose own one is not known in a run.

    Args:
        **config: with which the family was published.
    """
    # Here, since tables of families are read before any scheduler is needed.
    from diffusers import FlowMatchEulerDiscreteScheduler

    return FlowMatchEulerDiscreteScheduler(**config)


def even_sigmas(steps: int) -> list[float]:
    """The sigmas of a run before its scheduler shifts them, as most pipelines pass them."""
    return [1 - step / steps for step in range(steps)]


def shift_of_size(scheduler: Any, tokens: int) -> float:
    """The shift ``mu`` of diffusers' ``calculate_shift``, greater for greater images.

    Args:
        scheduler: whose configuration has the numbers.
        tokens: of the image.
    """
    config = scheduler.config
    few, most = config.get("base_image_seq_len", 256), config.get("max_image_seq_len", 4096)
    low, high = config.get("base_shift", 0.5), config.get("max_shift", 1.15)
    return float(low + (high - low) * (tokens - few) / (most - few))


def levels_of_flow(
    scheduler: Any, steps: int, *, sigmas: list[float] | None = None, mu: float | None = None
) -> list[float]:
    """Noise levels of a run of flow matching, in which a scheduler's timesteps are 0 to 1000.

    Args:
        scheduler: as made by ``flow_scheduler``, or of a pipeline; it is copied, not changed.
        steps: of the run.
        sigmas: as the pipeline passes them; a scheduler with flow sigmas of its own needs none.
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
    """The step, over 1000, at which Stable Diffusion's training had as much noise."""
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
