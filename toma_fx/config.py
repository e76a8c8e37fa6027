"""All options of the method, their checks and their sources.

"Table", "Eq." and "section" refer to *Token Merge with Attention for Diffusion Models*
(ICML 2025, arXiv 2509.10918). "Own measurement" refers to the ablation in ``docs/measured.md``.
"""

import fnmatch
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Literal, Self, get_args

from toma_fx.closest import did_you_mean
from toma_fx.combinations import check_combinations
from toma_fx.errors import ConfigError
from toma_fx.option_values import (
    choice,
    count,
    listed,
    number,
    options_of,
    plain_ratio,
)
from toma_fx.schedule import Memory, Schedule

Tokens = Literal["all", "references"]
Component = Literal["self_attention", "cross_attention", "mlp"]
Placement = Literal["component", "block", "keys"]
Residual = Literal["keep", "replace"]
Region = Literal["tile", "stripe", "image"]
MergeOver = Literal["region", "image"]
Selector = Literal["facility_location", "random", "grid", "fixed"]
Unmerge = Literal["transpose", "pinv"]
Share = Literal["group", "block"]


def matches(path: str, pattern: str) -> bool:
    """Return whether a module path matches a pattern of ``skip`` or ``block_ratios``.

    Patterns use the wildcards of `fnmatch`: ``*``, ``?`` and ``[...]``. Matching is case-sensitive
    on every system, because module paths are.
    >>> matches("up_blocks.1.attentions.0", "up_blocks.*"), matches("Up", "up")
    (True, False)
    """
    return fnmatch.fnmatchcase(path, pattern)


