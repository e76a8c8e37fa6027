"""A ratio for each block, and the noise level to merge below, from what each costs an image.

The same arithmetic can be saved in many places. `calibrate` draws some images untouched, then with
one group of blocks merged at a time, then at other ratios and below other noise levels, and so
learns where merging hurts. `Calibration.config` spends a budget where it hurts least. Nothing is
trained, and the model that results is one that `toma_fx.transform` makes by hand-given options too.

The prediction is deliberately simple: the squared error of the image is the sum over groups of what
each adds alone, times a factor for the ratio and one for the noise level.
"""

import fnmatch
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from toma_fx.config import MergeConfig
from toma_fx.errors import ConfigError, ModelError
from toma_fx.hooks import copied_with_hooks
from toma_fx.inputs import weightless
from toma_fx.report import count_blocks
from toma_fx.transform import model_of, restore, rewrite_of, rewritten, transform

RATIOS = (0.25, 0.5, 0.75, 0.9)
"""What a group may get, and 0."""
PROBE = 0.5
"""At which groups and noise levels are tried."""
NOISE_LEVELS = (1.0, 0.8, 0.6, 0.4)
"""See `MergeConfig.merge_below`."""
GROUPS = 8
"""At least so many groups are tried apart; where a model has fewer lists of blocks, their parts."""

Draw = Callable[[Any], npt.ArrayLike]
"""Draws images with a pipeline, the same ones whenever it is called: ``(images, ...)``, of any
shape and unit. The error is theirs, so pixels are better than latents."""


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """What merging costs a model's images, and what it saves.

    Errors are squared differences to the untouched images: the mean over an image's values, and of
    those the geometric mean over images, which no single image decides.
    """

    base: MergeConfig
    """All options that are not allotted."""
    groups: Mapping[str, tuple[str, ...]]
    """Name of each group, and the patterns of its blocks."""
    errors: Mapping[str, float]
    """Of merging a group alone, at `PROBE`."""
    savings: Mapping[str, Mapping[float, int]]
    """By group and ratio, operations of one call at the native size that merging it saves."""
    by_ratio: Mapping[float, float]
    """Error of merging all groups at a ratio, relative to that at `PROBE`."""
    by_noise: Mapping[float, float]
    """Error of merging below a noise level, relative to that of merging at every step."""
    steps: Mapping[float, float]
    """Share of a run's steps that lie below each noise level."""
    uniform: Callable[[float], int]
    """Operations of one call that a uniform ratio saves."""

    def config(
        self, ratio: float = 0.5, *, noise_levels: Sequence[float] | None = None
    ) -> MergeConfig:
        """The options that change images least at the arithmetic of a uniform ratio.

        Args:
            ratio: the uniform ratio, at every step, in (0, 1).
            noise_levels: choose ``merge_below`` from these alone. ``(1.0,)`` merges at every step,
                for a model that is captured as one graph.

        Returns:
            options with ``block_ratios`` and ``merge_below``; their ``ratio`` is 0, since every
            block has its own.

        Raises:
            ConfigError: when a noise level was not measured.
            ModelError: when no allotment saves as much, as when ``ratio`` is near 1.
        """
        levels = tuple(self.steps if noise_levels is None else noise_levels)
        unknown = [level for level in levels if level not in self.steps]
        if unknown:
            raise ConfigError(
                f"noise_levels={unknown} were not measured; choose from {list(self.steps)}"
            )
        replace(self.base, ratio=ratio)  # checks it
        wanted = self.uniform(ratio)
        found = [(self._allot(wanted / self.steps[b]), b) for b in levels if self.steps[b]]
        possible = [(*allotted, b) for allotted, b in found if allotted is not None]
        if not possible:
            raise ModelError(
                f"no allotment saves what ratio={ratio} at every step does; ask for a smaller one"
            )
        _, ratios, below = min(possible, key=lambda each: each[0] * self.by_noise[each[2]])
        own = {pattern: ratios[name] for name, group in self.groups.items() for pattern in group}
        return replace(
            self.base, ratio=0, block_ratios=tuple(own.items()), merge_below=below, skip=()
        )

    def _allot(self, wanted: float) -> tuple[float, dict[str, float]] | None:
        """Error and ratio of each group for savings of at least ``wanted`` operations a call.

        Each group's choices that lie on the lower hull of error over saving are taken in the order
        of what an operation costs, which is best for every saving that it stops at.
        """
        steps = [
            (cost, saving, error, name, ratio)
            for name in self.groups
            for cost, saving, error, ratio in _hull(
                [
                    (saving, self.errors[name] * self.by_ratio[ratio], ratio)
                    for ratio, saving in self.savings[name].items()
                ]
            )
        ]
        ratios = dict.fromkeys(self.groups, 0.0)
        total = spent = 0.0
        for _, saving, error, name, ratio in sorted(steps):
            if total >= wanted:
                break
            ratios[name] = ratio
            total, spent = total + saving, spent + error
        return (spent, ratios) if total >= wanted else None


