"""Construction of a merging model from options, and its removal.

The model is copied and its recipe made. Graphs are captured, rewritten and installed as the forward
of its blocks, and classes stand in at its borders.
"""

import functools
import inspect
from collections.abc import Iterator, Mapping, Sequence
from itertools import chain, takewhile
from types import CodeType
from typing import Any

from torch import fx, nn

from toma_fx.border import Border
from toma_fx.config import MergeConfig
from toma_fx.errors import ModelError
from toma_fx.families import family_of
from toma_fx.families.rows import Block, Family, Stage, qualified_name
from toma_fx.foreign import check_caches, check_copy, check_free
from toma_fx.hooks import attach_hooks, copied_with_hooks, follow_class
from toma_fx.install_borders import install_borders, uninstall_borders
from toma_fx.passes.capture import capture_block
from toma_fx.passes.install import install, uninstall
from toma_fx.passes.leaf_values import remembering, run_on_examples
from toma_fx.passes.pipeline import Pass, run_passes
from toma_fx.recipe import BlockRecipe, FoundBlock, Recipe, make_recipe, plain_path


def recipe_of(
    model: nn.Module,
    config: MergeConfig,
    speedup: float | None = None,
    family: Family | None = None,
) -> Recipe:
    """Make the recipe of a model; ``family`` is needed only for a class that toma_fx does not know.

    Raises:
        ModelError: when the options name no block, or when nothing would merge.
    """
    family = family_of(model) if family is None else family
    found = [
        FoundBlock(module=path, row=row, submodules=frozenset(n for n, _ in block.named_modules()))
        for path, block, row in _blocks(model, family)
    ]
    return make_recipe(family, found, _stages(model, family), config, type(model).__name__, speedup)


def merged_copy(
    model: nn.Module,
    config: MergeConfig,
    speedup: float | None = None,
    pipeline: Any = None,
    family: Family | None = None,
) -> nn.Module:
    """Transform a model that passed all checks, without logging.

    Args:
        model: a model of the family.
        config: the options.
        speedup: the speed-up for which the ratio was chosen, if any.
        pipeline: the pipeline that holds the model, if any.
        family: family of the model, if it is not a known one.
    """
    copied, hooks = copied_with_hooks(model)
    recipe = recipe_of(copied, config, speedup, family)
    check_copy(copied, recipe)
    if recipe.merged:
        install_blocks(copied, recipe)
    if recipe.merged or recipe.merges_references:
        install_borders(copied, recipe, pipeline)
    else:  # an untouched model that remembers that it was asked to stay untouched
        copied.toma_recipe = recipe  # type: ignore[assignment]
    attach_hooks(hooks)
    check_caches(copied, recipe)
    return copied


def take_off(model: nn.Module) -> None:
    """Undo `merged_copy` on the copy itself; other changes made since stay.

    Raises:
        ModelError: when the model does not merge, or when other code replaced a class or a forward
            that was installed.
    """
    recipe = recipe_of_transformed(model)
    blocks = [model.get_submodule(block.module) for block in recipe.blocks] if recipe.merged else []
    borders = [module for module in model.modules() if isinstance(module, Border)]
    classes = {module: type(module) for module in (*blocks, *borders)}
    # Check first, so that a refused model still merges as a whole.
    installed = [(path, each) for path, each in model.named_modules() if each in classes]
    for path, module in installed:
        if "toma_base" not in vars(classes[module]):
            raise ModelError(
                f"{path or 'the model'} became a {qualified_name(classes[module])} after it was "
                "transformed; undo that first, then restore"
            )
    check_free(installed)
    for block in blocks:
        uninstall(block)
    uninstall_borders(model)
    for module, before in classes.items():
        follow_class(module, before)


def recipe_of_transformed(model: nn.Module) -> Recipe:
    """Return the recipe with which `transform` changed a model.

    Raises:
        ModelError: when the model was not transformed.
    """
    recipe = getattr(model, "toma_recipe", None)
    if not isinstance(recipe, Recipe):
        raise ModelError(
            f"this {type(model).__name__} was not transformed; call toma_fx.transform first"
        )
    return recipe


def install_blocks(model: nn.Module, recipe: Recipe) -> None:
    """Make the blocks of a model run the variants of the recipe.

    Raises:
        CaptureError: when a block's forward does something that one graph cannot represent.
    """
    graphs = _Graphs(recipe)
    for each in recipe.blocks:
        block = model.get_submodule(each.module)
        leads, form = each.role == "lead" and recipe.makes_plans, each.form
        install(
            block,
            graphs.of(block, each, recipe.variants(each)),
            attention_kwargs=each.row.flow.attention_kwargs,
            form=None if form is None else ((form.argument, *form.more), form.of),
            leads=each.group.name if leads else "",
            follower=graphs.of(block, each, recipe.followers(each)) if leads else None,
            usual=next(iter(recipe.variants(each))),
            path=each.path if recipe.config.memory is not None else "",
        )


