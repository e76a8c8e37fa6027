"""Checks of foreign code in a model that merging may mislead: it is refused or warned about.

Merged tokens are fewer than the image's and in token order. So code that takes them for the image
grid goes wrong: attention processors and forwards of other libraries, hooks that read features,
masks over all tokens. Such code can declare that it works on any tokens::

    processor.any_tokens = True          # an attention processor, or its class
    forward.any_tokens = True            # a function that replaces a module's forward

A hook can get the order from `toma_fx.token_order`.
"""

import warnings
from collections.abc import Iterable, Iterator, Mapping
from types import MethodType
from typing import Any
from weakref import ref

from torch import Tensor, nn

from toma_fx.errors import InputError, ModelError, TomaWarning
from toma_fx.families.rows import qualified_name
from toma_fx.hooks import HOOK_MARKS, hooks_of
from toma_fx.recipe import BlockRecipe, Recipe
from toma_fx.runtime import plan


def check_copy(model: nn.Module, recipe: Recipe) -> None:
    """Check foreign code that was put into a model before it was copied.

    A function put on a module of the original refers to the original. So the copy would run the
    original's layers: nothing below it would merge, and adapters would not reach it. A subclass of
    a block may have its own forward, which a graph would not follow. Attention processors of other
    libraries may take tokens for the grid; they cause a warning.

    Raises:
        ModelError: when there is such a function or subclass.
    """
    for path, module in model.named_modules():
        if (forward := _foreign_forward(module)) is not None:
            raise ModelError(
                f"{path or 'the model'} has a forward of its own, {forward!r:.80}, which refers to "
                "its original module, so a copy would run that one; take it off, "
                "del module.forward, transform, and put it on the transformed model"
            )
    for block in recipe.merged:
        _check_block_class(block, model.get_submodule(block.module))
    _check_processors(each for block in recipe.merged for each in _named_modules(model, block))


def _check_block_class(recipe: BlockRecipe, block: nn.Module) -> None:
    given: Any = type(block)
    known: Any = next(base for base in given.__mro__ if qualified_name(base) == recipe.row.cls)
    if given.forward is not known.forward or given.__call__ is not nn.Module.__call__:
        raise ModelError(
            f"{recipe.path} is a {qualified_name(given)}, whose forward is not the one of "
            f"diffusers' {known.__name__} and would be lost in a merged block; restore the "
            f"block's class, or leave it out: skip=({recipe.path!r},)"
        )


def check_free(modules: Iterable[tuple[str, nn.Module]]) -> None:
    """Refuse to restore the classes of modules whose forward other code replaced since.

    Raises:
        ModelError: when there is such a forward.
    """
    for path, module in modules:
        if (forward := _foreign_forward(module)) is not None:
            raise ModelError(
                f"{path or 'the model'} got a forward of its own after it was transformed, "
                f"{forward!r:.80}, which may refer to the merged one; take it off, "
                "del module.forward, restore, and put it on again"
            )


def _foreign_forward(module: nn.Module) -> Any:
    """Return a forward that belongs neither to a known hook nor to the module's class, if any.

    A leftover of removed hooks, the forward of the class itself, is deleted.
    """
    forward = vars(module).get("forward")
    if forward is None or any(mark in vars(module) for mark in HOOK_MARKS):
        return None
    if _is_own(forward, module):
        del module.forward
        return None
    return forward


def _is_own(forward: Any, module: nn.Module) -> bool:
    """Return whether a module's forward is the one of its class, as removed hooks leave it."""
    bound = isinstance(forward, MethodType) and forward.__self__ is module
    return bound and forward.__func__ is getattr(type(module), "forward", None)


