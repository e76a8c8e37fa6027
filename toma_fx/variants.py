"""The settings that are compared: merging ones in their short form, and fewer steps.

============================  =====================================================================
``placement=keys,...``        options of `toma_fx.transform`; see `toma_fx.setting`
``toma:region=stripe``        a preset, with or without changes
``FILE.json``                 what ``toma-fx calibrate`` allots at the arithmetic of a ratio
``steps``                     no merging, as few steps as the first merging variant's arithmetic
                              pays for, to the nearest, and fewer than all if it saves any
``steps=18``                  no merging, 18 steps
============================  =====================================================================
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from toma_fx.closest import did_you_mean
from toma_fx.config import PRESETS, MergeConfig
from toma_fx.errors import ConfigError, TomaError
from toma_fx.setting import Given, config_of, in_short, read_short

STEPS = "steps"
UNTOUCHED = "untouched"
"""The model as it is: what paired measures compare with."""


@dataclass(frozen=True, kw_only=True)
class Merging:
    """A variant that merges tokens."""

    name: str
    given: Given = field(default_factory=dict)
    """Values of `toma_fx.setting.OPTIONS`; with a ratio among them it is tried at that alone."""

    def ratios(self, asked: Sequence[float]) -> tuple[float, ...]:
        """Its own ratio, or those that are asked for."""
        return (self.given["ratio"],) if "ratio" in self.given else tuple(asked)

    def config(self, ratio: float) -> MergeConfig:
        """The options of `toma_fx.transform`.

        Raises:
            TomaError: when there is nothing for the ratio, or values do not go together.
        """
        return config_of({**self.given, "ratio": ratio})


@dataclass(frozen=True, kw_only=True)
class FewerSteps:
    """The untouched model with fewer denoising steps: what every saving must be compared with."""

    name: str
    count: int | None = None
    """Steps; ``None`` for as many as the arithmetic of the first merging variant pays for."""


def merging(given: Given) -> Merging:
    """A variant of values, under their short form; a calibration alone under its file's name.

    Raises:
        TomaError: when values do not go together.
    """
    file = given.get("calibration")
    name = Path(file).stem if file is not None and len(given) == 1 else in_short(given)
    found = Merging(name=name, given=dict(given))
    found.config(found.ratios([0.5])[0])
    return found


def parse_variant(text: str) -> Merging | FewerSteps:
    """A variant as written on the command line.

    Args:
        text: as in the module's table.

    Raises:
        ConfigError: when the name, an option or a value is unknown; the message names them.

    >>> parse_variant("toma:region=stripe,region_tokens=64").config(0.5).region_tokens
    64
    """
    if text == STEPS or text.startswith(f"{STEPS}="):
        return FewerSteps(name=text, count=_steps(text))
    head = text.partition(":")[0]
    if "=" not in head and head not in PRESETS and not head.endswith(".json"):
        raise ConfigError(
            f"variant={text!r} is unknown; choose from {', '.join(PRESETS)}, with changes such as "
            f"toma:region=stripe, or {STEPS}, or {STEPS}=18{did_you_mean(head, [*PRESETS, STEPS])}"
        )
    try:
        found = merging(read_short(text))
    except TomaError as error:
        raise ConfigError(f"variant={text!r}: {error}") from error
    # As it was written; a calibration by the name of its file.
    return found if text.endswith(".json") else Merging(name=text, given=found.given)


def check_ratios(variants: Sequence[object], ratios: Sequence[float]) -> None:
    """Refuse what cannot be tried, before anything is loaded.

    Raises:
        TomaError: when a merging variant takes no ratio that it is to be tried at.
    """
    for _ in configs(variants, ratios):
        pass


def configs(
    variants: Sequence[object], ratios: Sequence[float]
) -> Iterator[tuple[Merging, float, MergeConfig]]:
    """Every merging variant at every ratio that it is tried at, with its options."""
    for variant in variants:
        if isinstance(variant, Merging):
            for ratio in variant.ratios(ratios):
                yield variant, ratio, variant.config(ratio)


def _steps(text: str) -> int | None:
    _, equals, count = text.partition("=")
    if not equals:
        return None
    if not count.isdecimal() or int(count) < 1:
        raise ConfigError(f"variant={text!r} must name a number of steps, such as {STEPS}=18")
    return int(count)
