"""Code that an installed block runs before and after its graph, and the data that controls it."""

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from toma_fx.runtime import memory, plan

PATH = "toma_path"
"""Attribute of a block with memory: its path in the model."""


@dataclass(frozen=True)
class Code:
    """The source of a ``forward``, and the functions that it calls by name."""

    source: str
    helpers: tuple[tuple[str, Any], ...]


@dataclass(frozen=True)
class Argument:
    """An argument of a block's ``forward``."""

    place: int
    """Position of the argument after ``self``."""
    name: str

    def of(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Return the value that a call gives for the argument."""
        return args[self.place] if len(args) > self.place else kwargs.get(self.name)


@dataclass(frozen=True)
class Lead:
    """Code of a leader that is compiled by itself."""

    planners: tuple[tuple[str, Code], ...]
    """For each variant, the code that makes the plan."""
    follower: tuple[tuple[str, Code | None], ...]
    """Variants of the blocks that follow the leader; the rest of the leader runs them too."""


@dataclass(frozen=True)
class Forward:
    """All data from which the class of a block is made, besides the block's own class."""

    variants: tuple[tuple[str, Code | None], ...]
    attention_kwargs: Argument | None
    """Argument that carries the scope of the call; None for the scope of the thread."""
    form: tuple[tuple[Argument, ...], Callable[..., str]] | None = None
    """Arguments whose kind selects the graph, and a function that returns the kind."""
    group: str = ""
    """Name of the group for which the block makes a plan."""
    lead: Lead | None = None
    """Set if the plan can be made separately."""
    usual: str = plan.MERGED
    """Variant that runs if no call of the model selects another."""


def variant_of(forward: Forward, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[str, str]:
    """Return the variant that the current call of the model selects for a block.

    The second item is the kind of the block's arguments.
    """
    variant = plan.variant(carrier_of(forward, args, kwargs), forward.group)
    if forward.form is None:
        return variant, ""
    arguments, kind_of = forward.form
    return variant, kind_of(*[each.of(args, kwargs) for each in arguments])


def carrier_of(forward: Forward, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Return the attention kwargs of a call of a block; None if the block gets none."""
    argument = forward.attention_kwargs
    return None if argument is None else argument.of(args, kwargs)


def call_planned(planners: Mapping[str, Any], forward: Forward) -> Callable[..., Any]:
    """Return the ``__call__`` of a leader."""
    group = forward.group
    run = call_with_memory(forward) if forward.usual == plan.REMEMBER else nn.Module.__call__

    def call(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """Run the block; if a hook skipped it, register its planner for the blocks that follow."""
        output = run(self, *args, **kwargs)
        carrier = carrier_of(forward, args, kwargs)
        if plan.is_due(carrier, group):
            planner = planners["".join(variant_of(forward, args, kwargs))]
            plan.postpone(carrier, group, functools.partial(planner, self, *args, **kwargs))
        return output

    return call


def call_with_memory(forward: Forward) -> Callable[..., Any]:
    """Return the ``__call__`` of a block with memory."""

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        """Run the block with its memory set, so that the code shared by blocks names no block."""
        memories = memory.memories_in(carrier_of(forward, args, kwargs))
        if memories is None:
            return nn.Module.__call__(self, *args, **kwargs)
        memories.begin(self.toma_path)
        output = nn.Module.__call__(self, *args, **kwargs)
        memories.end(self.toma_path)
        return output

    return call
