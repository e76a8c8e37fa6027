"""Merging together with other ways to make a model faster, each without and with merging.

    python -m benchmarks.stack flux --blocks 1 2 --height 512
    python -m benchmarks.stack examples/small_models/flux --image --steps 8

Every addition is made to a copy that shares the model's weights, compiled block by block. An
addition that cannot run here stays in the table with the reason.
"""

import argparse
import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import diffusers
from diffusers.models.attention_dispatch import attention_backend
from torch import Tensor, nn

from benchmarks.options import command_options
from toma_fx.bench.cli import add_timing
from toma_fx.bench.command import setting_of, show
from toma_fx.bench.compare import compare
from toma_fx.bench.contenders import (
    COMPILED,
    EAGER,
    LOWER_BOUND,
    Setting,
    compile_blocks,
    load,
    twin,
)
from toma_fx.bench.image import Studio, studio
from toma_fx.bench.levels import Timed
from toma_fx.bench.timing import Contender
from toma_fx.config import MergeConfig
from toma_fx.errors import ConfigError
from toma_fx.families import family_of
from toma_fx.images import pixels, psnr
from toma_fx.inputs import random_inputs
from toma_fx.tables import Table
from toma_fx.transform import model_of, transform

MERGED = "merged"
BACKENDS = ("native", "_native_flash", "_native_cudnn", "_native_efficient", "flash", "sage")
MODES = ("reduce-overhead", "max-autotune-no-cudagraphs")
KNOWN = ("unet", "flux")
"""Families with the layers and outputs that additions expect."""
CACHE_THRESHOLD = 0.1
"""The first-block cache skips a step when its first block's output changed by less than this."""


@dataclass(frozen=True, kw_only=True)
class Addition:
    """Something that makes a model faster, whether or not it merges tokens."""

    name: str
    before: Callable[[Any], None] = lambda model: None
    """Changes the model; `toma_fx.transform` comes after it."""
    after: Callable[[Any], None] = lambda model: None
    """Changes the model after `toma_fx.transform`, if any, and before it is compiled."""
    mode: str | None = None
    """Mode of ``torch.compile``."""
    fullgraph: bool = True
    runs: bool = False
    """Whether it needs the steps of a denoising run, and so whole images."""


def additions(model: nn.Module) -> Iterator[Addition]:
    """The additions that a model of this class can have."""
    yield Addition(name="fused QKV projections", before=_fuse)
    for backend in BACKENDS:
        yield Addition(
            name=f"attention backend {backend}",
            before=functools.partial(_attention, backend),
        )
    for mode in MODES:
        yield Addition(name=f"torch.compile mode {mode}", mode=mode)
    yield Addition(name="torchao int8 dynamic quantisation", before=_int8)
    yield Addition(
        name=f"first-block cache, threshold {CACHE_THRESHOLD}",
        after=_first_block_cache,
        fullgraph=False,
        runs=True,
    )


def _fuse(model: Any) -> None:
    model.fuse_qkv_projections()


def _attention(backend: str, model: Any) -> None:
    if isinstance(model, diffusers.UNet2DConditionModel):
        raise ConfigError("the UNet's attention processors know no backends")
    with attention_backend("native"):  # setting it changes every model's; this puts that back
        model.set_attention_backend(backend)


def _int8(model: nn.Module) -> None:
    if find_spec("torchao") is None:
        raise ConfigError("torchao is not installed: pip install torchao")
    torchao: Any = import_module("torchao.quantization")
    torchao.quantize_(model, torchao.Int8DynamicActivationInt8WeightConfig(), _is_large)


def _is_large(module: nn.Module, path: str) -> bool:
    """Whether it is a linear layer of a block; embeddings and modulations stay as they are."""
    return isinstance(module, nn.Linear) and "transformer_blocks" in path and "norm" not in path


def _first_block_cache(model: Any) -> None:
    if isinstance(model, diffusers.UNet2DConditionModel):
        raise ConfigError("diffusers' first-block cache knows no UNets")
    model.enable_cache(diffusers.FirstBlockCacheConfig(threshold=CACHE_THRESHOLD))


def changed(
    model: nn.Module, addition: Addition, config: MergeConfig | None, *, compiled: bool
) -> nn.Module:
    """A copy with an addition, merged with a configuration unless it is None."""
    copied = twin(model)
    addition.before(copied)
    if config is not None:
        copied = transform(copied, config)
    addition.after(copied)
    if compiled:
        options = {"fullgraph": addition.fullgraph}
        compile_blocks(copied, **options | ({"mode": addition.mode} if addition.mode else {}))
    return copied


