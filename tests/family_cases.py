"""Calls of tiny FLUX.2, Qwen-Image, Z-Image and Wan models, and values of their image tokens."""

import functools
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.family_reference import Grid, Picture
from tests.tiny_families import (
    flux2_inputs,
    qwen_image_inputs,
    tiny_flux2,
    tiny_qwen_image,
    tiny_wan,
    tiny_wan_image_to_video,
    tiny_wan_vace,
    tiny_z_image,
    wan_inputs,
    wan_vace_inputs,
    z_image_inputs,
)
from toma_fx import transform

# As of tests.test_reference, and a single token midway between two destinations may be worse.
TOLERANCE = 2e-5
WORST = 2e-4


@dataclass(frozen=True)
class Case:
    """A model and a call of it."""

    family: str
    model: Callable[[], Any]
    inputs: Callable[..., dict[str, Any]]
    grids: tuple[Grid, ...]
    given: tuple[int, ...] = ()
    call: dict[str, Any] = field(default_factory=dict)

    @property
    def picture(self) -> Picture:
        return Picture(self.grids, self.given)

    def inputs_of(self, batch: int, **changes: Any) -> dict[str, Any]:
        frames, rows, columns = self.grids[0]
        size: dict[str, Any] = {"height": rows, "width": columns}
        if self.family.startswith("wan"):
            size["frames"] = frames
        if len(self.grids) > 1:
            size["references"] = [grid[1:] for grid in self.grids[1:]]
        return self.inputs(built(self.model), batch=batch, **{**size, **self.call, **changes})


@functools.cache
def built(model: Callable[[], Any]) -> Any:
    """One model for all tests; nothing here may change it."""
    return model()


@functools.cache
def merging(model: Callable[[], Any], **options: Any) -> Any:
    """A transformed model, for all tests too; every block merges unless ``skip`` says otherwise."""
    return transform(built(model), **{"skip": (), **options})


flux2 = functools.partial(tiny_flux2, num_single_layers=2)
klein = functools.partial(flux2, guidance=False)
qwen = functools.partial(tiny_qwen_image, num_layers=2)
zero_cond_t = functools.partial(qwen, zero_cond_t=True)
z_image = functools.partial(tiny_z_image, num_layers=2)
wan = functools.partial(tiny_wan, num_layers=2)
image_to_video = functools.partial(tiny_wan_image_to_video, num_layers=2)
image_embeds = functools.partial(image_to_video, image_embeds=True)
first_and_last = functools.partial(image_to_video, last_image=True)
vace = functools.partial(tiny_wan_vace, num_layers=2, vace_layers=(0, 1))

LARGE, VIDEO = (1, 16, 12), (5, 8, 12)
CASES = {
    "flux2": Case("flux2", flux2, flux2_inputs, (LARGE,)),
    "flux2 reference": Case("flux2", klein, flux2_inputs, (LARGE, (1, 8, 10))),
    "qwen": Case("qwen_image", qwen, qwen_image_inputs, (LARGE,)),
    "qwen mask": Case("qwen_image", qwen, qwen_image_inputs, (LARGE,), call={"lengths": (7, 4, 1)}),
    "qwen edit": Case("qwen_image", qwen, qwen_image_inputs, (LARGE, (1, 8, 8), (1, 4, 20))),
    "qwen zero_cond_t": Case(
        "qwen_image",
        zero_cond_t,
        qwen_image_inputs,
        (LARGE, (1, 8, 8), (1, 4, 20)),
        call={"lengths": (7, 4, 1)},
    ),
    "z": Case("z_image", z_image, z_image_inputs, (LARGE,)),
    "z captions": Case("z_image", z_image, z_image_inputs, (LARGE,), call={"lengths": (5, 40, 70)}),
    "z padded": Case(
        "z_image", z_image, z_image_inputs, ((1, 8, 10),), call={"lengths": (5, 40, 70)}
    ),
    "wan t2v": Case("wan", wan, wan_inputs, (VIDEO,)),
    "wan ti2v": Case("wan", wan, wan_inputs, (VIDEO,), (0,), {"times": "after the first frame"}),
    "wan t2v each": Case("wan", wan, wan_inputs, (VIDEO,), (0,), {"times": "each token"}),
    "wan i2v": Case("wan", image_to_video, wan_inputs, (VIDEO,), (0,)),
    "wan i2v embeds": Case("wan", image_embeds, wan_inputs, (VIDEO,), (0,)),
    "wan flf2v": Case("wan", first_and_last, wan_inputs, (VIDEO,), (0, 4)),
    "wan given": Case("wan", image_to_video, wan_inputs, (VIDEO,), (0, 2, 4), {"given": (0, 2, 4)}),
    "vace": Case("wan_vace", vace, wan_vace_inputs, (VIDEO,)),
    "vace references": Case(
        "wan_vace", vace, wan_vace_inputs, (VIDEO,), (0, 1), {"references": 2, "frames": 3}
    ),
}
ALL = pytest.mark.parametrize("name", CASES)
FEW = ("flux2 reference", "qwen zero_cond_t", "z captions", "wan ti2v", "vace")
SOME = pytest.mark.parametrize("name", FEW)


def run(model: Any, inputs: dict[str, Any]) -> Tensor:
    """The output of a call, of Z-Image's too, which has a list of images."""
    sample = model(**inputs).sample
    return torch.stack(sample) if isinstance(sample, list) else sample


def difference(a: Tensor, b: Tensor) -> float:
    """Root mean square of ``a - b``, in standard deviations of ``b``."""
    return float((a - b).square().mean().sqrt() / b.std())


def cut_off(case: Case, batch: int = 2) -> Case:
    """A case whose texts are as many as the batch has rows."""
    if "lengths" not in case.call:
        return case
    return replace(case, call={**case.call, "lengths": case.call["lengths"][:batch]})


def sized(name: str, *grids: Grid) -> Case:
    """A case with images of other sizes."""
    return replace(cut_off(CASES[name]), grids=grids)
