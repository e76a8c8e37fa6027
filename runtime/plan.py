"""Transport of a plan from the block that makes it to the blocks that share it.

Every call of a transformed model opens a `CallScope`. If diffusers passes a dictionary of attention
kwargs to every block, the scope travels in it; other models have no such argument, and their blocks
use the scope of the thread. The scope ends with the call, so no other image, request or thread can
use its plans, and in a captured graph only def-use edges are left of it. Generated forwards call
the functions here to reach the scope.
"""

import threading
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.fx.node import has_side_effect

from toma_fx.errors import InputError
from toma_fx.runtime import regions

if TYPE_CHECKING:
    from toma_fx.runtime.memory import Memories

SCOPE = "toma"
"""Key of the scope in the attention kwargs."""

Plan = tuple[Any, ...]
"""Merge weight; unmerge weight; for each argument with a row per token, such as rotary values, the
destinations' rows, or None if the argument was None; and the destinations, if the model keeps plans
for later calls. If only keys merge: merge weight and the logarithms of the clusters' sizes."""

Plans = Mapping[str, Mapping[str, Plan]]
"""Plans by the path of the stage whose blocks share them, and by their group's name in it."""

MERGED = "merged"
"""Variant of a block that merges with a new plan, made by itself or shared."""
UNTOUCHED = "untouched"
"""Variant that runs diffusers' own forward on all tokens."""
WEIGH = "weigh"
"""Variant that keeps an earlier call's destinations and computes their weights again."""
REUSE = "reuse"
"""Variant that merges with the plan of an earlier call."""
REMEMBER = "remember"
"""Variant that runs on all tokens and remembers its update: `toma_fx.runtime.memory`."""
RECALL = "recall"
"""Variant that corrects the remembered update, by means of merged tokens."""

BRING_PLANS = (WEIGH, REUSE, RECALL)
"""Variants that need data of an earlier call."""
MERGE_AS_BEFORE = (REUSE, RECALL)
"""Variants that merge with a plan of an earlier call."""


class CallScope:
    """Plans of one call of a model, or of one stage in it.

    Attributes:
        variant: variant of the blocks that runs in this call.
        grids: token counts of the grids in the image sequence; None if it is one grid.
        unmerged: number of image tokens before those grids that stay unmerged, such as those of a
            given first frame.
        order: order of the image tokens, ``(N,)`` int64; None if it is the caller's. If references
            merged before the call: the tokens that are left, in the caller's order.
        rows: number of tokens before references merged; None if no tokens were left out.
        whole: arguments of the model that describe all these tokens, by name.
        plans: plans made by the first block of each group, for the blocks that follow, by the
            group's name. So a block that runs again later, as in gradient checkpointing, finds its
            plan.
        planners: for each group whose first block was skipped, a function that makes its plan.
        kept: plans of an earlier call, by the name of the group.
        kept_by_stage: plans of this scope and of the stages in it, by their paths.
        stages: scopes of stages with groups of their own, by their paths in the model. It stays
            empty if plans are not kept, so that a stage's plan is freed with the stage.
        keeps: whether the plans are needed after the call.
        memories: the blocks' memories of a full step, in a model with memory.
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
        """Return the plans of this scope and its stages, for a later call."""
        scopes = {"": self, **self.stages}
        return {path: dict(scope.plans) for path, scope in scopes.items() if scope.plans}


class _Thread(threading.local):
    # Each thread begins with a value of its own. With a default of the class, a guard of Dynamo
    # says that the thread has no value yet, and the first call itself would break that guard.
    def __init__(self) -> None:
        self.scope: CallScope | None = None


_THREAD = _Thread()


def current() -> CallScope | None:
    """Return the scope of the model call that this thread is in; None outside of a call."""
    return _THREAD.scope


def enter(scope: CallScope | None) -> CallScope | None:
    """Set the scope of this thread and return the previous one, to be restored later."""
    before = _THREAD.scope
    _THREAD.scope = scope
    return before


class InScope:
    """A block whose calls run in a given scope, from any thread and at any time.

    Gradient checkpointing runs a block again during the backward pass, after the call has ended.
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
    """Return the scope of the model call to which a block's call belongs, if any."""
    return current() if attention_kwargs is None else attention_kwargs.get(SCOPE)


