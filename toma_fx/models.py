"""The borders of a model: where tokens enter and leave, and where a call begins.

Each class stands in for diffusers' class of the same name. It changes the order of the tokens where
that is free or nearly so, opens the scope in which blocks share a plan, and leaves the rest to
diffusers.
"""

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import diffusers
import torch
from diffusers.hooks import HookRegistry, ModelHook
from diffusers.models.transformers import transformer_2d
from torch import Tensor, nn

from toma_fx.config import MergeConfig
from toma_fx.errors import InputError, ModelError
from toma_fx.hooks import check_caches, is_cast
from toma_fx.runtime.plan import SCOPE, PlanScope, own_scope
from toma_fx.runtime.schedule import DenoisingClock, make_slots
from toma_fx.treatment import Treatment

toma = torch.ops.toma

_SCHEDULE_COMPILES = "2.12"
"""The torch from which on."""


@dataclass(frozen=True)
class Rewrite:
    """What `toma_fx.transform` did to a model; kept on it as ``_toma``.

    Attributes:
        config: the options.
        original: the untouched model, which shares every tensor with the transformed one.
        treatments: what happened to each block, by its path.
        speedup: what the ratio was chosen for, when it was not given.
    """

    config: MergeConfig
    original: nn.Module = field(repr=False)
    treatments: Mapping[str, Treatment]
    speedup: float | None = None

    @property
    def merged(self) -> dict[str, Treatment]:
        """Those of the blocks that merge."""
        return {path: each for path, each in self.treatments.items() if each.role is not None}

    @property
    def skipped(self) -> dict[str, Treatment]:
        """Those of the blocks that were left unmerged."""
        return {path: each for path, each in self.treatments.items() if each.role is None}

    def __deepcopy__(self, memo: object) -> "Rewrite":
        return self  # a copy of the transformed model has the same original


