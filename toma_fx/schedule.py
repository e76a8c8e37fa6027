"""Options that concern more than one step of a denoising run.

"Section" and "Table" refer to *Token Merge with Attention for Diffusion Models* (ICML 2025, arXiv
2509.10918).
"""

from dataclasses import dataclass

from toma_fx.errors import ConfigError
from toma_fx.option_values import count, number


@dataclass(frozen=True, kw_only=True, slots=True)
class Schedule:
    """Number of denoising steps between two computations of a plan (section 4.3.2, Table 7).

    ``Schedule()`` makes a new plan at every step and keeps no state between calls of the model. Any
    other schedule keeps the plans of a run in a bounded store outside the model's graphs. The store
    distinguishes calls by their prompt tensor: if guidance calls the model twice per step (Flux's
    ``true_cfg_scale``, modular guiders), each call has its own plan. Any number of threads may run
    one model. The plans are dropped when the pipeline finishes the image.

    Raises:
        ConfigError: when a field is not a whole number of at least 1.
    """

    select_every: int = 1
    """Number of steps between two selections of destinations. The paper uses 10; selecting at every
    step has the better MSE in its Table 7."""
    weigh_every: int = 1
    """Number of steps between two computations of the merge weights. The paper uses 5. A new
    selection of destinations always computes new weights."""

    def __post_init__(self) -> None:
        for name, paper in (("select_every", 10), ("weigh_every", 5)):
            object.__setattr__(self, name, count(name, getattr(self, name), paper))

    @property
    def stateless(self) -> bool:
        """True if every step makes a new plan, so that no state is kept."""
        return self.select_every == 1 and self.weigh_every == 1


@dataclass(frozen=True, kw_only=True, slots=True)
class Memory:
    """How the steps of a run reuse the results of a full step.

    A full step runs every block on all tokens. It keeps each block's update ``u`` (the change that
    the block adds to its tokens) together with its plan. A step in between runs the block on merged
    tokens and returns

    ``x + u + e + theta * unmerge((u_m - u_m0) - merge(e))``

    Here ``e`` is the change of ``u``, extrapolated from the last two full steps; ``u_m`` is the
    update of the merged tokens now, and ``u_m0`` the same at the full step. Errors that merging
    makes at both steps cancel, so ratios may be higher than without memory. The gain of the
    correction depends on the model and its scheduler (``docs/memory.md``). Early steps change
    fastest: leave them untouched with ``merge_below``.

    The bounded store of plans also holds the updates: per block, two of all tokens and one of
    merged tokens. `toma_fx.report` shows their size. Runs are told apart as for `Schedule`.

    Raises:
        ConfigError: when a field holds an invalid value.
    """

    every: int = 2
    """Number of steps from one full step to the next. With 1 every step is full, and the model
    computes the same as untouched."""
    theta: float | None = None
    """Share of the correction by merged tokens that is added, from 0 to 1.5. With 0, updates are
    only extrapolated and nothing runs on merged tokens. ``None`` takes the value of the model
    family. `toma_fx.calibrate_theta` measures the best value on images."""
    extrapolate: bool = True
    """True extrapolates ``e``, which keeps one more update per block; False takes ``e`` as 0."""
    control: bool = True
    """True also runs each full step on merged tokens to compute ``u_m0``, so that lasting errors of
    merging cancel. False takes ``merge(u)`` for ``u_m0``, which costs no time."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "every", count("memory.every", self.every, 2))
        if self.theta is not None:
            theta = number(self.theta)
            if not 0 <= theta <= 1.5:
                raise ConfigError(
                    f"memory.theta={self.theta!r} must be a number in [0, 1.5], such as 0.5, or "
                    "None for the model family's own"
                )
            object.__setattr__(self, "theta", abs(theta))
        for name in ("extrapolate", "control"):
            if not isinstance(getattr(self, name), bool):
                raise ConfigError(f"memory.{name}={getattr(self, name)!r} must be True or False")
