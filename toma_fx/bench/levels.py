"""What is called at each level: a block, a stage, or the whole model; `image` has the pipeline."""

import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import diffusers
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from toma_fx.arithmetic import Call
from toma_fx.bench.contenders import Setting, entrants, rival_contenders
from toma_fx.bench.timing import Contender
from toma_fx.errors import ConfigError
from toma_fx.families import family_of
from toma_fx.inputs import random_inputs, weightless
from toma_fx.lab.variants import Rival
from toma_fx.runtime.plan import SCOPE, CallScope

PLANS = "each merging contender makes its plan in every call that is timed"
SPOKEN_TO = ("unet", "flux")
"""Families whose blocks are told everything by their arguments, so that one can run alone."""


@dataclass(frozen=True, kw_only=True)
class Timed:
    """Contenders of one table."""

    title: str
    contenders: Sequence[Contender]
    notes: tuple[str, ...] = ()


def models(model: nn.Module, setting: Setting) -> Iterator[Timed]:
    """One forward of the whole model."""
    inputs = random_inputs(model, **setting.size)

    def call(each: nn.Module) -> object:
        # As pipelines do: the first argument by position, which is where tomesd looks for it.
        first, *rest = inputs
        return each(inputs[first], **{name: inputs[name] for name in rest})

    ours = [e.contender(functools.partial(call, e.model)) for e in entrants(model, setting)]
    yield Timed(
        title="one forward",
        contenders=(*ours, *rival_contenders(model, setting, call)),
        notes=(_attended(model, inputs), PLANS),
    )


def _attended(model: nn.Module, inputs: dict[str, Any]) -> str:
    counts = sorted(family_of(model).sequence_lengths(inputs))
    return f"tokens in attention: {', '.join(map(str, counts))}, text included where it joins"


def blocks(model: nn.Module, setting: Setting) -> Iterator[Timed]:
    """The last block of each kind of group; it follows a plan that was made before."""
    parts = {members[-1]: members[0] for members in _groups(model).values()}
    yield from _parts(model, setting, parts)


def stages(model: nn.Module, setting: Setting) -> Iterator[Timed]:
    """A group of blocks and its plan: on a UNet with the layers around it, on Flux in a chain."""
    unet = isinstance(model, diffusers.UNet2DConditionModel)
    groups = _groups(model)
    parts = {(path.rpartition(".")[0] if unet else path): "" for path in groups}
    yield from _parts(model, setting, parts)


class Chain(nn.Module):
    """Blocks that Flux runs one after the other."""

    def __init__(self, blocks: nn.ModuleList) -> None:
        super().__init__()
        self.blocks = blocks

    def forward(
        self, hidden_states: Tensor, encoder_hidden_states: Tensor, **more: Any
    ) -> tuple[Tensor, Tensor]:
        """Image and text tokens through all blocks."""
        for block in self.blocks:
            encoder_hidden_states, hidden_states = block(
                hidden_states=hidden_states, encoder_hidden_states=encoder_hidden_states, **more
            )
        return encoder_hidden_states, hidden_states


def _groups(model: nn.Module) -> dict[str, list[str]]:
    """The blocks of every module list."""
    family = family_of(model)
    groups: dict[str, list[str]] = {}
    for path, module in model.named_modules():
        if family.block_row(type(module)) is not None:
            groups.setdefault(path.rpartition(".")[0], []).append(path)
    return groups


def _parts(model: nn.Module, setting: Setting, parts: dict[str, str]) -> Iterator[Timed]:
    """Parts of the model, one of each kind, each with the leader whose plan it follows, if any."""
    family = family_of(model)
    if family.name not in SPOKEN_TO:
        raise ConfigError(
            f"blocks of {family.title} run in a call of their model alone; time one of each list "
            "with --level model --blocks 1"
        )
    all_entrants = list(entrants(model, setting))
    calls = _recorded(model, parts, setting)
    seen = set()
    for path, leader in parts.items():
        call = calls[path]
        kind = _kind(model.get_submodule(path), call)
        if kind in seen:
            continue
        seen.add(kind)
        call = Call(*tree_map(lambda v: _random(v, setting.device), (call.args, call.kwargs)))
        follows = leader not in ("", path)
        notes = ["its plan was made before" if follows else "the plan is made in the timed call"]
        if any(isinstance(variant, Rival) for variant in setting.variants):
            notes.append("rivals act on whole models: see --level model")
        yield Timed(
            title=f"{path}: {kind[0]}, {_shape(call)}",
            contenders=[
                e.contender(_runner(e.model, path, leader if follows else "", call))
                for e in all_entrants
            ],
            notes=tuple(notes),
        )


def _runner(model: nn.Module, path: str, leader: str, call: Call) -> Callable[[], object]:
    part = model.get_submodule(path)
    module = Chain(part) if isinstance(part, nn.ModuleList) else part
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
    # Blocks before the one that makes the plan may be spared.
    own = next(each for each in recipe.blocks if each.module == path)
    leaders = [e.module for e in recipe.merged if (e.group, e.role) == (own.group, "lead")]
    first = model.get_submodule((*leaders, leader)[0])

    def run() -> object:
        if not scope.plans:  # the first call, which is not counted
            run_in(scope, first)
        return run_in(scope, module)

    return run


def _recorded(model: nn.Module, paths: Iterable[str], setting: Setting) -> dict[str, Call]:
    """The calls of some parts, seen on tensors without data; a list's are those of its first."""
    model = weightless(model)
    calls: dict[str, Call] = {}

    def note(path: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            calls[path] = Call(args, kwargs)

        return hook

    for path in paths:
        part = model.get_submodule(path)
        first = part[0] if isinstance(part, nn.ModuleList) else part
        first.register_forward_pre_hook(note(path), with_kwargs=True)
    with torch.no_grad():
        model(**random_inputs(model, **setting.size))
    return calls


def _kind(part: nn.Module, call: Call) -> tuple[Any, ...]:
    """Parts of one kind take the same time."""
    count = len([m for m in part.modules() if not list(m.children())])
    name = f"{len(part)} blocks" if isinstance(part, nn.ModuleList) else type(part).__name__
    return name, count, _shape(call)


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
