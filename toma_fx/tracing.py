"""Capture of a whole model as one graph, for inspection and experiments.

Users run the model with its block classes; see `toma_fx.transform`. A trace is a single
``torch.fx.GraphModule`` over the same layers, in which plan sharing is a plain def-use edge.
"""

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import fx, nn
from torch.utils import _pytree as pytree

from toma_fx.calls import forced
from toma_fx.inputs import random_inputs, weightless
from toma_fx.model_border import given_in, grids_in
from toma_fx.passes.capture import ValueTracer
from toma_fx.passes.pipeline import recompile
from toma_fx.policy import Decision
from toma_fx.transform import model_of


def trace(model: Any, inputs: Mapping[str, Any] | None = None) -> fx.GraphModule:
    """Trace a model into one FX graph, with ``torch.ops.toma`` nodes where it merges.

    Args:
        model: a diffusers model, transformed or not, or a pipeline that holds one.
        inputs: keyword arguments of an example call; one at the native image size if omitted.
            Tensors become arguments of the graph, in the order of the model's signature and under
            their innermost names (``text_embeds``); all other values are fixed. The graph also
            takes other sizes, unless a token count determines how regions are cut.

    Returns:
        A graph module that shares the model's layers and returns the output tensor. It passes
        ``graph.lint()``, and ``meta["val"]`` of every node is an example value on the meta device.

    Raises:
        ModelError: when ``model`` is neither a module nor a known pipeline.
    """
    model = model_of(model)
    skeleton = weightless(model)
    inputs = random_inputs(skeleton) if inputs is None else inputs
    decision = Decision(grids=grids_in(model, inputs), given=given_in(model, inputs))
    inputs = pytree.tree_map_only(torch.Tensor, lambda t: t.to("meta"), dict(inputs))
    with forced(decision):
        gm = _ModelTracer({**inputs, "return_dict": False}).capture(skeleton, over=model)
    gm.graph.eliminate_dead_code()
    gm.graph.lint()
    recompile(gm)
    return gm


def _is_leaf(module: nn.Module) -> bool:
    if isinstance(module, nn.Sequential | nn.ModuleList | nn.ModuleDict):
        return False
    return type(module).__module__.startswith("torch.nn")


def _leaf_value(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return module(*args, **kwargs)


class _ModelTracer(ValueTracer):
    def __init__(self, inputs: dict[str, Any]) -> None:
        super().__init__(_is_leaf, _leaf_value)
        self._inputs = inputs

    def run(self, module: Any) -> Any:
        order = list(inspect.signature(type(module).forward).parameters)
        inputs = dict(sorted(self._inputs.items(), key=lambda pair: order.index(pair[0])))

        def argument(path: Any, value: Any) -> Any:
            if not isinstance(value, torch.Tensor):
                return value
            name = str(path[-1].key if hasattr(path[-1], "key") else path[-2].key)
            proxy = self.create_proxy("placeholder", name, (), {})
            proxy.node.meta["val"] = value
            return proxy

        inputs = pytree.tree_map_with_path(argument, inputs)
        return type(module).forward(module, **inputs)[0]
