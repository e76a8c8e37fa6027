"""Count of the floating-point operations of a denoising model in a call from its pipeline."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.flop_counter import FlopCounterMode
from torch.utils.weak import WeakTensorKeyDictionary

from toma_fx.build import take_off
from toma_fx.calls import LastCall, forced
from toma_fx.errors import TomaError
from toma_fx.families import family_of, knows
from toma_fx.inputs import unfit, weightless
from toma_fx.policy import Decision, policy_of
from toma_fx.recipe import Recipe
from toma_fx.runtime.memory import Kept
from toma_fx.runtime.plan import RECALL, REUSE

aten = torch.ops.aten


@dataclass(frozen=True)
class Call:
    """The arguments of one call of a model."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


class _SeenError(Exception):
    """Stops the drawing of an image after its first call has been seen."""


def first_call(model: nn.Module, draw: Callable[[], object]) -> Call:
    """Return the arguments that a pipeline passes to its denoising model at the first step.

    So the image size, the text length and the doubling by guidance are those of the images that
    will be drawn.

    Args:
        model: the denoising model.
        draw: draws an image with the model; it is stopped at the model's first call.
    """
    seen: list[Call] = []

    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen.append(Call(args, kwargs))
        raise _SeenError

    handle = model.register_forward_pre_hook(hook, with_kwargs=True)
    try:
        with suppress(_SeenError):
            draw()
    finally:
        handle.remove()
    return seen[0]


def count(model: nn.Module, call: Call, *, data: bool = False) -> int:
    """Count the floating-point operations of a call: matrix products, convolutions and attention.

    Args:
        model: any denoising model, transformed or not.
        call: from `first_call`.
        data: True runs on the call's own tensors. False runs on tensors without data, as
            `toma_fx.report` does, which takes no time but cannot follow a model that reads values.
    """
    if not data:
        model = weightless(model)
        call = Call(*tree_map(_without_data, (call.args, call.kwargs)))
    return _counted(model, call).get_total_flops()  # type: ignore[no-any-return]


@dataclass(frozen=True)
class RunOperations:
    """Floating-point operations of a call, averaged over a denoising run.

    Attributes:
        before: operations of the untouched model, by block path; ``""`` is the whole model.
        after: operations of the model that merges.
        shares: share of the calls that run each variant.
        tokens: number of image tokens that enter each block.
        kept_bytes: bytes of the plans and memories that a run keeps from step to step.
    """

    before: Mapping[str, int]
    after: Mapping[str, int]
    shares: Mapping[str, float]
    tokens: Mapping[str, int]
    kept_bytes: int


def run_operations(
    model: nn.Module, recipe: Recipe, call: LastCall, steps: int, scheduler: Any = None
) -> RunOperations:
    """Count the operations of a transformed model in a run, and those of the untouched model.

    Args:
        model: the transformed model.
        recipe: the model's recipe.
        call: one of the model's calls.
        steps: number of steps of the run.
        scheduler: makes the run's timesteps; None for the family's usual scheduler.

    Raises:
        ModelError: when the call does not fit the model.
    """
    merged, untouched = weightless(model), weightless(model)
    take_off(untouched)
    paths = {block.path: block.module for block in recipe.blocks}
    tokens = _note_tokens(untouched, paths)
    levels = recipe.family.run_levels(scheduler, steps, call.arguments)
    shares = policy_of(recipe.config).shares(levels)
    arguments = Call((), call.arguments)
    modules = ["", *paths.values()]
    try:
        before = _parts(untouched, arguments, modules)
        each, kept = _count_variants(merged, call, modules, shares)
    except TomaError:
        raise
    except Exception as error:
        raise unfit(model, error) from error
    names = {"": "", **paths}
    after = {
        path: round(sum(share * each[variant][module] for variant, share in shares.items()))
        for path, module in names.items()
    }
    tensors = [each for each in tree_leaves(kept) if isinstance(each, Tensor)]
    return RunOperations(
        before={path: before[module] for path, module in names.items()},
        after=after,
        shares=shares,
        tokens=tokens,
        kept_bytes=sum(each.nbytes for each in tensors),
    )


def _count_variants(
    model: nn.Module,
    call: LastCall,
    modules: Sequence[str],
    shares: Mapping[str, float],
) -> tuple[dict[str, dict[str, int]], Kept | None]:
    """Return the operations of modules in each variant that runs, and the data that a run keeps."""
    counts, kept = {}, None
    keeps = REUSE in shares or RECALL in shares
    # The first variant leaves the data that the others need.
    for variant in shares:
        decision = Decision(variant, kept, grids=call.grids, given=call.given, keeps=keeps)
        with forced(decision) as now:
            counts[variant] = _parts(model, Call((), call.arguments), modules)
        kept = now.made or kept
    return counts, kept


def _note_tokens(model: nn.Module, paths: Mapping[str, str]) -> dict[str, int]:
    """Return image tokens by block path; the next call of the model fills in the counts.

    Blocks that the call leaves out have 0.
    """
    tokens = dict.fromkeys(paths, 0)

    def note(path: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            given = args[0] if args else next(iter(kwargs.values()))
            tokens[path] = given.shape[1]

        return hook

    for path, module in paths.items():
        model.get_submodule(module).register_forward_pre_hook(note(path), with_kwargs=True)
    return tokens


def count_parts(model: nn.Module, call: Call, paths: Sequence[str]) -> dict[str, int]:
    """Count the operations of one call in some modules, on tensors without data.

    Args:
        model: any denoising model, transformed or not.
        call: from `first_call`.
        paths: paths of the modules; ``""`` is the whole model.
    """
    call = Call(*tree_map(_without_data, (call.args, call.kwargs)))
    return _parts(weightless(model), call, paths)


def _parts(model: nn.Module, call: Call, paths: Sequence[str]) -> dict[str, int]:
    counts = _counted(model, call).get_flop_counts()
    root = type(model).__name__
    names = {path: f"{root}.{path}" if path else root for path in paths}
    # A call may leave parts out, such as those for reference images.
    return {path: sum(counts.get(name, {}).values()) for path, name in names.items()}


def _counted(model: nn.Module, call: Call) -> Any:
    # The counter does not know the operator of the CPU's fused attention.
    plain = sdpa_kernel(SDPBackend.MATH)
    words = _AllWords() if knows(model) and family_of(model).reads_values else nullcontext()
    with plain, words, torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(*call.args, **call.kwargs)
    return counter


class _AllWords(TorchDispatchMode):
    """Makes a model without data select all tokens of a text as words, and none as padding.

    The number of words does not change the counts, because the model continues with both kinds.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._padding: Any = WeakTensorKeyDictionary()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not (args and isinstance(args[0], Tensor) and args[0].is_meta):
            return func(*args, **(kwargs or {}))
        if func is aten._local_scalar_dense.default and args[0].dtype == torch.bool:
            return True
        if func is aten.index.Tensor and args[1][0].dtype == torch.bool:
            picked = 0 if args[1][0] in self._padding else args[0].shape[0]
            return args[0].new_empty(picked, *args[0].shape[1:])
        result = func(*args, **(kwargs or {}))
        if func is aten.bitwise_not.default:
            self._padding[result] = True
        return result


def _without_data(value: object) -> object:
    return value.to("meta") if isinstance(value, Tensor) else value
