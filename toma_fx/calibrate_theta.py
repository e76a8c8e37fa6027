"""How much of the correction by merged tokens to believe, from what it costs whole images.

`toma_fx.Memory.theta` could be fitted block by block, by least squares. But errors of many blocks
add up, and on transformers their sum is smallest for less than each block alone would take. So
`calibrate_theta` draws images at a few values and compares them with the untouched ones.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from toma_fx.calibrate import Draw, Progress, check_same, error_of
from toma_fx.calibration_files import CalibrationFile, numbers, origin_of
from toma_fx.config import MergeConfig
from toma_fx.errors import ConfigError, ModelError
from toma_fx.transform import while_transformed

THETAS = (0.0, 0.1, 0.25, 0.5, 0.75, 1.0)
"""The values that are tried unless others are given."""


@dataclass(frozen=True, kw_only=True)
class ThetaCalibration(CalibrationFile):
    """The cost of each value of `toma_fx.Memory.theta` to a pipeline's images.

    Errors are squared differences to the untouched images, as those of `toma_fx.Calibration`.
    """

    FILE = "theta.json"
    _MAKER = "calibrate_theta"

    errors: Mapping[float, float]
    """By value."""

    def __post_init__(self) -> None:
        if self.base.memory is None or not self.errors:
            raise ConfigError(
                f"base={self.base!r} and errors={self.errors!r} must hold a memory, and a theta"
            )

    @property
    def theta(self) -> float:
        """The value with the smallest error."""
        return min(self.errors, key=self.errors.__getitem__)

    @property
    def config(self) -> MergeConfig:
        """The options with that value."""
        assert self.base.memory is not None
        return replace(self.base, memory=replace(self.base.memory, theta=self.theta))

    @classmethod
    def _fields_of(cls, content: dict[str, Any]) -> dict[str, Any]:
        return {"errors": numbers("errors", content["errors"])}


def calibrate_theta(
    pipeline: Any,
    draw: Draw,
    config: MergeConfig,
    *,
    thetas: Sequence[float] = THETAS,
    name: str = "",
    progress: Progress = lambda done, total, what: None,
) -> ThetaCalibration:
    """Measure which `toma_fx.Memory.theta` keeps a pipeline's images closest.

    Args:
        pipeline: with an untouched model, which it has again afterwards.
        draw: see `toma_fx.calibrate.Draw`. Size, steps and guidance should be those of later use.
        config: options with a ``memory``.
        thetas: values to try; each draws once, and the untouched model twice.
        name: what the calibration is called; the model's name when left out.
        progress: see `toma_fx.calibrate.Progress`.

    Raises:
        ConfigError: when the options have no memory, or there is no value to try.
        ModelError: when ``pipeline`` is a model alone, `transform` refuses the model, or two
            untouched drawings differ.

    Example:
        >>> config = toma_fx.MergeConfig(ratio=0.9, memory=toma_fx.Memory())  # doctest: +SKIP
        >>> found = toma_fx.calibrate_theta(pipe, draw, config)  # doctest: +SKIP
        >>> toma_fx.transform(pipe, found.config)  # doctest: +SKIP
    """
    if config.memory is None:
        raise ConfigError(
            "memory=None has no theta to measure; give options with one, such as "
            "MergeConfig(ratio=0.9, memory=Memory(every=2))"
        )
    if not thetas:
        raise ConfigError(f"thetas={thetas!r} holds no value to try; give some, such as {THETAS}")
    if not hasattr(pipeline, "scheduler"):
        raise ModelError(
            f"calibrate_theta draws images and needs a pipeline, not a {type(pipeline).__name__}"
        )
    total, errors = 2 + len(thetas), dict[float, float]()
    progress(0, total, "untouched")
    untouched = np.asarray(draw(pipeline), dtype=np.float64)
    progress(1, total, "untouched again")
    check_same(np.asarray(draw(pipeline), dtype=np.float64), untouched)
    for place, theta in enumerate(thetas):
        progress(2 + place, total, f"theta {theta:g}")
        with while_transformed(
            pipeline, replace(config, memory=replace(config.memory, theta=theta))
        ):
            errors[theta] = error_of(np.asarray(draw(pipeline), dtype=np.float64), untouched)
    return ThetaCalibration(base=config, origin=origin_of(pipeline, name), errors=errors)
