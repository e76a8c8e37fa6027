"""Recipes: what `toma_fx.transform` will do to a model, as data made from a family and the options.

A recipe lists every block, its merging parts and its variants, each a tuple of passes. Live models,
captured graphs, reports, speed-ups, calibration and export all use it. It can be printed.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from tabulate import tabulate

from toma_fx.config import MergeConfig, matches
from toma_fx.errors import ModelError
from toma_fx.families.rows import Block, Family, Form
from toma_fx.passes.cleanup import Cleanup
from toma_fx.passes.guard_inputs import GuardInputs
from toma_fx.passes.hand_on import HandOn
from toma_fx.passes.merge import Merge
from toma_fx.passes.merge_keys import MergeKeys
from toma_fx.passes.one_plan import OnePlan
from toma_fx.passes.pipeline import Pass
from toma_fx.passes.plan_nodes import PlanOptions
from toma_fx.passes.recall import Recall
from toma_fx.passes.remember import Remember
from toma_fx.passes.sites import WHOLE_BLOCK, KeysSite, Site, choose_sites, keys_sites
from toma_fx.policy import policy_of
from toma_fx.runtime.plan import MERGED, RECALL, REMEMBER, REUSE, UNTOUCHED, WEIGH
from toma_fx.runtime.regions import WHOLE_IMAGE
from toma_fx.schedule import Memory

Role = Literal["alone", "lead", "follow"]
"""A block makes a plan for itself ("alone") or for its group ("lead"), or uses its group's."""

RATIO_IS_ZERO = "ratio is 0"
ALL_STEPS_FULL = "memory.every is 1"
ONLY_REFERENCES = "only references merge, at the model's border"


@dataclass(frozen=True, kw_only=True)
class Group:
    """Blocks that can share a plan: those of one list, in one stage, with one ratio."""

    stage: str
    """Path of the stage whose scope carries the plan; ``""`` is the model."""
    name: str
    """Path of the list in its stage, with the ratio if ratios of its blocks differ."""


