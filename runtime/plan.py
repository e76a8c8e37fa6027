"""How a plan travels from the block that makes it to the blocks that share it.

Every call of a transformed model opens a `CallScope`. Where diffusers hands a dictionary of
attention kwargs to every block, the scope goes along in it; other models have no such argument, and
their blocks ask for the scope of the thread. It dies with the call, so no plan can be used by
another image, another request or another thread, and under capture it leaves nothing but def-use
edges. The functions here are what the generated forwards call to reach it.
"""

import threading
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor
from torch.fx.node import has_side_effect

from toma_fx.errors import InputError
from toma_fx.runtime import regions

if TYPE_CHECKING:
    from toma_fx.runtime.memory import Memories

SCOPE = "toma"
"""The key of the scope in the attention kwargs."""

Plan = tuple[Any, ...]
"""Merge weight, unmerge weight, the destinations' rows of what has one for each token, such as
rotary values, or None for an argument that was; and the destinations, in a model that keeps plans
for later calls. Where keys alone merge, merge weight and the logarithms of the clusters' sizes."""

Plans = Mapping[str, Mapping[str, Plan]]
"""Plans by the path of the stage whose blocks share them, and by the name of their group in it."""

MERGED = "merged"
"""The variant of a block that makes a new plan, or shares one, and merges by it."""
UNTOUCHED = "untouched"
"""The variant that runs diffusers' own forward on all tokens."""
WEIGH = "weigh"
"""The variant that keeps an earlier call's destinations and computes their weights again."""
REUSE = "reuse"
"""The variant that merges by the plan of an earlier call."""
REMEMBER = "remember"
"""The variant that runs on all tokens and remembers its update: `toma_fx.runtime.memory`."""
RECALL = "recall"
"""The variant that adds what changed since then, by merged tokens, to what is remembered."""

BRING_PLANS = (WEIGH, REUSE, RECALL)
"""The variants that need something of an earlier call."""
MERGE_AS_BEFORE = (REUSE, RECALL)
"""Those that merge by a plan of an earlier call."""


class CallScope:
    """The plans of one call of a model, or of one stage in it.

    Attributes:
        variant: the variant of a block that runs in this call.
        grids: token counts of the grids in the image sequence; None when it is one grid.
        unmerged: image tokens before those grids that stay as they are, as those of a first frame
            that is given.
        order: the order of the image tokens, ``(N,)`` int64; None where it is the caller's. Where
            references merged before the call, the tokens that are left, in the caller's order.
        rows: how many tokens there were then; None where none is left out.
        whole: arguments of the model that tell of all of them, by name.
        plans: what a group's first block made, for the blocks that follow it, by the name of the
            group. So a block that runs again later, as in gradient checkpointing, finds its plan.
        planners: what makes the plan of a group whose first block was skipped, if one asks for it.
        kept: plans of an earlier call, by the name of the group.
        kept_by_stage: those of this scope and of the stages in it, by their paths.
        stages: the scopes of stages with groups of their own, by their paths in the model; where
            nobody keeps plans, there are none, so that a stage's plan goes with the stage.
        keeps: whether the plans are wanted after the call.
        memories: what blocks remember of a full step, in a model with memory.
    """

    __slots__ = (
        "grids",
        "keeps",
        "kept",
        "kept_by_stage",
        "memories",
        "order",
        "planners",
        "plans",
        "rows",
        "stages",
        "unmerged",
        "variant",
        "whole",
    )

    def __init__(
        self,
        variant: str = MERGED,
        grids: Sequence[int] | None = None,
        kept: Plans | None = None,
        stage: str = "",
        keeps: bool = False,
        unmerged: int = 0,
        order: Tensor | None = None,
        rows: int | None = None,
        whole: Mapping[str, Any] | None = None,
        memories: "Memories | None" = None,
    ) -> None:
        self.variant = variant
        self.memories = memories
        self.keeps = keeps
        self.grids = grids
        self.unmerged = unmerged
        self.order = order
        self.rows = rows
        self.whole = whole
        self.kept_by_stage = {} if kept is None else kept
        self.kept = self.kept_by_stage.get(stage, {})
        self.plans: dict[str, Plan] = dict(self.kept) if variant in MERGE_AS_BEFORE else {}
        self.planners: dict[str, Callable[[], object]] = {}
        self.stages: dict[str, CallScope] = {}

    def made(self) -> dict[str, dict[str, Plan]]:
        """The plans of this scope and its stages, for a later call."""
        scopes = {"": self, **self.stages}
        return {path: dict(scope.plans) for path, scope in scopes.items() if scope.plans}


