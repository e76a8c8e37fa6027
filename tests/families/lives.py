"""The families whose life is tested: a small model of each, a call of it, and its properties.

The names are those of the tables of small models, one for each kind of border and of block. A
family that `toma_fx.transform` does not know has no rows here until it does.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor, nn

from tests.tiny_families import FAMILY_MODELS
from tests.tiny_more_families import MORE_FAMILIES
from toma_fx.families import MODELS

Make = Callable[..., Any]


@dataclass(frozen=True)
class Life:
    """A family as its users meet it.

    Attributes:
        build: makes a small model, the same every time.
        call: makes the keyword arguments of a call of it; takes ``batch`` and ``seed``.
        other: makes those of a call at another size.
        exact: makes those of a call at a size that regions divide, so that a ratio near 0 keeps
            every token.
    """

    build: Make
    call: Make
    other: Make
    exact: Make


_REFERENCES = {"height": 16, "width": 16, "references": ((8, 8), (16, 8))}
_EXACT: dict[str, dict[str, Any]] = {
    "FLUX.2 edit": _REFERENCES,
    "Qwen-Image-Edit 2511": _REFERENCES,
    "Wan": {"width": 8},
    "Wan VACE": {"width": 8},
}


def _of(name: str, **other: Any) -> Life:
    if name in FAMILY_MODELS:
        build, call, _ = FAMILY_MODELS[name]
    else:
        build, call = MORE_FAMILIES[name]
    return Life(build, call, partial(call, **other), partial(call, **_EXACT.get(name, {})))


_WIDER = {"height": 16, "width": 20}
_ROWS: dict[str, dict[str, Any]] = {
    "FLUX.2": _WIDER,
    "FLUX.2 edit": _WIDER,
    "Qwen-Image": _WIDER,
    "Qwen-Image, texts of two lengths": _WIDER,
    "Qwen-Image-Edit 2511": _WIDER,
    "Z-Image": _WIDER,
    "Z-Image, captions of two lengths": _WIDER,
    "Wan": {"height": 12, "width": 12},
    "Wan 2.2 TI2V from an image": {"height": 12, "width": 12},
    "Wan 2.1 I2V": {"height": 12, "width": 12},
    "Wan VACE": {"height": 12, "width": 12},
    "sd3": {"height": 24},
    "sd3.5": {"height": 24},
    "chroma": {"height": 24},
    "hunyuan-video": {"height": 12},
    "hunyuan-video-i2v": {"height": 12},
    "hunyuan-video-1.5": {"height": 12},
    "hunyuan-image": {"height": 24},
    "pixart": {"height": 24},
    "ltx": {"height": 12},
    "ltx-i2v": {"height": 12},
    "ltx-2": {"height": 12},
    "cogvideox": {"height": 12},
    "krea-2": {"height": 24},
    "cosmos": {"height": 24},
    "flux.3": {"height": 24},
}


def _is_known(name: str) -> bool:
    build = FAMILY_MODELS[name].build if name in FAMILY_MODELS else MORE_FAMILIES[name][0]
    cls = type(build())
    return f"{cls.__module__}.{cls.__qualname__}" in MODELS


LIVES = {
    name: _of(name, **other)
    for name, other in _ROWS.items()
    if name in {**FAMILY_MODELS, **MORE_FAMILIES} and _is_known(name)
}
SPLIT = {**LIVES, "Wan 2.1 FLF2V": _of("Wan 2.1 FLF2V")}
"""Those that ranks share, one of whose given frames is not the first."""


def run(model: nn.Module, call: dict[str, Any]) -> Tensor:
    """The output of a call without gradients, whose images are a list where they were one."""
    with torch.no_grad():
        output = model(**call, return_dict=False)[0]
    return output if isinstance(output, Tensor) else torch.stack(output)


def adapt(model: Any) -> Any:
    """Load a LoRA on every linear layer, the same every time; returns the model."""
    layers = [name for name, module in model.named_modules() if type(module) is nn.Linear]
    lora = LoraConfig(r=2, lora_alpha=1, target_modules=layers, init_lora_weights=False)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        if hasattr(model, "add_adapter"):
            model.add_adapter(lora)
        else:
            inject_adapter_in_model(lora, model)
    return model.eval()


QUICK = ("FLUX.2", "Qwen-Image-Edit 2511", "Z-Image", "Wan 2.2 TI2V from an image", "sd3.5")
"""One for each kind of border, for tests that are slow or much alike in all families."""


def quick_first(names: Iterable[str]) -> list[Any]:
    """Parameters of a test, of which those that are not quick are marked slow."""
    slow = (pytest.mark.slow,)
    return [pytest.param(name, marks=() if name in QUICK else slow) for name in names]


NO_BATCH = {"control_hidden_states_scale"}


def first_of(call: dict[str, Any]) -> dict[str, Any]:
    """The call of the first row of a batch of two alone."""

    def row(name: str, value: Any) -> Any:
        rows = isinstance(value, Tensor | list) and name not in NO_BATCH and len(value) == 2
        return value[:1] if rows else value

    return {
        name: row(name, value) if not isinstance(value, Tensor) or value.ndim else value
        for name, value in call.items()
    }
