"""Export of a transformed model to files that run without toma_fx and diffusers."""

import contextlib
import inspect
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.utils import _pytree as pytree

from toma_fx.calls import forced, to_meta
from toma_fx.inputs import random_inputs, weightless
from toma_fx.model_border import given_in, grids_in
from toma_fx.policy import Always, Decision, policy_of
from toma_fx.recipe import Group, Recipe
from toma_fx.runtime.memory import BlockMemory, Kept, Updates
from toma_fx.runtime.plan import BRING_PLANS, MERGED, RECALL, REUSE
from toma_fx.transform import model_of

Plan = dict[str, list[Tensor]]
"""Tensors of each plan, keyed by the path of the list of blocks that share it, such as
``"transformer_blocks"``. A program returns it for use in later steps."""


def export(
    model: Any,
    inputs: Mapping[str, Any] | None = None,
    *,
    path: str | Path | None = None,
    dynamic_shapes: Mapping[str, Any] | None = None,
) -> Any:
    """Export a model with `torch.export`; nodes are named ``torch.ops.toma`` until decomposed.

    A model that does the same in every call becomes one program. It takes the model's keyword
    arguments and returns a tuple with the output tensor (for LTX-2 also the sound). A model whose
    policy chooses between variants becomes one program per variant, and the caller chooses:

    * ``merge_below``: run ``"merged"`` below the noise level and ``"untouched"`` above it.
    * A memory: ``"remember"``, a full step, returns ``(output, plan, memory)``. ``"recall"`` takes
      ``plan`` and ``memory`` and returns ``(output,)``. If updates are extrapolated, it also takes
      ``memory_before``, the memory of the full step before (or the same again), and ``ahead``, a
      0-dimensional tensor: the distance from the last full step, in units of the distance between
      the last two full steps. A ``memory`` is a dictionary from block paths to lists of tensors.
    * A schedule: ``"merged"`` makes a plan and returns ``(output, plan)``. ``"weigh"`` takes
      ``plan`` as an extra argument, keeps its destinations and returns ``(output, plan)``.
      ``"reuse"`` takes it and returns ``(output,)``; it is missing if each token has a timestep,
      which a plan would hold. Each request keeps its own plan, so that requests can take turns.

    Args:
        model: a diffusers model, transformed or not, or a pipeline that holds one.
        inputs: keyword arguments of an example call; one at the native image size if omitted.
        path: file to save the program to, with only ATen operators and control flow in it. For
            several programs, the name of the variant goes before the suffix: ``unet.pt2`` becomes
            ``unet.merged.pt2``.
        dynamic_shapes: passed to `torch.export.export`, for the names in ``inputs``. Batch and
            image size can be dynamic. A program accepts token counts of the same kind as in
            ``inputs``: multiples of ``region_tokens``, written ``64 * Dim("regions", min=2)``; or
            other counts from 17 times ``region_tokens`` on, written ``Dim.AUTO``.

    Returns:
        The program, before decomposition; or a dictionary of programs by the names of the variants.

    Raises:
        ModelError: when ``model`` is neither a module nor a known pipeline, or when no fitting call
            can be made up; the message then asks for ``inputs``.
    """
    model = model_of(model)
    inputs = dict(random_inputs(model) if inputs is None else inputs)
    recipe = getattr(model, "toma_recipe", None)
    if recipe is None or not recipe.merged or isinstance(policy_of(recipe.config), Always):
        program = _export(model, inputs, MERGED, None, dynamic_shapes)
        _save(program, path)
        return program
    variants = list(policy_of(recipe.config).variants)
    if REUSE in variants and recipe.needs_new_rows(inputs):
        variants.remove(REUSE)
    keeps = not set(variants).isdisjoint(BRING_PLANS)
    kept = _example_kept(model, inputs) if keeps else None
    programs = {}
    for variant in variants:
        programs[variant] = _export(model, inputs, variant, kept, dynamic_shapes)
        _save(programs[variant], path, variant)
    return programs


