"""Rows: diffusers' pipelines."""

import pytest
import torch
from diffusers import (
    FluxImg2ImgPipeline,
    FluxInpaintPipeline,
    StableDiffusionXLImg2ImgPipeline,
    StableDiffusionXLInpaintPipeline,
)

from tests.matrix.frame import Cell, row
from tests.matrix.pictures import check, converted, drawing, picture, pipeline

# diffusers' Euler scheduler hands a tensor to NumPy in a way that NumPy 2 is about to change.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

SECTION = "Pipelines"


@row("Text-to-image", section=SECTION, quick=("eager", "regional"))
def test_text_to_image(cell: Cell) -> None:
    check(cell, pipeline(cell.family), drawing())


@row("Image-to-image", section=SECTION)
def test_image_to_image(cell: Cell) -> None:
    cls = {"sdxl": StableDiffusionXLImg2ImgPipeline, "flux": FluxImg2ImgPipeline}[cell.family]
    check(cell, converted(cls, cell.family), drawing(image=picture(), strength=0.7))


@row("Inpainting", section=SECTION)
def test_inpainting(cell: Cell) -> None:
    cls = {"sdxl": StableDiffusionXLInpaintPipeline, "flux": FluxInpaintPipeline}[cell.family]
    mask = torch.zeros(1, 1, 128, 128)
    mask[..., 32:96, 16:80] = 1
    draw = drawing(image=picture(), mask_image=mask, strength=0.9)
    check(cell, converted(cls, cell.family), draw)
