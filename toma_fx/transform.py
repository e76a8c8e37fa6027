"""``transform`` and ``restore``: from a model to a model that merges, and back.

``transform`` copies the model; the copy shares every tensor with the original. The family and the
options make a recipe. The recipe makes graphs, which become the forward of the blocks, and classes
stand in at the model's borders. ``restore`` undoes all of this.
"""

import contextlib
import logging
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any, TypeVar

from torch import fx, nn
from torch.export import ExportedProgram

from toma_fx.build import merged_copy, recipe_of_transformed, take_off
from toma_fx.config import MergeConfig, build_config
from toma_fx.errors import ConfigError, ModelError, TomaWarning
from toma_fx.families import MODELS, family_of, knows
from toma_fx.families.rows import Family, TokenGrids, qualified_name
from toma_fx.hooks import check_hooks
from toma_fx.recipe import Recipe
from toma_fx.speedup import for_speedup

MEASURED_LEVEL = 0.8
"""Lowest ``merge_below`` at which merging without memory was measured to ruin images."""

Model = TypeVar("Model")

logger = logging.getLogger(__name__)


def transform(
    model: Model,
    config: MergeConfig | None = None,
    *,
    family: Family | None = None,
    speedup: float | None = None,
    inputs: Mapping[str, Any] | None = None,
    **options: Any,
) -> Model:
    """Merge tokens in a diffusers model or pipeline.

    A model is copied: the copy shares every tensor with the original, which stays unchanged and may
    be transformed again. A pipeline is changed in place: it holds the copy afterwards, so that
    everything that refers to the pipeline sees the faster model. `restore` undoes either.

    Args:
        model: a diffusers model of a known family, or a pipeline with one. Transform before
            ``torch.compile``. A captured model also works: the result of `torch.export.export`, or
            a `torch.fx.GraphModule` from `toma_fx.trace`, from Dynamo, or from the ``module()`` of
            an exported program.
        config: the options; ``MergeConfig()`` if omitted.
        family: description of a model whose class toma_fx does not know. `toma_fx.derive` infers
            it from an example call.
        speedup: replaces the ratio. Takes the smallest ratio that divides the model's predicted
            arithmetic by this factor, at its native size and averaged over a run. This is no
            promise of time; `report` shows the chosen ratio.
        inputs: with ``speedup``, keyword arguments of a call to predict with instead of one at the
            model's native size.
        **options: fields of `MergeConfig`, in place of ``config``: ``transform(unet, ratio=0.4)``.

    Returns:
        A new model of the same class (a subclass with the same name), or the given pipeline.

    Raises:
        ConfigError: when an option is unknown or has an invalid value, when options are given
            beside a config, or when both a ratio and a speed-up are given.
        ModelError: when the model is unknown, compiled, offloaded or already transformed; when no
            block would merge; when a part of the model refers to the original model itself; when a
            cache keeps values that merging changes at every step; or when no ratio reaches the
            speed-up.
        CaptureError: when a captured model contains an operation that cannot take merged tokens.
    """
    if config is not None and options:
        raise ConfigError(
            f"transform got both a config and the options {', '.join(options)}; put them into the "
            "config: MergeConfig.preset('default', ...) or dataclasses.replace(config, ...)"
        )
    if speedup is not None and "ratio" in options:
        raise ConfigError(
            f"transform got both ratio={options['ratio']!r} and speedup={speedup!r}, which chooses "
            "the ratio; give one of them"
        )
    config = build_config(**options) if config is None else config
    if not isinstance(config, MergeConfig):
        raise ConfigError(
            f"config={config!r} must be a MergeConfig; options go by name: "
            "toma_fx.transform(model, ratio=0.5)"
        )
    if speedup is not None and config.tokens == "references":
        raise ConfigError(
            f"speedup={speedup!r} goes by a call without references, which tokens='references' "
            "does not change; give a ratio, and see toma_fx.report"
        )
    if speedup is not None and config.block_ratios:
        raise ConfigError(
            f"speedup={speedup!r} chooses one ratio for all blocks, and block_ratios gives some "
            "their own; give one of them, or let toma_fx.calibrate choose"
        )
    if isinstance(model, fx.GraphModule | ExportedProgram):
        if speedup is not None:
            raise ModelError(
                f"speedup={speedup!r} is for diffusers models; give a captured graph a ratio"
            )
        from toma_fx.flat import transform_flat  # most users never hold a graph

        return transform_flat(model, config)  # type: ignore[no-any-return]
    if isinstance(model, nn.Module):
        return _transform_model(model, config, family, speedup, inputs)  # type: ignore[return-value]
    made = {
        name: _transform_model(part, config, family, speedup, inputs, model)
        for name, part in pipeline_models(model, family).items()
    }
    for name, part in made.items():
        setattr(model, name, part)
    return model