def _export(
    model: nn.Module,
    inputs: Mapping[str, Any],
    variant: str,
    kept: Kept | None,
    dynamic_shapes: Mapping[str, Any] | None,
) -> ExportedProgram:
    grids, frames = grids_in(model, inputs), given_in(model, inputs)
    recipe: Any = getattr(model, "toma_recipe", None)
    example = {} if kept is None else _as_arguments(kept, recipe)
    if variant not in BRING_PLANS:
        example = {}
    elif variant == RECALL and recipe.config.memory.extrapolate:
        before = pytree.tree_map_only(Tensor, torch.clone, example["memory"])
        like = next(each for each in pytree.tree_leaves(dict(inputs)) if isinstance(each, Tensor))
        ahead = torch.ones((), dtype=torch.float32, device=like.device)
        example |= {"memory_before": before, "ahead": ahead}

    def call(model: nn.Module, **arguments: Any) -> Any:
        state = {name: arguments.pop(name) for name in example}
        ahead = state.pop("ahead", 1.0)
        kept_before = _as_kept(state, recipe) if state else None
        decision = Decision(
            variant, kept_before, ahead=ahead, grids=grids, given=frames, keeps=kept is not None
        )
        with forced(decision) as now:
            outputs = tuple(model(**arguments, return_dict=False))
        if now.made is None:
            return outputs
        return *outputs, *_as_arguments(now.made, recipe).values()

    inputs = {**example, **inputs}
    if dynamic_shapes is not None:
        dynamic_shapes = {**pytree.tree_map(lambda _: None, dict(inputs)), **dynamic_shapes}
    program = _Program(model, call, list(inputs))
    with torch.no_grad(), _parts_unchanged(model):
        return torch.export.export(
            program, (), dict(inputs), dynamic_shapes=dynamic_shapes, strict=False
        )


@contextlib.contextmanager
def _parts_unchanged(model: nn.Module) -> Iterator[None]:
    """Undo on exit the changes that tracing makes to diffusers objects that are not modules.

    Z-Image makes its table of positions in its first call. If that call is traced, the table has no
    values, and all later calls would use it.
    """
    parts = {
        id(part): part
        for module in model.modules()
        for part in vars(module).values()
        if type(part).__module__.startswith("diffusers.") and not isinstance(part, nn.Module)
    }
    before = [
        (vars(part), dict(vars(part))) for part in parts.values() if hasattr(part, "__dict__")
    ]
    try:
        yield
    finally:
        for now, then in before:
            now.update(then)
            for name in now.keys() - then.keys():
                del now[name]


def _save(program: ExportedProgram, path: str | Path | None, variant: str = "") -> None:
    if path is None:
        return
    path = Path(path)
    if variant:
        path = path.with_suffix(f".{variant}{path.suffix}")
    torch.export.save(program.run_decompositions(), path)


def _example_kept(model: nn.Module, inputs: Mapping[str, Any]) -> Kept:
    """Return tensors shaped like the plans and memories that a call of the model keeps."""
    skeleton: Any = weightless(model)
    first = policy_of(skeleton.toma_recipe.config).variants[0]
    grids, frames = grids_in(model, inputs), given_in(model, inputs)
    decision = Decision(first, grids=grids, given=frames, keeps=True)
    with torch.no_grad(), forced(decision) as now:
        skeleton(**to_meta(inputs))
    device = next(model.parameters()).device
    made: Kept = pytree.tree_map_only(
        Tensor, lambda t: torch.zeros(t.shape, dtype=t.dtype, device=device), now.made
    )
    return made


def _as_arguments(kept: Kept, recipe: Recipe) -> dict[str, Any]:
    """Return the state that a program returns and takes, by the names of its arguments."""
    plan: Plan = {
        _path(group): list(kept.plans[group.stage][group.name])
        for group in _groups(recipe)
        if group.name in kept.plans.get(group.stage, {})
    }
    if recipe.config.memory is None:
        return {"plan": plan}
    memory = {path: [*each.update, *each.merged] for path, each in kept.memory.items()}
    return {"plan": plan, "memory": memory}


def _as_kept(state: Mapping[str, Any], recipe: Recipe) -> Kept:
    plans: dict[str, dict[str, tuple[Tensor, ...]]] = {}
    for group in _groups(recipe):
        if _path(group) in state["plan"]:
            plans.setdefault(group.stage, {})[group.name] = tuple(state["plan"][_path(group)])
    memory = state.get("memory", {})
    before = state.get("memory_before", memory)
    return Kept(
        plans,
        {
            path: BlockMemory(*_halves(tensors, recipe), _halves(before[path], recipe)[0])
            for path, tensors in memory.items()
        },
    )


def _halves(tensors: list[Tensor], recipe: Recipe) -> tuple[Updates, Updates]:
    """Split a block's memory into the updates of all tokens and those of merged tokens."""
    whole = len(tensors) // 2 if recipe.controls else len(tensors)
    return tuple(tensors[:whole]), tuple(tensors[whole:])


def _groups(recipe: Recipe) -> list[Group]:
    return list(dict.fromkeys(block.group for block in recipe.merged))


def _path(group: Group) -> str:
    return f"{group.stage}.{group.name}" if group.stage else group.name


class _Program(nn.Module):
    """The module that is exported: a call of the model with keyword arguments of these names."""

    def __init__(self, model: nn.Module, call: Callable[..., Any], names: list[str]) -> None:
        super().__init__()
        self.model = model

        def forward(**inputs: Any) -> Any:
            return call(model, **inputs)

        parameters = [inspect.Parameter(n, inspect.Parameter.KEYWORD_ONLY) for n in names]
        forward.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        self.forward = forward
