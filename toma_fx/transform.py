"""``transform`` and ``restore``: the whole story in one file.

A copy of the model shares every tensor with the original. The graph of each transformer block is
captured, rewritten by passes, and installed as the block's forward.
"""

import logging
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, replace
from typing import Any, TypeVar

import torch
from torch import fx, nn
from torch.export import ExportedProgram

from toma_fx.captured import transform_captured
from toma_fx.config import MergeConfig, build_config
from toma_fx.errors import ConfigError, ModelError
from toma_fx.families import Block, Family, example_inputs, family_of, leaf_value
from toma_fx.hooks import attach_hooks, check_caches, check_forwards, check_hooks, copied_with_hooks
from toma_fx.models import Rewrite
from toma_fx.passes.capture import capture_block
from toma_fx.passes.cleanup import Cleanup
from toma_fx.passes.guard_inputs import GuardInputs
from toma_fx.passes.install import install
from toma_fx.passes.merge_components import MergeComponents
from toma_fx.passes.merge_once import MergeOnce
from toma_fx.passes.pipeline import Pass, run_passes
from toma_fx.passes.plan_nodes import TokenFlow
from toma_fx.passes.share_plan import SharePlan
from toma_fx.passes.sites import SITES, FindSites
from toma_fx.runtime.schedule import DenoisingClock, PlanMemory
from toma_fx.treatment import Treatment, plan_options, treatments

Model = TypeVar("Model")

logger = logging.getLogger(__name__)

PIPELINE_PARTS = ("unet", "transformer")
"""Names under which a pipeline holds its denoising model."""


