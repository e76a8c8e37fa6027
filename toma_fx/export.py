"""A transformed model as a file that needs neither toma_fx nor diffusers to run."""

import inspect
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from toma_fx.inputs import random_inputs, weightless
from toma_fx.runtime.schedule import PlanMemory, make_slots, slot_name
from toma_fx.transform import model_of

State = dict[str, Tensor]


def export(
    model: Any,
    inputs: Mapping[str, Any] | None = None,
    *,
    path: str | Path | None = None,
    dynamic_shapes: Mapping[str, Any] | None = None,
) -> torch.export.ExportedProgram:
    """Export a model with `torch.export`; nodes are named ``torch.ops.toma`` until decomposed.

    A stateless model becomes a program that takes the model's keyword arguments and returns a tuple
    with the output tensor. A model with a schedule becomes a pure one: it takes its plans as one
    more argument, ``state``, and returns ``(output, state)``. Each request keeps its own state, so
    that requests can take turns. A new request starts with a copy of `initial_state`, which is also
    the ``state`` among the program's ``example_inputs``.

    Args:
        model: a diffusers model, transformed or not, or a pipeline that holds one.
        inputs: keyword arguments of a call of it; those of the native image size when left out.
        path: where to save the program, with only ATen operators and control flow in it.
        dynamic_shapes: as `torch.export.export` takes it, for the names in ``inputs``. Batch and
            image size can be dynamic as long as every token count stays a multiple of
            ``region_tokens``, such as ``64 * Dim("regions")``; with a schedule they cannot, since
            kept plans have a shape.

    Returns:
        The program, before decomposition.

    Raises:
        ModelError: when ``model`` is neither a module nor a known pipeline.
    """
    model = model_of(model)
    inputs = dict(random_inputs(model) if inputs is None else inputs)
    scheduled = any(isinstance(module, PlanMemory) for module in model.modules())
    if scheduled:
        inputs = {"state": initial_state(model, inputs), **inputs}
    program = _Program(model, _stateful if scheduled else _stateless, list(inputs))
    if dynamic_shapes is not None:
        dynamic_shapes = {**pytree.tree_map(lambda _: None, inputs), **dynamic_shapes}
    with torch.no_grad():
        exported = torch.export.export(
            program, (), inputs, dynamic_shapes=dynamic_shapes, strict=False
        )
    if path is not None:
        torch.export.save(exported.run_decompositions(), path)
    return exported


def initial_state(model: nn.Module, inputs: Mapping[str, Any]) -> State:
    """The state of a model with a schedule before its first step; it holds no plan yet.

    Args:
        model: a transformed model.
        inputs: keyword arguments of a call, whose shapes the plans will have.
    """
    skeleton = weightless(model)
    shapes = {}

    def note(path: str) -> Any:
        def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            shapes[path] = (args[0].shape, args[0].dtype)

        return hook

    memories = {p: m for p, m in model.named_modules() if isinstance(m, PlanMemory)}
    for path in memories:
        skeleton.get_submodule(path).register_forward_pre_hook(note(path))
    with torch.no_grad():
        skeleton(**pytree.tree_map_only(Tensor, lambda t: t.to("meta"), dict(inputs)))
    device = next(model.parameters()).device
    kept = [CLOCK]
    for path, (shape, dtype) in shapes.items():
        tokens = torch.empty(shape, dtype=dtype, device=device)
        make_slots(memories[path], tokens)
        kept.append(f"{path}.slots.{slot_name(tokens)}.")
    buffers = model.named_buffers()
    state = {name: torch.zeros_like(b) for name, b in buffers if name.startswith(tuple(kept))}
    for name, value in state.items():
        if name.endswith(".run"):
            value.fill_(0 if name.startswith(CLOCK) else -1)
    return state


CLOCK = "toma_clock."


class _Program(nn.Module):
    """What is exported: a call of the model with keyword arguments of these names."""

    def __init__(self, model: nn.Module, call: Callable[..., Any], names: list[str]) -> None:
        super().__init__()
        self.model = model

        def forward(**inputs: Any) -> Any:
            return call(model, **inputs)

        parameters = [inspect.Parameter(n, inspect.Parameter.KEYWORD_ONLY) for n in names]
        forward.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        self.forward = forward


def _stateless(model: nn.Module, **inputs: Any) -> tuple[Tensor]:
    (output,) = model(**inputs, return_dict=False)
    return (output,)


def _stateful(model: nn.Module, state: State, **inputs: Any) -> tuple[Tensor, State]:
    # The model writes its plans into its buffers; here its buffers are copies of the state.
    state = {name: value.clone() for name, value in state.items()}
    inputs["return_dict"] = False
    (output,) = torch.func.functional_call(model, state, (), inputs)
    return output, state
