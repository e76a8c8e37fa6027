"""Hooks that others put on a model: followed to the copy, or refused where merging breaks them.

A hook of diffusers replaces ``module.forward`` by a closure over the module and the next hook. In a
copied model such a closure still runs the original's forward: nothing would be merged, and nothing
would say so. Hooks are therefore taken off the copy and put on again when its blocks are rewritten.
"""

import copy
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from diffusers.hooks import HookRegistry
from diffusers.hooks.layerwise_casting import LayerwiseCastingHook
from torch import nn

from toma_fx.errors import ModelError

_HELD = {
    "diffusers.hooks.group_offloading": "group offload",
    "diffusers.hooks.context_parallel": "context parallelism",
}
"""Modules whose hooks hold devices, streams or process groups, which no copy can share."""

_MARKS = ("_diffusers_hook", "_hf_hook")
"""Attributes under which a module holds the hooks of diffusers and of accelerate."""

Attached = tuple[nn.Module, str, Any]
"""A module, and the name and the hook that it had."""


def check_hooks(model: nn.Module) -> None:
    """Refuse a model with hooks that cannot follow it to its copy.

    Raises:
        ModelError: when it is offloaded or parallel already.
    """
    for path, module in model.named_modules():
        where = f"{type(model).__name__}{'.' if path else ''}{path}"
        if hasattr(module, "_hf_hook"):
            raise ModelError(
                f"{where} has accelerate's {type(module._hf_hook).__name__}, bound to this very "
                "model; transform first, then offload: pipe.remove_all_hooks(), "
                "toma_fx.transform(pipe), pipe.enable_model_cpu_offload()"
            )
        for _, hook in _hooks(module):
            held = _HELD.get(type(hook).__module__)
            if held is not None:
                raise ModelError(
                    f"{where} has diffusers' {type(hook).__name__}, which is bound to this very "
                    f"model; transform first, then enable {held} on the transformed model"
                )


def copied_with_hooks(model: nn.Module) -> tuple[nn.Module, list[Attached]]:
    """A copy that shares every tensor with the model and has none of its hooks, and those hooks.

    Returns:
        the copy; and copies of the hooks, for `attach_hooks`, in the order of attachment.
    """
    shared: list[Any] = [*model.parameters(), *model.buffers()]
    # A cache asks its pipeline for the timestep; the pipeline must not be copied along.
    cache = getattr(model, "_cache_config", None)
    shared += [] if cache is None else [cache, *filter(callable, vars(cache).values())]
    copied = copy.deepcopy(model, {id(each): each for each in shared})
    attached = []
    for module in copied.modules():
        hooks = list(_hooks(module))
        attached += [(module, name, hook) for name, hook in hooks]
        _take_off(module)
    return copied, attached


def copied_without_hooks(model: nn.Module, memo: Mapping[int, Any]) -> nn.Module:
    """A deep copy without the hooks of diffusers and accelerate, whatever those hold.

    Args:
        model: may be offloaded or parallel.
        memo: as `copy.deepcopy` takes it.
    """
    hooks = [vars(m)[mark] for m in model.modules() for mark in _MARKS if mark in vars(m)]
    copied = copy.deepcopy(model, {**memo, **dict.fromkeys(map(id, hooks))})
    for module in copied.modules():
        _take_off(module)
    return copied


def _take_off(module: nn.Module) -> None:
    if any(mark in vars(module) for mark in _MARKS):
        # The closure, or what the last hook left when it was taken off: the original's method.
        for name in (*_MARKS, "forward", "_old_forward"):
            vars(module).pop(name, None)


def check_forwards(modules: Iterable[tuple[str, nn.Module]]) -> None:
    """Refuse modules to be rewritten that run something else than their class's ``forward``.

    Raises:
        ModelError: when there is one.
    """
    for path, module in modules:
        if "forward" in vars(module):
            raise ModelError(
                f"{path or 'the model'} has a forward of its own, {vars(module)['forward']!r:.80}, "
                "which would run in place of the merged one; take it off: del module.forward"
            )


def attach_hooks(attached: list[Attached]) -> None:
    """Put hooks on modules again."""
    for module, name, hook in attached:
        HookRegistry.check_if_exists_or_initialize(module).register_hook(hook, name)


def check_caches(model: nn.Module) -> None:
    """Refuse a cache of what merged tokens are inside a block, where the next step's are others.

    Raises:
        ModelError: when a module within a merged block keeps its output for later steps, while
            every step chooses its own destinations.
    """
    rewrite: Any = model._toma
    if rewrite.config.selector != "facility_location":
        return
    for block in rewrite.merged:
        for path, module in model.get_submodule(block).named_modules(prefix=block):
            kept = [type(hook).__name__ for _, hook in _hooks(module) if hook._is_stateful]
            if kept and path != block:
                raise ModelError(
                    f"{kept[0]} keeps the output of {path} for later steps, which merge into "
                    "other tokens; transform with selector='grid', which keeps its tokens, or "
                    "cache whole blocks: FirstBlockCacheConfig or MagCacheConfig"
                )


def is_cast(model: nn.Module) -> bool:
    """Whether a layer stores its weights in another dtype than it computes in."""
    hooks = (hook for module in model.modules() for _, hook in _hooks(module))
    return any(isinstance(hook, LayerwiseCastingHook) for hook in hooks)


def _hooks(module: nn.Module) -> Iterator[tuple[str, Any]]:
    registry = vars(module).get("_diffusers_hook")
    if registry is not None:
        yield from ((name, registry.hooks[name]) for name in registry._hook_order)
