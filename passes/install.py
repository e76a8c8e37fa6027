"""Turn graphs into the forward of a module.

Before: a `GraphModule`, whose class, name and code object are its own. After: a subclass of the
module's class, with the same name, whose ``forward`` is the graph's code. Blocks with the same code
share the class, so ``torch.compile`` compiles it once. Code that inspects a block finds the
expected class, submodules, state-dict keys and hooks. `uninstall` restores the original class.

A block may have several **variants**, each a function with its own code object. The call of the
model selects the variant; a block that is called on its own runs the first.

A leader that is compiled by itself, as by ``compile_repeated_blocks``, becomes two graphs: the
plan, and the rest, which has the same code as the blocks that follow and is compiled with theirs.
If a hook skips a leader, as layer guidance does, the first block that needs the plan makes it.
"""

import copy
import functools
import inspect
import linecache
import re
import threading
import weakref
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import replace
from hashlib import sha256
from types import MethodType, ModuleType
from typing import Any

import torch
from torch import fx, nn

from toma_fx.errors import ModelError
from toma_fx.passes.block_calls import (
    PATH,
    Argument,
    Code,
    Forward,
    Lead,
    call_planned,
    call_with_memory,
    variant_of,
)
from toma_fx.passes.plan_apart import plan_apart
from toma_fx.runtime import plan

Graphs = Mapping[str, fx.GraphModule | None]
"""For each variant, its graph; None for the forward of the block's own class."""


def install(
    block: nn.Module,
    graphs: Graphs,
    *,
    attention_kwargs: str | None,
    form: tuple[tuple[str, ...], Callable[..., str]] | None = None,
    leads: str = "",
    follower: Graphs | None = None,
    usual: str = plan.MERGED,
    path: str = "",
) -> None:
    """Make ``block`` run graphs instead of its own forward.

    Args:
        block: a module of the class whose ``forward`` was captured.
        graphs: the variants.
        attention_kwargs: the argument that carries the scope of the call, if any.
        form: arguments whose kind selects the graph, and a function that returns the kind, with
            which the names of the variants end.
        leads: name of the group for which the block makes the plan, if it makes one for others.
        follower: the variants of the blocks that follow, if the block leads.
        usual: the variant that runs without a call of the model.
        path: path of the block in the model, the key of its memory, in a model with memory.
    """
    base: Any = type(block)
    carrier = None if attention_kwargs is None else _argument(base, attention_kwargs)
    kind = None if form is None else (tuple(_argument(base, each) for each in form[0]), form[1])
    lead = _lead_of(graphs, follower)
    forward = Forward(_codes_of(graphs), carrier, kind, leads, lead, usual)
    if path:
        vars(block)[PATH] = path
    _become(block, _class_of(base, forward))


def _argument(base: Any, name: str) -> Argument:
    """Find an argument; a subclass with ``*args`` passes its arguments on to a base class."""
    forwards = (cls.forward for cls in base.__mro__ if hasattr(cls, "forward"))
    signatures = (list(inspect.signature(each).parameters)[1:] for each in forwards)
    names = next(each for each in signatures if name in each)
    return Argument(names.index(name), name)


def uninstall(block: nn.Module) -> None:
    """Restore a block's own class, uncompiled; other changes made since stay.

    Raises:
        ModelError: when other code replaced the installed class.
    """
    cls: Any = type(block)
    if "toma_base" not in vars(cls):
        raise ModelError(
            f"{type(block).__name__} got another class after it was transformed, "
            f"{cls.__module__}.{cls.__qualname__}; undo that first, then restore"
        )
    block.__class__ = cls.toma_base
    vars(block).pop(PATH, None)
    vars(block).pop("_compiled_call_impl", None)  # the compiled code belongs to the removed class
    _LEAVING.pop(block)()


def _codes_of(graphs: Graphs) -> tuple[tuple[str, Code | None], ...]:
    return tuple((name, None if gm is None else _code_of(gm.graph)) for name, gm in graphs.items())


