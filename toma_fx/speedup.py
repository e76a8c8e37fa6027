"""The ratio that a wanted speed-up needs, from arithmetic alone.

What is predicted is how many times fewer floating-point operations a call of the model takes. Time
follows it only as far as a machine is bound by arithmetic: see the README for what was measured.
"""

import logging
import math
from dataclasses import replace

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from toma_fx.config import MergeConfig
from toma_fx.errors import ConfigError, ModelError
from toma_fx.inputs import random_inputs, weightless
from toma_fx.transform import rewritten

logger = logging.getLogger(__name__)

CLOSE = 0.5
"""The ratio up to which images stay close (`MergeConfig.ratio`)."""


def for_speedup(model: nn.Module, config: MergeConfig, speedup: float) -> MergeConfig:
    """The configuration with the smallest ratio whose predicted arithmetic is small enough.

    Ratios are tried in steps of one token of a region. The image is of the model's native size.

    Args:
        model: a ``UNet2DConditionModel`` or ``FluxTransformer2DModel``.
        config: all options but the ratio.
        speedup: wanted arithmetic of the untouched model over that of the merged one, at least 1.

    Raises:
        ConfigError: when ``speedup`` is no number of at least 1.
        ModelError: when no ratio reaches it.
    """
    number = isinstance(speedup, int | float) and not isinstance(speedup, bool)
    if not number or not 1 <= speedup < math.inf:
        raise ConfigError(f"speedup={speedup!r} must be a number of at least 1, such as 1.3")
    skeleton = weightless(model)
    untouched, steps = _operations(skeleton), config.region_tokens

    def reached(step: int) -> float:
        return untouched / _operations(rewritten(skeleton, replace(config, ratio=step / steps)))

    low, high = 0, steps - 1  # the answer is in (low, high], or 0
    most = reached(high)
    if most < speedup:
        raise ModelError(
            f"speedup={speedup:g} cannot be reached on this {type(model).__name__}: even with "
            f"ratio={high / steps:.3g} the arithmetic of a call is only {most:.2f} times less; "
            "ask for less" + (", or merge every block: skip=()" if config.skip is None else "")
        )
    if speedup == 1:
        return replace(config, ratio=0)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if reached(middle) >= speedup else (middle, high)
    ratio = high / steps
    if ratio > CLOSE:
        logger.warning(
            "speedup=%g takes ratio=%.3g; above %g images change visibly", speedup, ratio, CLOSE
        )
    return replace(config, ratio=ratio)


def _operations(skeleton: nn.Module) -> int:
    """Floating-point operations of a call at the native size, of a model without data."""
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        skeleton(**random_inputs(skeleton))
    return int(counter.get_total_flops())
