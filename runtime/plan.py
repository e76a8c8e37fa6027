"""How a plan travels from the block that makes it to the blocks that share it.

Every call of a transformed model opens a `PlanScope` and sends it along in the dictionary of
attention kwargs that diffusers hands to every block. The scope dies with the call, so no plan can
be used by another image, another request or another thread, and under capture it leaves nothing but
def-use edges. The functions here are what the generated forwards call to reach it.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from toma_fx.errors import InputError

SCOPE = "toma"
"""The key of the scope in the attention kwargs."""

Plan = tuple[Tensor, ...]
"""Merge weight, unmerge weight, and the destinations' rotary values where the model has them."""


class PlanScope:
    """The plans of one call of a model.

    Attributes:
        plans: what a group's first block made, for the blocks that follow it, by the class of the
            blocks, and their ratio where blocks differ in it. A model has one such group, or a
            scope of its own for each; so a block that runs again later, as in gradient
            checkpointing, finds the plan that it had.
        planners: what makes the plan of a group whose first block was skipped, if one asks for it.
        time: step and run of the model's `DenoisingClock`, when it has a schedule.
        merging: whether the blocks merge in this call.
    """

    __slots__ = ("merging", "planners", "plans", "time")

    def __init__(self, time: tuple[Tensor, Tensor] | None = None, merging: bool = True) -> None:
        self.plans: dict[str, Plan] = {}
        self.planners: dict[str, Callable[[], object]] = {}
        self.time = time
        self.merging = merging


def _scope(attention_kwargs: Mapping[str, Any] | None) -> PlanScope | None:
    return None if attention_kwargs is None else attention_kwargs.get(SCOPE)


def own_scope(attention_kwargs: Mapping[str, Any] | None) -> dict[str, Any]:
    """The attention kwargs with a scope of their own, for a part of a model with its own group."""
    scope = _scope(attention_kwargs)
    own = PlanScope() if scope is None else PlanScope(scope.time, scope.merging)
    return {**(attention_kwargs or {}), SCOPE: own}


def merging(attention_kwargs: Mapping[str, Any] | None) -> bool:
    """Whether a block merges in this call of the model; on its own, it always does."""
    scope = _scope(attention_kwargs)
    return scope is None or scope.merging


def share(attention_kwargs: Mapping[str, Any] | None, blocks: str, *plan: Tensor) -> Plan:
    """Hand the plan to the later blocks of the group called ``blocks``; returns it."""
    scope = _scope(attention_kwargs)
    if scope is not None:
        scope.plans[blocks] = plan
    return plan


def is_due(attention_kwargs: Mapping[str, Any] | None, blocks: str) -> bool:
    """Whether this call of the model merges, and the group of ``blocks`` has no plan yet."""
    scope = _scope(attention_kwargs)
    return scope is not None and scope.merging and blocks not in scope.plans


def postpone(
    attention_kwargs: Mapping[str, Any], blocks: str, planner: Callable[[], object]
) -> None:
    """Let ``planner`` share the plan when a later block of the group asks for it."""
    attention_kwargs[SCOPE].planners[blocks] = planner


def shared(attention_kwargs: Mapping[str, Any] | None, blocks: str) -> Plan:
    """The plan that the group's first block made in this call of the model.

    Raises:
        InputError: when that block did not run: this one was called on its own, or a hook skipped
            the first, whose plan takes what its layers compute.
    """
    scope = _scope(attention_kwargs)
    if scope is not None and blocks not in scope.plans and blocks in scope.planners:
        scope.planners[blocks]()
    if scope is None or blocks not in scope.plans:
        raise InputError(
            f"this block ({blocks}) shares the plan of its group's first block, which did not run "
            "before it; call the whole model, or, to run blocks on their own or to skip the first, "
            "transform with share='block', where each makes its own plan"
        )
    return scope.plans[blocks]


def time_of(attention_kwargs: Mapping[str, Any] | None) -> tuple[Tensor, Tensor]:
    """Step and run number of this call, each an int64 scalar, for the block that keeps plans.

    Raises:
        InputError: when the block was called on its own, so that there is no clock.
    """
    scope = _scope(attention_kwargs)
    if scope is None or scope.time is None:
        raise InputError(
            "this block keeps its plan on a schedule and needs the model's clock; call the whole "
            "model, or transform without a schedule to run blocks on their own"
        )
    return scope.time


def carry(attention_kwargs: Mapping[str, Any] | None, *refused: str) -> dict[str, Any]:
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


def carry_mask(mask: Tensor | None, name: str, merged_keys: bool) -> Tensor | None:
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
            "pass None, or leave the component out: components=('cross_attention', 'mlp') for a "
            "self-attention mask, ('self_attention', 'mlp') for a cross-attention mask"
        )
    return mask


class RotaryTable:
    """Rotary values with a batch dimension, in the place of diffusers' table without one.

    `apply_rotary_emb` takes ``cos[None, :, None, :]`` of a ``(tokens, head_dim)`` table to
    ``(1, tokens, 1, head_dim)``. Destinations differ from image to image, so this table answers
    the same index with ``(B, tokens, 1, head_dim)``.
    """

    __slots__ = ("values",)

    def __init__(self, values_BSD: Tensor) -> None:
        self.values = values_BSD

    def __getitem__(self, index: tuple[slice | None, ...]) -> Tensor:
        if index != (None, slice(None), None, slice(None)):
            raise InputError(
                f"rotary index {index!r} is not the [None, :, None, :] of Flux's attention "
                "processors; use one of diffusers' own processors with merged tokens"
            )
        return self.values[:, :, None, :]


def rotary_at(
    rotary: tuple[Tensor, Tensor], destinations: Tensor, text_tokens: int
) -> tuple[Tensor, Tensor]:
    """Rotary values of the text tokens, then of the destinations.

    Args:
        rotary: cosines and sines, each ``(P + N, head_dim)``, text first.
        destinations: ``(B, R, m)`` int64.
        text_tokens: ``P``.

    Returns:
        cosines and sines, each ``(B, P + R * m, head_dim)``.
    """
    cos, sin = rotary
    return _rotary_at(cos, destinations, text_tokens), _rotary_at(sin, destinations, text_tokens)


def _rotary_at(table_SD: Tensor, destinations: Tensor, text_tokens: int) -> Tensor:
    text = table_SD[:text_tokens].expand(destinations.shape[0], -1, -1)
    return torch.cat([text, torch.ops.toma.gather(table_SD[text_tokens:], destinations)], dim=1)


def rotary_tables(cos: Tensor, sin: Tensor) -> tuple[RotaryTable, RotaryTable]:
    """What Flux's attention takes as ``image_rotary_emb`` on merged tokens."""
    return RotaryTable(cos), RotaryTable(sin)


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
