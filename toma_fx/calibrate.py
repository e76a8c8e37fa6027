"""A ratio for each block, from what merging it costs an image.

The same arithmetic can be saved in many places. `calibrate` draws some images untouched, then with
one part of the model merged at a time, then at other ratios, and so learns where merging hurts.
`Calibration.config` spends a budget where it hurts least. Nothing is trained, and the options that
result could as well have been given by hand.

The prediction is deliberately simple: the squared error of an image is the sum over parts of what
each adds alone, times a factor for the ratio.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import nn

from toma_fx.arithmetic import count_parts, first_call
from toma_fx.build import merged_copy, recipe_of_transformed
from toma_fx.calibration_files import (
    CalibrationFile,
    ForeignError,
    mapping,
    numbers,
    origin_of,
    strings,
)
from toma_fx.config import MergeConfig, matches
from toma_fx.errors import ConfigError, ModelError
from toma_fx.inputs import weightless
from toma_fx.transform import model_of, transform, while_transformed

RATIOS = (0.25, 0.5, 0.75, 0.9)
"""Ratios that a part may get, besides 0."""
PROBE = 0.5
"""At which parts and noise levels are tried."""
UNIFORM = (0.1, 0.2, 0.25, 0.3, 0.4, 0.5, 0.6, 0.7, 0.75, 0.8, 0.9)
"""Uniform ratios whose savings are counted; between them they are interpolated."""
PARTS = 8
"""At least so many parts are tried; where a model has fewer lists of blocks, lists are parted."""

Draw = Callable[[Any], npt.ArrayLike]
"""Draws images with a pipeline, the same ones whenever it is called: ``(images, ...)``, of any
shape and unit. The error is theirs, so pixels are better than latents, and floats than bytes."""
Progress = Callable[[int, int, str], None]
"""Told how many drawings of how many are done, and what is drawn next."""


@dataclass(frozen=True, kw_only=True)
class Calibration(CalibrationFile):
    """The cost of merging to a model's images by block, and its savings.

    Errors are squared differences to the untouched images: the mean over an image's values, and of
    those the geometric mean over images, which no single image decides.
    """

    FILE = "calibration.json"
    _MAKER = "calibrate"

    parts: Mapping[str, tuple[str, ...]]
    """Name of each part of the model, and the patterns of its blocks."""
    errors: Mapping[str, float]
    """Of merging a part alone, at `PROBE`."""
    savings: Mapping[str, Mapping[float, int]]
    """By part and ratio, operations of the drawing's first call that merging it saves."""
    uniform: Mapping[float, int]
    """Operations that a uniform ratio saves, with the blocks skipped that it skips by default."""
    by_ratio: Mapping[float, float]
    """Error of merging the better half of the parts at a ratio, relative to that at `PROBE`."""

    def config(self, ratio: float = 0.5) -> MergeConfig:
        """The options that change images least at the arithmetic of a uniform ratio.

        Args:
            ratio: the uniform ratio; above 0 and up to 0.9.

        Returns:
            options with ``block_ratios``; their ``ratio`` is 0, since every block has its own.

        Raises:
            ConfigError: when the ratio is none of these.
            ModelError: when no allotment saves as much.
        """
        number = isinstance(ratio, int | float) and not isinstance(ratio, bool)
        if not number or not 0 < ratio <= UNIFORM[-1]:
            raise ConfigError(
                f"ratio={ratio!r} must be a number above 0 and up to {UNIFORM[-1]}: the uniform "
                "ratio whose arithmetic is allotted, such as 0.5"
            )
        wanted = np.interp(ratio, [0, *self.uniform], [0, *self.uniform.values()])
        ratios = self._allot(float(wanted))
        if ratios is None:
            raise ModelError(
                f"no allotment saves what ratio={ratio} everywhere does; ask for a smaller ratio"
            )
        own = tuple((p, ratios[name]) for name, patterns in self.parts.items() for p in patterns)
        return replace(self.base, ratio=0, block_ratios=own)

    def _allot(self, wanted: float) -> dict[str, float] | None:
        """The ratio of each part for savings of at least ``wanted`` operations a call.

        Each part's choices that lie on the lower hull of error over saving are taken in the order
        of what an operation costs, which is best for every saving that it stops at.
        """
        steps = [
            (*step, name)
            for name in self.parts
            for step in _hull(
                [
                    (saving, self.errors[name] * self.by_ratio[ratio], ratio)
                    for ratio, saving in self.savings[name].items()
                ]
            )
        ]
        ratios, total = dict.fromkeys(self.parts, 0.0), 0.0
        for _, saving, ratio, name in sorted(steps):
            if total >= wanted:
                break
            ratios[name] = ratio
            total += saving
        return ratios if total >= wanted else None

    @classmethod
    def _fields_of(cls, content: dict[str, Any]) -> dict[str, Any]:
        given = mapping("parts", content["parts"])
        parts = {name: strings("parts", patterns) for name, patterns in given.items()}
        errors = numbers("errors", content["errors"], parts)
        savings = mapping("savings", content["savings"])
        found = {
            "parts": parts,
            # As the parts are ordered, which is the order of the blocks.
            "errors": {name: errors[name] for name in parts},
            "savings": {name: numbers("savings", savings.get(name)) for name in parts},
            "uniform": dict(sorted(numbers("uniform", content["uniform"]).items())),
            "by_ratio": numbers("by_ratio", content["by_ratio"]),
        }
        if not found["uniform"] or any(
            each.keys() != found["by_ratio"].keys() for each in found["savings"].values()
        ):
            raise ForeignError("its savings, uniform and by_ratio are not of the same ratios")
        return found


