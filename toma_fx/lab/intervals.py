"""Bootstrap intervals over prompts and seeds, which say how far a mean can be trusted."""

import numpy as np
from numpy.typing import ArrayLike

LEVEL = 0.95
"""Share of repeated experiments whose interval holds the true mean."""
DRAWS = 2000
"""Resampled experiments. More would move the ends by less than a table shows."""


def mean_interval(
    values_PS: ArrayLike, *, level: float = LEVEL, draws: int = DRAWS, seed: int = 0
) -> tuple[float, float]:
    """Bootstrap interval of the mean over prompts and seeds (percentile method).

    Images of one prompt resemble each other, so an experiment is repeated in two steps: prompts
    are drawn with replacement, then seeds within each. Fewer than about 20 prompts give intervals
    that are too narrow.

    Args:
        values_PS: ``(P, S)``, one value for each prompt and seed. Infinite values are allowed.
        level: the interval's confidence.
        draws: repetitions.
        seed: seed of the draws; the global random state is not touched.

    Returns:
        lower and upper end; NaN for both when there is only one value, since nothing then says how
        far another would be.
    """
    values = np.asarray(values_PS, dtype=float)
    prompts, seeds = values.shape
    if values.size < 2:
        return float("nan"), float("nan")
    generator = np.random.default_rng(seed)
    row = generator.integers(prompts, size=(draws, prompts, 1))
    column = generator.integers(seeds, size=(draws, prompts, seeds))
    means = values[row, column].mean(axis=(1, 2))
    # No interpolation between two draws, because infinite ones have no number between them.
    ends = np.quantile(means, [(1 - level) / 2, (1 + level) / 2], method="nearest")
    return float(ends[0]), float(ends[1])
