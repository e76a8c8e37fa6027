"""Capture of a module's forward as a torch.fx graph, with an example value on every node.

Before, in diffusers' source::

    norm_hidden_states = self.norm1(hidden_states)
    ...
    attn_output = self.attn1(norm_hidden_states, **cross_attention_kwargs)

After::

    passed_on = toma_fx_runtime_plan_pass_on(cross_attention_kwargs)
    norm1 = self.norm1(hidden_states)
    attn1 = self.attn1(norm1, **passed_on)

Plain `torch.fx.symbolic_trace` stops at the first ``if x.ndim == 4``. Here every proxy also carries
an example value, so branches are decided as at run time. Attributes such as ``shape`` are recorded
as nodes and never fixed, so one graph serves every size. `symbolic_trace` also patches the process
while it traces; here the forward runs on stand-ins for the modules, and other threads go on.
"""

import copy
import dataclasses
import functools
import inspect
import operator
from abc import abstractmethod
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from itertools import count
from typing import Any

import torch
from torch import fx, nn
from torch.fx.graph import CodeGen, PythonCode
from torch.utils import _pytree as pytree

from toma_fx.errors import CaptureError
from toma_fx.passes.open_attention import opened_arguments, recording_processor, rewritable
from toma_fx.passes.pipeline import (
    EXAMPLE_SCOPE,
    LEAF_VALUE,
    LeafValue,
    example_value,
    recompile,
)
from toma_fx.passes.plan_nodes import call
from toma_fx.passes.stand_ins import StandIn, module_of, stand_in_for
from toma_fx.runtime import arguments, plan

STAR = "**"
"""Keyword under which a call node holds a whole dictionary of keyword arguments."""


class Count(int):
    """Example of a number that selects no branch, so a block may be called with any other."""


def _is_in_place(method: str) -> bool:
    return method.endswith("_") and not method.endswith("__")


class ValueProxy(fx.Proxy):
    """Proxy with an example of its value, which answers questions about it."""

    @property
    def value(self) -> Any:
        """The example value."""
        return self.node.meta["val"]

    # ``isinstance(x, torch.Tensor)`` in a traced forward must be true for a traced tensor.
    @property  # type: ignore[misc]
    def __class__(self) -> type:
        return torch.Tensor if isinstance(self.node.meta.get("val"), torch.Tensor) else type(self)

    def __getattr__(self, name: str) -> Any:
        if _is_in_place(name):
            return functools.partial(self._write, name)
        if callable(getattr(self.value, name)):
            return fx.proxy.Attribute(self, name)
        return self.tracer.create_proxy("call_function", getattr, (self, name), {})

    def __setitem__(self, index: Any, value: Any) -> None:
        self._write("__setitem__", index, value)

    def _write(self, method: str, *args: Any, **kwargs: Any) -> fx.Proxy:
        """Add a node for a method that writes into the tensor, which no graph drops as unused."""
        return self.tracer.create_proxy(
            "call_function", arguments.in_place, (self, method, *args), kwargs
        )

    def __len__(self) -> int:
        assert isinstance(self.tracer, ValueTracer)
        self.tracer.assumed_lengths[self.node] = len(self.value)
        return len(self.value)

    def __index__(self) -> int:
        return int(self.value)

    def __float__(self) -> float:
        raise CaptureError(
            f"{self.node.format_node()} is asked for as a float, which would fix it to its example "
            "value; compute with operators (x ** 0.5) or torch functions, not with those of math"
        )


