"""Which variant of its blocks a model runs in a call: decided outside every graph.

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
    """What a policy may ask of a call of a model."""

    timesteps: Callable[[], list[float]]
    """The timestep of each row of the batch, or one for all."""
    levels: Callable[[], list[float]]
    """Their noise levels: 1 for pure noise, 0 for the image."""
    prompt: Tensor
    """Its embeddings."""
    shape: tuple[object, ...]
    """What else tells the plans of two calls apart: sizes, type and device."""


@dataclass(frozen=True)
class Decision:
    """What a call of a model runs."""

    variant: str = MERGED
    kept: Kept | None = None
    """What an earlier call of the run left."""
    ahead: float | Tensor = 1.0
    """How far the call is past that one, in units of what lies between it and the one before."""
    run: Run | None = None
    """Where what this call makes is kept."""
    grids: tuple[int, ...] | None = None
    """Token counts of the grids in the image sequence, when there are several."""
    given: tuple[bool, ...] | None = None
    """Whether each frame of a video is given, where values of the call tell."""
    keeps: bool = False
    """Whether what the call makes is wanted afterwards."""


class Policy(Protocol):
    """Chooses the variant for each call."""

    @property
    def variants(self) -> tuple[str, ...]:
        """Those that it chooses from."""

    def decide(self, call: ModelCall, state: State) -> Decision:
        """What a call runs."""

    def shares(self, levels: Sequence[float]) -> Mapping[str, float]:
        """How often each variant runs in a denoising run with these noise levels."""


@dataclass(frozen=True)
class Always:
    """Merge at every step, each by a plan of its own. It keeps no state and needs no value."""

    variants: ClassVar[tuple[str, ...]] = (MERGED,)

    def decide(self, call: ModelCall, state: State) -> Decision:
        return Decision()

    def shares(self, levels: Sequence[float]) -> Mapping[str, float]:
        return {MERGED: 1.0}


@dataclass(frozen=True)
class OncePerImage(Always):
    """Merge references alone, by one plan for all steps of a run; it is told by their values."""

    def shares(self, levels: Sequence[float]) -> Mapping[str, float]:
        return {MERGED: 1 / len(levels), REUSE: 1 - 1 / len(levels)}


@dataclass(frozen=True)
class BelowNoiseLevel:
    """Merge where the noise is low."""

    level: float
    variants: ClassVar[tuple[str, ...]] = (MERGED, UNTOUCHED)

    def decide(self, call: ModelCall, state: State) -> Decision:
        """As `Policy`.

        Raises:
            InputError: when rows of the batch lie on both sides of the level.
        """
        levels = call.levels()
        merging = {level <= self.level for level in levels}
        if len(merging) > 1:
            raise InputError(
                f"this batch holds noise levels from {min(levels):g} to {max(levels):g}, on both "
                f"sides of merge_below={self.level:g}, and one call runs one of two graphs; call "
                "the model once for the rows of each side, or transform with merge_below=1"
            )
        return Decision(MERGED if merging.pop() else UNTOUCHED)

    def shares(self, levels: Sequence[float]) -> Mapping[str, float]:
        merged = sum(level <= self.level for level in levels) / len(levels)
        return {MERGED: merged, UNTOUCHED: 1 - merged}


@dataclass(frozen=True)
class WithMemory:
    """Run every so many steps in full, and those between with what they left."""

    memory: Memory
    level: float = 1.0
    """The noise level above which every step is full, and leaves nothing."""

    @property
    def variants(self) -> tuple[str, ...]:
        """As `Policy`."""
        return (REMEMBER, RECALL) if self.level == 1 else (REMEMBER, RECALL, UNTOUCHED)

    def decide(self, call: ModelCall, state: State) -> Decision:
        """As `Policy`.

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
        """As `Policy`."""
        below = sum(level <= self.level for level in levels)
        full = -(-below // self.memory.every)
        counts = {REMEMBER: full, RECALL: below - full, UNTOUCHED: len(levels) - below}
        return {variant: counts[variant] / len(levels) for variant in self.variants}


@dataclass(frozen=True)
class OnSchedule:
    """Plan again at some steps only (section 4.3.2), and keep the plans of a run in between."""

    schedule: Schedule
    variants: ClassVar[tuple[str, ...]] = (MERGED, WEIGH, REUSE)

    def decide(self, call: ModelCall, state: State) -> Decision:
        """As `Policy`.

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
    """The timestep of all rows of a batch.

    Raises:
        InputError: when it is not one.
    """
    timesteps = call.timesteps()
    if len(set(timesteps)) > 1:
        raise InputError(
            f"this batch holds timesteps from {min(timesteps):g} to {max(timesteps):g}, and "
            f"{counting} counts the steps of one; call the model once for each, or transform with "
            f"{instead}"
        )
    return timesteps[0]


def policy_of(config: MergeConfig) -> Policy:
    """The policy of a configuration."""
    if config.tokens == "references":
        return OncePerImage()
    if config.memory is not None:
        return WithMemory(config.memory, config.merge_below)
    if config.merge_below < 1:
        return BelowNoiseLevel(config.merge_below)
    if not config.schedule.stateless:
        return OnSchedule(config.schedule)
    return Always()
