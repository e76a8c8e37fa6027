"""What happens to each block: its ratio and whether it makes a plan, or why it is left alone."""

import fnmatch
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from toma_fx.config import MergeConfig
from toma_fx.errors import ModelError
from toma_fx.passes.plan_nodes import PlanOptions
from toma_fx.runtime.regions import WHOLE_IMAGE

Role = Literal["alone", "lead", "follow"]
"""Makes a plan for itself, or for its group, or uses its group's."""

Group = tuple[str, float]
"""The module list and the ratio that the blocks of a group have in common."""

NOTHING = "ratio is 0"
"""Why a block is left unmerged whose ratio says so."""


@dataclass(frozen=True, kw_only=True)
class Treatment:
    """What happens to a block."""

    group: Group
    role: Role | None = None
    """``None`` when it is left unmerged."""
    skipped: str = ""
    """Why, then."""
    components: tuple[str, ...] = ()
    """What of it runs on merged tokens: ``("block",)``, or some components."""

    @property
    def ratio(self) -> float:
        """Share of the tokens of a region that is merged away, unless the block is left alone."""
        return self.group[1]


def treatments(
    paths: Sequence[str],
    config: MergeConfig,
    spared: Mapping[str, tuple[int, int]],
    model: str,
) -> dict[str, Treatment]:
    """What happens to each block of a model.

    Args:
        paths: of the blocks; those of a list in the order in which they run.
        config: the options.
        spared: of the model's family, see `toma_fx.families.Family`.
        model: what the errors call it.

    Raises:
        ModelError: when a pattern names no block, or when none merges, unless all were asked not to
            by a ratio of 0.
    """
    if config.merges and paths:
        _check_patterns(paths, config)
    treated: dict[str, Treatment] = {}
    left_out = _left_out(paths, config, spared)
    led = set()
    for path in paths:
        ratio = config.ratio_of(path)
        group = path.rpartition(".")[0], ratio
        if ratio == 0 or path in left_out:
            why = NOTHING if ratio == 0 else left_out[path]
            treated[path] = Treatment(group=group, skipped=why)
            continue
        role: Role = "follow" if group in led else "lead"
        led.add(group)
        treated[path] = Treatment(group=group, role="alone" if config.share == "block" else role)
    reasons = {each.skipped for each in treated.values()}
    if config.merges and "" not in reasons and reasons != {NOTHING}:
        why = "; ".join(sorted(reasons)) or "the model has no transformer block"
        raise ModelError(f"nothing to merge in this {model}: {why}. Pass skip=() to merge all")
    return treated


def _check_patterns(paths: Sequence[str], config: MergeConfig) -> None:
    ratios = [pattern for pattern, _ in config.block_ratios]
    for name, patterns in (("skip", config.skip or ()), ("block_ratios", ratios)):
        unused = [p for p in patterns if not fnmatch.filter(paths, p)]
        if unused:
            raise ModelError(
                f"{name}={unused!r} matches no block; block paths look like {paths[0]!r}"
            )
    named = {config.pattern_of(path) for path in paths}
    hidden = [pattern for pattern in ratios if pattern not in named]
    if hidden:
        raise ModelError(
            f"block_ratios={hidden!r} names only blocks that patterns before it name, and the "
            "first that fits counts; put it before them"
        )


def plan_options(config: MergeConfig, ratio: float) -> PlanOptions:
    """How plans for blocks of a ratio are made under a configuration."""
    return PlanOptions(
        region_tokens=WHOLE_IMAGE if config.region == "image" else config.region_tokens,
        ratio=ratio,
        selector=config.selector,
        temperature=config.temperature,
        merge_over=config.merge_over,
        unmerge=config.unmerge,
    )


def _left_out(
    paths: Sequence[str], config: MergeConfig, spared: Mapping[str, tuple[int, int]]
) -> dict[str, str]:
    """The blocks that the options or the family's list leave unmerged, each with the reason."""
    if config.skip is not None:
        return {
            path: f"skip={pattern!r}"
            for pattern in config.skip
            for path in fnmatch.filter(paths, pattern)
        }
    left_out = {}
    for parent, (first, of) in spared.items():
        siblings = [path for path in paths if path.rpartition(".")[0] == parent]
        for path in siblings[: len(siblings) * first // of]:
            if config.pattern_of(path) is None:
                left_out[path] = "spared by default, as in the paper"
    return left_out