class ValueTracer(fx.Tracer):
    """Tracer with `ValueProxy` that changes neither the traced modules nor the process.

    Subclasses define in `run` how the module is called.

    Args:
        is_leaf: tells which modules stay single nodes.
        leaf_value: returns the example value of a leaf's output.
    """

    proxy_buffer_attributes = True

    def __init__(self, is_leaf: Callable[[nn.Module], bool], leaf_value: LeafValue) -> None:
        super().__init__()
        self._is_leaf = is_leaf
        self._leaf_value = leaf_value
        self.assumed_lengths: dict[fx.Node, int] = {}

    @abstractmethod
    def run(self, module: Any) -> Any:
        """Call the forward of ``module``, a stand-in, on placeholders and return its output."""

    def capture(self, module: nn.Module, over: nn.Module | None = None) -> fx.GraphModule:
        """Return the graph of a module; replaces `trace`, which patches ``nn.Module``.

        Args:
            module: the module to trace.
            over: module whose submodules and tensors the graph module gets: ``module`` if None, or
                another one of the same structure.

        Returns:
            A graph module that has not been compiled: change it, then recompile it.
        """
        # Holds the module's attributes, and the constants that torch.fx sets on it.
        self.root = _holder(module)
        self.graph = fx.Graph()
        self.submodule_paths = {each: path for path, each in module.named_modules()}
        self.tensor_attrs = {
            value: f"{path}.{name}".lstrip(".")
            for path, each in module.named_modules()
            for name, value in vars(each).items()
            if isinstance(value, torch.Tensor)
        }
        output = self.run(stand_in_for(module, self))
        self.create_node("output", "output", (self.create_arg(output),), {})
        root = _holder(module if over is None else over)
        new = vars(self.root).keys() - vars(module).keys()
        vars(root).update({name: getattr(self.root, name) for name in new})
        gm = fx.GraphModule(root, self.graph, class_name=type(module).__name__)
        gm.meta[LEAF_VALUE] = self._leaf_value
        return gm

    def value_of(self, attribute: Any) -> Any:
        """Return the example value of an attribute of the module."""
        return attribute

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return self._is_leaf(m)

    def get_fresh_qualname(self, prefix: str) -> str:
        # torch.fx would continue the numbering of an earlier or a concurrent trace.
        return next(name for i in count() if not hasattr(self.root, name := f"{prefix}{i}"))

    def proxy(self, node: fx.Node) -> ValueProxy:
        return ValueProxy(node, self)

    def create_arg(self, a: Any) -> Any:
        # Check this before fx asks whether it is a tensor, which a traced tensor claims to be.
        if isinstance(a, fx.Proxy):
            return a.node
        return super().create_arg(module_of(a) if isinstance(a, StandIn) else a)

    def to_bool(self, obj: fx.Proxy) -> bool:
        return bool(obj.node.meta["val"])

    def iter(self, obj: fx.Proxy) -> Iterator[Any]:
        node = obj.node
        if node.op == "call_method" and any(isinstance(each, fx.Node) for each in node.args[1:]):
            raise CaptureError(
                f"{node.format_node()} makes a number of pieces that depends on a size, and a "
                "graph has a fixed number; turn it off, e.g. block.set_chunk_feed_forward(None)"
            )
        return (obj[i] for i in range(len(node.meta["val"])))  # type: ignore[index]

    def create_node(self, kind: str, *args: Any, **kwargs: Any) -> fx.Node:
        node = super().create_node(kind, *args, **kwargs)
        # If another thread compiles meanwhile, torch.fx takes the stack of that compilation.
        if self.module_stack:
            node.meta["nn_module_stack"] = copy.copy(self.module_stack)
        if kind == "get_attr":
            node.meta["val"] = self.value_of(operator.attrgetter(str(node.target))(self.root))
        elif kind.startswith("call_"):
            node.meta["val"] = example_value(node, self.root, self._leaf_value)
        return node


def _holder(module: nn.Module) -> nn.Module:
    holder = nn.Module()
    vars(holder).update(vars(module))
    return holder


class _StarCodeGen(CodeGen):
    """Writes the keyword argument `STAR` as ``**kwargs`` in the generated source."""

    # Private API, but the only place where a graph becomes source.
    def _gen_python_code(self, *args: Any, **kwargs: Any) -> PythonCode:
        code = super()._gen_python_code(*args, **kwargs)
        return dataclasses.replace(code, src=code.src.replace(f"{STAR} = ", STAR))