class Watched:
    """List of the modules of a transformed model on which other code may put something.

    It is made once, because a large model may be called every few milliseconds, and walking its
    modules would take as long.

    Args:
        model: the transformed model.
        recipe: the model's recipe.
    """

    def __init__(self, model: nn.Module, recipe: Recipe) -> None:
        self._recipe = recipe
        # Weak references, so that a layer that is exchanged (e.g. quantised) can be freed.
        self._model = ref(model)
        self._list()

    def _list(self) -> None:
        model, recipe = self._model(), self._recipe
        assert model is not None, "it is the model that asks"
        inside = [
            (path, module, block.path)
            for block in recipe.merged
            for path, module in _named_modules(model, block)
        ]
        self._inside = [(path, ref(module), block) for path, module, block in inside]
        self._processed = [(p, ref(m)) for p, m, _ in inside if "processor" in vars(m)]
        self._opened = [(path, ref(each)) for path, each in _opened(model, recipe)]
        blocks = [(block.path, model.get_submodule(block.module)) for block in recipe.blocks]
        self._blocks = [(path, ref(block)) for path, block in blocks]

    def check_call(self, call: Mapping[str, Any]) -> None:
        """Refuse a call that merging would mislead, because of code added since `transform`.

        Raises:
            InputError: when a foreign forward runs on merged tokens, when an attention kwarg is a
                mask over all tokens, or when a hook is on an attention that is part of its block's
                graph.
        """
        for path, reference in self._opened:
            _check_opened(path, reference())
        _check_kwargs(self._recipe, call)
        _check_masks(self._recipe, call)
        inside = [module() for _, module, _ in self._inside]
        if None in inside:  # layers were exchanged since the list was made
            self._list()
            inside = [module() for _, module, _ in self._inside]
        for (path, _, block), module in zip(self._inside, inside, strict=True):
            if module is not None and "forward" in module.__dict__:
                _check_forward(path, module, block)
        held = ((path, module()) for path, module in self._processed)
        _check_processors((path, module) for path, module in held if module is not None)
        if self._recipe.merged and self._recipe.config.region == "tile":
            self._check_hooks()

    def _check_hooks(self) -> None:
        for path, reference in self._blocks:
            block = reference()
            if block is None:
                continue
            hooks = (*block._forward_hooks.values(), *block._forward_pre_hooks.values())
            if any(not getattr(hook, "any_tokens", False) for hook in hooks):
                warnings.warn(
                    f"a hook on {path} sees image tokens in token order, not row by row; "
                    "toma_fx.token_order() gives it the order, region='stripe' keeps tokens as "
                    "they are, and hook.any_tokens = True says that the order does not matter",
                    TomaWarning,
                    stacklevel=4,
                )
                return


def _named_modules(model: nn.Module, block: BlockRecipe) -> Iterator[tuple[str, nn.Module]]:
    yield from model.get_submodule(block.module).named_modules(prefix=block.path)


def _opened(model: nn.Module, recipe: Recipe) -> Iterator[tuple[str, nn.Module]]:
    """Yield the attentions whose keys and values merge; a graph contains their layers instead."""
    for block in recipe.merged:
        for name in block.attentions:
            yield f"{block.path}.{name}", model.get_submodule(f"{block.module}.{name}")


def _check_opened(path: str, attention: nn.Module | None) -> None:
    if attention is None:
        return
    hooks = attention._forward_hooks or attention._forward_pre_hooks
    if hooks or _foreign_forward(attention) is not None:
        raise InputError(
            f"{path} has a hook or a forward of its own, which would not run: with "
            "placement='keys' its layers are part of the block's graph; take it off, or transform "
            "with placement='block'"
        )


def _check_kwargs(recipe: Recipe, call: Mapping[str, Any]) -> None:
    """Refuse arguments that merged blocks refuse, also in calls that do not merge.

    Otherwise a run would fail midway, when the noise is low enough to merge.

    Raises:
        InputError: when there is such an argument.
    """
    if not recipe.merged:
        return
    for guard in {recipe.guard(block) for block in recipe.merged}:
        plan.pass_on(_kwargs(recipe, call), *guard.refused_kwargs)
        for name, component in guard.masks:
            # The mask's rows are in raster order, which is not the order of tiles.
            if component in guard.components or recipe.config.region == "tile":
                plan.pass_on_mask(call.get(name), name, component == "self_attention")


def _kwargs(recipe: Recipe, call: Mapping[str, Any]) -> Any:
    """Return the attention kwargs of a call of the model, if it takes any."""
    name = recipe.family.attention_kwargs
    return None if name is None else call.get(name)