def own_scope(attention_kwargs: Mapping[str, Any], stage: str) -> dict[str, Any]:
    """Return the attention kwargs with a separate scope for a stage, whose blocks share plans.

    Args:
        attention_kwargs: kwargs of the model's call, with its scope.
        stage: path of the stage in the model.
    """
    scope: CallScope = attention_kwargs[SCOPE]
    own = CallScope(scope.variant, scope.grids, scope.kept_by_stage, stage, memories=scope.memories)
    if scope.keeps:
        scope.stages[stage] = own
    return {**attention_kwargs, SCOPE: own}


def variant(attention_kwargs: Mapping[str, Any] | None, group: str = "") -> str:
    """Return the variant of a block in this call of the model; outside of one, it merges.

    Args:
        attention_kwargs: kwargs of the block's call.
        group: group for which the block makes a plan. If an earlier call left no plan, for example
            because a hook skipped the block, the block makes a new one, and a new memory too.
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
    """Return the division of a call's image tokens into regions: `toma_fx.runtime.regions.layout`.

    Args:
        attention_kwargs: kwargs of the block's call; their scope knows the grids of the sequence.
        tokens: ``(B, N, D)`` image tokens.
        region_tokens: wanted number of tokens per region.
        ratio: share of each region's tokens that is merged away.
    """
    scope = scope_of(attention_kwargs)
    count = tokens.shape[1]
    grids: tuple[int, ...] = (count,)
    # Some blocks take only some of the grids: the image's, or its references'. A rank of context
    # parallelism holds a part of the sequence, in which grids are unknown.
    if scope is not None and scope.grids is not None:
        given = tuple(scope.grids)
        ends = range(len(given), -1, -1)
        parts = [*(given[:end] for end in ends), *(given[start:] for start in range(1, len(given)))]
        grids = next((part for part in parts if sum(part) == count), grids)
    return regions.layout(grids, region_tokens, ratio)


def unmerged_tokens(attention_kwargs: Mapping[str, Any] | None) -> int:
    """Return the number of image tokens before all others that stay unmerged."""
    scope = scope_of(attention_kwargs)
    return 0 if scope is None else scope.unmerged


def text_tokens(attention_kwargs: Mapping[str, Any] | None, tokens: Tensor) -> int:
    """Return the number of text tokens in a sequence of image and text tokens.

    Args:
        attention_kwargs: kwargs of the block's call; their scope knows the grids of the image.
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
    """Share a plan with the later blocks of the group, and return the plan to use.

    If blocks have memories made with an earlier plan, that plan stays in use.
    """
    scope = scope_of(attention_kwargs)
    if scope is None:
        return plan
    if scope.variant == RECALL and group in scope.plans:
        return scope.plans[group]
    scope.plans[group] = plan
    return plan


def is_due(attention_kwargs: Mapping[str, Any] | None, group: str) -> bool:
    """Return whether this call of the model merges and the group still lacks a plan."""
    scope = scope_of(attention_kwargs)
    return scope is not None and scope.variant != UNTOUCHED and group not in scope.plans


def postpone(
    attention_kwargs: Mapping[str, Any] | None, group: str, planner: Callable[[], object]
) -> None:
    """Register ``planner`` to share the plan when a later block of the group needs it."""
    scope = scope_of(attention_kwargs)
    assert scope is not None, "no plan is due outside of a call of the model"
    scope.planners[group] = planner


def shared(attention_kwargs: Mapping[str, Any] | None, group: str) -> Plan:
    """Return the plan that the group's first block made in this call of the model.

    Raises:
        InputError: when that block did not run: either this block was called on its own, or a hook
            skipped the first block, whose plan depends on the output of its layers.
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
    """Return the destinations, ``(B, R, m)`` int64, that an earlier call selected for the group."""
    scope = scope_of(attention_kwargs)
    assert scope is not None, "this variant runs only in a call that brings kept plans"
    destinations: Tensor = scope.kept[group][-1]
    return destinations


def pass_on(attention_kwargs: Mapping[str, Any] | None, *refused: str) -> dict[str, Any]:
    """Return the attention kwargs for the attention layers: all but the scope.

    Raises:
        InputError: when a key in ``refused`` is present, which merged tokens do not support.
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
"""Components that remain when self-attention (True) or cross-attention (False) is left out."""


def pass_on_mask(mask: Tensor | None, name: str, merged_keys: bool) -> Tensor | None:
    """Return an attention mask if it is still correct after merging.

    Args:
        mask: bias ``(B, 1 or queries, keys)``, or None.
        name: name of the argument, for the message.
        merged_keys: whether the keys are the merged tokens themselves (self-attention).

    Raises:
        InputError: when the mask refers to single image tokens.
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
    """Clip float16 overflow like Flux; the dtype is checked at run time, not at capture."""
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