class _WholeKwargs:
    """Dictionary of attention kwargs that passes through a forward as a whole."""

    def __init__(self, proxy: fx.Proxy) -> None:
        self._proxy = proxy

    def copy(self) -> "_WholeKwargs":
        return self

    def get(self, key: str, default: Any = None) -> Any:
        return default

    pop = get

    def __contains__(self, key: str) -> bool:
        return False

    def keys(self) -> list[str]:
        return [STAR]

    def __getitem__(self, key: str) -> fx.Proxy:
        return self._proxy


class _BlockTracer(ValueTracer):
    def __init__(
        self,
        examples: Mapping[str, Any],
        kwargs_name: str | None,
        leaf_value: LeafValue,
        opened: Collection[nn.Module] = (),
    ) -> None:
        super().__init__(lambda module: module not in opened, leaf_value)
        self._examples = examples
        self._kwargs_name = kwargs_name
        self._opened = opened

    def call_module(self, m: nn.Module, forward: Any, args: Any, kwargs: Any) -> Any:
        """Same as in `torch.fx.Tracer`; but for an opened attention, its layers become nodes."""
        if m in self._opened:
            # Drop the attention kwargs here: those that diffusers' own processors use are refused
            # elsewhere, and the processors ignore the rest.
            kwargs = opened_arguments({k: v for k, v in kwargs.items() if k != STAR})
            vars(forward.__self__)["processor"] = recording_processor(m, self)
            with rewritable(self.path_of_module(m), type(m)):
                return super().call_module(m, forward, args, kwargs)
        return super().call_module(m, forward, args, kwargs)

    def run(self, module: Any) -> Any:
        self.graph.set_codegen(_StarCodeGen())
        every = list(inspect.signature(type(module).forward).parameters.values())
        parameters = {each.name: each for each in every[1:]}
        values: dict[str, Any] = {}
        self._check_named(module, parameters)
        for name, each in parameters.items():
            default = () if each.default is inspect.Parameter.empty else (each.default,)
            starred = _STARS.get(each.kind, "") + name
            proxy: Any = self.create_proxy("placeholder", starred, default, {})
            proxy.node.meta["val"] = self._examples.get(name, _NOTHING.get(each.kind))
            if each.kind in _NOTHING:
                if name not in self._examples:  # otherwise the block is known to ignore them
                    self._expect(proxy, _NOTHING[each.kind], name)
            else:
                values[name] = self._argument(name, proxy)
        if self._kwargs_name is not None:
            self._hide_kwargs(module, values)
        by_name = {
            n: v for n, v in values.items() if parameters[n].kind is parameters[n].KEYWORD_ONLY
        }
        by_place = [v for n, v in values.items() if n not in by_name]
        return type(module).forward(module, *by_place, **by_name)

    def value_of(self, attribute: Any) -> Any:
        # As with the examples: a weight may be on any device, and stored in any dtype.
        tensors = [e for e in pytree.tree_leaves(self._examples) if isinstance(e, torch.Tensor)]
        if not isinstance(attribute, torch.Tensor) or not any(e.is_meta for e in tensors):
            return attribute
        computed = next(each.dtype for each in tensors if each.is_floating_point())
        return attribute.detach().to("meta", computed if attribute.is_floating_point() else None)

    def _argument(self, name: str, proxy: fx.Proxy) -> Any:
        """Return what the forward gets: the value itself if it selects branches, else the proxy."""
        value = self._examples.get(name)
        decides = isinstance(value, bool | int | str | None) and not isinstance(value, Count)
        if name not in self._examples or not decides:
            return proxy
        self._expect(proxy, value, name)
        return value

    def _expect(self, proxy: fx.Proxy, value: Any, name: str) -> None:
        self.create_proxy("call_function", arguments.expect_value, (proxy, value, name), {})

    def _check_named(self, module: Any, parameters: Mapping[str, inspect.Parameter]) -> None:
        """Refuse a forward that takes needed arguments without naming them."""
        starred = [each for each in parameters.values() if each.kind in _NOTHING]
        ignored = {
            each.name
            for each in starred
            if isinstance(self._examples.get(each.name), type(_NOTHING[each.kind]))
        }
        needed = {*self._examples, self._kwargs_name} - {None, *ignored}
        if starred and not needed <= parameters.keys() - {each.name for each in starred}:
            raise CaptureError(
                f"{type(module).__name__}.forward takes {', '.join(map(str, starred))}, and a "
                "graph has a fixed number of named arguments; replace it by a forward, here or in "
                "a subclass, that names all its arguments"
            )

    def _hide_kwargs(self, module: Any, values: dict[str, Any]) -> None:
        name = self._kwargs_name
        assert name is not None
        if name not in values:
            raise CaptureError(
                f"{type(module).__name__}.forward has no argument {name!r} for the attention "
                f"kwargs, in which blocks share a plan; it has {', '.join(values)}"
            )
        passed_on = self.create_proxy(
            "call_function", plan.pass_on, (values[name],), {}, name="passed_on"
        )
        values[name] = _WholeKwargs(passed_on)