def transform(
    model: Model,
    config: MergeConfig | None = None,
    *,
    speedup: float | None = None,
    **options: Any,
) -> Model:
    """Merge tokens in a diffusers model; returns a new model, or the same pipeline with one.

    A model is copied, but every tensor is shared with the original, which stays as it was. A
    pipeline is changed in place, so that everything that refers to it sees the faster model;
    `restore` puts the original back.

    Args:
        model: a ``UNet2DConditionModel`` or ``FluxTransformer2DModel``, or a pipeline with one.
            Transform before ``torch.compile``. Or one that was captured already: what
            `torch.export.export` returned, or a `torch.fx.GraphModule` from `toma_fx.trace`,
            from Dynamo, or from the ``module()`` of an exported program.
        config: what to do; `MergeConfig` with its defaults when left out.
        speedup: in place of a ratio: take the smallest whose predicted arithmetic, at the model's
            native size, is this many times less than the untouched model's. That is no promise of
            time; `report` says what was chosen.
        **options: fields of `MergeConfig`, in place of ``config``: ``transform(unet, ratio=0.4)``.

    Returns:
        A model of the same class (a subclass with the same name), or the given pipeline.

    Raises:
        ConfigError: when an option is unknown or holds a value it cannot take, when it is given
            beside a config, or when both a ratio and a speed-up are given.
        ModelError: when the model is unknown, compiled, offloaded or transformed already, when no
            block would be merged, when a cache keeps what merging changes at every step, or when
            no ratio reaches the speed-up.
        CaptureError: when a captured model holds something that merged tokens cannot go through.
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
        return transform_captured(model, config)  # type: ignore[no-any-return]
    if isinstance(model, nn.Module):
        return _transform_model(model, config, speedup)  # type: ignore[return-value]
    part = _pipeline_part(model)
    setattr(model, part, _transform_model(getattr(model, part), config, speedup))
    return model


def restore(model: Model) -> Model:
    """Undo `transform`.

    Args:
        model: a transformed model, or a pipeline that holds one.

    Returns:
        The original model; or the given pipeline, with the original model in place.

    Raises:
        ModelError: when nothing was transformed.
    """
    if isinstance(model, nn.Module):
        return rewrite_of(model).original  # type: ignore[return-value]
    part = _pipeline_part(model)
    setattr(model, part, rewrite_of(getattr(model, part)).original)
    return model


def rewrite_of(model: nn.Module) -> Rewrite:
    """What `transform` did to a model.

    Raises:
        ModelError: when it was not transformed.
    """
    rewrite = getattr(model, "_toma", None)
    if not isinstance(rewrite, Rewrite):
        raise ModelError(
            f"this {type(model).__name__} was not transformed; call toma_fx.transform first"
        )
    return rewrite


def model_of(model: Any) -> nn.Module:
    """The denoising model: the given one, or that of the given pipeline."""
    return model if isinstance(model, nn.Module) else getattr(model, _pipeline_part(model))


def _pipeline_part(pipeline: object) -> str:
    for part in PIPELINE_PARTS:
        if isinstance(getattr(pipeline, part, None), nn.Module):
            return part
    raise ModelError(
        f"{type(pipeline).__name__} is neither a torch module nor a pipeline with a module named "
        f"{' or '.join(PIPELINE_PARTS)}; pass the model itself"
    )


def _transform_model(
    model: nn.Module, config: MergeConfig, speedup: float | None = None
) -> nn.Module:
    _check_model(model)
    family_of(model)
    if speedup is not None:
        from toma_fx.speedup import for_speedup  # which transforms, to count

        config = for_speedup(model, config, speedup)
    copied = rewritten(model, config, speedup)
    _log(rewrite_of(copied))
    return copied


def rewritten(model: nn.Module, config: MergeConfig, speedup: float | None = None) -> nn.Module:
    """`transform` of a model that can be transformed, without a word to the log."""
    family = family_of(model)
    copied, hooks = copied_with_hooks(model)
    blocks = {path: (block, row) for path, block, row in _blocks(copied, family)}
    check_forwards([("", copied), *((path, block) for path, (block, _) in blocks.items())])
    treated = treatments(list(blocks), config, family.spared, type(model).__name__)
    graphs: dict[Any, fx.GraphModule] = {}

    def graph(block: nn.Module, row: Block, treatment: Treatment | None) -> fx.GraphModule:
        done = treatment and (treatment.role, treatment.ratio)
        key = _structure(block), done
        if key not in graphs:
            graphs[key] = rewritten_graph(block, row, config, treatment)
        return graphs[key]

    for path, treatment in treated.items():
        block, row = blocks[path]
        if treatment.role is None:
            install(block, graph(block, row, None), attention_kwargs=row.attention_kwargs)
            continue
        gm = graph(block, row, treatment)
        follows = replace(treatment, role="follow")
        install(
            block,
            gm,
            follower=graph(block, row, follows) if treatment.role == "lead" else None,
            untouched=graph(block, row, None) if config.merge_below < 1 else None,
            attention_kwargs=row.attention_kwargs,
        )
        treated[path] = replace(treatment, components=_components(gm, config))
    rewrite = Rewrite(config, model, treated, speedup)
    _install_borders(copied, family, rewrite)
    attach_hooks(hooks)
    check_caches(copied)
    return copied


_ROLES = {
    "alone": "plans for itself",
    "lead": "plans for its group",
    "follow": "uses the plan of its group",
}


def _log(rewrite: Rewrite) -> None:
    merged, skipped = rewrite.merged, rewrite.skipped
    logger.info(
        "transformed %s: %d of %d blocks merge tokens, in %d groups; %s",
        type(rewrite.original).__name__,
        len(merged),
        len(rewrite.treatments),
        len({treatment.group for treatment in merged.values()}),
        rewrite.config,
    )
    for reason, count in Counter(treatment.skipped for treatment in skipped.values()).items():
        logger.info("left %d blocks unmerged: %s", count, reason)
    for path, treatment in merged.items():
        around, role = ", ".join(treatment.components), _ROLES[treatment.role or ""]
        logger.debug("%s merges around %s and %s", path, around, role)
    for path, treatment in skipped.items():
        logger.debug("%s is left unmerged: %s", path, treatment.skipped)


def rewritten_graph(
    block: nn.Module, row: Block, config: MergeConfig, treatment: Treatment | None
) -> fx.GraphModule:
    """The graph of a block: as captured, or with merge and unmerge nodes as its treatment says."""
    gm = capture_block(block, example_inputs(row, block), row.attention_kwargs, leaf_value)
    return gm if treatment is None else run_passes(gm, passes_for(row, config, treatment))


def block_graphs(
    model: nn.Module, config: MergeConfig
) -> Iterator[tuple[str, fx.GraphModule, fx.GraphModule]]:
    """Path of each block to be merged, its graph as captured, and as rewritten; for looking at."""
    family = family_of(model)
    blocks = {path: (block, row) for path, block, row in _blocks(model, family)}
    treated = treatments(list(blocks), config, family.spared, type(model).__name__)
    for path, treatment in treated.items():
        if treatment.role is not None:
            block, row = blocks[path]
            yield (
                path,
                rewritten_graph(block, row, config, None),
                rewritten_graph(block, row, config, treatment),
            )


def passes_for(row: Block, config: MergeConfig, treatment: Treatment) -> tuple[Pass, ...]:
    """The passes that turn the captured graph of a block into its merged one.

    Args:
        row: the block's row in the table of block structures.
        config: the options.
        treatment: its ratio, and whether it makes its group's plan, follows it, or makes one for
            itself alone.
    """
    plan = plan_options(config, treatment.ratio)
    flow = TokenFlow(output=row.output, text=row.text, text_first=row.text_first, rotary=row.rotary)
    memory = None
    if treatment.role == "lead" and not config.schedule.stateless and config.selector != "fixed":
        memory = PlanMemory(
            **asdict(plan),
            select_every=config.schedule.select_every,
            weigh_every=config.schedule.weigh_every,
        )
    find = FindSites(sites=row.sites, components=config.components)
    merge: tuple[Pass, ...] = (MergeOnce(options=plan, flow=flow, residual=config.residual),)
    if config.placement == "component":
        merge = (find, MergeComponents(options=plan, flow=flow))
    return (
        *merge,
        GuardInputs(components=config.components, masks=row.masks),
        SharePlan(
            attention_kwargs=row.attention_kwargs,
            blocks=_plan_name(row, config, treatment),
            role=treatment.role or "alone",
            memory=memory,
        ),
        Cleanup(),
    )


def _plan_name(row: Block, config: MergeConfig, treatment: Treatment) -> str:
    """Under which the blocks of a group find their plan: blocks of a class, and of a ratio."""
    name = row.cls.__name__
    return f"{name}, ratio {treatment.ratio!r}" if config.block_ratios else name


def _check_model(model: nn.Module) -> None:
    if hasattr(model, "_toma"):
        raise ModelError(
            f"this {type(model).__name__} is already transformed with {rewrite_of(model).config}; "
            "transform the original: toma_fx.restore(model)"
        )
    if isinstance(model, torch._dynamo.OptimizedModule) or any(
        module._compiled_call_impl is not None for module in model.modules()
    ):
        raise ModelError(
            f"this {type(model).__name__} is compiled, and compiled code cannot be rewritten; "
            "call toma_fx.transform first and compile its result"
        )
    check_hooks(model)
    family = family_of(model)
    if type(model) not in family.borders:
        raise ModelError(
            f"{type(model).__name__} is a subclass of diffusers' {family.cls.__name__}, whose "
            "forward may run the blocks in a way of its own; transform a model of that class itself"
        )


def _blocks(model: nn.Module, family: Family) -> Iterator[tuple[str, nn.Module, Block]]:
    for path, module in model.named_modules():
        for row in family.blocks:
            if isinstance(module, row.cls):
                yield path, module, row


def _structure(block: nn.Module) -> Any:
    """What decides the graph of a block: the classes in it and its plain attributes."""
    plain = str | int | float | bool | None
    attributes = {k: v for k, v in vars(block).items() if isinstance(v, plain) and k != "training"}
    classes = [
        (name, type(m), type(getattr(m, "processor", None))) for name, m in block.named_modules()
    ]
    return type(block), tuple(attributes.items()), tuple(classes)


def _components(gm: fx.GraphModule, config: MergeConfig) -> tuple[str, ...]:
    if config.placement == "block":
        return ("block",)
    return tuple(c for found in gm.meta[SITES] for c in found.site.components)


def _install_borders(model: nn.Module, family: Family, rewrite: Rewrite) -> None:
    model._toma = rewrite  # type: ignore[assignment]
    if not rewrite.merged:
        return
    for module in model.modules():
        if type(module) in family.borders:
            module.__class__ = family.borders[type(module)]
            module._toma = rewrite  # type: ignore[assignment]
    if not rewrite.config.schedule.stateless:
        model.toma_clock = DenoisingClock()
