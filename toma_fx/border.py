"""Base of the classes at a model's borders, which replace diffusers' classes."""

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import nn

from toma_fx.config import MergeConfig
from toma_fx.families.rows import Family, Stage, TokenGrids, TokenSequence


@dataclass(frozen=True)
class BorderKey:
    """Data from which a border class is made."""

    base: type[nn.Module]
    family: Family
    config: MergeConfig
    stage: Stage | None = None
    """The stage, if the class is for one."""
    places: str | None = None
    """Path of a module where tokens enter or leave token order; None for a stage and the model."""

    @property
    def positions(self) -> TokenSequence | None:
        """Arguments with image tokens and their positions, if the model takes positions."""
        found = (each for each in self.family.borders if isinstance(each, TokenSequence))
        return next(found, None)

    @property
    def grids(self) -> TokenGrids | None:
        """Grids of the tokens, if they follow from the shapes of the model's arguments."""
        found = (each for each in self.family.borders if isinstance(each, TokenGrids))
        return next(found, None)

    @property
    def sequence(self) -> TokenSequence | None:
        """Same as ``positions`` if tokens are put in tile order; None for every other region."""
        return self.positions if self.config.region == "tile" else None


class Border:
    """Base of all classes at borders; each looks like the class that it replaces.

    Pipelines look up the module of a class when they save, and hooks the signature of its forward.
    So a pickle stores the key from which the class is made. Creating a model from a transformed
    model's class, as by ``type(model).from_config(model.config)``, gives an untouched model: only
    `transform` makes transformed ones.
    """

    toma_base: ClassVar[Any]
    """The class that this class replaces."""
    toma_base_forward: Any
    """Forward of that class, as a method: Dynamo would not trace it if it were looked up on a class
    that is allowed in graphs."""
    toma_key: ClassVar[BorderKey]
    """Data from which this class is made."""
    toma_unpickled: ClassVar[Any]
    """Creates an instance of the class for a key."""
    toma_named: Any
    """Names the arguments of ``forward``; takes ``(args, kwargs)``."""

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        return cls.toma_base(*args, **kwargs)

    def __reduce_ex__(self, protocol: object) -> Any:
        instance: Any = self
        state = {k: v for k, v in instance.__getstate__().items() if k not in NOT_COPIED}
        return type(self).toma_unpickled, (self.toma_key,), state


NOT_COPIED = ("_run", "toma_watched", "toma_last_call")
"""Attributes that are left out of copies and pickles; ``_run`` exists once a model is compiled."""
