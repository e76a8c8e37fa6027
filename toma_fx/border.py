"""A border's class takes the place of one of diffusers': how it looks, and how it is made again."""

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import nn

from toma_fx.config import MergeConfig
from toma_fx.families.rows import Family, Stage, TokenGrids, TokenSequence


@dataclass(frozen=True)
class BorderKey:
    """All that makes a class that stands in for another."""

    base: type[nn.Module]
    family: Family
    config: MergeConfig
    stage: Stage | None = None
    """Of a stage."""
    places: str | None = None
    """Path of a module with places where tokens come into order, or leave it; None for a stage and
    for the model."""

    @property
    def positions(self) -> TokenSequence | None:
        """The arguments with image tokens and their positions, for a model that takes such."""
        found = (each for each in self.family.borders if isinstance(each, TokenSequence))
        return next(found, None)

    @property
    def grids(self) -> TokenGrids | None:
        """Where tokens are, for a model whose grids follow from shapes."""
        found = (each for each in self.family.borders if isinstance(each, TokenGrids))
        return next(found, None)

    @property
    def sequence(self) -> TokenSequence | None:
        """The same, if tokens are put in tile order; None for every other region."""
        return self.positions if self.config.region == "tile" else None


class Border:
    """The base of all classes at borders. To whoever asks, each looks like the class it replaces.

    Pipelines look up the module of a class when they save, hooks the signature of its forward. A
    pickle must then be told what makes the class. And whoever makes a model of a transformed one's
    class, as by ``type(model).from_config(model.config)``, gets an untouched one: only `transform`
    makes the other.
    """

    toma_base: ClassVar[Any]
    """The class that this one stands in for."""
    toma_base_forward: Any
    """Its forward, as a method: asked of the class, Dynamo would not trace that of a class that is
    allowed in graphs."""
    toma_key: ClassVar[BorderKey]
    """All that makes this class."""
    toma_unpickled: ClassVar[Any]
    """Makes an object of the class that a key makes."""
    toma_named: Any
    """Gives the arguments of ``forward`` their names, ``(args, kwargs)``."""

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        return cls.toma_base(*args, **kwargs)

    def __reduce_ex__(self, protocol: object) -> Any:
        instance: Any = self
        state = {k: v for k, v in instance.__getstate__().items() if k not in NOT_COPIED}
        return type(self).toma_unpickled, (self.toma_key,), state


NOT_COPIED = ("_run", "toma_watched", "toma_last_call")
"""Attributes that a copy or a pickle does without; ``_run`` is there once a model is compiled."""
