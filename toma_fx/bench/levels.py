"""Timed calls of a block or of the whole model; `toma_fx.bench.image` has those of a pipeline."""

import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from toma_fx.arithmetic import Call
from toma_fx.bench.contenders import Setting, entrants
from toma_fx.bench.timing import Contender, recorded
from toma_fx.errors import ConfigError
from toma_fx.families import family_of
from toma_fx.inputs import random_inputs, weightless
from toma_fx.runtime.plan import SCOPE, CallScope

PLANS = "each merging contender makes its plan in every call that is timed"
GRAPHS = "each call is replayed from a CUDA graph: the host's work takes no time"
SPOKEN_TO = ("unet", "flux")
"""Families whose blocks get everything by their arguments, so that a block can run alone."""

Rivals = Callable[[Callable[[nn.Module], object]], Iterable[Contender]]


@dataclass(frozen=True, kw_only=True)
class Timed:
    """Contenders of one table."""

    title: str
    contenders: Sequence[Contender]
    notes: tuple[str, ...] = ()


def models(model: nn.Module, setting: Setting, *, rivals: Rivals | None = None) -> Iterator[Timed]:
    """One forward of the whole model.

    Args:
        model: an untouched model.
        setting: sizes, ratios and variants.
        rivals: returns more contenders; its argument is a function that calls a given model.
    """
    inputs = random_inputs(model, **setting.size)

    def call(each: nn.Module) -> object:
        # Pipelines pass the first argument by position, and tomesd looks for it there.
        first, *rest = inputs
        return each(inputs[first], **{name: inputs[name] for name in rest})

    def calls(each: nn.Module) -> Callable[[], object]:
        run = functools.partial(call, each)
        return recorded(run) if setting.cuda_graphs else run

    ours = [e.contender(calls(e.model)) for e in entrants(model, setting)]
    yield Timed(
        title="one forward",
        contenders=(*ours, *(() if rivals is None else rivals(call))),
        notes=(_attended(model, inputs), PLANS, *((GRAPHS,) if setting.cuda_graphs else ())),
    )


def _attended(model: nn.Module, inputs: dict[str, Any]) -> str:
    counts = sorted(family_of(model).sequence_lengths(inputs))
    return f"tokens in attention: {', '.join(map(str, counts))}, text included where it joins"


def blocks(model: nn.Module, setting: Setting) -> Iterator[Timed]:
    """The last block of each kind of group; it follows a plan that was made before.

    Raises:
        ConfigError: when blocks of the model's family run only in a call of their model.
    """
    family = family_of(model)
    if family.name not in SPOKEN_TO:
        raise ConfigError(
            f"blocks of {family.title} run only in a call of their model; time one of each list "
            "with toma-fx bench model --blocks 1"
        )
    groups: dict[str, list[str]] = {}
    for path, module in model.named_modules():
        if family.block_row(type(module)) is not None:
            groups.setdefault(path.rpartition(".")[0], []).append(path)
    leaders = {members[-1]: members[0] for members in groups.values()}
    all_entrants = list(entrants(model, setting))
    calls = _recorded(model, leaders, setting)
    seen = set()
    for path, leader in leaders.items():
        call = calls[path]
        kind = _kind(model.get_submodule(path), call)
        if kind in seen:
            continue
        seen.add(kind)
        call = Call(*tree_map(lambda v: _random(v, setting.device), (call.args, call.kwargs)))
        follows = "" if leader == path else leader
        note = "its plan was made before" if follows else "the plan is made in the timed call"
        yield Timed(
            title=f"{path}: {kind[0]}, {_shape(call)}",
            contenders=[e.contender(_runner(e.model, path, follows, call)) for e in all_entrants],
            notes=(note,),
        )


def _runner(model: nn.Module, path: str, leader: str, call: Call) -> Callable[[], object]:
    module = model.get_submodule(path)
    name = str(family_of(model).attention_kwargs)
    recipe = getattr(model, "toma_recipe", None)
    if recipe is None or not recipe.merged:
        return lambda: module(*call.args, **call.kwargs)

    def run_in(scope: CallScope, part: nn.Module) -> object:
        given = call.kwargs.get(name) or {}
        return part(*call.args, **{**call.kwargs, name: {**given, SCOPE: scope}})

    if not leader:
        return lambda: run_in(CallScope(), module)
    scope = CallScope()
    # Blocks before the one that makes the plan need not run.
    own = next(each for each in recipe.blocks if each.module == path)
    leaders = [e.module for e in recipe.merged if (e.group, e.role) == (own.group, "lead")]
    first = model.get_submodule((*leaders, leader)[0])

    def run() -> object:
        if not scope.plans:  # the first call, which is not counted
            run_in(scope, first)
        return run_in(scope, module)

    return run


def _recorded(model: nn.Module, paths: Iterable[str], setting: Setting) -> dict[str, Call]:
    """The calls of some blocks, seen on tensors without data."""
    model = weightless(model)
    calls: dict[str, Call] = {}

    def note(path: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            calls[path] = Call(args, kwargs)

        return hook

    for path in paths:
        model.get_submodule(path).register_forward_pre_hook(note(path), with_kwargs=True)
    with torch.no_grad():
        model(**random_inputs(model, **setting.size))
    return calls


def _kind(part: nn.Module, call: Call) -> tuple[Any, ...]:
    """Blocks of one kind take the same time."""
    count = len([m for m in part.modules() if not list(m.children())])
    return type(part).__name__, count, _shape(call)


def _shape(call: Call) -> str:
    tokens = call.args[0] if call.args else call.kwargs["hidden_states"]
    return " x ".join(map(str, tokens.shape))


def _random(value: Any, device: str) -> Any:
    if not isinstance(value, Tensor):
        return value
    if not value.is_floating_point():
        raise TypeError(f"a recorded tensor of {value.dtype} has no random values")
    generator = torch.Generator().manual_seed(0)
    return torch.randn(value.shape, generator=generator).to(device, value.dtype)
