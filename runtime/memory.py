"""Memory of blocks: data kept from the last full step of a denoising run for later steps.

At a full step a block runs on all tokens. Its update ``block(x) - x`` is kept, together with the
update of the same block on merged tokens. At the steps in between, the block runs on merged tokens
only, and their update tells how far the block's update has changed since.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

from torch import Tensor
from torch.fx.node import has_side_effect

from toma_fx.runtime.plan import Plan, Plans, scope_of

Updates = tuple[Tensor, ...]
"""A block's update of each of its streams of tokens, ``(B, N, D)`` each."""


class BlockMemory(NamedTuple):
    """Data that a run keeps of a block."""

    update: Updates
    """Update of all tokens at the last full step."""
    merged: Updates
    """Update of merged tokens, ``(B, n, D)``, at the last full step; empty if not needed."""
    earlier: Updates = ()
    """``update`` of the full step before that one, or of the same step if it was the first; empty
    if not needed."""


class Kept(NamedTuple):
    """Data that a call of a model keeps for later calls."""

    plans: Plans
    memory: Mapping[str, BlockMemory] = {}
    """Memory of each block, by its path, in a model with memory."""

    def following(self, before: "Kept | None") -> "Kept":
        """Return a copy whose memories also hold the updates of the full step before."""
        earlier = {} if before is None else before.memory

        def updates_before(path: str, each: BlockMemory) -> Updates:
            if path in earlier:
                return earlier[path].update
            # Clone: a graph compiled while two inputs are the same tensor works for no others.
            return tuple(update.clone() for update in each.update)

        return self._replace(
            memory={
                path: each._replace(earlier=updates_before(path, each))
                for path, each in self.memory.items()
            }
        )


class Memories:
    """Memories of a model's blocks during one call of it.

    Attributes:
        kept: memories that the run kept, by the path of the block; empty in a full step.
        ahead: distance of this step from the last full step, in units of the distance between the
            last two full steps: 0-dimensional.
        here: memory of the running block. It is set around each block, because blocks of the same
            kind share their code, so the code cannot name a block.
        made: memories that this call leaves, by the path of the block.
        made_here: memory that the running block leaves.
    """

    def __init__(self, kept: Mapping[str, BlockMemory], ahead: Tensor | None) -> None:
        self.kept = kept
        self.ahead = ahead
        self.here: BlockMemory | None = None
        self.made: dict[str, BlockMemory] = {}
        self.made_here: BlockMemory | None = None

    def begin(self, path: str) -> None:
        """Set the memory of a block before it runs."""
        self.here = self.kept.get(path)
        self.made_here = None

    def end(self, path: str) -> None:
        """Collect the memory of a block after it ran."""
        if self.made_here is not None:
            self.made[path] = self.made_here


def memories_in(attention_kwargs: Mapping[str, Any] | None) -> Memories | None:
    """Return the memories of the model call to which a block's call belongs, if any."""
    scope = scope_of(attention_kwargs)
    return None if scope is None else scope.memories


@has_side_effect
def remember(
    attention_kwargs: Mapping[str, Any] | None,
    update: Updates,
    merged: Updates,
    plan: Plan | None = None,
) -> None:
    """Store a block's updates for the steps that follow.

    Args:
        attention_kwargs: kwargs of the block's call; their scope holds the memories.
        update: update of all tokens.
        merged: update of merged tokens.
        plan: the plan with which later steps merge, if this block does not merge now.
    """
    memories = memories_in(attention_kwargs)
    if memories is not None:
        memories.made_here = BlockMemory(update, merged)


def recall(attention_kwargs: Mapping[str, Any] | None) -> tuple[Updates, Updates, Updates]:
    """Return a block's memory of the last full step: the fields of `BlockMemory`.

    Args:
        attention_kwargs: kwargs of the block's call; their scope holds the memories.
    """
    memories = memories_in(attention_kwargs)
    assert memories is not None, "this variant runs only in a call that brings memories"
    assert memories.here is not None, "this variant runs only in a block that left a memory"
    return memories.here.update, memories.here.merged, memories.here.earlier


def steps_ahead(attention_kwargs: Mapping[str, Any] | None) -> Tensor:
    """Return the distance of this step from the last full step: `Memories.ahead`."""
    memories = memories_in(attention_kwargs)
    assert memories is not None, "this variant runs only in a call that brings memories"
    assert memories.ahead is not None, "a step between full ones knows how far it is"
    return memories.ahead