@dataclass(kw_only=True)
class Stack:
    """The contenders, and the distances of their last outputs from the first contender's."""

    model: nn.Module
    setting: Setting
    config: MergeConfig
    room: Studio | None
    outputs: dict[tuple[str, float | None], Any] = field(default_factory=dict)

    def contenders(self) -> list[Contender]:
        """The untouched model and ours; then the same with each addition."""
        return list(self._contenders())

    def _contenders(self) -> Iterator[Contender]:
        plain = Addition(name="")
        yield self._contender(EAGER, lambda: self.model, None)
        compiled = self.setting.compiled
        if compiled:
            yield self._contender(COMPILED, self._maker(plain, None), None, compiled=True)
        make = self._maker(plain, self.config)
        yield self._contender(MERGED, make, self.config, compiled=compiled)
        for addition in additions(self.model):
            for config in (None, self.config):
                name = addition.name if config is None else f"{addition.name}, {MERGED}"
                make = self._maker(addition, config)
                yield self._contender(name, make, config, compiled=compiled, optional=True)

    def _maker(self, addition: Addition, config: MergeConfig | None) -> Callable[[], nn.Module]:
        @functools.cache
        def make() -> nn.Module:
            if addition.runs and self.room is None:
                raise ConfigError("it skips steps of a denoising run: use --image")
            if addition.mode and not self.setting.compiled:
                raise ConfigError("nothing is compiled: leave out --eager")
            return changed(self.model, addition, config, compiled=self.setting.compiled)

        return make

    def _contender(
        self,
        name: str,
        make: Callable[[], nn.Module],
        config: MergeConfig | None,
        **fields: bool,
    ) -> Contender:
        ratio = None if config is None else config.ratio
        inputs = random_inputs(self.model, **self.setting.size) if self.room is None else {}

        def run() -> object:
            made = make()
            output = self.room.draw(made) if self.room else made(**inputs).sample
            self.outputs[name, ratio] = output.clone() if isinstance(output, Tensor) else output
            return output

        warm_ups = 3 if self.setting.compiled else 1  # a CUDA graph is replayed from the third
        return Contender(name=name, run=run, ratio=ratio, warm_ups=warm_ups, **fields)

    def distances(self) -> dict[tuple[str, float | None], float]:
        """PSNR in dB for images; the relative error for outputs."""
        first = self.outputs[EAGER, None]
        rest = {key: value for key, value in self.outputs.items() if key != (EAGER, None)}
        if isinstance(first, Tensor):
            norm = first.float().norm()
            return {k: float((v.float() - first.float()).norm() / norm) for k, v in rest.items()}
        return {key: psnr(pixels(value), pixels(first)) for key, value in rest.items()}


def stacked(setting: Setting, *, image: bool) -> Iterator[Table]:
    """A table of every addition, for each ratio.

    Args:
        setting: additions are made to its first variant that merges, the lower bound apart.
        image: draw whole images, and give their PSNR; otherwise one forward of the model, and the
            relative error of its output.

    Raises:
        ConfigError: when no variant merges, or the family's additions are not known.
    """
    room = studio(setting) if image else None
    model = load(setting) if room is None else model_of(room.pipeline)
    if family_of(model).name not in KNOWN:
        raise ConfigError(
            f"stack adds to SDXL and Flux; additions to {family_of(model).title} are not known"
        )
    merging = (v for v in setting.variants if v.name != LOWER_BOUND)
    variant = next(merging, None)
    if variant is None:
        raise ConfigError("stack needs a variant beside the lower bound, such as --variant default")
    for ratio in setting.ratios:
        stack = Stack(model=model, setting=setting, config=variant.config(ratio), room=room)
        what = "images" if image else "one forward"
        timed = Timed(title=f"additions, {what}", contenders=stack.contenders())
        key = "psnr" if image else "error"
        yield compare(timed, setting, title=setting.label, extra={key: stack.distances})


def main(arguments: Sequence[str] | None = None) -> None:
    """Time every addition without and with merging."""
    parser = argparse.ArgumentParser(description="Time merging with other ways to be fast.")
    parser.add_argument("model", help="sdxl, flux, or a folder or hub name of one")
    parser.add_argument("--image", action="store_true", help="whole images, not one forward")
    parser.add_argument("--steps", type=int, default=4, help="of denoising, with --image (4)")
    add_timing(parser)
    options = command_options(parser, "benchmarks.stack", arguments)
    show(stacked(setting_of(options), image=options.image), options)


if __name__ == "__main__":
    main()