def restore(model: Model) -> Model:
    """Undo `transform` on the given model, in place.

    Other changes made since stay: adapters that were loaded, fused or unloaded; weights that were
    quantised, cast, moved or loaded. Only the merging is removed, together with the compiled code
    that contains it: compile or transform the model again.

    Args:
        model: a transformed model, or a pipeline that holds one.

    Returns:
        The same model or pipeline. If the pipeline holds the ``torch.compile`` wrapper of a
        transformed model, it holds the model itself afterwards.

    Raises:
        ModelError: when nothing was transformed, or when other code replaced a class or a forward
            that `transform` installed.
    """
    if isinstance(model, nn.Module):
        return _restore_model(model)  # type: ignore[return-value]
    for name, part in pipeline_models(model).items():
        setattr(model, name, _restore_model(part))
    return model


def model_of(model: Any) -> nn.Module:
    """Return the given denoising model, or the one of a pipeline, without wrappers.

    Raises:
        ModelError: when there is none.
    """
    if isinstance(model, nn.Module):
        return unwrapped(model)
    return unwrapped(next(iter(pipeline_models(model).values())))


def unwrapped(model: nn.Module) -> nn.Module:
    """Return the known model inside a wrapper of torch.compile, peft or a parallel strategy."""
    if knows(model):
        return model
    inside = [module for module in model.modules() if knows(module)]
    return inside[0] if len(inside) == 1 else model


def pipeline_models(pipeline: object, family: Family | None = None) -> dict[str, nn.Module]:
    """Return the denoising models of a pipeline, by their attribute names.

    Args:
        pipeline: a diffusers pipeline.
        family: the family to look for; any known one if omitted.

    Raises:
        ModelError: when the pipeline holds no such model.
    """
    held = {name: value for name, value in _parts(pipeline) if isinstance(value, nn.Module)}
    if family is None:
        found = {name: value for name, value in held.items() if knows(unwrapped(value))}
    else:
        found = {n: v for n, v in held.items() if qualified_name(type(v)) == family.cls}
    if not found:
        known = ", ".join(name.rpartition(".")[2] for name in MODELS)
        raise ModelError(
            f"{type(pipeline).__name__} is neither a torch module nor a pipeline that holds a "
            f"model that toma_fx knows ({known}); pass the model itself, and, for a class that is "
            "not known, what toma_fx.derive read off it: transform(model, family=...)"
        )
    return found


def _parts(pipeline: object) -> Iterator[tuple[str, object]]:
    components = getattr(pipeline, "components", None)
    names = [*components] if isinstance(components, dict) else []
    of_class = [name for name in dir(type(pipeline)) if not name.startswith("__")]
    for name in dict.fromkeys([*names, *getattr(pipeline, "__dict__", {}), *of_class]):
        with contextlib.suppress(Exception):  # a foreign class's property may raise anything
            yield name, getattr(pipeline, name, None)