@dataclass(frozen=True, kw_only=True, slots=True)
class MergeConfig:
    """The options of `toma_fx.transform`. ``MergeConfig()`` is the preset ``"default"``.

    Every field also accepts the JSON form of its value, so that
    ``MergeConfig(**json.loads(json.dumps(dataclasses.asdict(config)))) == config``. Numbers of
    numpy and torch are stored as Python numbers. ``repr`` shows only the ratio and the fields that
    differ from their defaults.

    Raises:
        ConfigError: when a field holds an invalid value; the message names the value, the
            expectation and the fix.

    >>> MergeConfig.preset("toma_stripe", ratio=0.75).region
    'stripe'
    >>> MergeConfig(block_ratios={"mid_block.*": 0})
    MergeConfig(ratio=0.5, block_ratios=(('mid_block.*', 0.0),))
    """

    ratio: float = 0.5
    """Share of each region's tokens that is merged away, in [0, 1). 0 leaves the model
    bit-identical. Images stay close at 0.25 to 0.5; at 0.75 the paper's FID doubles (lower is
    better, Table 8). A ratio above 0 that is too small to merge one token of ``region_tokens`` is
    refused: it would cost time and change nothing."""
    block_ratios: tuple[tuple[str, float], ...] = ()
    """Ratios for single blocks, as a dictionary from `fnmatch` patterns on module paths to ratios,
    or as a list of such pairs: ``{"up_blocks.1.*": 0.25}``. A ratio of 0 leaves a block unmerged.
    The first matching pattern counts. A block named here merges even if its model family leaves it
    unmerged by default, but ``skip`` takes precedence. Blocks of one list share a plan if their
    ratios are equal. `toma_fx.calibrate` finds the ratios that change images least for the
    arithmetic of a uniform ratio."""
    tokens: Tokens = "all"
    """Image tokens that merge. ``"all"`` merges all image tokens inside the blocks, including those
    of references (the input images of an edit model). ``"references"`` merges only the references:
    once per image, at the model's border, each reference as one region. They stay merged, so every
    block runs on a shorter sequence and no block is rewritten. The generated image never merges.
    ``"references"`` can be combined with ``ratio``, ``selector`` and ``temperature`` only. It works
    with FLUX.1 Kontext, FLUX.2 and Qwen-Image-Edit; the model's output for references is then 0. A
    call without a reference runs untouched."""
    components: tuple[Component, ...] = get_args(Component)
    """Parts of a block that run on merged tokens. The paper merges all three (section 4);
    self-attention alone is only about 15 % of SDXL's transformer arithmetic. Other placements fix
    this choice: ``placement="block"`` merges the whole block and ``"keys"`` self-attention alone.
    Flux has no cross-attention; its joint attention counts as self-attention here."""
    placement: Placement = "block"
    """Where a block merges. ``"component"`` merges and unmerges around each component (ToMA).
    ``"block"`` does so once around the block (ToMA_once in Tables 1 and 8), which is faster and as
    close to the untouched image (own measurement). ``"keys"`` merges only the keys and values of
    self-attention: all queries and all other layers stay as they are. A merged key's logit is
    raised by the logarithm of its cluster's size, so that merging equal tokens changes nothing.
    ``"keys"`` saves ``ratio`` of the attention products and nothing else, so it pays where they
    dominate: videos, and images of 2048 x 2048 pixels and more."""
    residual: Residual = "keep"
    """How ``placement="block"`` treats the residual stream. ``"keep"`` adds only the block's update
    to it, ``h + unmerge(block(merge(h)) - merge(h))``; ``"replace"`` returns
    ``unmerge(block(merge(h)))``, as the paper's ToMA_once does. Both are equally close to the
    untouched image (own measurement)."""
    region: Region = "tile"
    """Shape of the regions in which tokens merge (section 4.3.1). ``"tile"`` groups neighbours in
    both directions, ``"stripe"`` a run in raster order. ``"image"`` makes one region of all tokens,
    at a cost that grows with the square of the token count. Tiles stay closest to the untouched
    image (Table 8)."""
    region_tokens: int = 64
    """Number of tokens per region. If it does not divide the tokens of a grid, some regions of a
    large grid have one token less, and a small grid is cut into regions of nearly this length. 16
    is the paper's default (4x4 tiles). 64 has the best DINO and MSE in its Table 3. Around whole
    blocks, 16, 64 and 256 are equally close to the untouched image (own measurement).
    ``region="image"`` ignores it."""
    region_frames: int = 4
    """Number of latent video frames that a tile spans: a region of 64 tokens is then 4 frames of
    4 x 4 tokens. The first latent frame has tiles of its own, as in the models' VAEs."""
    merge_over: MergeOver = "region"
    """Destinations among which a token's weight is spread: those of its own ``"region"``, or those
    of the whole ``"image"`` (the paper's plain ToMA, section 5.1)."""
    selector: Selector = "facility_location"
    """Method that chooses the destinations. ``"facility_location"`` maximises Eq. 5 greedily
    (Alg. 2). ``"random"`` (a fixed pseudo-random choice) and ``"grid"`` (evenly spaced tokens) are
    baselines for comparison (Table 2). ``"fixed"`` takes the destinations of ``"grid"`` and random
    weights that do not depend on the tokens. It is the lower bound of time (LTB in Table 8), and
    its images are noise."""
    unmerge: Unmerge = "transpose"
    """Method that unmerges tokens: ``"transpose"`` uses ``A^T``, ``"pinv"`` the pseudo-inverse of
    the merge (Eq. 7). Their quality is equal in Table 6 and in our own measurement; ``"pinv"``
    takes twice the time."""
    temperature: float = 0.001
    """Temperature tau of the weights (Eq. 6), applied to cosine similarities. The authors' code
    uses 1/tau = 1000. PSNR on an earlier small SDXL (higher is closer): 30.0 dB at 0.001, 29.8 dB
    at 0.01, 23.7 dB at 0.1."""
    share: Share = "group"
    """Blocks that share one plan. ``"group"`` shares it among all consecutive blocks of a stage
    (section 4.3.2). With ``"block"`` each block makes its own plan, which costs more and gained
    nothing when measured."""
    schedule: Schedule = field(default=Schedule())
    """Steps at which a new plan is computed: every step by default. The paper uses
    ``Schedule(select_every=10, weigh_every=5)``."""
    memory: Memory | None = None
    """How steps reuse the results of an earlier full step; see `Memory`. ``Memory(every=2)`` runs
    every second step in full. With ``merge_below``, all steps above that level are full."""
    merge_below: float = 1.0
    """Noise level below which tokens merge: 1 is pure noise, 0 the finished image. Each model
    family derives the level of a call from its timestep and its scheduler. Early steps decide what
    the image shows, and merging disturbs them most. On the small SDXL at ratio 0.5, 0.8 raises the
    PSNR from 21.7 to 27.2 dB (higher is closer), and leaves 68 % of the arithmetic instead of 60 %
    (``docs/choose.md``). 1 merges at every step. No state is kept between calls, whatever the
    level."""
    skip: tuple[str, ...] | None = None
    """Blocks to leave unmerged, as `fnmatch` patterns on their module paths, such as
    ``("mid_block.*", "transformer_blocks.0")``. ``None`` takes the list of the model family: none
    for the UNet, the paper's first 5 double-stream and first 5 single-stream blocks for Flux."""

    def __post_init__(self) -> None:
        checked: dict[str, Any] = {
            "ratio": plain_ratio(f"ratio={self.ratio!r}", self.ratio),
            "block_ratios": self._checked_block_ratios(),
            "components": self._checked_components(),
            **{name: choice(name, getattr(self, name), each) for name, each in _CHOICES.items()},
            "region_tokens": count("region_tokens", self.region_tokens, 64),
            "region_frames": count("region_frames", self.region_frames, 4),
            "temperature": number(self.temperature),
            "schedule": options_of(
                Schedule, "schedule", self.schedule, "Schedule(select_every=10, weigh_every=5)"
            ),
            "memory": self._checked_memory(),
            "merge_below": number(self.merge_below),
            "skip": self._checked_skip(),
        }
        if not 0 < checked["temperature"] < math.inf:
            raise ConfigError(
                f"temperature={self.temperature!r} must be a number above 0, such as 0.001"
            )
        if not 0 < checked["merge_below"] <= 1:
            raise ConfigError(
                f"merge_below={self.merge_below!r} must be a number in (0, 1]: the noise level "
                "below which tokens are merged, 1 for pure noise, such as 0.6"
            )
        for name, value in checked.items():
            object.__setattr__(self, name, value)
        check_combinations(self)

    def __repr__(self) -> str:
        """Return an expression of the config with the ratio and all fields that are not default."""
        shown = (
            f"{field.name}={getattr(self, field.name)!r}"
            for field in fields(self)
            if field.name == "ratio" or getattr(self, field.name) != field.default
        )
        return f"{type(self).__name__}({', '.join(shown)})"

    @property
    def merges(self) -> bool:
        """True if any block may merge."""
        if self.memory is not None and self.memory.every == 1:
            return False
        return self.ratio > 0 or any(ratio > 0 for _, ratio in self.block_ratios)

    @property
    def choosing(self) -> str:
        """Option that makes the policy choose between variants; empty if every call merges."""
        if self.memory is not None:
            return str(self.memory)
        if self.merge_below < 1:
            return f"merge_below={self.merge_below:g}"
        return "" if self.schedule.stateless else str(self.schedule)

    def ratio_of(self, path: str) -> float:
        """Return the ratio of the block at a module path."""
        pattern = self.pattern_of(path)
        return self.ratio if pattern is None else dict(self.block_ratios)[pattern]

    def pattern_of(self, path: str) -> str | None:
        """Return the first pattern of ``block_ratios`` that matches a block, or None."""
        return next((each for each, _ in self.block_ratios if matches(path, each)), None)

    def _checked_block_ratios(self) -> tuple[tuple[str, float], ...]:
        given: object = self.block_ratios
        # A set has no order, so it has no first pattern that could count.
        members = None if isinstance(given, set | frozenset) else listed(given)
        pairs = tuple(given.items()) if isinstance(given, Mapping) else members
        if pairs is None or not all(isinstance(p, tuple | list) and len(p) == 2 for p in pairs):
            raise ConfigError(
                f"block_ratios={given!r} must be a dictionary from patterns of block paths to "
                'ratios, such as {"up_blocks.1.*": 0.25}'
            )
        checked: dict[str, float] = {}
        for pattern, ratio in pairs:
            if not isinstance(pattern, str):
                raise ConfigError(
                    f"block_ratios={given!r} names blocks by {pattern!r}, which must be a "
                    'pattern of their paths, such as "up_blocks.1.*"'
                )
            if pattern in checked:
                raise ConfigError(
                    f"block_ratios={given!r} names {pattern!r} twice, and only the first would "
                    "count; leave one of them out"
                )
            checked[str(pattern)] = plain_ratio(f"block_ratios[{pattern!r}]={ratio!r}", ratio)
        return tuple(checked.items())

    def _checked_components(self) -> tuple[Component, ...]:
        given: object = self.components
        if not isinstance(given, tuple | list | set | frozenset) or not given:
            raise ConfigError(
                f"components={given!r} must be a tuple with at least one of "
                f"{', '.join(map(repr, get_args(Component)))}, and with all of them where "
                "placement='block'"
            )
        # Accept a list or a set, which callers write naturally; store a hashable, ordered form.
        named = [choice("components", each, get_args(Component)) for each in given]
        return tuple(each for each in get_args(Component) if each in named)

    def _checked_memory(self) -> Memory | None:
        given = self.memory
        return None if given is None else options_of(Memory, "memory", given, "Memory(every=2)")

    def _checked_skip(self) -> tuple[str, ...] | None:
        given: object = self.skip
        if given is None:
            return None
        patterns = listed(given)
        if patterns is None or not all(isinstance(each, str) for each in patterns):
            example = (given,) if isinstance(given, str) else ("mid_block.*",)
            raise ConfigError(
                f"skip={given!r} must be a tuple of patterns, such as skip={example!r}"
            )
        plain = map(str, patterns)
        # The order of a set differs from process to process.
        return tuple(sorted(plain) if isinstance(given, set | frozenset) else plain)

    @classmethod
    def preset(cls, name: str, **changes: Any) -> Self:
        """Return a named configuration, with changes.

        Args:
            name: ``"default"``, the best configuration we know; or a variant of the paper:
                ``"toma"`` (selection in tiles, weights over the image), ``"toma_tile"`` and
                ``"toma_stripe"`` (selection and weights in tiles or stripes of 16 tokens),
                ``"toma_once"`` (tiles, once per block, residual replaced), all four with the
                paper's 10/5 schedule; or ``"lower_bound"`` (random weights, once per block,
                nothing else).
            **changes: fields that differ from the preset, such as ``ratio``.

        Raises:
            ConfigError: when the preset or a field is unknown.
        """
        fields_of = PRESETS[choice("preset", name, tuple(PRESETS))]
        config: Self = build_config(cls, **{**fields_of, **changes})
        return config


def build_config(cls: type[MergeConfig] = MergeConfig, **options: Any) -> Any:
    """Build a `MergeConfig` from keyword options.

    Raises:
        ConfigError: when an option is not a field of `MergeConfig`.
    """
    names = [field.name for field in fields(cls)]
    for option, value in options.items():
        if option not in names:
            raise ConfigError(
                f"{option}={value!r} is not an option; choose from {', '.join(names)}"
                f"{did_you_mean(option, names)}"
            )
    return cls(**options)


_CHOICES: dict[str, tuple[Any, ...]] = {
    "tokens": get_args(Tokens),
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
    # Its weights do not depend on the tokens, so it needs no other token order than stripes.
    "lower_bound": {"selector": "fixed", "residual": "replace", "region": "stripe"},
}