def calibrate(
    pipeline: Any,
    draw: Draw,
    config: MergeConfig | None = None,
    *,
    name: str = "",
    progress: Progress = lambda done, total, what: None,
) -> Calibration:
    """Measure where merging costs a pipeline's images most.

    SDXL is drawn with 17 configurations: untouched twice, each of its 11 parts alone, and the
    better half of them at 4 ratios.

    Args:
        pipeline: with an untouched model, which it has again afterwards.
        draw: see `Draw`. A few prompts are enough; size, steps and guidance should be those of
            later use.
        config: options that are not allotted. Blocks that its ``skip`` names stay unmerged. With
            ``merge_below`` other blocks may be the ones that suffer: calibrate with that of later
            use.
        name: what the calibration is called; the model's name when left out.
        progress: see `Progress`.

    Raises:
        ConfigError: when the options hold ``block_ratios`` already, or a memory.
        ModelError: when `transform` refuses the model, or two untouched drawings differ.

    Example:
        >>> def draw(pipe):  # doctest: +SKIP
        ...     seed = torch.Generator().manual_seed(0)
        ...     return pipe(prompts, generator=seed, output_type="np").images
        >>> calibration = toma_fx.calibrate(pipe, draw)  # doctest: +SKIP
        >>> toma_fx.transform(pipe, calibration.config(0.5))  # doctest: +SKIP
    """
    config = config or MergeConfig()
    _check_options(pipeline, config)
    model = model_of(pipeline)
    base = replace(config, ratio=0, skip=config.skip or ())
    merged_blocks = recipe_of_transformed(transform(model, replace(base, ratio=PROBE))).merged
    paths = [block.path for block in merged_blocks]
    modules = {block.path: block.module for block in merged_blocks}
    parts = _parts(paths)
    total = 2 + len(parts) + len(RATIOS)
    done = 0

    def images(what: str) -> npt.NDArray[np.float64]:
        nonlocal done
        progress(done, total, what)
        done += 1
        return np.asarray(draw(pipeline), dtype=np.float64)

    untouched = images("untouched")
    check_same(images("untouched again"), untouched)

    def merged(what: str, names: Sequence[str], ratio: float) -> float:
        own = tuple((pattern, ratio) for name in names for pattern in parts[name])
        with while_transformed(pipeline, replace(base, block_ratios=own)):
            return error_of(images(what), untouched)

    alone = {name: merged(f"{name} alone", [name], PROBE) for name in parts}
    # Of the better half alone: with all parts merged an image may become another one, which no
    # higher ratio makes worse.
    better = sorted(parts, key=alone.__getitem__)[: math.ceil(len(parts) / 2)]
    by_ratio = {ratio: merged(f"ratio {ratio}", better, ratio) for ratio in RATIOS}
    call = first_call(model, lambda: draw(pipeline))
    skeleton = weightless(model)

    def counted(options: MergeConfig) -> dict[str, int]:
        counts = count_parts(merged_copy(skeleton, options), call, ["", *modules.values()])
        return {path: counts[module] for path, module in {"": "", **modules}.items()}

    def merged_at(ratio: float) -> MergeConfig:
        # A plan for each part, as parts of a list have when they differ in their ratio.
        own = ((p, ratio + 1e-9 * i) for i, part in enumerate(parts.values()) for p in part)
        return replace(base, block_ratios=tuple(own))

    before, after = counted(base), {ratio: counted(merged_at(ratio)) for ratio in RATIOS}
    return Calibration(
        base=base,
        origin=origin_of(pipeline, name),
        parts=parts,
        errors=alone,
        savings={
            name: {
                ratio: sum(before[p] - after[ratio][p] for p in paths if _fits(p, patterns))
                for ratio in RATIOS
            }
            for name, patterns in parts.items()
        },
        uniform={r: before[""] - counted(replace(config, ratio=r))[""] for r in UNIFORM},
        by_ratio={ratio: value / by_ratio[PROBE] for ratio, value in by_ratio.items()},
    )