def _transform_model(
    model: nn.Module,
    config: MergeConfig,
    family: Family | None,
    speedup: float | None,
    inputs: Mapping[str, Any] | None,
    pipeline: Any = None,
) -> nn.Module:
    _check_model(model, family)
    family = family_of(model) if family is None else family
    config = _possible(config, family)
    if speedup is not None:
        scheduler = getattr(pipeline, "scheduler", None)
        config = for_speedup(model, config, speedup, inputs, scheduler, family)
    if family.regretted and _merges_without_memory(config):
        warnings.warn(
            f"merging without memory {family.regretted}. Give a memory, which adds only what has "
            "changed since a full step: merge_below=0.8, memory=toma_fx.Memory(every=2, theta=0), "
            "skip=(); or take fewer steps",
            TomaWarning,
            stacklevel=3,
        )
    copied = merged_copy(model, config, speedup, pipeline, family)
    _log(recipe_of_transformed(copied), type(copied).__name__)
    return copied


def _merges_without_memory(config: MergeConfig) -> bool:
    whole = config.tokens == "all" and config.placement != "keys"
    early = config.merge_below >= MEASURED_LEVEL
    return whole and early and config.merges and config.memory is None


def _restore_model(model: nn.Module) -> nn.Module:
    model = unwrapped(model)
    take_off(model)
    logger.info("restored %s: no block merges tokens", type(model).__name__)
    return model


_ROLES = {
    "alone": "plans for itself",
    "lead": "plans for its group",
    "follow": "uses the plan of its group",
}


def _log(recipe: Recipe, model: str) -> None:
    if recipe.merges_references:
        logger.info("transformed %s: references merge at its border; %s", model, recipe.config)
        return
    logger.info(
        "transformed %s: %d of %d blocks merge tokens, in %d groups; %s",
        model,
        len(recipe.merged),
        len(recipe.blocks),
        len({block.group for block in recipe.merged}),
        recipe.config,
    )
    for reason, count in Counter(block.unmerged_because for block in recipe.unmerged).items():
        logger.info("left %d blocks unmerged: %s", count, reason)
    for block in recipe.merged:
        around, role = ", ".join(block.components), _ROLES[block.role or ""]
        logger.debug("%s merges around %s and %s", block.path, around, role)
    for block in recipe.unmerged:
        logger.debug("%s is left unmerged: %s", block.path, block.unmerged_because)


def _possible(config: MergeConfig, family: Family) -> MergeConfig:
    """Return the options, without tiles if the family does not know where tokens are reordered."""
    ordered = any(not isinstance(each, TokenGrids) or each.enter for each in family.borders)
    if ordered or config.region != "tile" or not config.merges:
        return config
    warnings.warn(
        f"where the image tokens of {family.title} change their order is not known, so regions are "
        "stripes and not tiles, which are closer to the untouched image; say so to silence this: "
        "region='stripe'",
        TomaWarning,
        stacklevel=4,
    )
    return replace(config, region="stripe")


def _check_model(model: nn.Module, family: Family | None) -> None:
    recipe = getattr(unwrapped(model), "toma_recipe", None)
    if recipe is not None:
        raise ModelError(
            f"this {type(model).__name__} is already transformed with {recipe.config}; "
            "restore it first: toma_fx.restore(model)"
        )
    if any(module._compiled_call_impl is not None for module in model.modules()) or (
        unwrapped(model) is not model and hasattr(model, "_orig_mod")
    ):
        raise ModelError(
            f"this {type(model).__name__} is compiled, and compiled code cannot be rewritten; "
            "call toma_fx.transform first and compile its result"
        )
    check_hooks(model)
    if family is None:
        family = family_of(model)
    if qualified_name(type(model)) != family.cls:
        known = family.cls.rpartition(".")[2]
        raise ModelError(
            f"{type(model).__name__} is a subclass of diffusers' {known}, whose forward may run "
            "the blocks in a way of its own; transform a model of that class itself"
        )


@contextlib.contextmanager
def while_transformed(pipeline: Any, config: MergeConfig) -> Iterator[None]:
    """Within it, a pipeline holds a transformed model; after it, its own again."""
    untouched = pipeline_models(pipeline)
    transform(pipeline, config)
    try:
        yield
    finally:
        for name, part in untouched.items():
            setattr(pipeline, name, part)