def _lead_of(graphs: Graphs, follower: Graphs | None) -> Lead | None:
    if follower is None:
        return None
    apart = []
    for name, gm in graphs.items():
        if gm is None or not gm.graph.find_nodes(op="call_function", target=plan.share):
            continue
        planner = plan_apart(gm)
        if planner is None:
            return None
        apart.append((name, _code_of(planner)))
    return Lead(tuple(apart), _codes_of(follower)) if apart else None


def _code_of(graph: fx.Graph) -> Code:
    code = graph.python_code("self")
    # Keep only used globals: torch.fx adds more, such as NaN, which never equals an unpickled NaN.
    used = {k: v for k, v in code.globals.items() if re.search(rf"\b{k}\b", code.src)}
    helpers = {k: v for k, v in used.items() if not isinstance(v, ModuleType)}
    return Code(code.src, tuple(helpers.items()))


_CLASSES: weakref.WeakValueDictionary[Any, type[Any]] = weakref.WeakValueDictionary()
_USES: Counter[type[Any]] = Counter()
_LEAVING: weakref.WeakKeyDictionary[nn.Module, Any] = weakref.WeakKeyDictionary()
"""For each block, a finalizer that releases its class; it runs when called or with the block."""
_LOCK = threading.RLock()
"""Held while a class is made or its uses are counted."""


def _class_of(base: Any, forward: Forward) -> type[Any]:
    """Return the subclass of ``base`` that runs a forward; the same one while any block has it."""
    with _LOCK:
        cls = _CLASSES.get((base, forward))
        if cls is None:
            cls = _CLASSES[base, forward] = _new_class(base, forward)
        return cls


def _become(block: nn.Module, cls: type[Any]) -> None:
    """Set the class of a block; the class is released with its last block."""
    with _LOCK:
        if not _USES[cls]:
            _register(cls)
        _USES[cls] += 1
    leaving = _LEAVING[block] = weakref.finalize(block, _leave, cls)
    leaving.atexit = False
    block.__class__ = cls


def _leave(cls: type[Any]) -> None:
    with _LOCK:
        _USES[cls] -= 1
        if not _USES[cls]:
            del _USES[cls]
            _registry().pop(cls, None)


def _registry() -> dict[type[Any], Any]:
    # Private API, in which diffusers' hooks look up the arguments and outputs of a block.
    from diffusers.hooks._helpers import TransformerBlockRegistry

    TransformerBlockRegistry._register()
    known: dict[type[Any], Any] = TransformerBlockRegistry._registry
    return known


def _register(cls: Any) -> None:
    known = _registry()
    if cls.toma_base in known:  # otherwise diffusers' hooks do not know the block either
        metadata = known[cls.toma_base]
        known[cls] = replace(metadata, _cls=cls, _cached_parameter_indices=None)


def _new_class(base: Any, forward: Forward) -> type[Any]:
    def reduce(self: Any, protocol: object) -> tuple[Callable[..., Any], Any, Any]:
        # A generated class cannot be found by name, so a pickle stores what it is made from.
        return _new, (base, forward), self.__getstate__()

    attributes = {
        "__doc__": base.__doc__,
        "__module__": base.__module__,
        "__qualname__": base.__qualname__,
        "__reduce_ex__": reduce,
        "toma_base": base,
        "forward": _forward(base, forward),
    }
    if hasattr(base, "set_chunk_feed_forward"):
        attributes["set_chunk_feed_forward"] = _refuse_chunks
    if forward.lead is not None:
        planners = {name: _function(base, code) for name, code in forward.lead.planners}
        follower = replace(forward, variants=forward.lead.follower, group="", lead=None)
        attributes["__call__"] = call_planned(planners, forward)
        attributes["compile"] = _compile_apart(planners, _class_of(base, follower), forward)
    elif forward.usual == plan.REMEMBER:
        attributes["__call__"] = call_with_memory(forward)
    return type(base.__name__, (base,), attributes)


def _new(base: Any, forward: Forward) -> Any:
    block = base.__new__(base)
    _become(block, _class_of(base, forward))
    return block


def _refuse_chunks(self: nn.Module, chunk_size: int | None, dim: int = 0) -> None:
    """Replace diffusers' method: the graph would not notice its setting."""
    if chunk_size is not None:
        raise ModelError(
            f"forward chunking in pieces of {chunk_size} has no effect on a transformed "
            f"{type(self).__name__}, whose graph is fixed; leave it out: merging saves memory too"
        )


