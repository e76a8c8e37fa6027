"""Contenders by name: presets of `MergeConfig` with changes, calibrations, and fewer steps.

A variant is what is written on the command line; with a ratio it becomes a contender (`contend`).

============================  =====================================================================
``toma``                      a preset of `toma_fx.MergeConfig`
``toma:region=stripe``        the same with other fields; several are parted by commas
``...:components=mlp+...``    several values of one field are parted by ``+``
``...:schedule=10/5``         steps between two selections and between two computations of weights
``...:memory=2``              steps from one full step to the next; ``2/0.5`` with a theta of 0.5
``FILE.json``                 what ``toma-fx calibrate`` allots at the arithmetic of a ratio
``steps``                     no merging, as few steps as the first merging variant's arithmetic
                              pays for, to the nearest, and fewer than all if it saves any
``steps=18``                  no merging, 18 steps
============================  =====================================================================
"""

from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Any

from toma_fx.calibrate import Calibration
from toma_fx.config import PRESETS, MergeConfig
from toma_fx.errors import ConfigError, TomaError
from toma_fx.schedule import Memory, Schedule

STEPS = "steps"
UNTOUCHED = "untouched"
"""The model as it is: what paired measures compare with."""


@dataclass(frozen=True, kw_only=True)
class Merging:
    """A variant that merges tokens."""

    name: str

    def config(self, ratio: float) -> MergeConfig:
        """What `toma_fx.transform` is given.

        Raises:
            TomaError: when there is nothing for the ratio, or a field holds what it cannot take.
        """
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True)
class Preset(Merging):
    """A preset with changes."""

    preset: str
    changes: tuple[tuple[str, Any], ...] = ()

    def config(self, ratio: float) -> MergeConfig:
        """The preset at a ratio."""
        return MergeConfig.preset(self.preset, **{**dict(self.changes), "ratio": ratio})


@dataclass(frozen=True, kw_only=True)
class Allotted(Merging):
    """Ratios by block, from a calibration."""

    calibration: Calibration

    def config(self, ratio: float) -> MergeConfig:
        """What was allotted at the arithmetic of a uniform ratio."""
        return self.calibration.config(ratio)


@dataclass(frozen=True, kw_only=True)
class FewerSteps:
    """The untouched model with fewer denoising steps: what every saving must be compared with."""

    name: str
    count: int | None = None
    """Steps; ``None`` for as many as the arithmetic of the first merging variant pays for."""


def parse_variant(text: str) -> Merging | FewerSteps:
    """A variant as written on the command line.

    Args:
        text: as in the module's table.

    Raises:
        ConfigError: when the name, a field or a value is unknown; the message names them.

    >>> parse_variant("toma:region=stripe,region_tokens=64").config(0.5).region_tokens
    64
    """
    if text == STEPS or text.startswith(f"{STEPS}="):
        return FewerSteps(name=text, count=_steps(text))
    if text.endswith(".json"):
        return Allotted(name=Path(text).stem, calibration=Calibration.load(text))
    preset, _, rest = text.partition(":")
    if preset not in PRESETS:
        raise ConfigError(
            f"variant={text!r} is unknown; choose from {', '.join(PRESETS)}, with changes such as "
            f"toma:region=stripe, or {STEPS}, or {STEPS}=18"
        )
    changes: dict[str, Any] = {}
    for change in filter(None, rest.split(",")):
        name, equals, value = change.partition("=")
        if not equals:
            raise ConfigError(f"variant={text!r}: {change!r} must be FIELD=VALUE")
        changes[name] = _value(text, name, value)
    variant = Preset(name=text, preset=preset, changes=tuple(changes.items()))
    try:
        variant.config(0.5)
    except TomaError as error:
        raise ConfigError(f"variant={text!r}: {error}") from error
    return variant


def parse_schedule(text: str) -> Schedule:
    """``"10/5"``: steps between two selections, and between two computations of the weights.

    Raises:
        ConfigError: when it is not two whole numbers of at least 1.
    """
    select, _, weigh = text.partition("/")
    if not (select.isdecimal() and weigh.isdecimal()):
        raise ConfigError(f"schedule={text!r} must be two numbers of steps, such as 10/5")
    return Schedule(select_every=int(select), weigh_every=int(weigh))


def parse_memory(text: str) -> Memory:
    """``"2"``: steps from one full step to the next; ``"2/0.5"``: and theta.

    Raises:
        ConfigError: when it is neither.
    """
    every, slash, theta = text.partition("/")
    try:
        return Memory(every=int(every), theta=float(theta) if slash else None)
    except ConfigError as error:
        raise ConfigError(f"memory={text!r}: {error}") from error
    except ValueError as error:
        raise ConfigError(
            f"memory={text!r} must be a number of steps, such as 2, or with theta, such as 2/0.5"
        ) from error


def _steps(text: str) -> int | None:
    _, equals, count = text.partition("=")
    if not equals:
        return None
    if not count.isdecimal() or int(count) < 1:
        raise ConfigError(f"variant={text!r} must name a number of steps, such as {STEPS}=18")
    return int(count)


def _value(text: str, name: str, value: str) -> Any:
    """A field's value from its text, by the kind of the field's default."""
    defaults = {f.name: f.default for f in fields(MergeConfig)}
    if name == "ratio":
        raise ConfigError(f"variant={text!r}: the ratio is given once for all, by --ratio")
    default = defaults.get(name, MISSING)
    if isinstance(default, Schedule):
        return parse_schedule(value)
    if name == "memory":
        return parse_memory(value)
    try:
        if isinstance(default, bool):
            return {"true": True, "false": False}[value]
        if isinstance(default, int | float):
            return type(default)(value)
    except (ValueError, KeyError) as error:
        expected = "true or false" if isinstance(default, bool) else "a number"
        raise ConfigError(f"variant={text!r}: {name}={value!r} must be {expected}") from error
    if default is None or isinstance(default, tuple):
        return tuple(filter(None, value.split("+")))
    return value
