"""A graph becomes the forward of a module again.

Before: a `GraphModule`, whose class, name and code object are its own. After: a subclass of the
module's class, with the same name, whose ``forward`` is the graph's code. Blocks with the same code
share the class, so ``torch.compile`` compiles it once, and everything that looks at a block finds
what it looks for: class, submodules, state-dict keys, hooks.

A leader that is compiled by itself, as ``compile_repeated_blocks`` does, becomes two graphs: the
plan, and the rest, which is the code of the blocks that follow it and is compiled with theirs. And
where a hook skips a leader, as layer guidance does, the first that asks for the plan makes it.

A block that merges at some noise levels only runs one of two graphs, as the call of the model says:
the rewritten one, or the one that was captured.
"""

import contextlib
import copy
import functools
import linecache
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from hashlib import sha256
from types import MethodType, ModuleType
from typing import Any

import torch

# Private, and where diffusers' hooks look up what a block takes and returns.
from diffusers.hooks._helpers import TransformerBlockRegistry
from torch import fx, nn

from toma_fx.errors import ModelError
from toma_fx.passes.plan_apart import plan_apart
from toma_fx.runtime import plan


@dataclass(frozen=True)
class _Code:
    """The source of a ``forward``, and the functions that it calls by name."""

    source: str
    helpers: tuple[tuple[str, Any], ...]


