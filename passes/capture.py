"""A module's forward as a torch.fx graph, with an example value on every node.

Before, in diffusers' source::

    norm_hidden_states = self.norm1(hidden_states)
    ...
    attn_output = self.attn1(norm_hidden_states, **cross_attention_kwargs)

After::

    carried = toma_fx_runtime_plan_carry(cross_attention_kwargs, 'gligen')
    norm1 = self.norm1(hidden_states)
    attn1 = self.attn1(norm1, **carried)

Plain `torch.fx.symbolic_trace` stops at the first ``if x.ndim == 4``. Here every proxy also carries
an example value, and a branch is decided as it would be at run time. Attributes such as ``shape``
are recorded as nodes and never frozen, so one graph serves every size.
"""

import dataclasses
import inspect
import operator
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import fx, nn
from torch.fx.graph import CodeGen, PythonCode

from toma_fx.errors import CaptureError
from toma_fx.passes.pipeline import LEAF_VALUE, LeafValue, example_value
from toma_fx.passes.plan_nodes import call
from toma_fx.runtime import plan

STAR = "**"
"""The keyword under which a call node holds a whole dictionary of keyword arguments."""


class ValueProxy(fx.Proxy):
    """A proxy that knows an example of its value, and answers questions about it."""

    @property
    def value(self) -> Any:
        """The example value."""
        return self.node.meta["val"]

    # ``isinstance(x, torch.Tensor)`` in a traced forward must hold for a traced tensor.
    @property  # type: ignore[misc]
    def __class__(self) -> type:
        return torch.Tensor if isinstance(self.node.meta.get("val"), torch.Tensor) else type(self)

    def __getattr__(self, name: str) -> Any:
        if callable(getattr(self.value, name)):
            return fx.proxy.Attribute(self, name)
        return self.tracer.create_proxy("call_function", getattr, (self, name), {})

    def __len__(self) -> int:
        assert isinstance(self.tracer, ValueTracer)
        self.tracer.assumed_lengths[self.node] = len(self.value)
        return len(self.value)

    def __index__(self) -> int:
        return int(self.value)


class ValueTracer(fx.Tracer):
    """Traces with `ValueProxy`.

    Args:
        is_leaf: which modules stay single nodes.
        leaf_value: the example value of a leaf's output.
    """

    def __init__(self, is_leaf: Callable[[nn.Module], bool], leaf_value: LeafValue) -> None:
        super().__init__()
        self._is_leaf = is_leaf
        self._leaf_value = leaf_value
        self._evaluating = False
        self.assumed_lengths: dict[fx.Node, int] = {}

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return self._is_leaf(m)

    def proxy(self, node: fx.Node) -> ValueProxy:
        return ValueProxy(node, self)

    def create_arg(self, a: Any) -> Any:
        # Before fx asks whether it is a tensor, which a traced tensor claims to be.
        return a.node if isinstance(a, fx.Proxy) else super().create_arg(a)

    def to_bool(self, obj: fx.Proxy) -> bool:
        return bool(obj.node.meta["val"])

    def iter(self, obj: fx.Proxy) -> Iterator[Any]:
        node = obj.node
        if node.op == "call_method" and any(isinstance(each, fx.Node) for each in node.args[1:]):
            raise CaptureError(
                f"{node.format_node()} makes as many pieces as a size says, and a graph has a "
                "fixed number; turn it off, as by block.set_chunk_feed_forward(None)"
            )
        return (obj[i] for i in range(len(node.meta["val"])))  # type: ignore[index]

    def call_module(self, m: nn.Module, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        if self._evaluating:
            return forward(*args, **kwargs)
        return super().call_module(m, forward, args, kwargs)

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Any]) -> Any:
        if self._evaluating:
            return attr_val
        return super().getattr(attr, attr_val, parameter_proxy_cache)

    def create_proxy(
        self, kind: str, target: Any, args: Any, kwargs: Any, *rest: Any, **named: Any
    ) -> Any:
        proxy = super().create_proxy(kind, target, args, kwargs, *rest, **named)
        if kind not in ("placeholder", "output"):
            proxy.node.meta["val"] = self._evaluate(proxy.node)
        return proxy

    def _evaluate(self, node: fx.Node) -> Any:
        self._evaluating = True
        try:
            if node.op == "get_attr":
                return operator.attrgetter(str(node.target))(self.root)
            return example_value(node, self.root, self._leaf_value)
        finally:
            self._evaluating = False