def _check_options(pipeline: Any, config: MergeConfig) -> None:
    if isinstance(pipeline, nn.Module):
        raise ModelError(
            f"calibrate draws images and needs a pipeline, not a {type(pipeline).__name__} alone"
        )
    if config.memory is not None:
        raise ConfigError(
            f"{config.memory} cannot be calibrated with the ratios, whose savings it averages over "
            "a run; find ratios with memory=None, then theta with toma_fx.calibrate_theta"
        )
    if config.tokens == "references":
        raise ConfigError(
            "tokens='references' merges in no block, and calibrate measures what blocks bear; "
            "leave it out, or choose its ratio by images: toma_fx.transform(pipe, ratio=0.5, "
            "tokens='references')"
        )
    if config.block_ratios:
        raise ConfigError(
            f"block_ratios={config.block_ratios!r} are what calibrate finds; leave them out"
        )


def _parts(paths: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """Lists of blocks, or parts of them, by name, with patterns of their blocks."""
    lists: dict[str, list[str]] = {}
    for path in paths:
        lists.setdefault(path.rpartition(".")[0], []).append(path)
    count = math.ceil(PARTS / len(lists))
    if count == 1:
        return {parent: (f"{parent}.*",) for parent in lists}
    parts = {}
    for members in lists.values():
        for part in np.array_split(np.array(members), min(count, len(members))):
            first, last = str(part[0]), str(part[-1])
            name = first if len(part) == 1 else f"{first}-{last.rpartition('.')[2]}"
            parts[name] = tuple(map(str, part))
    return parts


def _fits(path: str, patterns: Sequence[str]) -> bool:
    return any(matches(path, pattern) for pattern in patterns)


def check_same(again: npt.NDArray[np.float64], first: npt.NDArray[np.float64]) -> None:
    """Refuse to compare with images that are others when they are drawn again.

    Raises:
        ModelError: when they are.
    """
    if again.shape != first.shape or not np.isfinite(first).all():
        raise ModelError(
            f"draw gave images of shape {first.shape}, then {again.shape}, which must be equal and "
            "all their values numbers"
        )
    if not np.array_equal(again, first):
        raise ModelError(
            f"draw gave other images when it was called again, by {abs(again - first).max():.3g}; "
            "let it make its generator anew, as in torch.Generator().manual_seed(0); on a GPU "
            "torch.use_deterministic_algorithms(True) may be needed"
        )


def error_of(images: npt.NDArray[np.float64], untouched: npt.NDArray[np.float64]) -> float:
    """Squared difference to the untouched images: the geometric mean of those of the images."""
    squares = ((images - untouched) ** 2).reshape(len(images), -1).mean(1)
    # An image that did not change at all is no better than one that nobody could tell apart.
    least = max(1e-8 * float(untouched.var()), 1e-300)
    return float(np.exp(np.log(np.maximum(squares, least)).mean()))


def _hull(choices: Sequence[tuple[float, float, float]]) -> list[tuple[float, float, float]]:
    """The steps of the lower hull of ``(saving, error, ratio)`` from ``(0, 0)`` on.

    Returns:
        ``(error per saving, saving, ratio)`` of each step, in increasing order.
    """
    steps: list[tuple[float, float, float]] = []
    at = (0.0, 0.0, 0.0)
    while ahead := [each for each in choices if each[0] > at[0]]:
        best = min(ahead, key=lambda each: ((each[1] - at[1]) / (each[0] - at[0]), -each[0]))
        saving = best[0] - at[0]
        steps.append(((best[1] - at[1]) / saving, saving, best[2]))
        at = best
    return steps