@dataclass(frozen=True)
class _Argument:
    """An argument of a block's ``forward``."""

    place: int
    """Where it stands after ``self``."""
    name: str

    def of(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What a call gives for it."""
        return args[self.place] if len(args) > self.place else kwargs.get(self.name)


@dataclass(frozen=True)
class _Apart:
    """The two parts of a leader: what makes the plan, and what the blocks that follow run."""

    planner: _Code
    follower: _Code
    attention_kwargs: _Argument
    blocks: str
    """Name under which the group finds the plan."""


@dataclass(frozen=True)
class _Gate:
    """What a block runs in a call of the model that does not merge."""

    untouched: _Code
    attention_kwargs: _Argument


def generated_class(base: Any, gm: fx.GraphModule) -> type[Any]:
    """The subclass of ``base`` that runs a graph.

    Args:
        base: a module class.
        gm: a graph over the submodules of its instances, with the signature of its ``forward``.

    Returns:
        The class; the same one whenever base and code are the same.
    """
    return _class_of(base, _code_of(gm), None, None)


def install(
    block: nn.Module,
    gm: fx.GraphModule,
    *,
    follower: fx.GraphModule | None = None,
    untouched: fx.GraphModule | None = None,
    attention_kwargs: str = "",
) -> None:
    """Let ``block`` run the graph, with a copy of each submodule that passes added to it.

    Args:
        block: a module of the class whose ``forward`` was captured.
        gm: what it runs.
        follower: when ``gm`` is that of a leader, the graph of the blocks that follow it.
        untouched: what it runs instead in calls that do not merge, if there are such calls.
        attention_kwargs: the argument that says which calls those are.
    """
    for name, child in gm.named_children():
        if name not in block._modules:
            block.add_module(name, copy.deepcopy(child))
    planner = None if follower is None else plan_apart(gm)
    apart = None
    if planner is not None and follower is not None:
        (shared,) = gm.graph.find_nodes(op="call_function", target=plan.share)
        carrier, blocks, *_ = shared.args
        carrier = _argument(gm, carrier.target)
        apart = _Apart(_code_of(planner), _code_of(follower), carrier, blocks)
    gate = None
    if untouched is not None:
        gate = _Gate(_code_of(untouched), _argument(untouched, attention_kwargs))
    base: Any = type(block)
    block.__class__ = _class_of(base, _code_of(gm), apart, gate)


def _argument(gm: fx.GraphModule, name: str) -> _Argument:
    names = [node.target for node in gm.graph.find_nodes(op="placeholder")]
    return _Argument(names.index(name), name)


def _code_of(gm: fx.GraphModule) -> _Code:
    code = gm.graph.python_code("self")
    # torch.fx offers more than the code uses: NaN, say, which no unpickled NaN would be equal to.
    used = {k: v for k, v in code.globals.items() if re.search(rf"\b{k}\b", code.src)}
    helpers = {k: v for k, v in used.items() if not isinstance(v, ModuleType)}
    return _Code(code.src, tuple(helpers.items()))


@functools.cache
def _class_of(base: Any, code: _Code, apart: _Apart | None, gate: _Gate | None) -> type[Any]:
    def reduce(self: Any, protocol: object) -> tuple[Callable[..., Any], Any, Any]:
        # A generated class cannot be found by name, so a pickle holds what makes it.
        return _new, (base, code, apart, gate), self.__getstate__()

    attributes = {
        "__doc__": base.__doc__,
        "__module__": base.__module__,
        "__qualname__": base.__qualname__,
        "__reduce_ex__": reduce,
        "forward": _function(base, code) if gate is None else _gated(base, code, gate),
    }
    if hasattr(base, "set_chunk_feed_forward"):
        attributes["set_chunk_feed_forward"] = _refuse_chunks
    if apart is not None:
        planner = _function(base, apart.planner)
        attributes["__call__"] = _call_planned(planner, apart)
        attributes["compile"] = _compile_apart(
            planner, _class_of(base, apart.follower, None, gate), gate
        )
    cls = type(base.__name__, (base,), attributes)
    with contextlib.suppress(ValueError):  # a block that diffusers' hooks do not know either
        known = TransformerBlockRegistry.get(base)
        TransformerBlockRegistry.register(cls, replace(known, _cached_parameter_indices=None))
    return cls


def _refuse_chunks(self: nn.Module, chunk_size: int | None, dim: int = 0) -> None:
    """In the place of diffusers' method, whose setting the graph would not see."""
    if chunk_size is not None:
        raise ModelError(
            f"forward chunking in pieces of {chunk_size} has no effect on a transformed "
            f"{type(self).__name__}, whose graph is fixed; leave it out: merging saves memory too"
        )


def _function(base: Any, code: _Code) -> Any:
    filename = f"<toma_fx {base.__name__} {sha256(code.source.encode()).hexdigest()[:12]}>"
    # So that a traceback into the generated code shows its lines.
    lines = code.source.splitlines(keepends=True)
    linecache.cache[filename] = (len(code.source), None, lines, filename)
    namespace: dict[str, Any] = {"torch": torch, **dict(code.helpers)}
    exec(compile(code.source, filename, "exec"), namespace)
    return namespace["forward"]


_DISPATCH = """
def forward(self, *args, **kwargs):
    run = merged if merging(args, kwargs) else untouched
    return run(self, *args, **kwargs)
"""


def _gated(base: Any, code: _Code, gate: _Gate) -> Any:
    """The ``forward`` that runs one of two graphs."""
    merged = _function(base, code)
    names = {"merged": merged, "untouched": _function(base, gate.untouched)}
    # From source, since Dynamo counts the graphs of one code object, and a closure's are all one.
    forward = _function(base, _Code(_DISPATCH, (*names.items(), ("merging", _merging(gate)))))
    return functools.wraps(merged)(forward)


def _merging(gate: _Gate) -> Callable[[tuple[Any, ...], dict[str, Any]], bool]:
    """Whether the call of the model, to which a call of a block belongs, merges."""

    def merging(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        return plan.merging(gate.attention_kwargs.of(args, kwargs))

    return merging


def _call_planned(planner: Callable[..., Any], apart: _Apart) -> Callable[..., Any]:
    """The ``__call__`` of a leader."""

    def call(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """Run the block; and where a hook skipped it, leave its plan to those that follow."""
        output = nn.Module.__call__(self, *args, **kwargs)
        carrier = apart.attention_kwargs.of(args, kwargs)
        if plan.is_due(carrier, apart.blocks):
            plan.postpone(carrier, apart.blocks, functools.partial(planner, self, *args, **kwargs))
        return output

    return call


def _compile_apart(
    planner: Callable[..., Any], follower_class: type[Any], gate: _Gate | None
) -> Callable[..., None]:
    """The ``compile`` of a leader."""
    merging = None if gate is None else _merging(gate)

    def compile_(self: nn.Module, *args: Any, **kwargs: Any) -> None:
        """Compile this block for its own calls; arguments as `torch.compile` takes them."""
        if "forward" in vars(self):  # somebody's hook, which runs the block whole
            nn.Module.compile(self, *args, **kwargs)
            return
        follower = copy.copy(self)  # shares every tensor, submodule and hook
        follower.__class__ = follower_class
        follower.compile(*args, **kwargs)
        make_plan = torch.compile(MethodType(planner, self), *args, **kwargs)

        def call(*inputs: Any, **named: Any) -> Any:
            follower.training = self.training
            if merging is None or merging(inputs, named):
                make_plan(*inputs, **named)
            if "forward" in vars(self):  # a hook that came after compiling
                return self._call_impl(*inputs, **named)
            return follower(*inputs, **named)

        self._compiled_call_impl = call

    return compile_


def _new(base: Any, code: _Code, apart: _Apart | None, gate: _Gate | None) -> Any:
    cls: Any = _class_of(base, code, apart, gate)
    return cls.__new__(cls)