def _keyword_only(function: Callable[..., Any]) -> Callable[[tuple[Any, ...], dict[str, Any]], Any]:
    """How to give every argument of a method a name, whatever the version of diffusers."""
    signature = inspect.signature(function)
    names = tuple(signature.parameters)[1:]
    required = tuple(n for n in names if signature.parameters[n].default is inspect.Parameter.empty)

    def named(args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        call = {**dict(zip(names, args, strict=False)), **kwargs}
        lost = len(call) < len(args) + len(kwargs)
        if lost or any(name not in call for name in required):
            signature.bind(None, *args, **kwargs)  # raises the TypeError of an ordinary call
        return call

    return named


class _Clocked(nn.Module):
    """A model whose blocks share plans during a call."""

    _toma: Rewrite
    _run: Callable[[dict[str, Any]], Any]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """As diffusers' model, but one call at a time where plans are kept between calls."""
        if torch.compiler.is_compiling():
            return super().__call__(*args, **kwargs)
        self._check_checkpointing()
        clock = getattr(self, "toma_clock", None)
        if not isinstance(clock, DenoisingClock):
            return super().__call__(*args, **kwargs)
        with clock.alone():
            return super().__call__(*args, **kwargs)

    def _check_checkpointing(self) -> None:
        """Say what Dynamo would say at length: a checkpointed block may not hand on a plan."""
        compiled = self._compiled_call_impl is not None and torch.is_grad_enabled()
        if compiled and self._toma.config.share == "group" and self.is_gradient_checkpointing:
            raise InputError(
                "torch.compile cannot take a whole model whose blocks share plans through gradient "
                "checkpointing; compile its blocks instead: model.compile_repeated_blocks()"
            )

    def _merge_in(self, call: dict[str, Any], kwargs: str, noise: Any) -> Any:
        """A call of the model, in a scope in which its blocks share plans.

        Args:
            call: the arguments of diffusers' ``forward``.
            kwargs: name of the argument with the attention kwargs.
            noise: the timestep over 1000, a number, a scalar or ``(B,)``.
        """
        clock = getattr(self, "toma_clock", None)
        conditioning = call.get("encoder_hidden_states")
        time = None if clock is None else clock(call["timestep"], conditioning)

        def run(merging: bool) -> Any:
            scope = PlanScope(time, merging)
            return self._run({**call, kwargs: {**(call.get(kwargs) or {}), SCOPE: scope}})

        below = self._toma.config.merge_below
        if below == 1 or (isinstance(noise, Tensor) and noise.is_meta):
            return run(True)  # without data there is no deciding: a step that merges
        if torch.compiler.is_compiling():
            raise ModelError(
                f"merge_below={below} chooses between two graphs by the timestep, and one graph "
                "cannot hold both. Compile with model.compile() or "
                "model.compile_repeated_blocks(), which compile each. To export, export the "
                "untouched model, and one transformed with merge_below=1, and let the timestep "
                "choose the program"
            )
        return run(bool(torch.as_tensor(noise).flatten()[0] <= below))

    def _check_schedule_compiles(self) -> None:
        """Say what torch would say at length where it cannot compile what a schedule decides."""
        schedule = self._toma.config.schedule
        if not schedule.stateless and torch.__version__ < _SCHEDULE_COMPILES:
            raise ModelError(
                f"{schedule} compiles from torch {_SCHEDULE_COMPILES} on, and this is torch "
                f"{torch.__version__}; install a newer torch, transform with schedule=Schedule(), "
                "which plans at every step, or leave the model uncompiled"
            )

    def compile_repeated_blocks(self, *args: Any, **kwargs: Any) -> None:
        """As diffusers' method."""
        self._check_schedule_compiles()
        model: Any = super()
        model.compile_repeated_blocks(*args, **kwargs)

    def compile(self, *args: Any, **kwargs: Any) -> None:
        """Compile the model for its own calls; arguments as `torch.compile` takes them."""
        self._check_schedule_compiles()
        if not self._toma.config.schedule.stateless:
            kwargs.setdefault("dynamic", False)  # what a schedule decides takes no symbolic sizes
        if self._toma.config.merge_below == 1:
            super().compile(*args, **kwargs)
        else:  # what decides between the two graphs stays outside both
            self._run = torch.compile(self._run, *args, **kwargs)

    def enable_layerwise_casting(self, *args: Any, **kwargs: Any) -> None:
        """As diffusers' method; the original, whose weights are these, is cast along with it.

        Or no layer of the model that `toma_fx.restore` brings back could take its weights. Another
        model that was transformed from the same original shares them too: cast it as well.
        """
        model: Any = super()
        model.enable_layerwise_casting(*args, **kwargs)
        original: Any = self._toma.original
        if not is_cast(original):
            original.enable_layerwise_casting(*args, **kwargs)

    def __getstate__(self) -> dict[str, Any]:
        state: dict[str, Any] = super().__getstate__()  # type: ignore[no-untyped-call]
        state.pop("_run", None)  # a copy or a pickle is not compiled, as with any module
        return state

    def _reset_stateful_cache(self, *args: Any, **kwargs: Any) -> None:
        """Called by every diffusers pipeline when an image is done."""
        reset = getattr(super(), "_reset_stateful_cache", None)
        if reset is not None:
            reset(*args, **kwargs)
        clock = getattr(self, "toma_clock", None)
        if isinstance(clock, DenoisingClock):
            clock.reset()


class UNet2DConditionModel(_Clocked, diffusers.UNet2DConditionModel):  # type: ignore[misc]
    """The UNet; its tokens are put in order by each `Transformer2DModel` inside it."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As diffusers' ``forward``."""
        call = _unet_arguments(args, kwargs)
        return self._merge_in(call, "cross_attention_kwargs", call["timestep"] / 1000)

    def _run(self, call: dict[str, Any]) -> Any:
        return super().forward(**call)


class Transformer2DModel(transformer_2d.Transformer2DModel):  # type: ignore[misc]
    """A stage of the UNet: ``(B, C, H, W)`` becomes ``(B, H * W, D)`` in token order, and back."""

    _toma: Rewrite

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As diffusers' ``forward``; the blocks of a stage are a group, whose plan is its own."""
        call = _stage_arguments(args, kwargs)
        call["cross_attention_kwargs"] = own_scope(call.get("cross_attention_kwargs"))
        return super().forward(**call)

    def _operate_on_continuous_inputs(self, hidden_states: Tensor) -> tuple[Tensor, int]:
        height, width = hidden_states.shape[-2:]
        tokens, inner_dim = super()._operate_on_continuous_inputs(hidden_states)
        if not self._toma.config.schedule.stateless:
            make_slots(self, tokens)
        if self._toma.config.region == "tile":
            tokens = toma.reorder(tokens, toma.tile_order(tokens, height, width))
        return tokens, inner_dim

    def _get_output_for_continuous_inputs(
        self, hidden_states: Tensor, residual: Tensor, *args: Any, **kwargs: Any
    ) -> Tensor:
        if self._toma.config.region == "tile":
            height, width = residual.shape[-2:]
            raster = toma.tile_order(hidden_states, height, width).argsort()
            hidden_states = toma.reorder(hidden_states, raster)
        output: Tensor = super()._get_output_for_continuous_inputs(
            hidden_states, residual, *args, **kwargs
        )
        return output


class FluxTransformer2DModel(_Clocked, diffusers.FluxTransformer2DModel):  # type: ignore[misc]
    """The Flux transformer; image tokens and their position ids are put in tile order together."""

    # Not asked of the registry of hooks, which pipelines add between two calls of a compiled model.
    _ordered_by_hook = False

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As diffusers' ``forward``."""
        call = _flux_arguments(args, kwargs)
        return self._merge_in(call, "joint_attention_kwargs", call.get("timestep"))

    def _run(self, call: dict[str, Any]) -> Any:
        if not self._toma.config.schedule.stateless:
            tokens = call["hidden_states"]
            make_slots(self, tokens[:, :, :1].expand(-1, -1, self.inner_dim))
        if self._toma.config.region != "tile" or self._ordered_by_hook:
            return super().forward(**call)
        return _in_tile_order(super().forward, call)

    def enable_parallelism(self, *, config: Any, **options: Any) -> None:
        """As diffusers' method; the ranks of context parallelism get neighbouring tiles.

        Tokens are put in tile order before they are split, so that each rank holds a compact part
        of the image, whose regions are those of the whole image where they divide its tokens.
        """
        super().enable_parallelism(config=config, **options)
        parallel: Any = self._parallel_config
        if self._toma.config.region == "tile" and parallel.context_parallel_config is not None:
            registry = HookRegistry.check_if_exists_or_initialize(self)
            registry.register_hook(_TileOrderHook(), "toma_tile_order")
            self._ordered_by_hook = True

    def enable_cache(self, config: Any) -> None:
        """As diffusers' method, but not for caches that merging would mislead: `check_caches`."""
        super().enable_cache(config)
        try:
            check_caches(self)
        except ModelError:
            super().disable_cache()
            raise


class _TileOrderHook(ModelHook):  # type: ignore[misc]
    """Tile order around the hook that splits tokens among ranks, and so among all of them."""

    def new_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return _in_tile_order(self.fn_ref.original_forward, _flux_arguments(args, kwargs))


def _in_tile_order(forward: Callable[..., Any], call: dict[str, Any]) -> Any:
    """Flux on reordered tokens; what comes out is in the caller's order."""
    ids = call["img_ids"]
    ids = ids if ids.ndim == 2 else ids[0]
    order = toma.tile_order_of_ids(ids)
    call["hidden_states"] = toma.reorder(call["hidden_states"], order)
    call["img_ids"] = ids[order]
    for residuals in ("controlnet_block_samples", "controlnet_single_block_samples"):
        if call.get(residuals) is not None:
            call[residuals] = [toma.reorder(each, order) for each in call[residuals]]
    raster = order.argsort()
    output = forward(**call)
    if isinstance(output, tuple):
        return (toma.reorder(output[0], raster), *output[1:])
    output.sample = toma.reorder(output.sample, raster)
    return output


_unet_arguments = _keyword_only(diffusers.UNet2DConditionModel.forward)
_stage_arguments = _keyword_only(transformer_2d.Transformer2DModel.forward)
_flux_arguments = _keyword_only(diffusers.FluxTransformer2DModel.forward)


def _new(name: str) -> Any:
    cls = globals()[name]
    return object.__new__(cls)


def _new_upstream(cls: Any, *args: Any, **kwargs: Any) -> Any:
    return cls.upstream(*args, **kwargs)


def _reduce(self: Any, protocol: object) -> tuple[Callable[..., Any], Any, Any]:
    return _new, (type(self).__name__,), self.__getstate__()


# Whoever asks finds diffusers' class: pipelines look up the module of a class when they save, hooks
# the signature of its forward. A pickle must then be told where the class really is. And whoever
# makes a model of a transformed one's class, as by type(model).from_config(model.config), gets an
# untouched one: only `transform` makes the other.
for _class in (UNet2DConditionModel, Transformer2DModel, FluxTransformer2DModel):
    _upstream: Any = next(c for c in _class.__mro__ if c.__module__.startswith("diffusers"))
    _class.__module__ = _upstream.__module__
    _class.__reduce_ex__ = _reduce  # type: ignore[method-assign]
    _class.__new__ = _new_upstream  # type: ignore[method-assign]
    _class.upstream = _upstream
    if "forward" in vars(_class):
        vars(_class)["forward"].__signature__ = inspect.signature(_upstream.forward)