@dataclass(frozen=True, kw_only=True)
class BlockRecipe:
    """Changes to one block."""

    path: str
    """Path in the model, without the names that wrappers add."""
    module: str
    """Path in the model, with those names."""
    row: Block = field(repr=False)
    ratio: float
    """Share of each region's tokens that is merged away."""
    group: Group
    role: Role | None
    """None if the block stays unmerged."""
    unmerged_because: str = ""
    """Reason why the block stays unmerged; empty if it merges."""
    sites: tuple[Site, ...] = ()
    """Parts of the block that run on merged tokens."""

    @property
    def components(self) -> tuple[str, ...]:
        """Parts of the block that run on merged tokens: ``("block",)``, or some components.

        ``("keys and values",)`` if only those merge.
        """
        if self.sites == (WHOLE_BLOCK,):
            return ("block",)
        if self.attentions:
            return ("keys and values",)
        return tuple(component for site in self.sites for component in site.components)

    @property
    def attentions(self) -> tuple[str, ...]:
        """Paths, in the block, of the attentions whose keys and values merge."""
        return tuple(site.leave for site in self.sites if isinstance(site, KeysSite))

    @property
    def form(self) -> Form | None:
        """Arguments that select the branches of the block's graph at run time; None if none do."""
        optional = self.row.key_mask if self.attentions else None
        return self.row.form if optional is None else optional.form


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Changes to a model."""

    family: Family
    config: MergeConfig
    blocks: tuple[BlockRecipe, ...]
    speedup: float | None = None
    """The speed-up for which the ratio was chosen, if any."""

    @property
    def merges_references(self) -> bool:
        """True if only references merge, at the model's border."""
        return self.config.tokens == "references" and self.config.ratio > 0

    @property
    def merged(self) -> tuple[BlockRecipe, ...]:
        """Blocks that merge."""
        return tuple(block for block in self.blocks if block.role is not None)

    @property
    def unmerged(self) -> tuple[BlockRecipe, ...]:
        """Blocks that stay unmerged."""
        return tuple(block for block in self.blocks if block.role is None)

    def variants(self, block: BlockRecipe) -> dict[str, tuple[Pass, ...] | None]:
        """Return the passes of each variant of a block; None for the block's own forward.

        The first variant runs if no call of the model selects another.
        """
        if block.role is None:
            return {UNTOUCHED: None}
        wanted = policy_of(self.config).variants
        made: dict[str, tuple[Pass, ...] | None]
        if self.config.memory is None:
            made = {MERGED: (*self._passes(block), Cleanup())}
        else:
            made = self._with_memory(block, self.config.memory)
        if UNTOUCHED in wanted:
            made[UNTOUCHED] = None
        if REUSE in wanted and block.role == "lead":
            made[WEIGH] = (*self._passes(block, kept_destinations=True), Cleanup())
            made[REUSE] = (*self._passes(replace(block, role="follow")), Cleanup())
        return made

    @property
    def theta(self) -> float:
        """Share of the correction by merged tokens that a step between full steps adds."""
        memory = self.config.memory
        given = None if memory is None else memory.theta
        return self.family.theta if given is None else given

    @property
    def makes_plans(self) -> bool:
        """False if nothing runs on merged tokens, because updates are only extrapolated."""
        return self.config.memory is None or self.theta > 0

    @property
    def controls(self) -> bool:
        """True if full steps also run on merged tokens."""
        memory = self.config.memory
        return memory is not None and memory.control and self.theta > 0

    def _with_memory(
        self, block: BlockRecipe, memory: Memory
    ) -> dict[str, tuple[Pass, ...] | None]:
        merging = self._passes(block) if self.makes_plans else ()
        remember = Remember(flow=block.row.flow, merging=merging, control=self.controls)
        recall = Recall(
            flow=block.row.flow,
            theta=self.theta,
            extrapolate=memory.extrapolate,
            control=self.controls,
        )
        between = self._passes(replace(block, role="follow")) if self.makes_plans else ()
        return {REMEMBER: (remember, Cleanup()), RECALL: (*between, recall, Cleanup())}

    def needs_new_rows(self, call: Mapping[str, Any]) -> bool:
        """Return whether a plan would hold rows that differ at the next step."""
        return self.config.placement == "block" and self.family.rows_change(call)

    def followers(self, block: BlockRecipe) -> dict[str, tuple[Pass, ...] | None]:
        """Return the variants of the blocks that use this block's plan."""
        return self.variants(replace(block, role="follow"))

    def _passes(self, block: BlockRecipe, *, kept_destinations: bool = False) -> tuple[Pass, ...]:
        kwargs = block.row.flow.attention_kwargs
        passes: list[Pass] = [
            self.merge(block),
            self.guard(block),
            OnePlan(),
        ]
        if block.role in ("lead", "follow"):
            passes.append(
                HandOn(
                    attention_kwargs=kwargs,
                    group=block.group.name,
                    role=block.role,
                    keep=REUSE in policy_of(self.config).variants,
                    kept_destinations=kept_destinations,
                    own_rows=self.config.memory is not None,
                )
            )
        return tuple(passes)

    def merge(self, block: BlockRecipe) -> Merge | MergeKeys:
        """Return the pass that merges in a block, for the block's own graph."""
        if block.attentions:
            return MergeKeys(
                flow=block.row.flow,
                attentions=block.attentions,
                options=plan_options(self.config, block.ratio),
            )
        return Merge(
            flow=block.row.flow,
            sites=block.sites,
            options=plan_options(self.config, block.ratio),
            residual=self.config.residual if self.config.placement == "block" else "replace",
        )

    def guard(self, block: BlockRecipe) -> GuardInputs:
        """Return the pass that refuses arguments that a block's merged tokens do not support."""
        row = block.row
        return GuardInputs(
            components=("self_attention",) if block.attentions else self.config.components,
            masks=row.masks,
            refused=row.refused,
            refused_by_attention=row.refused_by_attention,
        )

    def __str__(self) -> str:
        rows = [
            (
                block.path,
                ", ".join(block.components) or f"nothing: {block.unmerged_because}",
                f"{block.ratio:g}" if block.role else "",
                block.role or "",
                ", ".join(self.variants(block)),
            )
            for block in self.blocks
        ]
        headers = ("block", "merged", "ratio", "plan", "variants")
        title = f"{self.family.title}, {self.config}"
        if self.merges_references:
            title += "\nreferences merge once for an image, at the model's border"
        return f"{title}\n{tabulate(rows, headers)}"


def plan_options(config: MergeConfig, ratio: float) -> PlanOptions:
    """Return the options of plans for blocks with a ratio."""
    return PlanOptions(
        region_tokens=WHOLE_IMAGE if config.region == "image" else config.region_tokens,
        ratio=ratio,
        selector=config.selector,
        temperature=config.temperature,
        merge_over=config.merge_over,
        unmerge=config.unmerge,
    )


@dataclass(frozen=True, kw_only=True)
class FoundBlock:
    """A block in a model or in a captured graph."""

    module: str
    """Path of the block."""
    row: Block
    submodules: frozenset[str]
    """Paths of its submodules, relative to it."""


