"""Policies: choice of the variant of the blocks that a call runs, outside every graph.

A policy sees the timestep and the prompt of a call, and the plans that a run kept. Graphs never
decide: each variant is a graph of its own, compiled once.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Protocol

from torch import Tensor

from toma_fx.config import MergeConfig
from toma_fx.errors import InputError
from toma_fx.runtime.memory import Kept
from toma_fx.runtime.plan import MERGED, RECALL, REMEMBER, REUSE, UNTOUCHED, WEIGH
from toma_fx.schedule import Memory, Schedule
from toma_fx.state import Run, State


@dataclass(frozen=True)
class ModelCall:
    """Properties of a model's call that a policy may use."""

    timesteps: Callable[[], list[float]]
    """Returns the timestep of each sample, or one for all."""
    levels: Callable[[], list[float]]
    """Returns their noise levels: 1 for pure noise, 0 for the image."""
    prompt: Tensor
    """Embeddings of the prompt."""
    shape: tuple[object, ...]
    """Further properties that distinguish the plans of two calls: sizes, dtype and device."""


@dataclass(frozen=True)
class Decision:
    """Decision about a call of a model."""

    variant: str = MERGED
    kept: Kept | None = None
    """Data that an earlier call of the run left."""
    ahead: float | Tensor = 1.0
    """Distance from that call, in units of the distance between it and the one before."""
    run: Run | None = None
    """Run that keeps the data of this call; None if no run does."""
    grids: tuple[int, ...] | None = None
    """Token counts of the grids in the image sequence, if there are several."""
    given: tuple[bool, ...] | None = None
    """Whether each frame of a video is given, if values of the call tell."""
    keeps: bool = False
    """True if the data of this call is needed afterwards."""


class Policy(Protocol):
    """Chooses the variant for each call."""

    @property
    def variants(self) -> tuple[str, ...]:
        """Variants to choose from."""

    def decide(self, call: ModelCall, state: State) -> Decision:
        """Decide about a call."""

    def shares(self, levels: Sequence[float]) -> Mapping[str, float]:
        """Return the share of each variant in a denoising run with these noise levels."""


@dataclass(frozen=True)
class Always:
    """Merge at every step with a new plan. It keeps no state and needs no values."""

    variants: ClassVar[tuple[str, ...]] = (MERGED,)

    def decide(self, call: ModelCall, state: State) -> Decision:
        return Decision()

    def shares(self, levels: Sequence[float]) -> Mapping[str, float]:
        return {MERGED: 1.0}


@dataclass(frozen=True)
class OncePerImage(Always):
    """Merge references only, with one plan for all steps of a run, found by their values."""

    def shares(self, levels: Sequence[float]) -> Mapping[str, float]:
        return {MERGED: 1 / len(levels), REUSE: 1 - 1 / len(levels)}


@dataclass(frozen=True)
class BelowNoiseLevel:
    """Merge if the noise level is low."""

    level: float
    variants: ClassVar[tuple[str, ...]] = (MERGED, UNTOUCHED)

    def decide(self, call: ModelCall, state: State) -> Decision:
        """Same as `Policy.decide`.

        Raises:
            InputError: when rows of the batch lie on both sides of the level.
        """
        levels = call.levels()
        merging = {level <= self.level for level in levels}
        if len(merging) > 1:
            raise InputError(
                f"this batch holds noise levels from {min(levels):g} to {max(levels):g}, on both "
                f"sides of merge_below={self.level:g}, but a call runs only one of two graphs; "
                "call the model once for the rows of each side, or transform with merge_below=1"
            )
        return Decision(MERGED if merging.pop() else UNTOUCHED)

    def shares(self, levels: Sequence[float]) -> Mapping[str, float]:
        merged = sum(level <= self.level for level in levels) / len(levels)
        return {MERGED: merged, UNTOUCHED: 1 - merged}


@dataclass(frozen=True)
class WithMemory:
    """Run every n-th step in full, and the steps in between with its results."""

    memory: Memory
    level: float = 1.0
    """Noise level above which every step is full and leaves nothing."""

    @property
    def variants(self) -> tuple[str, ...]:
        """Same as `Policy.variants`."""
        return (REMEMBER, RECALL) if self.level == 1 else (REMEMBER, RECALL, UNTOUCHED)

    def decide(self, call: ModelCall, state: State) -> Decision:
        """Same as `Policy.decide`.

        Raises:
            InputError: when rows of the batch are at different timesteps.
        """
        timestep = _one_timestep(call, str(self.memory), "memory=None, which remembers nothing")
        if self.level < 1 and BelowNoiseLevel(self.level).decide(call, state).variant == UNTOUCHED:
            return Decision(UNTOUCHED)
        run = state.run_of(call.prompt, call.shape, timestep)
        if run.kept is None or run.step - run.kept_at[-1] >= self.memory.every:
            return Decision(REMEMBER, run=run, keeps=True)
        first, last = run.kept_at[0], run.kept_at[-1]
        return Decision(RECALL, run.kept, (run.step - last) / max(last - first, 1))

    def shares(self, levels: Sequence[float]) -> Mapping[str, float]:
        """Same as `Policy.shares`."""
        below = sum(level <= self.level for level in levels)
        full = -(-below // self.memory.every)
        counts = {REMEMBER: full, RECALL: below - full, UNTOUCHED: len(levels) - below}
        return {variant: counts[variant] / len(levels) for variant in self.variants}


@dataclass(frozen=True)
class OnSchedule:
    """Make new plans at some steps only (section 4.3.2), and reuse them in between."""

    schedule: Schedule
    variants: ClassVar[tuple[str, ...]] = (MERGED, WEIGH, REUSE)

    def decide(self, call: ModelCall, state: State) -> Decision:
        """Same as `Policy.decide`.

        Raises:
            InputError: when rows of the batch are at different timesteps.
        """
        instead = "Schedule(), which plans at every step"
        timestep = _one_timestep(call, str(self.schedule), instead)
        run = state.run_of(call.prompt, call.shape, timestep)
        left = run.kept is not None and run.kept.plans
        variant = self._variant(run.step) if left else MERGED
        kept = None if variant == MERGED else run.kept
        return Decision(variant, kept, run=run, keeps=True)

    def _variant(self, step: int) -> str:
        if step % self.schedule.select_every == 0:
            return MERGED
        return WEIGH if step % self.schedule.weigh_every == 0 else REUSE

    def shares(self, levels: Sequence[float]) -> Mapping[str, float]:
        chosen = [self._variant(step) for step in range(len(levels))]
        return {variant: chosen.count(variant) / len(chosen) for variant in self.variants}


def _one_timestep(call: ModelCall, counting: str, instead: str) -> float:
    """Return the timestep of all rows of a batch.

    Raises:
        InputError: when rows have different timesteps.
    """
    timesteps = call.timesteps()
    if len(set(timesteps)) > 1:
        raise InputError(
            f"this batch holds timesteps from {min(timesteps):g} to {max(timesteps):g}, but "
            f"{counting} counts the steps of one; call the model once for each, or transform with "
            f"{instead}"
        )
    return timesteps[0]


def policy_of(config: MergeConfig) -> Policy:
    """Return the policy of a configuration."""
    if config.tokens == "references":
        return OncePerImage()
    if config.memory is not None:
        return WithMemory(config.memory, config.merge_below)
    if config.merge_below < 1:
        return BelowNoiseLevel(config.merge_below)
    if not config.schedule.stateless:
        return OnSchedule(config.schedule)
    return Always()
