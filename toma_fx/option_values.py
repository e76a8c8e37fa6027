"""Checks that turn the values of options into plain Python values, or refuse them.

The repr of an option's value is pasted into generated code, and options are compared and hashed.
So numbers of numpy and torch are converted to Python numbers.
"""

import math
import numbers
from collections.abc import Mapping
from dataclasses import fields
from decimal import ROUND_FLOOR, Context, Decimal
from typing import Any

from toma_fx.closest import did_you_mean
from toma_fx.errors import ConfigError


def choice(name: str, value: object, choices: tuple[Any, ...]) -> Any:
    """Return one of the choices as a plain string.

    Raises:
        ConfigError: when the value is not one of the choices.
    """
    if not isinstance(value, str) or value not in choices:
        raise ConfigError(
            f"{name}={value!r} is unknown; choose one of {', '.join(map(repr, choices))}"
            f"{did_you_mean(value, choices)}"
        )
    return choices[choices.index(value)]  # a plain string, since its repr becomes code


def _item(value: Any) -> Any:
    """Return a number of numpy or torch as a Python number; return other values unchanged."""
    return value.item() if getattr(value, "ndim", None) == 0 else value


def number(value: Any) -> float:
    """Return a plain float, whose repr can become code; NaN for values that are not numbers.

    A float of 16 or 32 bits becomes the shortest decimal that rounds to it: a float32 of 0.1
    becomes 0.1, not 0.10000000149.
    """
    found = _item(value)
    if isinstance(found, bool) or not isinstance(found, numbers.Real):
        return math.nan
    try:
        exact = float(found)
    except OverflowError:
        return math.inf
    if found is value or isinstance(found, int):
        return exact
    if not hasattr(value, "new_tensor"):
        return float(str(value))  # numpy prints the shortest decimal, torch only four digits
    decimals = (float(f"{exact:.{digits}g}") for digits in range(1, 18))
    return next((each for each in decimals if value.new_tensor(each) == value), exact)


def plain_ratio(given: str, value: object) -> float:
    """Return a ratio as a plain float.

    Raises:
        ConfigError: when the value is not a number in [0, 1).
    """
    ratio = number(value)
    if not 0 <= ratio < 1:
        raise ConfigError(
            f"{given} must be a number in [0, 1): the share of tokens merged away, such as 0.5"
        )
    return abs(ratio)  # one zero, since -0.0 has another repr


def count(name: str, value: object, example: int) -> int:
    """Return a count as a plain int.

    Raises:
        ConfigError: when the value is not a whole number of at least 1.
    """
    found = _item(value)
    if isinstance(found, bool) or not isinstance(found, numbers.Integral) or found < 1:
        raise ConfigError(
            f"{name}={value!r} must be a whole number of at least 1, such as {example}"
        )
    return int(found)


def listed(given: object) -> tuple[Any, ...] | None:
    """Return the members of an iterable; None for a string or a single value."""
    try:
        return None if isinstance(given, str) else tuple(given)  # type: ignore[arg-type]
    except TypeError:
        return None


def check_merging(given: str, ratio: float, region_tokens: int) -> None:
    """Refuse a ratio above 0 that merges no token of a region.

    Raises:
        ConfigError: when the ratio is that small.
    """
    # Same as `toma_fx.runtime.regions.kept_tokens`, whose import would load torch.
    kept = max(1, int(region_tokens * (1 - ratio) + 0.5))
    if ratio == 0 or kept < region_tokens:
        return
    ways = ["a ratio of 0"]
    if ratio > 1e-6:  # so that the suggested region_tokens is a count that an image may have
        ways.insert(0, f"region_tokens={1 << math.ceil(-math.log2(ratio))}")
    if region_tokens > 1:
        # The next number of three digits above the ratio that merges half a token.
        three = Context(prec=3, rounding=ROUND_FLOOR)
        least = float(three.next_plus(three.divide(Decimal(1), Decimal(2 * region_tokens))))
        ways.insert(0, f"a ratio of at least {least}")
    raise ConfigError(
        f"{given} is too small to merge a token of a region of region_tokens={region_tokens}; use "
        f"{', or '.join(ways)}"
    )


def options_of(cls: type[Any], name: str, given: object, example: str) -> Any:
    """Return an option that is a dataclass of options, built from its JSON form if necessary.

    Raises:
        ConfigError: when the value is neither form, or has an unknown field.
    """
    if isinstance(given, cls):
        return given
    if not isinstance(given, Mapping):
        raise ConfigError(f"{name}={given!r} must be a {cls.__name__}, such as {example}")
    names = [field.name for field in fields(cls)]
    if unknown := [key for key in given if key not in names]:
        raise ConfigError(
            f"{name}={given!r} holds {', '.join(map(repr, unknown))}, which a {cls.__name__} does "
            f"not have; choose from {', '.join(map(repr, names))}"
        )
    return cls(**given)