class _Thread(threading.local):
    # On the class, so that a guard of Dynamo holds in threads that never called a model.
    scope: ClassVar[CallScope | None] = None


_THREAD = _Thread()


def current() -> CallScope | None:
    """The scope of the call of a model that this thread is in."""
    return _THREAD.scope


def enter(scope: CallScope | None) -> CallScope | None:
    """Let ``scope`` be that of this thread; returns the one before, to be entered again."""
    before = _THREAD.scope
    _THREAD.scope = scope  # type: ignore[misc]
    return before


class InScope:
    """A block whose calls run in a scope, whichever thread makes them and whenever.

    Gradient checkpointing runs a block again during the backward pass, when the call is over.
    """

    def __init__(self, block: Callable[..., Any], scope: CallScope | None) -> None:
        self._block, self._scope = block, scope

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        before = enter(self._scope)
        try:
            return self._block(*args, **kwargs)
        finally:
            enter(before)


def scope_of(attention_kwargs: Mapping[str, Any] | None) -> CallScope | None:
    """The scope of the call of a model to which a call of a block belongs, if any."""
    return current() if attention_kwargs is None else attention_kwargs.get(SCOPE)


def own_scope(attention_kwargs: Mapping[str, Any], stage: str) -> dict[str, Any]:
    """The attention kwargs with a scope of its own for a stage, whose blocks share plans.

    Args:
        attention_kwargs: those of the call of the model, with its scope.
        stage: the stage's path in the model.
    """
    scope: CallScope = attention_kwargs[SCOPE]
    own = CallScope(scope.variant, scope.grids, scope.kept_by_stage, stage, memories=scope.memories)
    if scope.keeps:
        scope.stages[stage] = own
    return {**attention_kwargs, SCOPE: own}


def variant(attention_kwargs: Mapping[str, Any] | None, group: str = "") -> str:
    """The variant of a block that runs in this call of the model; on its own, it merges.

    Args:
        attention_kwargs: of the call of the block.
        group: the group that the block makes a plan for. It makes one whenever an earlier call
            left none, as where a hook skipped the block then; and then it remembers anew, too.
    """
    scope = scope_of(attention_kwargs)
    if scope is None:
        return MERGED
    if scope.variant not in BRING_PLANS:
        return scope.variant
    left = not group or group in scope.kept
    if scope.variant == RECALL:
        assert scope.memories is not None, "this variant runs only in a call that brings memories"
        return RECALL if left and scope.memories.here is not None else REMEMBER
    return scope.variant if left else MERGED


def region_layout(
    attention_kwargs: Mapping[str, Any] | None, tokens: Tensor, region_tokens: int, ratio: float
) -> tuple[int, ...]:
    """How the image tokens of a call are cut into regions: `toma_fx.runtime.regions.layout`.

    Args:
        attention_kwargs: of the call of the block; their scope knows the grids of the sequence.
        tokens: ``(B, N, D)`` image tokens.
        region_tokens: tokens wanted in a region.
        ratio: share of a region's tokens that is merged away.
    """
    scope = scope_of(attention_kwargs)
    count = tokens.shape[1]
    grids: tuple[int, ...] = (count,)
    # Some blocks take a part of the grids, those of the image or those of its references. A rank of
    # context parallelism holds a part of the sequence, in which grids are unknown.
    if scope is not None and scope.grids is not None:
        given = tuple(scope.grids)
        ends = range(len(given), -1, -1)
        parts = [*(given[:end] for end in ends), *(given[start:] for start in range(1, len(given)))]
        grids = next((part for part in parts if sum(part) == count), grids)
    return regions.layout(grids, region_tokens, ratio)


def unmerged_tokens(attention_kwargs: Mapping[str, Any] | None) -> int:
    """Image tokens that stay as they are, before all others."""
    scope = scope_of(attention_kwargs)
    return 0 if scope is None else scope.unmerged


def text_tokens(attention_kwargs: Mapping[str, Any] | None, tokens: Tensor) -> int:
    """Text tokens in a sequence of image and text tokens.

    Args:
        attention_kwargs: of the call of the block; their scope knows the grids of the image.
        tokens: ``(B, N + P, D)``.

    Raises:
        InputError: when the block is not called by a transformed model.
    """
    scope = scope_of(attention_kwargs)
    if scope is None or scope.grids is None:
        raise InputError(
            f"tokens of shape {tuple(tokens.shape)} hold image and text, and only the model knows "
            "how many of each; call or export the whole model, not this block alone"
        )
    count: int = tokens.shape[1] - scope.unmerged - sum(scope.grids)
    return count


