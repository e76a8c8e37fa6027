"""The whole model as one graph, for looking at and experimenting on.

What users run is the model with its block classes; see `toma_fx.transform`. A trace is one
``torch.fx.GraphModule`` over the same layers, in which plan sharing is a plain def-use edge.
"""

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import fx, nn
from torch.utils import _pytree as pytree

from toma_fx.inputs import random_inputs, weightless
from toma_fx.passes.capture import ValueTracer
from toma_fx.passes.pipeline import LEAF_VALUE
from toma_fx.runtime.schedule import DenoisingClock, PlanMemory
from toma_fx.transform import model_of


def trace(model: Any, inputs: Mapping[str, Any] | None = None) -> fx.GraphModule:
    """A model as one FX graph, with ``torch.ops.toma`` nodes where it merges.

    Args:
        model: a diffusers model, transformed or not, or a pipeline that holds one.
        inputs: keyword arguments of a call of it. Tensors become arguments of the graph, in the
            order of the model's signature and under their innermost names (``text_embeds``); all
            else is fixed. Those of the native image size when left out. The graph also takes other
            sizes, unless a token count decides how regions are cut.

    Returns:
        A graph module that shares the model's layers and returns the output tensor. It lints, and
        every node has an example of its value, on the meta device, in ``meta["val"]``.

    Raises:
        ModelError: when ``model`` is neither a module nor a known pipeline.
    """
    model = model_of(model)
    skeleton = weightless(model)
    inputs = random_inputs(skeleton) if inputs is None else inputs
    inputs = pytree.tree_map_only(torch.Tensor, lambda t: t.to("meta"), dict(inputs))
    tracer = _ModelTracer({**inputs, "return_dict": False})
    graph = tracer.trace(skeleton)
    gm = fx.GraphModule(model, graph, class_name=type(model).__name__)
    gm.meta[LEAF_VALUE] = _leaf_value
    graph.eliminate_dead_code()
    graph.lint()
    gm.recompile()
    return gm


def _is_leaf(module: nn.Module) -> bool:
    if isinstance(module, nn.Sequential | nn.ModuleList | nn.ModuleDict):
        return False
    return type(module).__module__.startswith("torch.nn") or isinstance(
        module, DenoisingClock | PlanMemory
    )


def _leaf_value(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    if isinstance(module, PlanMemory):
        return module.blank(args[0])
    return module(*args, **kwargs)


class _ModelTracer(ValueTracer):
    def __init__(self, inputs: dict[str, Any]) -> None:
        super().__init__(_is_leaf, _leaf_value)
        self._inputs = inputs

    def create_args_for_root(
        self, root_fn: Any, is_module: bool, concrete_args: Any = None
    ) -> tuple[Any, list[Any]]:
        order = list(inspect.signature(root_fn).parameters)
        inputs = dict(sorted(self._inputs.items(), key=lambda pair: order.index(pair[0])))

        def argument(path: Any, value: Any) -> Any:
            if not isinstance(value, torch.Tensor):
                return value
            name = str(path[-1].key if hasattr(path[-1], "key") else path[-2].key)
            proxy = self.create_proxy("placeholder", name, (), {})
            proxy.node.meta["val"] = value
            return proxy

        inputs = pytree.tree_map_with_path(argument, inputs)
        return lambda root: root_fn(root, **inputs)[0], [self.root]
