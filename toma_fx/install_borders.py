"""Classes that replace diffusers' classes at the borders of a model: made, installed, removed.

One replaces the class of the model (`toma_fx.model_border`), and one that of each stage whose
blocks form groups of their own. This file makes them for classes that it is given; it names none.
"""

import inspect
import threading
import types
import weakref
from typing import Any

import torch
from torch import nn

from toma_fx.border import Border, BorderKey
from toma_fx.calls import Arguments, named_arguments
from toma_fx.families.rows import Stage, TokenGrids, qualified_name
from toma_fx.grids import method_in_order
from toma_fx.model_border import ModelBorder
from toma_fx.model_kinds import (
    CachedModelBorder,
    CachedParallelModelBorder,
    ParallelModelBorder,
)
from toma_fx.ordering import TOKEN_ORDER_HOOK, enter_in_order, known_order, leave_in_order
from toma_fx.ranks import RANKS_HOOK
from toma_fx.recipe import Recipe, plain_path
from toma_fx.runtime.plan import SCOPE, own_scope
from toma_fx.state import State
from toma_fx.timesteps import TimestepReader

toma = torch.ops.toma


class StageBorder(Border):
    """The border of a stage whose blocks are groups of their own."""

    toma_stage: str
    """Path of the stage in the model."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Same as diffusers' ``forward``, but the blocks of the stage share plans of their own."""
        call = self.toma_named(args, kwargs)
        name = self.toma_key.family.attention_kwargs
        if SCOPE in (call.get(name) or {}):
            call[name] = own_scope(call[name], self.toma_stage)
        if self.toma_key.config.region != "tile":
            return self.toma_base_forward(**call)
        grid = next(iter(call.values()))
        with known_order(lambda: toma.tile_order(grid, *grid.shape[-2:])):
            return self.toma_base_forward(**call)


_CLASSES: weakref.WeakValueDictionary[BorderKey, Any] = weakref.WeakValueDictionary()
_LOCK = threading.Lock()


def _class_of(key: BorderKey) -> Any:
    """Return the class for a key; the same one as long as any object is of it."""
    with _LOCK:
        cls = _CLASSES.get(key)
        if cls is None:
            cls = _CLASSES[key] = _new_class_of(key)
        return cls


def _new_class_of(key: BorderKey) -> Any:
    if key.stage is not None:
        return _new_stage_class(key, key.stage)
    return _new_model_class(key) if key.places is None else _new_place_class(key)


def _new_class(key: BorderKey, mixin: type[Border], attributes: Arguments) -> Any:
    base: Any = key.base
    common = {
        "__doc__": base.__doc__,
        "__module__": base.__module__,
        "__qualname__": base.__qualname__,
        "toma_base": base,
        "toma_base_forward": base.forward,
        "toma_key": key,
        "toma_unpickled": staticmethod(_unpickled),
        "toma_named": staticmethod(named_arguments(base.forward)),
    }
    if "forward" not in attributes:
        common["forward"] = forward = _own_code(mixin.forward)  # type: ignore[attr-defined]
        forward.__signature__ = inspect.signature(base.forward)
    return type(base.__name__, (mixin, base), {**common, **attributes})


_MIXINS = {
    (False, False): ModelBorder,
    (False, True): ParallelModelBorder,
    (True, False): CachedModelBorder,
    (True, True): CachedParallelModelBorder,
}
"""Border classes, by whether diffusers' caches know a model and whether ranks can split it."""


def _new_model_class(key: BorderKey) -> Any:
    mixin = _MIXINS[hasattr(key.base, "enable_cache"), hasattr(key.base, "enable_parallelism")]
    attributes = {
        # Dynamo counts graphs per code object, and each configuration has graphs of its own.
        "_run": _own_code(ModelBorder._run),
        "__call__": _own_code(ModelBorder.__call__),
        "_before": torch.compiler.disable(_own_code(ModelBorder._before)),
        "_after": torch.compiler.disable(_own_code(ModelBorder._after)),
    }
    attributes |= _methods_in_order(key, "")
    # Names that compile_repeated_blocks compiles; diffusers leaves out some or all of them.
    blocks = [row.cls.rpartition(".")[2] for row in key.family.blocks]
    repeated = getattr(key.base, "_repeated_blocks", None) or ()
    attributes["_repeated_blocks"] = list(dict.fromkeys([*repeated, *blocks]))
    cls = _new_class(key, mixin, attributes)
    for frame in (cls.__call__, cls.forward):
        _decided_outside(frame)
    return cls


