"""How tokens merge, in words: the options of the commands, and their short form.

Everything that `toma_fx.transform` takes is an option under its own name. Where several settings
are compared, ``--variant`` takes each in the short form, with the same names and values::

    placement=keys,merge_below=0.8,memory=2,theta=0.5
    toma:region=stripe                     a preset with changes, or preset=toma,region=stripe
    calibrated.json                        what toma-fx calibrate wrote, or calibration=FILE

Several values of one name are parted by ``+``.
"""

import argparse
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, get_args, get_origin

from toma_fx.closest import did_you_mean
from toma_fx.config import PRESETS, Component, MergeConfig
from toma_fx.errors import ConfigError
from toma_fx.schedule import Memory, Schedule

Given = Mapping[str, Any]
"""Values by the names of `OPTIONS`, without those that were not given."""


@dataclass(frozen=True, kw_only=True)
class Option:
    """One word of a setting."""

    about: str
    read: Callable[[str], Any] = str
    """The value of a text; raises `ValueError` where it is none."""
    shown: str = ""
    """Stands for the value in help and in messages."""
    choices: tuple[str, ...] = ()
    several: bool = False


def _switch(text: str) -> bool:
    return {"true": True, "false": False}[text.lower()]


def _schedule(text: str) -> Schedule:
    select, weigh = map(int, text.split("/"))
    return Schedule(select_every=select, weigh_every=weigh)


def _pair(text: str) -> tuple[str, float]:
    pattern, equals, ratio = text.rpartition("=")
    if not equals:
        raise ValueError
    return pattern, float(ratio)


_ABOUT = {
    "ratio": "share of tokens merged away",
    "block_ratios": "blocks that get a ratio of their own, as in up_blocks.1.*=0.25",
    "tokens": "merge all tokens, or only those of the images to edit",
    "components": f"parts that merge with placement component: {', '.join(get_args(Component))}",
    "placement": "merge around components, around whole blocks, or keys and values alone",
    "residual": "keep the residual stream, or replace it by the merged one",
    "region": "shape of the regions in which destinations are selected",
    "region_tokens": "tokens in a region",
    "region_frames": "latent frames that a tile of a video spans",
    "merge_over": "merge into destinations of the region, or of the image",
    "selector": "method that selects destinations",
    "unmerge": "matrix that spreads merged tokens: transpose or pseudo-inverse",
    "temperature": "temperature of the softmax over destinations",
    "share": "make one plan for a group of blocks, or for each block",
    "schedule": "select every A steps and weigh every B, as in 10/5",
    "memory": "run every Nth step in full; the steps between add what has changed",
    "merge_below": "noise level below which tokens merge; 1 merges at all steps",
    "skip": "blocks that stay unmerged, as in mid_block.*; no pattern: none",
}
_READ: dict[str, dict[str, Any]] = {
    "block_ratios": {"read": _pair, "shown": "PATTERN=RATIO", "several": True},
    "components": {"shown": "PART", "several": True},
    "schedule": {"read": _schedule, "shown": "A/B"},
    "memory": {"read": int, "shown": "N"},
    "skip": {"shown": "PATTERN", "several": True},
}


def _option(name: str, kind: Any, default: Any) -> Option:
    about = (
        f"{_ABOUT[name]} (default: {default:g})"
        if isinstance(default, int | float)
        else _ABOUT[name]
    )
    if name in _READ:
        return Option(about=about, **_READ[name])
    if get_origin(kind) is not None:
        choices = get_args(kind)
        return Option(about=f"{about} (default: {default})", choices=choices)
    return Option(about=about, read=kind, shown="X" if kind is float else "N")


OPTIONS: dict[str, Option] = {
    "preset": Option(
        about="settings that the other options change (default: default)", choices=tuple(PRESETS)
    ),
    "calibration": Option(
        about="file of toma-fx calibrate, whose ratios are used at the arithmetic of --ratio; or "
        "of toma_fx.calibrate_theta, with its options",
        shown="FILE",
    ),
    **{each.name: _option(each.name, each.type, each.default) for each in fields(MergeConfig)},
    "theta": Option(
        about="with memory: share of the correction that is added (default: by model)",
        read=float,
        shown="X",
    ),
    "extrapolate": Option(about="with memory: extrapolate updates (default: yes)", read=_switch),
    "control": Option(about="with memory: full steps run merged too (default: yes)", read=_switch),
}
OF_MEMORY = ("theta", "extrapolate", "control")


def add_setting(parser: argparse.ArgumentParser, *, leave_out: tuple[str, ...] = ()) -> None:
    """Add every option but some to a command; `given_in` reads them."""
    group = parser.add_argument_group("how tokens merge, as in toma_fx.transform")
    for name, option in OPTIONS.items():
        if name in leave_out:
            continue
        flag = f"--{name.replace('_', '-')}"
        how: dict[str, Any] = {"help": option.about, "default": argparse.SUPPRESS}
        if option.read is _switch:
            group.add_argument(flag, action=argparse.BooleanOptionalAction, **how)
            continue
        if option.several:
            how["nargs"] = "*" if name == "skip" else "+"
        if option.choices:
            how["choices"] = option.choices
        else:
            how |= {"type": _typed(name), "metavar": option.shown}
        group.add_argument(flag, dest=name, **how)


