"""The types of the rows in the tables of small and of published models."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

SMALL = {"height": 32, "width": 64}
VIDEO = {"height": 32, "width": 64, "frames": 9}


@dataclass
class Tiny:
    """A model of a few thousand parameters, and a small size for it."""

    cls: str
    file: str
    config: dict[str, Any]
    size: dict[str, int]
    lengths: set[int]
    """Of the sequences that attention sees at that size, for the usual number of text tokens."""
    present: tuple[str, ...] = ()
    """Arguments that the configuration asks for."""
    absent: tuple[str, ...] = ()
    output: str = "hidden_states"
    """The argument whose shape the output has; empty for that of none."""
    parts: tuple[str, ...] = ()
    """The arguments whose shapes the outputs have, where there are several."""


@dataclass
class Published:
    """A published model, cut to few blocks."""

    cls: str
    file: str
    cut: dict[str, Any] = field(default_factory=lambda: {"num_layers": 1})
    output: str = "hidden_states"
    shape: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    """Of the image or video at the native size, by the model's name."""
    runs: bool = True
    """Whether it can without data: some models branch on values, or count them."""
