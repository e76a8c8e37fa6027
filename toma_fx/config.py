"""Every option of the method, its check and where it comes from.

"Table", "Eq." and "section" refer to *Token Merge with Attention for Diffusion Models*
(ICML 2025, arXiv 2509.10918). "Own measurement" refers to the ablation in ``docs/measured.md``.
"""

import fnmatch
import math
from collections.abc import Iterable
from dataclasses import dataclass, fields
from typing import Any, Literal, Self, get_args

from toma_fx.errors import ConfigError

Component = Literal["self_attention", "cross_attention", "mlp"]
Placement = Literal["component", "block"]
Residual = Literal["keep", "replace"]
Region = Literal["tile", "stripe", "image"]
MergeOver = Literal["region", "image"]
Selector = Literal["facility_location", "random", "grid", "fixed"]
Unmerge = Literal["transpose", "pinv"]
Share = Literal["group", "block"]


def _check_choice(name: str, value: object, choices: tuple[Any, ...]) -> None:
    if value not in choices:
        raise ConfigError(
            f"{name}={value!r} is unknown; choose one of {', '.join(map(repr, choices))}"
        )


def _number(value: object) -> float:
    return value if isinstance(value, int | float) else math.nan


def _check_ratio(given: str, ratio: object) -> None:
    if isinstance(ratio, bool) or not 0 <= _number(ratio) < 1:
        raise ConfigError(
            f"{given} must be a number in [0, 1): the share of tokens merged away, such as 0.5"
        )


def _check_count(name: str, value: object) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ConfigError(f"{name}={value!r} must be a whole number of at least 1")


@dataclass(frozen=True, kw_only=True, slots=True)
class Schedule:
    """How many denoising steps pass between two computations of a plan (section 4.3.2, Table 7).

    A step is a change of timestep; a timestep that rises starts a new image. ``Schedule()``, one
    plan at every step, is stateless: nothing is kept from one call of the model to the next. Any
    other schedule keeps the plan in the model, which then serves one denoising run at a time, of
    one call a step: where guidance calls the model once for each prompt, as Flux's
    ``true_cfg_scale`` and modular guiders do, each call is taken for a new image and makes its own
    plan, so that nothing is saved. SDXL's pipelines put both prompts into one call.

    Raises:
        ConfigError: when a field is not a whole number of at least 1.
    """

    select_every: int = 1
    """Steps between two selections of destinations. The paper uses 10; every step has the better
    MSE in its Table 7."""
    weigh_every: int = 1
    """Steps between two computations of the merge weights. The paper uses 5. The weights are also
    computed whenever the destinations are."""

    def __post_init__(self) -> None:
        _check_count("select_every", self.select_every)
        _check_count("weigh_every", self.weigh_every)

    @property
    def stateless(self) -> bool:
        """Whether a new plan is made at every step, so that no state is kept."""
        return self.select_every == 1 and self.weigh_every == 1


