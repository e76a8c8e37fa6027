"""The models to time: the untouched one, and ours at each ratio. All share their weights."""

import copy
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn

from toma_fx.bench.depth import counted, one_of_each
from toma_fx.bench.timing import WALL, Clock, Contender
from toma_fx.checkpoints import RANDOM, available_memory, load_model, model_class
from toma_fx.config import MergeConfig
from toma_fx.errors import ModelError
from toma_fx.schedule import Schedule
from toma_fx.transform import transform
from toma_fx.variants import UNTOUCHED, Merging, configs

LOWER_BOUND = "lower_bound"
EAGER, COMPILED = f"{UNTOUCHED}, eager", f"{UNTOUCHED}, compiled"
BASELINES = (EAGER, COMPILED)
"""The others are compared with the faster of the two."""


@dataclass(frozen=True, kw_only=True)
class Setting:
    """Model, sizes and clock of a timing, for all contenders."""

    model: str = "sdxl"
    """A name that `toma_fx.checkpoints.load_model` takes."""
    blocks: tuple[int, ...] | None = None
    """Blocks of each list of a model with random weights, or one number for every list; all when
    left out, or one of each where all do not fit into memory."""
    overrides: Mapping[str, Any] = field(default_factory=dict)
    """Other changes of the configuration, for random weights."""
    height: int | None = None
    """Height in pixels; the model's own when left out."""
    width: int | None = None
    """Width in pixels; like the height when left out."""
    frames: int | None = None
    """Frames of a video; the model's own when left out."""
    batch: int = 1
    dtype: torch.dtype = torch.bfloat16
    ratios: tuple[float, ...] = (0.5,)
    variants: tuple[Merging, ...] = ()
    repeats: int = 3
    compiled: bool = True
    steps: int = 4
    """Denoising steps, for whole images."""
    clock: Clock = WALL
    """`WALL` time, or `CPU` time on a machine that others use too."""
    cuda_graphs: bool = False
    """Record each call in a CUDA graph and time replays, which leaves out the host's work."""

    @property
    def device(self) -> str:
        """The GPU if there is one, otherwise the CPU."""
        return "cuda" if torch.cuda.is_available() else "cpu"

    @property
    def label(self) -> str:
        """The setting in words, for the title of a table."""
        depth = "" if self.blocks is None else f", {self._depth}"
        high, wide = self.height, self.width or self.height
        size = "own size" if high is None else f"{high} x {wide} pixels"
        if self.frames is not None:
            size += f", {self.frames} frame{'s' * (self.frames > 1)}"
        dtype = str(self.dtype).removeprefix("torch.")
        changed = "".join(f", {name}={value}" for name, value in self.overrides.items())
        return f"{self.model}{depth}{changed}, {size}, batch {self.batch}, {dtype}"

    @property
    def _depth(self) -> str:
        counts = self.blocks or ()
        noun = "block" if counts == (1,) else "blocks"
        each = " in each list" if len(counts) == 1 else ""
        return f"{' + '.join(map(str, counts))} {noun}{each}"

    @property
    def changes(self) -> dict[str, Any]:
        """Changes of the configuration, for random weights.

        Raises:
            ConfigError: when the numbers of blocks do not fit the lists that a model has.
        """
        depth = {} if self.blocks is None else counted(self.model, self.blocks)
        return {**self.overrides, **depth}

    @property
    def size(self) -> dict[str, Any]:
        """Height, width, frames and batch, as `toma_fx.inputs.random_inputs` takes them."""
        return {name: getattr(self, name) for name in ("height", "width", "frames", "batch")}


@dataclass(frozen=True)
class Entrant:
    """A model that takes part, before it is called."""

    name: str
    model: nn.Module
    ratio: float | None = None
    compiled: bool = False

    def contender(self, run: Callable[[], object]) -> Contender:
        """The call of the model, to be timed."""
        return Contender(name=self.name, run=run, ratio=self.ratio, compiled=self.compiled)


def load(setting: Setting) -> nn.Module:
    """Load the untouched model.

    Raises:
        ModelError: when there is no such model, or random weights would not fit into memory.
    """
    if setting.model in RANDOM and not _fits(setting):
        needed, there = _needed_memory(setting), _free_memory(setting.device)
        raise ModelError(
            f"{setting.model} with {needed / setting.dtype.itemsize / 1e9:.1f} billion parameters "
            f"needs {needed / 2**30:.1f} GiB and {there / 2**30:.1f} are free; take fewer blocks, "
            "such as --blocks 1"
        )
    return load_model(setting.model, dtype=setting.dtype, device=setting.device, **setting.changes)


def fitted(setting: Setting) -> Setting:
    """The setting, with one block of each list where not all fit into memory.

    One block has the sizes of its whole list. It makes a plan of its own, which the whole list
    would share.
    """
    if setting.model not in RANDOM or setting.blocks is not None or _fits(setting):
        return setting
    blocks = one_of_each(setting.model)
    return replace(setting, blocks=blocks) if blocks else setting


def _fits(setting: Setting) -> bool:
    return _needed_memory(setting) <= _free_memory(setting.device)


def _needed_memory(setting: Setting) -> int:
    cls, config = model_class(setting.model)
    with torch.device("meta"):
        model: nn.Module = cls(**{**config, **setting.changes})
    return setting.dtype.itemsize * sum(each.numel() for each in model.parameters())


def _free_memory(device: str) -> int:
    return torch.cuda.mem_get_info()[0] if device == "cuda" else available_memory()


def twin(model: nn.Module) -> nn.Module:
    """A copy of a model that shares every tensor with it, to be compiled or patched apart."""
    return copy.deepcopy(model, {id(t): t for t in [*model.parameters(), *model.buffers()]})


def compile_blocks(model: Any, **options: Any) -> Any:
    """Compile a model's transformer blocks one by one; returns the model."""
    model.compile_repeated_blocks(**{"fullgraph": True, "dynamic": False, **options})
    return model


def merged_configs(
    setting: Setting, *, scheduled: bool = False
) -> Iterator[tuple[str, float, MergeConfig]]:
    """Name, ratio and configuration of every merging variant at every ratio.

    Unless ``scheduled``, every step makes its plan. When one call is timed, a schedule would hide
    planning or show all of it, depending on the call.
    """
    by_ratio = sorted(configs(setting.variants, setting.ratios), key=lambda each: each[1])
    for variant, ratio, config in by_ratio:
        yield variant.name, ratio, config if scheduled else replace(config, schedule=Schedule())


def entrants(model: nn.Module, setting: Setting, *, scheduled: bool = False) -> Iterator[Entrant]:
    """The untouched model and ours, ready to be called, compiled block by block where wanted.

    Args:
        model: an untouched model, which stays untouched.
        setting: ratios, variants, and whether to compile.
        scheduled: keep the schedules of the variants.
    """
    yield Entrant(EAGER, model)
    if setting.compiled:
        yield Entrant(COMPILED, compile_blocks(twin(model)), compiled=True)
    for name, ratio, config in merged_configs(setting, scheduled=scheduled):
        merged = transform(model, config)
        if setting.compiled:
            compile_blocks(merged)
        yield Entrant(name, merged, ratio=ratio, compiled=setting.compiled)