def add_variants(
    parser: argparse.ArgumentParser, default: Sequence[str], *, more: str = ""
) -> None:
    """Add ``--variant``, which takes settings in the short form.

    Args:
        parser: of a command that compares settings.
        default: the settings to compare when none are given.
        more: help on further words that the command takes.
    """
    parser.add_argument(
        "--variant",
        nargs="+",
        default=[*default],
        metavar="SETTING",
        help="one or more, such as toma:region=stripe placement=keys,skip= calibrated.json: "
        f"presets and options of toma-fx report{more} (default: {' '.join(default)})",
    )


def given_in(options: argparse.Namespace) -> dict[str, Any]:
    """The values that a command line gave."""
    return {name: value for name, value in vars(options).items() if name in OPTIONS}


def _typed(name: str) -> Callable[[str], Any]:
    def read(text: str) -> Any:
        try:
            return OPTIONS[name].read(text)
        except (ValueError, KeyError) as error:
            raise argparse.ArgumentTypeError(_wrong(name, text, error)) from error

    return read


def _wrong(name: str, text: str, error: Exception) -> str:
    if isinstance(error, ConfigError):
        return str(error)
    wanted = {int: "a whole number", float: "a number", _switch: "true or false"}
    option = OPTIONS[name]
    return f"{name}={text!r} must be {wanted.get(option.read, option.shown)}"


def read_short(text: str) -> dict[str, Any]:
    """The values of a setting in its short form.

    Raises:
        ConfigError: when a name or a value is unknown; the message names it.

    >>> read_short("toma:region=stripe,ratio=0.25")
    {'preset': 'toma', 'region': 'stripe', 'ratio': 0.25}
    """
    head, _, rest = text.partition(":")
    if "=" in head:  # no preset stands first
        head, rest = "", text
    given: dict[str, Any] = {}
    if head:
        given["calibration" if head.endswith(".json") else "preset"] = head
    for change in filter(None, rest.split(",")):
        word, equals, value = change.partition("=")
        name = word.replace("-", "_")
        if not equals:
            raise ConfigError(f"{change!r} must be NAME=VALUE")
        if name not in OPTIONS:
            raise ConfigError(
                f"{change} is not an option of a setting{did_you_mean(name, OPTIONS)}"
            )
        given[name] = _read(name, value)
    return given


def _read(name: str, value: str) -> Any:
    option = OPTIONS[name]
    try:
        if not option.several:
            return option.read(value)
        return tuple(option.read(each) for each in value.split("+") if each)
    except (ValueError, KeyError) as error:
        raise ConfigError(_wrong(name, value, error)) from error


def in_short(given: Given) -> str:
    """The short form of values; ``default`` where there are none."""
    words = dict(given)
    head = words.pop("calibration", None) or words.pop("preset", "default")
    changes = ",".join(f"{name}={_short(value)}" for name, value in words.items())
    if not changes:
        return str(head)
    return changes if head == "default" else f"{head}:{changes}"


def _short(value: Any) -> str:
    if isinstance(value, Schedule):
        return f"{value.select_every}/{value.weigh_every}"
    if isinstance(value, list | tuple):
        parts = ("=".join(map(str, v)) if isinstance(v, tuple) else str(v) for v in value)
        return "+".join(parts)
    return str(value).lower() if isinstance(value, bool) else f"{value}"


def config_of(given: Given) -> MergeConfig:
    """The options of `toma_fx.transform` for some values.

    Raises:
        ConfigError: when values do not go together, or one is nothing that the option takes.
        ModelError: when a calibration saves too little for the ratio.
    """
    values = dict(given)
    memory = {name: values.pop(name) for name in OF_MEMORY if name in values}
    if "memory" in values:
        values["memory"] = Memory(every=values["memory"], **memory)
    elif memory:
        raise ConfigError(f"{', '.join(memory)} needs a memory: give memory too, such as 2")
    file = values.pop("calibration", None)
    if file is None:
        return MergeConfig.preset(values.pop("preset", "default"), **values)
    from toma_fx.calibrate import Calibration  # which needs torch
    from toma_fx.calibrate_theta import ThetaCalibration
    from toma_fx.calibration_files import kind_of

    ratio = values.pop("ratio", None)
    if values:
        raise ConfigError(
            f"{', '.join(values)} cannot be given beside calibration={str(file)!r}, which holds "
            "the options that it was made with; calibrate again with others"
        )
    if kind_of(Path(file)) == ThetaCalibration.__name__:
        config = ThetaCalibration.load(file).config
        return config if ratio is None else replace(config, ratio=ratio)
    return Calibration.load(file).config(MergeConfig().ratio if ratio is None else ratio)
