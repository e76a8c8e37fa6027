"""What blocks remember of the last full step of a denoising run, and what later steps find.

At a full step a block runs on all tokens, and its update ``block(x) - x`` is kept, with the update
of the same block on merged tokens. At the steps between it runs on merged tokens only, which say
how far its update has changed since.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

from torch import Tensor
from torch.fx.node import has_side_effect

from toma_fx.runtime.plan import Plan, Plans, scope_of

Updates = tuple[Tensor, ...]
"""What a block adds to each of its streams of tokens, ``(B, N, D)`` each."""


class BlockMemory(NamedTuple):
    """What a run keeps of a block."""

    update: Updates
    """At the last full step, of all tokens."""
    merged: Updates
    """At the last full step, of merged tokens, ``(B, n, D)``; empty where it is not asked for."""
    earlier: Updates = ()
    """``update`` at the full step before that one, or at the same one when it was the first; empty
    where it is not asked for."""


class Kept(NamedTuple):
    """What a call of a model leaves for later ones."""

    plans: Plans
    memory: Mapping[str, BlockMemory] = {}
    """By the path of a block, in a model with memory."""

    def following(self, before: "Kept | None") -> "Kept":
        """With the updates of the full step before in each memory."""
        earlier = {} if before is None else before.memory

        def updates_before(path: str, each: BlockMemory) -> Updates:
            if path in earlier:
                return earlier[path].update
            # A copy: a graph that is compiled while it is given one tensor twice serves no other.
            return tuple(update.clone() for update in each.update)

        return self._replace(
            memory={
                path: each._replace(earlier=updates_before(path, each))
                for path, each in self.memory.items()
            }
        )


class Memories:
    """The memories of a model's blocks, in one call of it.

    Attributes:
        kept: by the path of a block, what the run kept; nothing in a full step.
        ahead: how far this step is past the last full one, in units of what lies between the last
            two: 0-dimensional.
        here: what the block that is running finds. It is set around each block, so that the code
            of a block, which is that of all blocks like it, names none.
        made: by the path of a block, what this call leaves.
        made_here: what the block that is running leaves.
    """

    def __init__(self, kept: Mapping[str, BlockMemory], ahead: Tensor | None) -> None:
        self.kept = kept
        self.ahead = ahead
        self.here: BlockMemory | None = None
        self.made: dict[str, BlockMemory] = {}
        self.made_here: BlockMemory | None = None

    def begin(self, path: str) -> None:
        """Before a block runs."""
        self.here = self.kept.get(path)
        self.made_here = None

    def end(self, path: str) -> None:
        """After it ran."""
        if self.made_here is not None:
            self.made[path] = self.made_here


def memories_in(attention_kwargs: Mapping[str, Any] | None) -> Memories | None:
    """The memories of the call of a model to which a call of a block belongs, if it has any."""
    scope = scope_of(attention_kwargs)
    return None if scope is None else scope.memories


@has_side_effect
def remember(
    attention_kwargs: Mapping[str, Any] | None,
    update: Updates,
    merged: Updates,
    plan: Plan | None = None,
) -> None:
    """Leave what a block added to its tokens for the steps that follow.

    Args:
        attention_kwargs: of the call of the block; their scope holds the memories.
        update: of all tokens.
        merged: of merged tokens.
        plan: by which they will be merged, where this block does not do so now.
    """
    memories = memories_in(attention_kwargs)
    if memories is not None:
        memories.made_here = BlockMemory(update, merged)


def recall(attention_kwargs: Mapping[str, Any] | None) -> tuple[Updates, Updates, Updates]:
    """What the block left at the last full step: the fields of `BlockMemory`.

    Args:
        attention_kwargs: of the call of the block; their scope holds the memories.
    """
    memories = memories_in(attention_kwargs)
    assert memories is not None, "this variant runs only in a call that brings memories"
    assert memories.here is not None, "this variant runs only in a block that left a memory"
    return memories.here.update, memories.here.merged, memories.here.earlier


def steps_ahead(attention_kwargs: Mapping[str, Any] | None) -> Tensor:
    """How far this step is past the last full one: `Memories.ahead`."""
    memories = memories_in(attention_kwargs)
    assert memories is not None, "this variant runs only in a call that brings memories"
    assert memories.ahead is not None, "a step between full ones knows how far it is"
    return memories.ahead
