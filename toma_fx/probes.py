"""Probes of a model's calls of its blocks: as usual, and with blocks that pass tokens through.

In the latter call, nothing mixes image and text. So a row of a block's argument that changes with
the image belongs to an image token, wherever in the model the block is.
"""

import copy
import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from toma_fx.errors import ModelError
from toma_fx.hooks import copied_without_hooks


@dataclass(frozen=True)
class BlockCall:
    """A call of a block.

    Attributes:
        path: path of the block.
        block: the block.
        arguments: arguments by name, with defaults for omitted ones.
        output: output of the block.
    """

    path: str
    block: nn.Module
    arguments: Mapping[str, Any]
    output: Any

    def run(self, forward: Callable[..., Any], arguments: Mapping[str, Any]) -> Any:
        """Call a function that has the signature of the block's forward.

        Args:
            forward: the function.
            arguments: arguments by name; ``*args`` and ``**kwargs`` under their own names.
        """
        kinds = {name: each.kind for name, each in _parameters(self.block).items()}
        stars = {inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD}
        if stars.isdisjoint(kinds.values()):
            return forward(**arguments)
        by_place: list[Any] = []
        by_name: dict[str, Any] = {}
        for name, value in arguments.items():
            kind = kinds[name]
            if kind is inspect.Parameter.VAR_POSITIONAL:
                by_place += value
            elif kind is inspect.Parameter.VAR_KEYWORD:
                by_name |= value
            elif kind is inspect.Parameter.KEYWORD_ONLY:
                by_name[name] = value
            else:
                by_place.append(value)
        return forward(*by_place, **by_name)


@dataclass(frozen=True)
class Probe:
    """A call of a model, with the calls of its blocks."""

    blocks: Mapping[str, BlockCall]
    """Calls of blocks by path, in order."""
    others: Mapping[str, Any]
    """Outputs of the modules outside of blocks, by path."""
    output: Tensor


def lists_of_blocks(model: nn.Module) -> Iterator[tuple[str, nn.ModuleList]]:
    """Yield the outermost lists whose modules have one class and submodules of their own."""
    found: list[str] = []
    for path, module in model.named_modules():
        if any(path.startswith(f"{each}.") for each in found):
            continue
        classes = {type(each) for each in module} if isinstance(module, nn.ModuleList) else set()
        if len(classes) == 1 and any(True for _ in module[0].children()):
            found.append(path)
            yield path, module


def call_with_probes(
    model: nn.Module, call: Mapping[str, Any], passing: Mapping[str, BlockCall] | None = None
) -> Probe:
    """Call a model and record how it calls its blocks.

    Args:
        model: the model; it is not changed.
        call: its keyword arguments.
        passing: recorded calls of its blocks. If given, blocks do not run: for each output, they
            return the argument that looks like it.
    """
    tensors = {id(each): each for each in (*model.parameters(), *model.buffers())}
    model = copied_without_hooks(model, tensors)
    blocks: dict[str, BlockCall] = {}
    others: dict[str, Any] = {}
    members = [
        (f"{path}.{index}", block)
        for path, listed in lists_of_blocks(model)
        for index, block in enumerate(listed)
    ]
    for path, block in members:
        forward = block.forward if passing is None else _pass_through(passing.get(path))
        block.forward = _recorded(path, block, forward, blocks)
    inside = {module for _, block in members for module in block.modules()}
    for path, module in model.named_modules():
        if path and module not in inside:
            module.register_forward_hook(_noted(path, others))
    with torch.no_grad():
        output = model(**copy.copy(dict(call)))
    return Probe(blocks, others, first_tensor(output))


def first_tensor(output: Any) -> Tensor:
    """Return the first tensor in a model's output: the image or video."""
    parts = output if isinstance(output, tuple | list) else getattr(output, "sample", output)
    tensors = [part for part in pytree.tree_leaves(parts) if isinstance(part, Tensor)]
    return tensors[0]


def _noted(path: str, others: dict[str, Any]) -> Callable[..., None]:
    def hook(module: nn.Module, args: Any, output: Any) -> None:
        others.setdefault(path, output)

    return hook


def _recorded(
    path: str, block: nn.Module, forward: Callable[..., Any], blocks: dict[str, BlockCall]
) -> Callable[..., Any]:
    def run(*args: Any, **kwargs: Any) -> Any:
        output = forward(*args, **kwargs)
        blocks.setdefault(path, BlockCall(path, block, _named(block, args, kwargs), output))
        return output

    return run


def _parameters(block: nn.Module) -> dict[str, inspect.Parameter]:
    every = inspect.signature(type(block).forward).parameters
    return dict(list(every.items())[1:])


def _named(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments of a block's call by name, with defaults."""
    bound = inspect.signature(type(block).forward).bind(block, *args, **kwargs)
    bound.apply_defaults()
    return {name: bound.arguments[name] for name in _parameters(block)}


def _pass_through(seen: BlockCall | None) -> Callable[..., Any]:
    if seen is None:  # the block did not run before and must not run now
        return _not_run
    outputs = seen.output if isinstance(seen.output, tuple) else (seen.output,)
    sources = [_alike(output, seen.arguments) for output in outputs]

    def run(*args: Any, **kwargs: Any) -> Any:
        given = _named(seen.block, args, kwargs)
        passed = tuple(None if name is None else given[name] for name in sources)
        return passed if isinstance(seen.output, tuple) else passed[0]

    return run


def _not_run(*args: Any, **kwargs: Any) -> Any:
    raise ModelError(
        "a block ran in one call of the model and not in another; the blocks that run must not "
        "depend on the image"
    )


def _alike(output: Any, arguments: Mapping[str, Any]) -> str | None:
    """Return the name of the argument that has the shape of an output."""
    for name, value in arguments.items():
        if isinstance(value, Tensor) and isinstance(output, Tensor) and value.shape == output.shape:
            return name
    return None
