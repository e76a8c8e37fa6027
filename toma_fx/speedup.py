"""Choice of the ratio for a wanted speed-up, predicted from arithmetic only.

The prediction is the factor by which a model's floating-point operations shrink. Time follows it
only if the machine is limited by arithmetic: see docs/speed.md for measurements.
"""

import logging
import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import nn

from toma_fx.arithmetic import run_operations
from toma_fx.build import merged_copy, recipe_of_transformed
from toma_fx.calls import LastCall, to_meta
from toma_fx.config import MergeConfig
from toma_fx.errors import ConfigError, ModelError
from toma_fx.families.rows import Family
from toma_fx.inputs import random_inputs, weightless

logger = logging.getLogger(__name__)

CLOSE = 0.5
"""The ratio up to which images stay close (`MergeConfig.ratio`)."""


STEPS = 25
"""Number of steps of the denoising run over which arithmetic is averaged."""


def for_speedup(
    model: nn.Module,
    config: MergeConfig,
    speedup: float,
    inputs: Mapping[str, Any] | None = None,
    scheduler: Any = None,
    family: Family | None = None,
) -> MergeConfig:
    """Return the configuration with the smallest ratio that reaches the predicted speed-up.

    Ratios are tried in steps of one token per region.

    Args:
        model: a model of the family.
        config: all options except the ratio.
        speedup: wanted arithmetic of the untouched model divided by that of the merged one, at
            least 1, averaged over a run.
        inputs: keyword arguments of a call; one at the model's native size if omitted.
        scheduler: the pipeline's scheduler, which makes the run's timesteps; None for the usual
            ones.
        family: family of the model, if it is not a known one.

    Raises:
        ConfigError: when ``speedup`` is not a number of at least 1.
        ModelError: when no ratio reaches it, or when no fitting call can be made up; the message
            then asks for ``inputs``.
    """
    number = isinstance(speedup, int | float) and not isinstance(speedup, bool)
    if not number or not 1 <= speedup < math.inf:
        raise ConfigError(f"speedup={speedup!r} must be a number of at least 1, such as 1.3")
    if speedup == 1:
        return replace(config, ratio=0)
    skeleton, steps = weightless(model), config.region_tokens
    call = LastCall(random_inputs(skeleton) if inputs is None else to_meta(inputs))

    def reached(step: int) -> float:
        merged = merged_copy(skeleton, replace(config, ratio=step / steps), family=family)
        counted = run_operations(merged, recipe_of_transformed(merged), call, STEPS, scheduler)
        return counted.before[""] / counted.after[""]

    low, high = 0, steps - 1  # the answer is in (low, high], or 0
    most = reached(high)
    if most < speedup:
        raise ModelError(
            f"speedup={speedup:g} cannot be reached on this {type(model).__name__}: even with "
            f"ratio={high / steps:.3g} the arithmetic of a call is only {most:.2f} times less; "
            "ask for less" + (", or merge every block: skip=()" if config.skip is None else "")
        )
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if reached(middle) >= speedup else (middle, high)
    ratio = high / steps
    if ratio > CLOSE:
        logger.warning(
            "speedup=%g takes ratio=%.3g; above %g images change visibly", speedup, ratio, CLOSE
        )
    return replace(config, ratio=ratio)
