"""Checks of options that depend on each other."""

from dataclasses import fields
from typing import TYPE_CHECKING

from toma_fx.errors import ConfigError
from toma_fx.option_values import check_merging

if TYPE_CHECKING:
    from toma_fx.config import MergeConfig


def check_combinations(config: "MergeConfig") -> None:
    """Refuse options that cannot be combined.

    Raises:
        ConfigError: when two options conflict; the message tells a way out.
    """
    if config.tokens == "references":
        _check_references(config)
        return
    _check_placement(config)
    _check_steps(config)
    if config.memory is not None:
        _check_memory(config)
    if config.selector == "fixed" and (config.unmerge, config.merge_over) != (
        "transpose",
        "region",
    ):
        raise ConfigError(
            "selector='fixed' has no weights to invert or to spread over the image; use "
            "unmerge='transpose' and merge_over='region'"
        )
    if config.region != "image":  # its region size depends on the model's input
        for given, ratio in (
            (f"ratio={config.ratio}", config.ratio),
            *((f"block_ratios[{name!r}]={each}", each) for name, each in config.block_ratios),
        ):
            check_merging(given, ratio, config.region_tokens)


def _check_placement(config: "MergeConfig") -> None:
    default = {field.name: field.default for field in fields(config)}
    if config.placement == "block" and config.components != default["components"]:
        raise ConfigError(
            f"components={config.components!r} cannot be combined with placement='block', which "
            "merges the whole block; use placement='component' or leave components out"
        )
    if config.placement == "keys" and config.components != default["components"]:
        raise ConfigError(
            f"components={config.components!r} cannot be combined with placement='keys', which "
            "merges the keys and values of self-attention and nothing else; leave components out"
        )
    if config.placement == "keys" and config.unmerge != "transpose":
        raise ConfigError(
            f"unmerge={config.unmerge!r} cannot be combined with placement='keys', which counts "
            "tokens by the transpose and unmerges nothing; leave unmerge out"
        )


def _check_steps(config: "MergeConfig") -> None:
    if config.schedule.stateless:
        return
    if config.share == "block":
        raise ConfigError(
            f"share='block' cannot be combined with {config.schedule}, which keeps one plan per "
            "group; use share='group' or Schedule()"
        )
    if config.merge_below < 1:
        raise ConfigError(
            f"merge_below={config.merge_below} cannot be combined with {config.schedule}, which "
            "counts every step; use Schedule() or merge_below=1"
        )


def _check_memory(config: "MergeConfig") -> None:
    if config.share == "block":
        raise ConfigError(
            f"share='block' cannot be combined with {config.memory}, which keeps one plan per "
            "group; use share='group' or memory=None"
        )
    if not config.schedule.stateless:
        raise ConfigError(
            f"{config.schedule} cannot be combined with {config.memory}, which makes its plans at "
            "full steps; use Schedule() or memory=None"
        )
    if config.placement == "block" and config.residual == "replace":
        raise ConfigError(
            f"residual='replace' cannot be combined with {config.memory}, which adds to tokens "
            "that stay whole; use residual='keep' or memory=None"
        )


def _check_references(config: "MergeConfig") -> None:
    default = {field.name: field.default for field in fields(config)}
    allowed = ("ratio", "tokens", "selector", "temperature")
    for name, value in default.items():
        given = getattr(config, name)
        if name not in allowed and given != value:
            raise ConfigError(
                f"{name}={given!r} cannot be combined with tokens='references', with which no "
                f"block merges; leave {name} out: only {', '.join(allowed)} have an effect"
            )
    if config.selector == "fixed":
        raise ConfigError(
            "selector='fixed' cannot be combined with tokens='references': its weights are "
            "random, a bound of time for merging in blocks; use selector='facility_location'"
        )