@dataclass(frozen=True, kw_only=True, slots=True)
class MergeConfig:
    """What `toma_fx.transform` does to a model. ``MergeConfig()`` is the preset ``"default"``.

    Raises:
        ConfigError: when a field holds a value it cannot take; the message names the value, what
            was expected and the fix.

    >>> MergeConfig.preset("toma_stripe", ratio=0.75).region
    'stripe'
    """

    ratio: float = 0.5
    """Share of the tokens of a region that is merged away, in [0, 1). 0 leaves the model as it
    is, bit for bit. 0.25 to 0.5 is where images stay close; at 0.75 the paper's FID doubles
    (Table 8)."""
    block_ratios: tuple[tuple[str, float], ...] = ()
    """Blocks with a ratio of their own, 0 for none: ``{"up_blocks.1.*": 0.25}``, a dictionary from
    `fnmatch` patterns on their module paths, of which the first that fits counts. A block that it
    names is not spared by default; ``skip`` goes first. Blocks of one list share a plan with those
    of their own ratio. `toma_fx.calibrate` finds the ratios that change images least at the
    arithmetic of a uniform one."""
    components: tuple[Component, ...] = get_args(Component)
    """The parts of a block that run on merged tokens. The paper merges all three (section 4);
    self-attention alone is only about 15 % of SDXL's transformer arithmetic. With
    ``placement="block"`` the whole block is merged, so all three must be named. Flux has no
    cross-attention; its joint attention is the self-attention here."""
    placement: Placement = "block"
    """``"component"`` merges and unmerges around each component (ToMA); ``"block"`` once around
    the block (ToMA_once in Tables 1 and 8), which is faster, and with the residual kept also
    closer to the untouched image (own measurement)."""
    residual: Residual = "keep"
    """With ``placement="block"``: ``"keep"`` adds only the block's update to the residual stream,
    ``h + unmerge(block(merge(h)) - merge(h))`` (own measurement: 32.4 dB against 30.7);
    ``"replace"`` returns ``unmerge(block(merge(h)))``, as the paper's ToMA_once does."""
    region: Region = "tile"
    """Where tokens are grouped (section 4.3.1): ``"tile"``, neighbours in both directions;
    ``"stripe"``, a run in raster order; ``"image"``, all tokens at once, at a cost that grows
    with the square of the token count. Tiles are the closest to the untouched image (Table 8)."""
    region_tokens: int = 64
    """Tokens of a region, when a divisor of the token count makes that possible; otherwise the
    divisor that is nearest. 16 is the paper's default (4x4 tiles), 64 has its best DINO and MSE
    (Table 3) and the best PSNR of our own measurement. Not used by ``region="image"``."""
    merge_over: MergeOver = "region"
    """Destinations that a token's weight is spread over: those of its own region, or those of the
    whole image (the paper's plain ToMA, section 5.1)."""
    selector: Selector = "facility_location"
    """How destinations are chosen. ``"facility_location"``: greedy maximisation of Eq. 5, Alg. 2.
    ``"random"``: a fixed pseudo-random choice, and ``"grid"``: evenly spaced tokens, are the
    plain choices to compare it with (Table 2). ``"fixed"``: grid destinations and random weights
    that never look at a token, the lower bound of time (LTB in Table 8); its images are noise."""
    unmerge: Unmerge = "transpose"
    """``"transpose"`` spreads by ``A^T``; ``"pinv"`` by the pseudo-inverse of the merge (Eq. 7).
    Equal in quality in Table 6 and in our own measurement, at twice the time."""
    temperature: float = 0.001
    """Temperature tau of the weights (Eq. 6), applied to cosine similarities. The authors' code
    uses 1/tau = 1000; own measurement: 32.1 dB at 0.001, 31.6 at 0.01, 23.4 at 0.1."""
    share: Share = "group"
    """Who uses one plan: ``"group"``, all consecutive blocks of a stage (section 4.3.2);
    ``"block"``, each block makes its own, which costs more and gained nothing when measured."""
    schedule: Schedule = Schedule()
    """When a plan is computed again. Every step by default; the paper's is
    ``Schedule(select_every=10, weigh_every=5)``."""
    merge_below: float = 1.0
    """Noise level from which on a denoising run merges: the timestep over the 1000 of training, 1
    for pure noise, 0 for the image. Early steps decide what the image shows, and merging disturbs
    them most: 0.6 is 10 dB closer at the same ratio, and 5 dB at the same arithmetic (own
    measurement). 1 merges at every step, and can be captured as one graph, hence the default. A
    model that merges at some steps is stateless all the same."""
    skip: tuple[str, ...] | None = None
    """Blocks to leave unmerged, as `fnmatch` patterns on their module paths, such as
    ``("mid_block.*", "transformer_blocks.0")``. ``None`` takes the model family's own list: none
    on the UNet, the paper's first 5 double-stream and first 5 single-stream blocks on Flux."""

    def __post_init__(self) -> None:
        _check_ratio(f"ratio={self.ratio!r}", self.ratio)
        self._check_block_ratios()
        if not isinstance(self.components, tuple | list | set | frozenset) or not self.components:
            raise ConfigError(
                f"components={self.components!r} must be a tuple with at least one of "
                f"{', '.join(map(repr, get_args(Component)))}"
            )
        # A list or a set reads naturally at the call; the stored form is hashable and ordered.
        ordered = tuple(c for c in get_args(Component) if c in self.components)
        for component in self.components:
            _check_choice("components", component, get_args(Component))
        object.__setattr__(self, "components", ordered)
        for name, choices in _CHOICES.items():
            _check_choice(name, getattr(self, name), choices)
        _check_count("region_tokens", self.region_tokens)
        if isinstance(self.temperature, bool) or not 0 < _number(self.temperature) < math.inf:
            raise ConfigError(
                f"temperature={self.temperature!r} must be a number above 0, such as 0.001"
            )
        if isinstance(self.merge_below, bool) or not 0 < _number(self.merge_below) <= 1:
            raise ConfigError(
                f"merge_below={self.merge_below!r} must be a number in (0, 1]: the noise level, "
                "timestep over 1000, from which on tokens are merged, such as 0.6"
            )
        if not isinstance(self.schedule, Schedule):
            raise ConfigError(
                f"schedule={self.schedule!r} must be a Schedule, such as "
                "Schedule(select_every=10, weigh_every=5)"
            )
        if self.skip is not None:
            self._check_skip()
        self._check_combinations()

    @property
    def merges(self) -> bool:
        """Whether any block may merge."""
        return self.ratio > 0 or any(ratio > 0 for _, ratio in self.block_ratios)

    def ratio_of(self, path: str) -> float:
        """The ratio of a block, by its module path."""
        pattern = self.pattern_of(path)
        return self.ratio if pattern is None else dict(self.block_ratios)[pattern]

    def pattern_of(self, path: str) -> str | None:
        """The pattern of ``block_ratios`` that names a block; the first that fits."""
        names = (pattern for pattern, _ in self.block_ratios if fnmatch.fnmatchcase(path, pattern))
        return next(names, None)

    def _check_block_ratios(self) -> None:
        given = self.block_ratios
        try:
            pairs = tuple((str(p), r) for p, r in dict(given).items())
        except (TypeError, ValueError) as error:
            raise ConfigError(
                f"block_ratios={given!r} must be a dictionary from patterns of block paths to "
                'ratios, such as {"up_blocks.1.*": 0.25}'
            ) from error
        for pattern, ratio in pairs:
            _check_ratio(f"block_ratios[{pattern!r}]={ratio!r}", ratio)
        object.__setattr__(self, "block_ratios", pairs)

    def _check_skip(self) -> None:
        given = self.skip
        patterns = (
            tuple(given) if isinstance(given, Iterable) and not isinstance(given, str) else ()
        )
        if not all(isinstance(each, str) for each in patterns) or (given and not patterns):
            example = (given,) if isinstance(given, str) else ("mid_block.*",)
            raise ConfigError(
                f"skip={given!r} must be a tuple of patterns, such as skip={example!r}"
            )
        object.__setattr__(self, "skip", patterns)

    def _check_combinations(self) -> None:
        if self.placement == "block" and self.components != get_args(Component):
            raise ConfigError(
                f"components={self.components!r} cannot be combined with placement='block', which "
                "merges the whole block; use placement='component' or leave components out"
            )
        if self.share == "block" and not self.schedule.stateless:
            raise ConfigError(
                f"share='block' cannot be combined with {self.schedule}, which keeps one plan per "
                "group; use share='group' or Schedule()"
            )
        if self.merge_below < 1 and not self.schedule.stateless:
            raise ConfigError(
                f"merge_below={self.merge_below} cannot be combined with {self.schedule}, which "
                "counts every step; use Schedule() or merge_below=1"
            )
        if self.selector == "fixed" and (self.unmerge, self.merge_over) != ("transpose", "region"):
            raise ConfigError(
                "selector='fixed' has no weights to invert or to spread over the image; use "
                "unmerge='transpose' and merge_over='region'"
            )

    @classmethod
    def preset(cls, name: str, **changes: Any) -> Self:
        """A named configuration, with changes.

        Args:
            name: ``"default"``, the best we know; or a variant of the paper: ``"toma"`` (tiles for
                selection, weights over the image), ``"toma_tile"``, ``"toma_stripe"`` (selection
                and weights in tiles or stripes of 16 tokens), ``"toma_once"`` (tiles, once per
                block, residual replaced), all four with its 10/5 schedule; ``"lower_bound"``
                (random weights, once per block, nothing else).
            **changes: fields that differ from the preset, such as ``ratio``.

        Raises:
            ConfigError: when the preset or a field is unknown.
        """
        _check_choice("preset", name, tuple(PRESETS))
        config: Self = build_config(cls, **{**PRESETS[name], **changes})
        return config