def make_recipe(
    family: Family,
    found: Sequence[FoundBlock],
    stages: Sequence[str],
    config: MergeConfig,
    model: str,
    speedup: float | None = None,
) -> Recipe:
    """Make the recipe of a model.

    Args:
        family: family of the model.
        found: blocks of the model; those of a list in the order in which they run.
        stages: paths of the modules whose blocks form groups of their own.
        config: the options.
        model: name of the model in errors.
        speedup: the speed-up for which the ratio was chosen, if any.

    Raises:
        ModelError: when a pattern matches no block; when no block merges, unless a ratio of 0 asked
            for that; or when only references are to merge and the family has none.
    """
    if config.tokens == "references":
        _check_references(family)
    paths = [plain_path(block.module) for block in found]
    if config.merges and paths:
        _check_patterns(paths, config)
    unmerged = {**_unmerged(paths, config, family), **_never_merged(paths, family)}
    wanted = ("self_attention",) if config.placement == "keys" else config.components
    led: set[Group] = set()
    blocks = []
    for path, block in zip(paths, found, strict=True):
        ratio = config.ratio_of(path)
        group = _group(path, stages, ratio, config)
        sites = _sites(block, config)
        without = "" if sites else f"it has none of {', '.join(wanted)}"
        why = unmerged.get(path, without)
        if ratio == 0 or not config.merges:
            why = RATIO_IS_ZERO if ratio == 0 else ALL_STEPS_FULL
        role: Role | None = None
        if not why:
            role = "alone" if config.share == "block" else "follow" if group in led else "lead"
            led.add(group)
        blocks.append(
            BlockRecipe(
                path=path,
                module=block.module,
                row=block.row,
                ratio=ratio,
                group=group,
                role=role,
                unmerged_because=why,
                sites=() if why else sites,
            )
        )
    reasons = {block.unmerged_because for block in blocks}
    if config.merges and reasons.isdisjoint({"", ONLY_REFERENCES}) and reasons != {RATIO_IS_ZERO}:
        why = "; ".join(sorted(reasons)) or "the model has no transformer block"
        raise ModelError(f"nothing to merge in this {model}: {why}. Pass skip=() to merge all")
    return Recipe(family=family, config=config, blocks=tuple(blocks), speedup=speedup)


def _check_references(family: Family) -> None:
    """Refuse ``tokens="references"`` for a family without references.

    Raises:
        ModelError: when the family has none.
    """
    if family.references is not None:
        return
    from toma_fx.families import all_families  # imported only for the error

    known = ", ".join(each.title for each in all_families() if each.references is not None)
    raise ModelError(
        f"tokens='references' merges the images that a model edits, and {family.title} takes none "
        f"as tokens; {known} do. Leave it out, or say tokens='all'"
    )


_WRAPPERS = re.compile(r"\.?_(checkpoint_wrapped_module|fsdp_wrapped_module|orig_mod)\b")


def plain_path(module: str) -> str:
    """Return a module's path without the names that wrappers around modules add."""
    return _WRAPPERS.sub("", module)


def _group(path: str, stages: Sequence[str], ratio: float, config: MergeConfig) -> Group:
    parent = path.rpartition(".")[0]
    inside = [stage for stage in stages if parent.startswith(f"{stage}.")]
    stage = max(inside, key=len, default="")
    name = parent.removeprefix(f"{stage}.") if stage else parent
    return Group(stage=stage, name=f"{name}, ratio {ratio!r}" if config.block_ratios else name)


def _sites(block: FoundBlock, config: MergeConfig) -> tuple[Site, ...]:
    if config.placement == "block":
        return (WHOLE_BLOCK,)
    if config.placement == "keys":
        return tuple(keys_sites(block.row.sites, block.submodules))
    return tuple(choose_sites(block.row.sites, config.components, block.submodules))


def _check_patterns(paths: Sequence[str], config: MergeConfig) -> None:
    ratios = [pattern for pattern, _ in config.block_ratios]
    for name, patterns in (("skip", config.skip or ()), ("block_ratios", ratios)):
        unused = [p for p in patterns if not any(matches(path, p) for path in paths)]
        if unused:
            raise ModelError(
                f"{name}={unused!r} matches no block; block paths look like {paths[0]!r}"
            )
    named = {config.pattern_of(path) for path in paths}
    hidden = [pattern for pattern in ratios if pattern not in named]
    if hidden:
        raise ModelError(
            f"block_ratios={hidden!r} match only blocks that earlier patterns match, and the first "
            "match counts; put them before those patterns"
        )


def _never_merged(paths: Sequence[str], family: Family) -> Mapping[str, str]:
    return {
        path: reason
        for pattern, reason in family.never_merged.items()
        for path in paths
        if matches(path, pattern)
    }


def _unmerged(paths: Sequence[str], config: MergeConfig, family: Family) -> Mapping[str, str]:
    """Return the blocks that the options or the family leave unmerged, with the reasons."""
    if config.tokens == "references":
        return dict.fromkeys(paths, ONLY_REFERENCES)
    if config.skip is not None:
        return {
            path: f"skip={pattern!r}"
            for pattern in config.skip
            for path in paths
            if matches(path, pattern)
        }
    unmerged = {}
    for parent, (first, of) in family.unmerged_by_default.items():
        siblings = [path for path in paths if path.rpartition(".")[0] == parent]
        for path in siblings[: len(siblings) * first // of]:
            if config.pattern_of(path) is None:
                unmerged[path] = family.unmerged_because
    return unmerged