def calibrate(
    pipeline: Any,
    draw: Draw,
    config: MergeConfig | None = None,
    *,
    noise_levels: Sequence[float] = NOISE_LEVELS,
    progress: Callable[[str], None] = lambda what: None,
) -> Calibration:
    """Measure where merging costs a pipeline's images most.

    It draws with ``2 + groups + ratios + noise levels - 1`` configurations, 20 for SDXL.

    Args:
        pipeline: with an untouched model, which it has again afterwards.
        draw: see `Draw`. A few prompts are enough; the steps should be those of later use.
        config: options that are not allotted; those that are, and ``skip``, are not looked at.
        noise_levels: to choose ``merge_below`` from; 1.0 among them.
        progress: is told what is drawn next.

    Raises:
        ConfigError: when the noise levels do not have 1.0, or a schedule is to merge below one.
        ModelError: when `transform` refuses the model, or two untouched drawings differ.

    Example:
        >>> def draw(pipe):  # doctest: +SKIP
        ...     seed = torch.Generator().manual_seed(0)
        ...     return pipe(prompts, generator=seed, output_type="np").images
        >>> calibration = toma_fx.calibrate(pipe, draw)  # doctest: +SKIP
        >>> toma_fx.transform(pipe, calibration.config(0.5))  # doctest: +SKIP
    """
    if 1.0 not in noise_levels:
        raise ConfigError(f"noise_levels={tuple(noise_levels)} must contain 1.0, every step")
    base = replace(config or MergeConfig(), ratio=0, block_ratios=(), merge_below=1.0, skip=())
    model = model_of(pipeline)
    paths = list(rewrite_of(transform(model, base)).treatments)
    groups = _groups(paths)
    progress("untouched")
    untouched = _images(draw(pipeline))
    progress("untouched again")
    if not np.array_equal(_images(draw(pipeline)), untouched):
        raise ModelError(
            "draw gave other images when it was called again; let it make its generator anew, as "
            "in torch.Generator().manual_seed(0)"
        )

    def error(what: str, **options: Any) -> float:
        progress(what)
        transform(pipeline, replace(base, **options))
        try:
            return _error(_images(draw(pipeline)), untouched)
        finally:
            restore(pipeline)

    alone = {
        name: error(f"{name} alone", block_ratios=_all_at(PROBE, group))
        for name, group in groups.items()
    }
    by_ratio = {ratio: error(f"ratio {ratio}", ratio=ratio) for ratio in RATIOS}
    by_noise = {
        level: error(f"below noise {level}", ratio=PROBE, merge_below=level)
        if level < 1
        else by_ratio[PROBE]
        for level in noise_levels
    }
    skeleton = weightless(copied_with_hooks(model)[0])  # arithmetic has no use for hooks

    def counted(ratio: float) -> tuple[dict[str, int], int]:
        return count_blocks(rewritten(skeleton, replace(base, ratio=ratio)), paths)[1:]

    (before, whole), after = counted(0), {ratio: counted(ratio)[0] for ratio in RATIOS}
    return Calibration(
        base=base,
        groups=groups,
        errors=alone,
        savings={
            name: {
                ratio: sum(before[p] - after[ratio][p] for p in paths if _fits(p, group))
                for ratio in RATIOS
            }
            for name, group in groups.items()
        },
        by_ratio={ratio: value / by_ratio[PROBE] for ratio, value in by_ratio.items()},
        by_noise={level: value / by_ratio[PROBE] for level, value in by_noise.items()},
        steps=_steps_below(pipeline, noise_levels),
        uniform=lambda ratio: whole - counted(ratio)[1],
    )


def _groups(paths: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """Lists of blocks, or parts of them, by name, with patterns of their blocks."""
    lists: dict[str, list[str]] = {}
    for path in paths:
        lists.setdefault(path.rpartition(".")[0], []).append(path)
    parts = math.ceil(GROUPS / len(lists))
    if parts == 1:
        return {parent: (f"{parent}.*",) for parent in lists}
    groups = {}
    for members in lists.values():
        for part in np.array_split(np.array(members), min(parts, len(members))):
            first, last = str(part[0]), str(part[-1])
            name = first if len(part) == 1 else f"{first}-{last.rpartition('.')[2]}"
            groups[name] = tuple(map(str, part))
    return groups


def _all_at(ratio: float, patterns: Sequence[str]) -> tuple[tuple[str, float], ...]:
    return tuple((pattern, ratio) for pattern in patterns)


def _fits(path: str, patterns: Sequence[str]) -> bool:
    return any(fnmatch.fnmatchcase(path, pattern) for pattern in patterns)


def _images(drawn: npt.ArrayLike) -> npt.NDArray[np.float64]:
    return np.asarray(drawn, dtype=np.float64)


def _error(images: npt.NDArray[np.float64], untouched: npt.NDArray[np.float64]) -> float:
    squares = ((images - untouched) ** 2).reshape(len(images), -1).mean(1)
    return float(np.exp(np.log(np.maximum(squares, 1e-20)).mean()))


def _steps_below(pipeline: Any, noise_levels: Sequence[float]) -> dict[float, float]:
    """From the timesteps that the pipeline's scheduler was left with."""
    timesteps = [float(timestep) / 1000 for timestep in pipeline.scheduler.timesteps]
    return {
        level: sum(timestep <= level for timestep in timesteps) / len(timesteps)
        for level in noise_levels
    }


def _hull(choices: Sequence[tuple[float, float, float]]) -> list[tuple[float, float, float, float]]:
    """The steps of the lower hull of ``(saving, error, ratio)`` from ``(0, 0)`` on.

    Returns:
        ``(error per saving, saving, error, ratio)`` of each step, in increasing order.
    """
    steps: list[tuple[float, float, float, float]] = []
    saved = spent = 0.0
    while ahead := [
        ((error - spent) / (saving - saved), saving - saved, error - spent, ratio)
        for saving, error, ratio in choices
        if saving > saved
    ]:
        best = min(ahead, key=lambda step: (step[0], -step[1]))
        steps.append(best)
        saved, spent = saved + best[1], spent + best[2]
    return steps