def build_config(cls: type[MergeConfig] = MergeConfig, **options: Any) -> Any:
    """`MergeConfig` from keyword options, with a readable error for an unknown one.

    Raises:
        ConfigError: when an option is not a field of `MergeConfig`.
    """
    names = [field.name for field in fields(cls)]
    for option, value in options.items():
        if option not in names:
            raise ConfigError(
                f"{option}={value!r} is not an option; choose from {', '.join(names)}"
            )
    return cls(**options)


_CHOICES: dict[str, tuple[Any, ...]] = {
    "placement": get_args(Placement),
    "residual": get_args(Residual),
    "region": get_args(Region),
    "merge_over": get_args(MergeOver),
    "selector": get_args(Selector),
    "unmerge": get_args(Unmerge),
    "share": get_args(Share),
}

_PAPER: dict[str, Any] = {
    "placement": "component",
    "region_tokens": 16,
    "schedule": Schedule(select_every=10, weigh_every=5),
}

PRESETS: dict[str, dict[str, Any]] = {
    "default": {},
    "toma": {**_PAPER, "merge_over": "image"},
    "toma_tile": _PAPER,
    "toma_stripe": {**_PAPER, "region": "stripe"},
    "toma_once": {**_PAPER, "placement": "block", "residual": "replace"},
    # Stripes, as weights that look at no token have no use for another order.
    "lower_bound": {"selector": "fixed", "residual": "replace", "region": "stripe"},
}