def _check_masks(recipe: Recipe, call: Mapping[str, Any]) -> None:
    """Refuse attention kwargs that are masks over all tokens.

    Raises:
        InputError: when there is such a mask.
    """
    merged, in_order = set(recipe.config.components), recipe.config.region != "tile"
    if in_order and merged == {"mlp"}:
        return
    kwargs = _kwargs(recipe, call) or {}
    masks = {
        name: value
        for name, value in kwargs.items()
        if isinstance(value, Tensor) and value.ndim > 1 and value.shape[-1] == value.shape[-2]
    }
    if not masks:
        return
    lengths = recipe.family.sequence_lengths(call)
    way = "leave it out"
    if recipe.merged:
        way += (
            ", or merge the MLP alone: transform with placement='component', components=('mlp',) "
            "and region='stripe'"
        )
    for name, mask in masks.items():
        if mask.shape[-1] in lengths:
            raise InputError(
                f"the attention kwarg {name!r} of shape {tuple(mask.shape)} has a row for each of "
                f"{mask.shape[-1]} tokens, which merging joins; {way}"
            )


def _check_forward(path: str, module: nn.Module, block: str) -> None:
    forward = _foreign_forward(module)
    if forward is None or getattr(forward, "any_tokens", False):
        return
    raise InputError(
        f"{path} has a forward of its own, {forward!r:.80}, and runs on merged tokens, which are "
        f"not the image grid; take it off, leave its block out with skip=({block!r},) and "
        "region='stripe', or, if it works on tokens in any number and order, set "
        "forward.any_tokens = True"
    )


def _check_processors(modules: Iterable[tuple[str, nn.Module]]) -> None:
    """Warn about attention processors of other libraries, once per class."""
    seen = set()
    for path, module in modules:
        processor = getattr(module, "processor", None)
        cls = type(processor)
        known = processor is None or cls.__module__.partition(".")[0] == "diffusers"
        if known or cls in seen or getattr(processor, "any_tokens", False):
            continue
        seen.add(cls)
        warnings.warn(
            f"the attention processor {qualified_name(cls)} of {path} runs on merged tokens, which "
            "are fewer than the image's and in another order; if it takes them for the grid, leave "
            "its block out with skip and take region='stripe'; if not, silence this by "
            f"{cls.__name__}.any_tokens = True",
            TomaWarning,
            stacklevel=4,
        )


def check_caches(model: nn.Module, recipe: Recipe) -> None:
    """Refuse a cache of values inside a merged block, because the next step merges other tokens.

    Raises:
        ModelError: when a module within a merged block keeps its output for later steps, while
            every step chooses its own destinations or full steps have all tokens; or when a hook is
            on an attention of which only the layers run.
    """
    for path, attention in _opened(model, recipe):
        if any(hooks_of(attention)):
            raise ModelError(
                f"a hook on {path} would not run: with placement='keys' its layers are part of the "
                "block's graph; cache whole blocks (FirstBlockCacheConfig, MagCacheConfig), or "
                "transform with placement='block'"
            )
    memory = recipe.config.memory
    chooses = recipe.config.selector == "facility_location" or memory is not None
    if recipe.config.placement == "keys" or not chooses:
        return
    for path, kept in _caches(model, recipe):
        if memory is not None:
            raise ModelError(
                f"{kept} keeps the output of {path} for later steps, and {memory} runs some steps "
                "on all tokens and others on merged ones; transform with memory=None and "
                "selector='grid', or cache whole blocks: FirstBlockCacheConfig or MagCacheConfig"
            )
        raise ModelError(
            f"{kept} keeps the output of {path} for later steps, which merge into other tokens; "
            "transform with selector='grid', which keeps its tokens, or cache whole blocks: "
            "FirstBlockCacheConfig or MagCacheConfig"
        )


def _caches(model: nn.Module, recipe: Recipe) -> Iterator[tuple[str, str]]:
    for block in recipe.merged:
        for path, module in _named_modules(model, block):
            kept = [type(hook).__name__ for _, hook in hooks_of(module) if hook._is_stateful]
            if kept and path != block.path:
                yield path, kept[0]
