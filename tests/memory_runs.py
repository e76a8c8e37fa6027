"""Small models with memory, and the calls of a denoising run of them."""

import copy
import functools
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from tests.tiny import flux_inputs, smallest_flux, smallest_unet, unet_inputs
from tests.tiny_families import tiny_wan, tiny_z_image, wan_inputs, z_image_inputs
from toma_fx import Memory, transform

MODELS: dict[str, tuple[Callable[[], Any], Callable[..., dict[str, Any]]]] = {
    "unet": (smallest_unet, partial(unet_inputs, height=16, width=16)),
    "flux": (smallest_flux, partial(flux_inputs, height=8, width=8)),
    "wan": (partial(tiny_wan, num_layers=2), partial(wan_inputs, frames=2, height=4, width=8)),
    "z-image": (
        partial(tiny_z_image, num_layers=2, num_refiner_layers=1),
        partial(z_image_inputs, height=8, width=8),
    ),
}
IMAGE = {"unet": "sample", "z-image": "x"}
TIME = {"z-image": "t"}
STEPS = 5


@functools.cache
def build(name: str) -> Any:
    """One model for all tests; nothing may change it."""
    return MODELS[name][0]()


@functools.cache
def _merging(name: str, memory: Memory, **options: Any) -> Any:
    settings = {"ratio": 0.75, "region_tokens": 16, "skip": (), **options}
    return transform(build(name), **settings, memory=memory)


def merging(name: str, *, every: int = 2, theta: float | None = 0.5, **options: Any) -> Any:
    """A small model with a memory, all of whose blocks merge; a copy of its own for each."""
    more = {key: options.pop(key) for key in ("extrapolate", "control") if key in options}
    return copy.deepcopy(_merging(name, Memory(every=every, theta=theta, **more), **options))


def calls_of(
    name: str, steps: int = STEPS, seed: int = 0, text: int = 0, **size: Any
) -> list[dict[str, Any]]:
    """The calls of a run from noise to an image.

    Args:
        name: of the model.
        steps: of the run.
        seed: of the noise.
        text: of the prompt.
        **size: of the image.
    """
    model = build(name)
    call = MODELS[name][1](model, **size, seed=100 + text)
    noise, other = (MODELS[name][1](model, **size, seed=seed + add) for add in (0, 50))
    image, time = IMAGE.get(name, "hidden_states"), TIME.get(name, "timestep")
    calls = []
    for step in range(steps):
        left = 1 - step / steps
        now = pytree.tree_map(lambda a, b, left=left: a + left * b, other[image], noise[image])
        at = 1 - left * call[time] if time == "t" else (left * call[time]).to(call[time].dtype)
        calls.append({**call, image: now, time: at})
    return calls


def output_of(model: Any, call: dict[str, Any]) -> Tensor:
    """The output of a call, whose images are a list where they were one."""
    output = model(**call, return_dict=False)[0]
    return output if isinstance(output, Tensor) else torch.stack(output)


@torch.no_grad()
def draw(model: Any, calls: Iterable[dict[str, Any]]) -> list[Tensor]:
    """The outputs of calls, one after the other."""
    return [output_of(model, call) for call in calls]


def same(outputs: Sequence[Tensor], others: Sequence[Tensor]) -> bool:
    """Whether all are equal, bit by bit."""
    return all(torch.equal(a, b) for a, b in zip(outputs, others, strict=True))


def difference(a: Tensor, b: Tensor) -> float:
    """Root mean square of ``a - b``, in standard deviations of ``b``."""
    return float((a - b).square().mean().sqrt() / b.std())
