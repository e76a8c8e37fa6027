"""How much a denoising model computes for one call, as the pipeline makes it."""

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._pytree import tree_map
from torch.utils.flop_counter import FlopCounterMode

from toma_fx.inputs import weightless


@dataclass(frozen=True)
class Call:
    """The arguments of one call of a model."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


class _SeenError(Exception):
    """Ends the drawing of an image once its first call has been seen."""


def first_call(model: nn.Module, draw: Callable[[], object]) -> Call:
    """What a pipeline hands to its denoising model at the first step.

    The image's size, the length of the text and the doubling by guidance are then those of the
    images that will be drawn.

    Args:
        model: the denoising model.
        draw: draws an image with it; it is stopped at the model's first call.
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
    """Floating-point operations of one call: matrix products, convolutions and attention.

    Args:
        model: any denoising model, transformed or not.
        call: of `first_call`.
        data: run on the call's own tensors. Otherwise on tensors without data, as
            `toma_fx.report` does, which takes no time but cannot follow a model that looks at
            values.
    """
    return _counted(model, call, data).get_total_flops()  # type: ignore[no-any-return]


def count_parts(model: nn.Module, call: Call, paths: Sequence[str]) -> dict[str, int]:
    """Floating-point operations of one call in some modules, on tensors without data.

    Args:
        model: any denoising model, transformed or not.
        call: of `first_call`.
        paths: of the modules; ``""`` is the whole model.
    """
    counts = _counted(model, call, data=False).get_flop_counts()
    root = type(model).__name__
    names = {path: f"{root}.{path}" if path else root for path in paths}
    return {path: sum(counts[name].values()) for path, name in names.items()}


def _counted(model: nn.Module, call: Call, data: bool) -> Any:
    if not data:
        model = weightless(model)
        call = Call(*tree_map(_without_data, (call.args, call.kwargs)))
    # The CPU's fused attention is an operator that the counter does not know.
    plain = sdpa_kernel(SDPBackend.MATH)
    with plain, torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(*call.args, **call.kwargs)
    return counter


def _without_data(value: object) -> object:
    return value.to("meta") if isinstance(value, Tensor) else value