_SOURCES: Counter[str] = Counter()
"""For each file name in `linecache`, the number of functions with that source."""


def _function(base: Any, code: Code) -> Any:
    digest = sha256(code.source.encode()).hexdigest()[:12]
    filename = f"<toma_fx {base.__name__} {digest}>"
    namespace: dict[str, Any] = {"torch": torch, **dict(code.helpers)}
    exec(compile(code.source, filename, "exec"), namespace)
    function = namespace["forward"]
    # Lets a traceback into the generated code show its lines, as long as the code exists.
    lines = code.source.splitlines(keepends=True)
    linecache.cache[filename] = (len(code.source), None, lines, filename)
    with _LOCK:
        _SOURCES[filename] += 1
    weakref.finalize(function, _forget_source, filename).atexit = False
    return function


def _forget_source(filename: str) -> None:
    with _LOCK:
        _SOURCES[filename] -= 1
        if not _SOURCES[filename]:
            del _SOURCES[filename]
            linecache.cache.pop(filename, None)


_UNTOUCHED = """
def forward(self, *args, **kwargs):
    args, kwargs = without_scope(args, kwargs)
    return base_forward(self, *args, **kwargs)
"""

# A block that follows has no own variant for calls that bring a plan: it merges as usual.
_DISPATCH = """
def forward(self, *args, **kwargs):
    name, kind = variant(args, kwargs)
    run = variants.get(name + kind) or variants.get(usual + kind, first)
    return run(self, *args, **kwargs)
"""


def _forward(base: Any, forward: Forward) -> Any:
    """Return the ``forward`` that runs the variant of the call."""
    functions = {
        name: _untouched(base, forward) if code is None else _function(base, code)
        for name, code in forward.variants
    }
    first = functions[forward.variants[0][0]]
    if len({code for _, code in forward.variants}) == 1:
        return first
    which = functools.partial(variant_of, forward)
    helpers = {"variants": functions, "first": first, "variant": which, "usual": forward.usual}
    # Made from source, because Dynamo counts graphs by code object, which closures would share.
    function = _function(base, Code(_DISPATCH, tuple(helpers.items())))
    return functools.wraps(base.forward)(function)


def _untouched(base: Any, forward: Forward) -> Any:
    """Return the forward of the block's own class, with the scope removed from its arguments."""
    argument = forward.attention_kwargs
    if argument is None:
        untouched: Any = base.forward
        return untouched

    def without_scope(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        given = argument.of(args, kwargs)
        if given is None or plan.SCOPE not in given:
            return args, kwargs
        passed_on = plan.pass_on(given) or None
        if len(args) > argument.place:
            args = (*args[: argument.place], passed_on, *args[argument.place + 1 :])
            return args, kwargs
        return args, {**kwargs, argument.name: passed_on}

    helpers = {"without_scope": without_scope, "base_forward": base.forward}
    function = _function(base, Code(_UNTOUCHED, tuple(helpers.items())))
    return functools.wraps(base.forward)(function)


def _compile_apart(
    planners: Mapping[str, Any], follower_class: type[Any], forward: Forward
) -> Callable[..., None]:
    """Return the ``compile`` method of a leader."""

    def compile_(self: nn.Module, *args: Any, **kwargs: Any) -> None:
        """Compile this block for its own calls; takes the arguments of `torch.compile`."""
        if "forward" in vars(self):  # a foreign hook, which runs the block as a whole
            nn.Module.compile(self, *args, **kwargs)
            return
        follower = copy.copy(self)  # shares every tensor, submodule and hook
        _become(follower, follower_class)
        nn.Module.compile(follower, *args, **kwargs)
        make = {
            name: torch.compile(MethodType(planner, self), *args, **kwargs)
            for name, planner in planners.items()
        }

        def call(*inputs: Any, **named: Any) -> Any:
            follower.training = self.training
            variant = "".join(variant_of(forward, inputs, named))
            if variant in make:
                make[variant](*inputs, **named)
            if "forward" in vars(self):  # a hook that was added after compiling
                return self._call_impl(*inputs, **named)
            return follower(*inputs, **named)

        self._compiled_call_impl = call

    return compile_
