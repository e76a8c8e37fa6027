"""What a call of an installed block does before and after its graph runs, and what tells it."""

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from toma_fx.runtime import memory, plan

PATH = "toma_path"
"""The attribute of a block that remembers."""


@dataclass(frozen=True)
class Code:
    """The source of a ``forward``, and the functions that it calls by name."""

    source: str
    helpers: tuple[tuple[str, Any], ...]


@dataclass(frozen=True)
class Argument:
    """An argument of a block's ``forward``."""

    place: int
    """Where it stands after ``self``."""
    name: str

    def of(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What a call gives for it."""
        return args[self.place] if len(args) > self.place else kwargs.get(self.name)


@dataclass(frozen=True)
class Lead:
    """What a leader that is compiled by itself becomes."""

    planners: tuple[tuple[str, Code], ...]
    """By variant, what makes the plan."""
    follower: tuple[tuple[str, Code | None], ...]
    """The variants of the blocks that follow it, which the rest of the leader is."""


@dataclass(frozen=True)
class Forward:
    """All that makes the class of a block, beside the block's own class."""

    variants: tuple[tuple[str, Code | None], ...]
    attention_kwargs: Argument | None
    """What carries the scope of the call; None for the scope of the thread."""
    form: tuple[tuple[Argument, ...], Callable[..., str]] | None = None
    """Arguments whose kind decides the graph, and what tells their kind."""
    group: str = ""
    """Name of the group whose plan the block makes."""
    lead: Lead | None = None
    """Known when the plan can be made apart."""
    usual: str = plan.MERGED
    """The variant that runs where no call of the model says otherwise."""


def variant_of(forward: Forward, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[str, str]:
    """The variant that the call of the model asks for, to which a call of a block belongs.

    With the kind of what the block is given.
    """
    variant = plan.variant(carrier_of(forward, args, kwargs), forward.group)
    if forward.form is None:
        return variant, ""
    arguments, kind_of = forward.form
    return variant, kind_of(*[each.of(args, kwargs) for each in arguments])


def carrier_of(forward: Forward, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The attention kwargs of a call of a block; None where none reach it."""
    argument = forward.attention_kwargs
    return None if argument is None else argument.of(args, kwargs)


def call_planned(planners: Mapping[str, Any], forward: Forward) -> Callable[..., Any]:
    """The ``__call__`` of a leader."""
    group = forward.group
    run = call_with_memory(forward) if forward.usual == plan.REMEMBER else nn.Module.__call__

    def call(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """Run the block; and where a hook skipped it, leave its plan to those that follow."""
        output = run(self, *args, **kwargs)
        carrier = carrier_of(forward, args, kwargs)
        if plan.is_due(carrier, group):
            planner = planners["".join(variant_of(forward, args, kwargs))]
            plan.postpone(carrier, group, functools.partial(planner, self, *args, **kwargs))
        return output

    return call


def call_with_memory(forward: Forward) -> Callable[..., Any]:
    """The ``__call__`` of a block that remembers."""

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        """Run the block beside its memory, of which the code of all blocks like it knows none."""
        memories = memory.memories_in(carrier_of(forward, args, kwargs))
        if memories is None:
            return nn.Module.__call__(self, *args, **kwargs)
        memories.begin(self.toma_path)
        output = nn.Module.__call__(self, *args, **kwargs)
        memories.end(self.toma_path)
        return output

    return call
