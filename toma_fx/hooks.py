"""Hooks that other code put on a model: moved to the copy, or refused if merging breaks them.

A hook of diffusers replaces ``module.forward`` by a closure over the module and the next hook. In a
copied model such a closure would still run the original's forward: nothing would merge, without any
message. So hooks are taken off the copy and put on again after its blocks are rewritten.
"""

import copy
import functools
from collections.abc import Iterator, Mapping
from types import MethodType
from typing import Any

from torch import Tensor, nn

from toma_fx.errors import ModelError

_HELD = {
    "diffusers.hooks.group_offloading": "group offload",
    "diffusers.hooks.context_parallel": "context parallelism",
}
"""Modules whose hooks hold devices, streams or process groups, which a copy cannot share."""

HOOK_MARKS = ("_diffusers_hook", "_hf_hook")
"""Attributes in which a module stores the hooks of diffusers and of accelerate."""

Attached = tuple[nn.Module, str, Any]
"""A module, and the name and object of a hook on it."""


def check_hooks(model: nn.Module) -> None:
    """Refuse a model with hooks that cannot move to its copy.

    Raises:
        ModelError: when the model is already offloaded or parallel.
    """
    for path, module in model.named_modules():
        where = f"{type(model).__name__}{'.' if path else ''}{path}"
        if hasattr(module, "_hf_hook"):
            raise ModelError(
                f"{where} has accelerate's {type(module._hf_hook).__name__}, bound to this very "
                "model; transform first, then offload: pipe.remove_all_hooks(), "
                "toma_fx.transform(pipe), pipe.enable_model_cpu_offload()"
            )
        for _, hook in hooks_of(module):
            held = _HELD.get(type(hook).__module__)
            if held is not None:
                raise ModelError(
                    f"{where} has diffusers' {type(hook).__name__}, which is bound to this very "
                    f"model; transform first, then enable {held} on the transformed model"
                )


def copied_with_hooks(model: nn.Module) -> tuple[nn.Module, list[Attached]]:
    """Copy a model, sharing every tensor, and separate the copy from its hooks.

    Returns:
        the copy without hooks; and copies of the hooks, for `attach_hooks`, in their order.
    """
    shared: list[Any] = [*model.parameters(), *model.buffers(), *_shared(model)]
    # A cache config refers to its pipeline for the timestep; the pipeline must not be copied.
    cache = getattr(model, "_cache_config", None)
    shared += [] if cache is None else [cache, *filter(callable, vars(cache).values())]
    copied = copy.deepcopy(model, {id(each): each for each in shared})
    attached = []
    for module in copied.modules():
        hooks = list(hooks_of(module))
        attached += [(module, name, hook) for name, hook in hooks]
        _take_off(module)
    return copied, attached


def _shared(model: nn.Module) -> Iterator[Any]:
    """Yield objects in modules that a copy must share.

    These are users' hooks, because the copy of a bound method would write into a copy of the user's
    object (hooks bound to a module of the model are copied with it). They are also tensors that
    are no parameters, such as pruning leaves, because torch refuses to copy them.
    """
    inside = set(map(id, model.modules()))
    for module in model.modules():
        for name, value in vars(module).items():
            if isinstance(value, Tensor):
                yield value
            elif name.endswith("_hooks") and isinstance(value, dict):
                yield from (hook for hook in value.values() if not _bound_to(hook, inside))


def _bound_to(hook: Any, modules: set[int]) -> bool:
    """Return whether a hook is a method of one of these modules, or a partial with one."""
    if isinstance(hook, functools.partial):
        parts = (hook.func, *hook.args, *hook.keywords.values())
        return any(id(part) in modules or _bound_to(part, modules) for part in parts)
    return isinstance(hook, MethodType) and id(hook.__self__) in modules


def follow_class(module: nn.Module, before: type[nn.Module]) -> None:
    """Make hooks on a module run the forward of its class, which has been replaced.

    Hooks of diffusers and accelerate store the bound method that was the forward when they were
    added.
    """
    new = MethodType(type(module).forward, module)

    def is_old(value: Any) -> bool:
        return isinstance(value, MethodType) and value.__func__ is before.forward

    for name in ("forward", "_old_forward"):
        if is_old(vars(module).get(name)):
            vars(module)[name] = new
    registry = vars(module).get("_diffusers_hook")
    for reference in [] if registry is None else registry._fn_refs:
        for name in ("forward", "original_forward"):
            if is_old(getattr(reference, name)):
                setattr(reference, name, new)


def copied_without_hooks(model: nn.Module, memo: Mapping[int, Any]) -> nn.Module:
    """Return a deep copy without hooks of any kind.

    Args:
        model: the model; it may be offloaded or parallel.
        memo: same as for `copy.deepcopy`.
    """
    hooks = [vars(m)[mark] for m in model.modules() for mark in HOOK_MARKS if mark in vars(m)]
    none: dict[int, Any] = dict.fromkeys(map(id, hooks))
    for module in model.modules():
        held = [v for k, v in vars(module).items() if k.endswith("_hooks") and isinstance(v, dict)]
        none |= {id(each): type(each)() for each in held}
    copied = copy.deepcopy(model, {**memo, **none})
    for module in copied.modules():
        _take_off(module)
    return copied


def _take_off(module: nn.Module) -> None:
    if any(mark in vars(module) for mark in HOOK_MARKS):
        # Remove the closure, or the original's method if the last hook left it when removed.
        for name in (*HOOK_MARKS, "forward", "_old_forward"):
            vars(module).pop(name, None)


def attach_hooks(attached: list[Attached]) -> None:
    """Put hooks on modules again."""
    from diffusers.hooks import HookRegistry  # needed only by users of such hooks

    for module, name, hook in attached:
        HookRegistry.check_if_exists_or_initialize(module).register_hook(hook, name)


def is_cast(model: nn.Module) -> bool:
    """Return whether a layer stores its weights in another dtype than it computes in."""
    hooks = (hook for module in model.modules() for _, hook in hooks_of(module))
    return any(type(hook).__name__ == "LayerwiseCastingHook" for hook in hooks)


def hooks_of(module: nn.Module) -> Iterator[tuple[str, Any]]:
    """Yield the names and objects of diffusers' hooks on a module."""
    registry = vars(module).get("_diffusers_hook")
    if registry is not None:
        yield from ((name, registry.hooks[name]) for name in registry._hook_order)