@has_side_effect
def share(attention_kwargs: Mapping[str, Any] | None, group: str, *plan: Tensor) -> Plan:
    """Hand the plan to the later blocks of the group; returns it.

    A plan by which blocks have remembered stays, whatever one that remembers anew has made.
    """
    scope = scope_of(attention_kwargs)
    if scope is None:
        return plan
    if scope.variant == RECALL and group in scope.plans:
        return scope.plans[group]
    scope.plans[group] = plan
    return plan


def is_due(attention_kwargs: Mapping[str, Any] | None, group: str) -> bool:
    """Whether this call of the model merges, and the group has no plan yet."""
    scope = scope_of(attention_kwargs)
    return scope is not None and scope.variant != UNTOUCHED and group not in scope.plans


def postpone(
    attention_kwargs: Mapping[str, Any] | None, group: str, planner: Callable[[], object]
) -> None:
    """Let ``planner`` share the plan when a later block of the group asks for it."""
    scope = scope_of(attention_kwargs)
    assert scope is not None, "no plan is due outside of a call of the model"
    scope.planners[group] = planner


def shared(attention_kwargs: Mapping[str, Any] | None, group: str) -> Plan:
    """The plan that the group's first block made in this call of the model.

    Raises:
        InputError: when that block did not run: this one was called on its own, or a hook skipped
            the first, whose plan takes what its layers compute.
    """
    scope = scope_of(attention_kwargs)
    if scope is not None and group not in scope.plans and group in scope.planners:
        scope.planners[group]()
    if scope is None or group not in scope.plans:
        raise InputError(
            f"this block ({group}) shares the plan of its group's first block, which did not run "
            "before it; call the whole model, or, to run or export blocks on their own or to skip "
            "the first, transform with share='block', where each makes its own plan"
        )
    return scope.plans[group]


def kept_destinations(attention_kwargs: Mapping[str, Any] | None, group: str) -> Tensor:
    """The destinations that an earlier call selected for the group, ``(B, R, m)`` int64."""
    scope = scope_of(attention_kwargs)
    assert scope is not None, "this variant runs only in a call that brings kept plans"
    destinations: Tensor = scope.kept[group][-1]
    return destinations


def pass_on(attention_kwargs: Mapping[str, Any] | None, *refused: str) -> dict[str, Any]:
    """The attention kwargs that go on to the attention layers: all but the scope.

    Raises:
        InputError: when a key of ``refused`` is present, which merged tokens cannot carry.
    """
    if attention_kwargs is None:
        return {}
    for key in refused:
        if attention_kwargs.get(key) is not None:
            raise InputError(
                f"the attention kwarg {key!r} refers to the full grid of image tokens and cannot "
                "be carried through merged tokens; leave it out, or call the untransformed model"
            )
    return {key: value for key, value in attention_kwargs.items() if key != SCOPE}


_LEFT_WITHOUT = {True: ("cross_attention", "mlp"), False: ("self_attention", "mlp")}
"""The components that stay when self-attention, or cross-attention, is left out."""


def pass_on_mask(mask: Tensor | None, name: str, merged_keys: bool) -> Tensor | None:
    """An attention mask that is still true after merging.

    Args:
        mask: ``(B, 1 or queries, keys)`` bias or None.
        name: the argument's name, for the message.
        merged_keys: whether the keys are the merged tokens themselves (self-attention).

    Raises:
        InputError: when the mask speaks of single image tokens.
    """
    if mask is None:
        return None
    if merged_keys or (mask.ndim > 2 and mask.shape[-2] != 1):
        raise InputError(
            f"{name} of shape {tuple(mask.shape)} masks single image tokens, which merging joins; "
            "pass None, or leave the component out: transform with placement='component', "
            f"components={_LEFT_WITHOUT[merged_keys]!r} and region='stripe'"
        )
    return mask


def clip_float16(hidden_states: Tensor, low: float, high: float) -> Tensor:
    """Flux's clipping of float16 overflow, decided when the block runs, not when it is captured."""
    return hidden_states.clip(low, high) if hidden_states.dtype == torch.float16 else hidden_states


def expect_outputs(outputs: tuple[Tensor, ...], count: int) -> tuple[Tensor, ...]:
    """Check that attention returned as many outputs as when its block was captured.

    Raises:
        InputError: when it did not, as after loading an IP-Adapter into a transformed model.
    """
    if len(outputs) != count:
        raise InputError(
            f"attention returned {len(outputs)} outputs, but {count} when the model was "
            "transformed; load or unload IP-Adapters first: toma_fx.restore, load, transform again"
        )
    return outputs