def _new_stage_class(key: BorderKey, stage: Stage) -> Any:
    base: Any = key.base
    attributes: Arguments = {}
    if key.config.region == "tile":
        attributes[stage.enter] = enter_in_order(getattr(base, stage.enter))
        attributes[stage.leave] = leave_in_order(getattr(base, stage.leave))
    return _new_class(key, StageBorder, attributes)


def _new_place_class(key: BorderKey) -> Any:
    assert key.places is not None
    attributes = _methods_in_order(key, key.places)
    base: Any = key.base
    attributes.setdefault("forward", base.forward)
    return _new_class(key, Border, attributes)


def _methods_in_order(key: BorderKey, module: str) -> Arguments:
    """Return a module's methods with reordered tokens, except the model's own forward."""
    if key.grids is None or not key.grids.is_ordered(key.config.region):
        return {}
    enter = [place for place in key.grids.enter if place.module == module]
    leave = [place for place in key.grids.leave if place.module == module]
    methods = {place.method for place in (*enter, *leave)}
    return {
        name: method_in_order(
            getattr(key.base, name),
            [place for place in enter if place.method == name],
            [place for place in leave if place.method == name],
        )
        for name in methods
        if module or name != "forward"
    }


def _own_code(function: Any) -> Any:
    """Return a copy of a function with its own code object."""
    own = types.FunctionType(
        function.__code__.replace(),
        function.__globals__,
        function.__name__,
        function.__defaults__,
        function.__closure__,
    )
    own.__doc__, own.__qualname__ = function.__doc__, function.__qualname__
    own.__kwdefaults__ = function.__kwdefaults__
    return own


def _decided_outside(frame: Any) -> None:
    """Make Dynamo run a frame uncompiled, and compile the functions that it calls.

    If something larger is compiled, such a frame is traced with it nevertheless.
    """
    # Private API, but the only way: torch.compiler.disable forbids tracing too.
    from torch._dynamo.eval_frame import skip_code

    skip_code(frame.__code__)


def _unpickled(key: BorderKey) -> Any:
    return object.__new__(_class_of(key))


def install_borders(model: nn.Module, recipe: Recipe, pipeline: Any = None) -> None:
    """Replace the classes at the borders of a model.

    Args:
        model: the model; its blocks already have their graphs.
        recipe: the model's recipe.
        pipeline: pipeline that holds the model, if any; its scheduler tells noise levels.
    """
    stages = {each.cls: each for each in recipe.family.borders if isinstance(each, Stage)}
    for path, module in model.named_modules():
        names = map(qualified_name, type(module).__mro__)
        stage = next((stages[name] for name in names if name in stages), None)
        if stage is not None:
            key = BorderKey(type(module), recipe.family, recipe.config, stage)
            module.__class__ = _class_of(key)
            module.toma_stage = plain_path(path)
    border: Any = model
    # Some configurations leave a module out, such as one of learned positions.
    for path in _places(recipe).intersection(path for path, _ in model.named_modules()):
        at: Any = model.get_submodule(path)
        at.__class__ = _class_of(BorderKey(type(at), recipe.family, recipe.config, places=path))
    border.__class__ = _class_of(BorderKey(type(model), recipe.family, recipe.config))
    border.toma_recipe = recipe
    border.toma_state = State()
    border.toma_reader = TimestepReader(pipeline)


def _places(recipe: Recipe) -> set[str]:
    """Return the paths of modules in a model where tokens enter or leave token order."""
    grids = [each for each in recipe.family.borders if isinstance(each, TokenGrids)]
    ordered = [each for each in grids if each.is_ordered(recipe.config.region)]
    places = [place for each in ordered for place in (*each.enter, *each.leave)]
    return {place.module for place in places if place.module}


def uninstall_borders(model: nn.Module) -> None:
    """Restore the classes at the borders of a model, and remove added attributes.

    Compiled code contains the merging, so it is removed too.
    """
    if vars(model).get("toma_ordered_by_hook"):
        model._diffusers_hook.remove_hook(TOKEN_ORDER_HOOK, recurse=False)  # type: ignore[operator, union-attr]
    ranks = vars(model).get("toma_ranks")
    if ranks is not None and ranks.arguments:
        from diffusers.hooks import HookRegistry

        HookRegistry.check_if_exists_or_initialize(model).register_hook(ranks.hook(), RANKS_HOOK)
    vars(model).pop("toma_recipe")
    for module in model.modules():
        cls: Any = type(module)
        if not issubclass(cls, Border):
            continue
        module.__class__ = cls.toma_base
        for name in [n for n in vars(module) if n.startswith("toma") or n == "_run"]:
            del vars(module)[name]