class _StarCodeGen(CodeGen):
    """Writes the keyword argument `STAR` as Python writes a dictionary of keyword arguments."""

    # Private, but the one place through which a graph becomes source.
    def _gen_python_code(self, *args: Any, **kwargs: Any) -> PythonCode:
        code = super()._gen_python_code(*args, **kwargs)
        return dataclasses.replace(code, src=code.src.replace(f"{STAR} = ", STAR))


class _WholeKwargs:
    """A dictionary of attention kwargs that goes through a forward in one piece."""

    def __init__(self, proxy: fx.Proxy) -> None:
        self._proxy = proxy

    def copy(self) -> "_WholeKwargs":
        return self

    def get(self, key: str, default: Any = None) -> Any:
        return default

    pop = get

    def keys(self) -> list[str]:
        return [STAR]

    def __getitem__(self, key: str) -> fx.Proxy:
        return self._proxy


class _BlockTracer(ValueTracer):
    def __init__(
        self, examples: Mapping[str, Any], kwargs_name: str, leaf_value: LeafValue
    ) -> None:
        super().__init__(lambda module: True, leaf_value)
        self._examples = examples
        self._kwargs_name = kwargs_name

    def create_args_for_root(
        self, root_fn: Any, is_module: bool, concrete_args: Any = None
    ) -> tuple[Any, list[Any]]:
        proxies: dict[str, Any] = {}
        for each in list(inspect.signature(root_fn).parameters.values())[1:]:
            default = () if each.default is inspect.Parameter.empty else (each.default,)
            proxies[each.name] = self.create_proxy("placeholder", each.name, default, {})
            proxies[each.name].node.meta["val"] = self._examples.get(each.name)
        carried = (proxies[self._kwargs_name], "gligen")
        proxies[self._kwargs_name] = _WholeKwargs(
            self.create_proxy("call_function", plan.carry, carried, {}, name="carried")
        )
        return root_fn, [self.root, *proxies.values()]


def capture_block(
    block: nn.Module, examples: Mapping[str, Any], kwargs_name: str, leaf_value: LeafValue
) -> fx.GraphModule:
    """The graph of a transformer block's forward; its submodules stay nodes.

    Args:
        block: a transformer block.
        examples: an example value for each argument that is not None, on any device.
        kwargs_name: the argument that holds the attention kwargs.
        leaf_value: the example value of a submodule's output.

    Returns:
        A graph module with the block's own signature that computes what the block computes.
    """
    tracer = _BlockTracer(examples, kwargs_name, leaf_value)
    graph = tracer.trace(block)
    graph.set_codegen(_StarCodeGen())
    gm = fx.GraphModule(block, graph, class_name=type(block).__name__)
    gm.meta[LEAF_VALUE] = leaf_value
    for node, length in tracer.assumed_lengths.items():
        if node.op == "call_module":
            _check_length(gm, node, length)
    for node in graph.find_nodes(op="call_method", target="clip"):
        node.op, node.target = "call_function", plan.clip_float16
    graph.eliminate_dead_code()
    graph.lint()
    gm.recompile()
    return gm


def _check_length(gm: fx.GraphModule, node: fx.Node, length: int) -> None:
    with gm.graph.inserting_after(node):
        checked = call(gm.graph, plan.expect_outputs, (node, length), name="outputs")
        checked.meta["val"] = node.meta["val"]
    node.replace_all_uses_with(checked, delete_user_cb=lambda user: user is not checked)