_STARS: dict[Any, str] = {
    inspect.Parameter.VAR_POSITIONAL: "*",
    inspect.Parameter.VAR_KEYWORD: "**",
}
_NOTHING: dict[Any, Any] = {inspect.Parameter.VAR_POSITIONAL: (), inspect.Parameter.VAR_KEYWORD: {}}
"""Values of unnamed arguments, by kind: a graph accepts none, as it cannot know their number."""


def capture_block(
    block: nn.Module,
    examples: Mapping[str, Any],
    kwargs_name: str | None,
    leaf_value: LeafValue,
    image_tokens: int = 0,
    opened: Sequence[str] = (),
) -> fx.GraphModule:
    """Return the graph of a transformer block's forward; its submodules stay nodes.

    Args:
        block: a transformer block.
        examples: an example value for each argument, on the meta device. If it is None, a flag, a
            string or a whole number (but not a `Count`), it selects branches, and the graph refuses
            any other value. An argument without an example passes through the block unchanged; a
            starred argument without an example must be empty.
        kwargs_name: the argument that holds the attention kwargs, if any.
        leaf_value: returns the example value of a submodule's output.
        image_tokens: number of image tokens in the examples.
        opened: paths of attention modules that are not nodes; their layers and the attention
            function are.

    Returns:
        A graph module with the block's own signature that computes the same as the block.

    Raises:
        CaptureError: when one graph cannot represent the forward.
    """
    modules = [block.get_submodule(path) for path in opened]
    tracer = _BlockTracer(examples, kwargs_name, leaf_value, modules)
    gm = tracer.capture(block)
    gm.meta[EXAMPLE_SCOPE] = scope = plan.CallScope(grids=(image_tokens,) if image_tokens else None)
    graph = gm.graph
    for node in graph.find_nodes(op="placeholder"):
        if node.target == kwargs_name:
            node.meta["val"] = {plan.SCOPE: scope}
    returned = inspect.get_annotations(inspect.unwrap(type(block).forward)).get("return")
    graph.output_node().type = returned
    for node, length in tracer.assumed_lengths.items():
        if node.op == "call_module":
            _check_length(gm, node, length)
    for node in graph.find_nodes(op="call_method", target="clip"):
        node.op, node.target = "call_function", plan.clip_float16
    graph.eliminate_dead_code()
    graph.lint()
    recompile(gm)
    return gm


def _check_length(gm: fx.GraphModule, node: fx.Node, length: int) -> None:
    with gm.graph.inserting_after(node):
        checked = call(gm.graph, plan.expect_outputs, (node, length), name="outputs")
        checked.meta["val"] = node.meta["val"]
    node.replace_all_uses_with(checked, delete_user_cb=lambda user: user is not checked)
