"""One image by the untouched model and with several settings, side by side in one picture."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from toma_fx.config import MergeConfig
from toma_fx.images import pixels, psnr
from toma_fx.lab.draw import Task, draw
from toma_fx.progress import progress
from toma_fx.transform import while_transformed

CELL_PIXELS = 256
LABEL_PIXELS = 40
GAP = 8
UNTOUCHED = "untouched"
DIFFERENCE_GAIN = 4
"""Differences of neighbouring ratios are small; four times as bright they can be seen."""


@dataclass(frozen=True, kw_only=True)
class Drawn:
    """An image, with its setting, time and distance."""

    name: str
    """Name of the setting; "untouched" for none."""
    image: Image.Image
    seconds: float
    psnr: float
    """Against the untouched image, in dB; infinite for that image itself."""


def draw_settings(pipeline: Any, task: Task, settings: Mapping[str, MergeConfig]) -> list[Drawn]:
    """Draw the task's first prompt with seed 0, untouched and with each setting.

    Args:
        pipeline: Of `toma_fx.checkpoints.load_pipeline`; afterwards it is untouched again.
        task: What to draw.
        settings: Configurations by the names that stand over their images.
    """
    prompt = task.prompts[0]
    draw(pipeline, task, prompt, 0, steps=1)  # the first call of all is slower than the others
    with progress("draw", total=1 + len(settings), unit="image") as bar:
        untouched, seconds = draw(pipeline, task, prompt, 0)
        bar.update()
        drawn = [Drawn(name=UNTOUCHED, image=untouched, seconds=seconds, psnr=math.inf)]
        for name, config in settings.items():
            with while_transformed(pipeline, config):
                image, seconds = draw(pipeline, task, prompt, 0)
            bar.update()
            near = psnr(pixels(image), pixels(untouched))
            drawn.append(Drawn(name=name, image=image, seconds=seconds, psnr=near))
    return drawn


def side_by_side_picture(drawn: Sequence[Drawn], title: str) -> Image.Image:
    """Images in one row, and under each its difference from the first, four times as bright.

    Args:
        drawn: the untouched image first.
        title: one line over all.
    """
    width, height = drawn[0].image.size
    scale = max(1, round(CELL_PIXELS / width))
    cell = (width * scale, height * scale)
    step_x, step_y = cell[0] + GAP, cell[1] + LABEL_PIXELS + GAP
    sheet = Image.new(
        "RGB", (GAP + step_x * len(drawn), LABEL_PIXELS + 2 * step_y), (255, 255, 255)
    )
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(size=14)
    pen.text((GAP, GAP), title, (0, 0, 0), font)
    for index, each in enumerate(drawn):
        left = GAP + index * step_x
        for row, image in enumerate((each.image, _difference(each.image, drawn[0].image))):
            top = LABEL_PIXELS + row * step_y
            for line, text in enumerate(_label(each, row)):
                pen.text((left, top + 17 * line), text, (0, 0, 0), font)
            sheet.paste(image.resize(cell, Image.Resampling.NEAREST), (left, top + LABEL_PIXELS))
    return sheet


def _label(each: Drawn, row: int) -> tuple[str, ...]:
    if row == 0:
        return each.name, f"{each.seconds:.1f} s"
    if each.name == UNTOUCHED:
        return ()
    return f"difference, {DIFFERENCE_GAIN} times as bright", f"PSNR {each.psnr:.1f} dB"


def _difference(image: Image.Image, reference: Image.Image) -> Image.Image:
    gap = np.abs(np.asarray(image, dtype=int) - np.asarray(reference, dtype=int))
    return Image.fromarray((gap * DIFFERENCE_GAIN).clip(0, 255).astype(np.uint8))
