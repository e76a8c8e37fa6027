"""Caches of other projects beside toma_fx: how they are put on a pipeline, and what they save.

A cache decides while it runs which parts of a call it computes. Each class here runs it on a small
pipeline and says what the real model would compute with the same decisions.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib import import_module
from types import SimpleNamespace
from typing import Any

from diffusers import FirstBlockCacheConfig, FluxKontextPipeline, TaylorSeerCacheConfig
from torch import nn

from benchmarks.real_size import RealSize
from toma_fx.arithmetic import Call, count, count_parts
from toma_fx.checkpoints import architecture

LISTS = ("transformer_blocks", "single_transformer_blocks", "blocks")
"""Where transformers hold their blocks: Flux in the first two, Wan in the last."""


@dataclass
class Ran:
    """Which share of the calls of a model computed a part, by the part's name."""

    calls: int = 0
    parts: Counter[str] = field(default_factory=Counter)

    def share(self, part: str) -> float:
        """Share of the calls that computed a part, from 0 to 1."""
        return self.parts[part] / self.calls


@dataclass(frozen=True)
class DiffusersCache:
    """A cache of diffusers for transformers, by its configuration."""

    name: str
    config: Any

    @contextmanager
    def on(self, pipe: Any, real: RealSize) -> Iterator[Callable[[], float]]:
        """The pipeline with the cache; the value is a function to the real model's arithmetic.

        Args:
            pipe: Small.
            real: The real model's call.
        """
        model = pipe.transformer
        # Counting begins before the cache goes on, which calls the parts' own forwards.
        with _counted(model) as ran, _named_calls(pipe):
            model.enable_cache(self.config)
            try:
                yield lambda: _transformer_share(ran, model, real)
            finally:
                model.disable_cache()


@dataclass(frozen=True)
class CacheDit:
    """The cache of cache-dit (DBCache), with the model's first block as the one that decides.

    Its blocks are left out while the first block's output has changed by less than a threshold
    since the last full step.

    Attributes:
        threshold: of cache-dit, relative.
        guided: whether a step makes two calls, with the prompt and without.
    """

    threshold: float
    guided: bool = True

    @property
    def name(self) -> str:
        """Name in tables."""
        return f"cache-dit, threshold {self.threshold:g}"

    @contextmanager
    def on(self, pipe: Any, real: RealSize) -> Iterator[Callable[[], float]]:
        """The pipeline with the cache; the value is a function to the real model's arithmetic.

        Args:
            pipe: Small.
            real: The real model's call.
        """
        package = import_module("cache_dit")
        config = package.DBCacheConfig(
            Fn_compute_blocks=1,
            max_warmup_steps=3,
            residual_diff_threshold=self.threshold,
            enable_separate_cfg=self.guided,
        )
        model = pipe.transformer
        with _counted(model) as ran:
            package.enable_cache(pipe, cache_config=config)
            try:
                yield lambda: _transformer_share(ran, model, real)
            finally:
                package.disable_cache(pipe)


@dataclass(frozen=True)
class DeepCache:
    """DeepCache (Ma et al., 2024) by its authors' package, for UNets.

    Between two full steps, the blocks below the first level's are not computed: their output is
    that of the last full step.
    """

    every: int

    @property
    def name(self) -> str:
        """Name in tables."""
        return f"DeepCache, every {self.every}"

    @contextmanager
    def on(self, pipe: Any, real: RealSize) -> Iterator[Callable[[], float]]:
        """The pipeline with the cache; the value is a function to the real model's arithmetic.

        Args:
            pipe: Small.
            real: The real model's call.
        """
        helper = self._helper(pipe)
        timesteps: list[int] = []
        hook = pipe.unet.register_forward_pre_hook(lambda _, args: timesteps.append(int(args[1])))
        helper.enable()
        try:
            yield lambda: self._share(len(dict.fromkeys(timesteps)), real)
        finally:
            helper.disable()
            hook.remove()

    def _helper(self, pipe: Any) -> Any:
        helper = import_module("DeepCache").DeepCacheSDHelper(pipe=pipe)
        helper.set_params(cache_interval=self.every, cache_branch_id=0)
        return helper

    def _share(self, steps: int, real: RealSize) -> float:
        unet, call = architecture(real.name), Call((), real.inputs())  # the package leaves traces
        whole = count_parts(unet, call, [""])[""]
        helper = self._helper(SimpleNamespace(unet=unet))
        forward = unet.forward
        helper.enable()
        unet.forward = forward  # its own asks for a timestep's value, which a meta tensor lacks
        helper.start_timestep = 0
        costs = []
        for helper.cur_timestep in range(self.every):
            costs.append(count(unet, call, data=True))
        helper.disable()
        return sum(costs[step % self.every] for step in range(steps)) / (steps * whole)


