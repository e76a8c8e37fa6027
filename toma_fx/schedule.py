"""The options that look at more than one step of a denoising run.

"Section" and "Table" refer to *Token Merge with Attention for Diffusion Models* (ICML 2025, arXiv
2509.10918).
"""

from dataclasses import dataclass

from toma_fx.errors import ConfigError
from toma_fx.option_values import count, number


@dataclass(frozen=True, kw_only=True, slots=True)
class Schedule:
    """How many denoising steps pass between two computations of a plan (section 4.3.2, Table 7).

    ``Schedule()`` makes a new plan at every step and keeps nothing from one call of the model to
    the next. Any other schedule keeps the plans of a run in a bounded store outside the model's
    graphs. Calls are told apart by their prompt tensor, so guidance in two calls a step (Flux's
    ``true_cfg_scale``, modular guiders) has a plan for each of them. Any number of threads may run
    one model. The plans are dropped when the pipeline ends the image.

    Raises:
        ConfigError: when a field is not a whole number of at least 1.
    """

    select_every: int = 1
    """Steps between two selections of destinations. The paper uses 10; every step has the better
    MSE in its Table 7."""
    weigh_every: int = 1
    """Steps between two computations of the merge weights. The paper uses 5. A new selection of
    destinations brings new weights with it."""

    def __post_init__(self) -> None:
        for name, paper in (("select_every", 10), ("weigh_every", 5)):
            object.__setattr__(self, name, count(name, getattr(self, name), paper))

    @property
    def stateless(self) -> bool:
        """Whether every step makes a new plan, so that no state is kept."""
        return self.select_every == 1 and self.weigh_every == 1


@dataclass(frozen=True, kw_only=True, slots=True)
class Memory:
    """How the steps of a run use what a full step computed.

    At a full step every block runs on all tokens, and its update ``u`` (what it adds to its tokens)
    is kept with its plan. At a step between, the block runs on merged tokens and gives

    ``x + u + e + theta * unmerge((u_m - u_m0) - merge(e))``

    with ``e`` the change of ``u`` extrapolated from the last two full steps, ``u_m`` the update of
    merged tokens now, and ``u_m0`` the same at the full step. What merging gets wrong at both steps
    cancels, so ratios may be higher than without memory. How much the correction gains depends on
    the model and its scheduler (``docs/memory.md``). Early steps change fastest: leave them
    untouched, by ``merge_below``.

    What is kept lies in the bounded store of plans: for a block, two updates of all tokens and one
    of merged ones. `toma_fx.report` says how much that is. Runs are told apart as for `Schedule`.

    Raises:
        ConfigError: when a field holds a value that it cannot take.
    """

    every: int = 2
    """Steps from one full step to the next. With 1 every step is full, and the model computes what
    it did untouched."""
    theta: float | None = None
    """The share of the correction by merged tokens that is added, from 0 to 1.5. With 0 updates are
    only extrapolated, and nothing runs on merged tokens. ``None`` takes the model family's own.
    `toma_fx.calibrate_theta` measures the best one on images."""
    extrapolate: bool = True
    """Whether ``e`` is extrapolated, or 0. It keeps one more update of each block."""
    control: bool = True
    """Whether each full step also runs merged, for ``u_m0``: errors of merging that last from step
    to step then cancel. Without it, ``u_m0`` is ``merge(u)``, which takes no time."""

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