class _Graphs:
    """Graphs of blocks; blocks of the same structure and passes share one."""

    def __init__(self, recipe: Recipe) -> None:
        self._recipe = recipe
        self._made: dict[Any, fx.GraphModule] = {}

    def of(
        self,
        block: nn.Module,
        recipe: BlockRecipe,
        variants: Mapping[str, tuple[Pass, ...] | None],
    ) -> dict[str, fx.GraphModule | None]:
        forms = ("",) if recipe.form is None else recipe.form.names
        opened = recipe.attentions
        return {
            f"{name}{form}": None if passes is None else self._graph(block, passes, form, opened)
            for name, passes in variants.items()
            for form in forms
        }

    def _graph(
        self, block: nn.Module, passes: tuple[Pass, ...], form: str, opened: tuple[str, ...]
    ) -> fx.GraphModule:
        key = _structure(block, opened), passes, form
        if key not in self._made:
            gm = captured(block, self._recipe.family, form, opened)
            self._made[key] = run_passes(gm, passes)
        return self._made[key]


def captured(
    block: nn.Module, family: Family, form: str | None = None, opened: Sequence[str] = ()
) -> fx.GraphModule:
    """Return the graph of a block as diffusers wrote it; of its first form, if it has several.

    Args:
        block: a block of a model of the family.
        family: family of the model.
        form: form of the block's arguments.
        opened: paths of its attentions whose inside the graph shows.
    """
    row = family.block_row(type(block))
    assert row is not None, f"{type(block)} is no block of {family.name}"

    forms = () if row.form is None else (form or row.form.names[0],)
    examples = row.examples(block, *forms)
    if opened:
        examples |= row.key_examples
    if opened and row.key_mask is not None:
        examples[row.key_mask.argument] = row.key_mask.example(form or "")
    leaf_value = remembering(functools.partial(example_of_leaf, family))
    return capture_block(
        block, examples, row.flow.attention_kwargs, leaf_value, row.example_tokens, opened
    )


def example_of_leaf(
    family: Family, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """Return an example of a submodule's output, without its weights.

    So offloaded, quantised and adapted layers are captured like any other.
    """
    names = map(qualified_name, type(module).__mro__)
    value = next((family.leaf_values[n] for n in names if n in family.leaf_values), None)
    if value is not None:
        return value(module, *args, **kwargs)
    return run_on_examples(module, args, kwargs)


def block_graphs(
    model: nn.Module, config: MergeConfig
) -> Iterator[tuple[str, fx.GraphModule, fx.GraphModule]]:
    """Yield path, captured graph and rewritten graph of each merging block, for inspection."""
    recipe = recipe_of(model, config)
    for each in recipe.merged:
        block = model.get_submodule(each.module)
        before, after = (captured(block, recipe.family, None, each.attentions) for _ in range(2))
        passes = next(iter(recipe.variants(each).values()))
        assert passes is not None
        yield each.path, before, run_passes(after, passes)


def _blocks(model: nn.Module, family: Family) -> Iterator[tuple[str, nn.Module, Block]]:
    for path, module in model.named_modules():
        row = family.block_row(type(module))
        if row is not None:
            yield path, module, row


def _stages(model: nn.Module, family: Family) -> list[str]:
    names = {border.cls for border in family.borders if isinstance(border, Stage)}
    return [
        plain_path(path)
        for path, module in model.named_modules()
        if any(qualified_name(cls) in names for cls in type(module).__mro__)
    ]


def _structure(block: nn.Module, opened: Sequence[str] = ()) -> Any:
    """Return what determines the graph of a block: its classes, and plain attributes that it reads.

    Other attributes may number the blocks of a list, which are alike anyway. Of an opened
    attention, all plain attributes count, because its processor reads them.
    """
    asked = _names_in(type(block))
    attributes = {name: value for name, value in _plain(block) if name in asked}
    attentions = [block.get_submodule(path) for path in opened]
    inside = [(*_plain(each), *_plain(each.processor)) for each in attentions]
    classes = [
        (name, type(m), type(getattr(m, "processor", None))) for name, m in block.named_modules()
    ]
    return type(block), tuple(attributes.items()), tuple(classes), tuple(inside)


def _plain(holder: object) -> Iterator[tuple[str, Any]]:
    plain = str | int | float | bool | None
    for name, value in vars(holder).items():
        if isinstance(value, plain) and name != "training":
            yield name, value


def _names_in(cls: type[nn.Module]) -> frozenset[str]:
    """Return the names and strings in the methods of a class, except ``__init__``."""
    own = takewhile(lambda base: base is not nn.Module, cls.__mro__)
    members = chain.from_iterable(vars(base).items() for base in own)
    functions = (
        inspect.unwrap(getattr(each, "__func__", each))
        for name, each in members
        if name != "__init__"
    )
    codes = [each.__code__ for each in functions if hasattr(each, "__code__")]
    names: set[str] = set()
    while codes:
        code = codes.pop()
        codes += [each for each in code.co_consts if isinstance(each, CodeType)]
        names.update(code.co_names, (each for each in code.co_consts if isinstance(each, str)))
    return frozenset(names)