def first_block_cache(threshold: float) -> DiffusersCache:
    """Diffusers' first-block cache: other blocks are left out while the first's output stays."""
    name = f"first-block cache, threshold {threshold:g}"
    return DiffusersCache(name, FirstBlockCacheConfig(threshold=threshold))


def taylor_seer(every: int, order: int = 1) -> DiffusersCache:
    """TaylorSeer (Liu et al., 2025) of diffusers, in its lite form.

    Between two full steps no block is computed, and the model's output is extrapolated.
    """
    config = TaylorSeerCacheConfig(
        cache_interval=every, disable_cache_before_step=3, max_order=order, use_lite_mode=True
    )
    return DiffusersCache(f"TaylorSeer lite, every {every}, order {order}", config)


def _parts(model: nn.Module) -> dict[str, nn.Module]:
    """The parts of blocks that compute, by their path in the model."""
    return {
        f"{blocks}.{index}.{name}": part
        for blocks in LISTS
        for index, block in enumerate(getattr(model, blocks, ()))
        for name, part in block.named_children()
        if any(isinstance(each, nn.Linear) for each in part.modules())
    }


@contextmanager
def _named_calls(pipe: Any) -> Iterator[None]:
    """Gives the calls of Kontext's pipeline the context that other pipelines name themselves."""
    model = pipe.transformer
    forward = model.forward

    def named(*args: Any, **kwargs: Any) -> Any:
        with model.cache_context("calls"):
            return forward(*args, **kwargs)

    if isinstance(pipe, FluxKontextPipeline):
        model.forward = named
    try:
        yield
    finally:
        vars(model).pop("forward", None)


@contextmanager
def _counted(model: nn.Module) -> Iterator[Ran]:
    """Counts the calls of a model and of its parts."""
    ran = Ran()
    handles = [model.register_forward_pre_hook(lambda *_: _add(ran, None))]
    handles += [_count_calls(part, ran, path) for path, part in _parts(model).items()]
    try:
        yield ran
    finally:
        for handle in handles:
            handle.remove()


def _count_calls(part: nn.Module, ran: Ran, path: str) -> Any:
    # A part that a cache leaves out is called too, or its hook is: what computes is a linear layer.
    first = next(each for each in part.modules() if isinstance(each, nn.Linear))
    return first.register_forward_pre_hook(lambda *_: _add(ran, path))


def _add(ran: Ran, path: str | None) -> None:
    if path is None:
        ran.calls += 1
    else:
        ran.parts[path] += 1


def _transformer_share(ran: Ran, small: nn.Module, real: RealSize) -> float:
    """The share of the real model; its blocks ran as the small one's first or other ones."""
    model, call = real.model, Call((), real.inputs())
    paths = list(_parts(model))
    costs = count_parts(model, call, ["", *paths])
    shares = _shares_by_kind(ran, list(_parts(small)))
    rest = costs[""] - sum(costs[path] for path in paths)
    return (rest + sum(costs[path] * shares[_kind(path)] for path in paths)) / costs[""]


def _shares_by_kind(ran: Ran, paths: list[str]) -> Mapping[tuple[str, bool, str], float]:
    kinds: dict[tuple[str, bool, str], list[float]] = {}
    for path in paths:
        kinds.setdefault(_kind(path), []).append(ran.share(path))
    return {kind: sum(values) / len(values) for kind, values in kinds.items()}


def _kind(path: str) -> tuple[str, bool, str]:
    blocks, index, name = path.split(".", 2)
    first = index == "0" and blocks != "single_transformer_blocks"  # which come after others
    return blocks, first, name
