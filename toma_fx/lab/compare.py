"""One image by the untouched model and at several ratios, side by side in one picture."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from toma_fx.config import MergeConfig
from toma_fx.images import pixels, psnr
from toma_fx.lab.draw import Task, draw
from toma_fx.transform import pipeline_models, transform

CELL_PIXELS = 256
LABEL_PIXELS = 40
GAP = 8
DIFFERENCE_GAIN = 4
"""Differences of neighbouring ratios are small; four times as bright they can be seen."""


@dataclass(frozen=True, kw_only=True)
class Drawn:
    """An image, and how it came about."""

    ratio: float
    image: Image.Image
    seconds: float
    psnr: float
    """Against the untouched image, in dB; infinite for that image itself."""


def draw_ratios(
    pipeline: Any, task: Task, ratios: Sequence[float], config: MergeConfig | None = None
) -> list[Drawn]:
    """The task's first prompt with seed 0, untouched (ratio 0) and at each ratio.

    Args:
        pipeline: of `load_pipeline`, not transformed; it is so again afterwards.
        task: what to draw.
        ratios: shares of tokens merged away, each above 0.
        config: the other options; the defaults when left out.
    """
    config = MergeConfig() if config is None else config
    prompt = task.prompts[0]
    draw(pipeline, task, prompt, 0, steps=1)  # the first call of all is slower than the others
    untouched, seconds = draw(pipeline, task, prompt, 0)
    models = pipeline_models(pipeline)
    drawn = [Drawn(ratio=0.0, image=untouched, seconds=seconds, psnr=math.inf)]
    for ratio in ratios:
        transform(pipeline, replace(config, ratio=ratio))
        try:
            image, seconds = draw(pipeline, task, prompt, 0)
        finally:
            for name, model in models.items():
                setattr(pipeline, name, model)
        near = psnr(pixels(image), pixels(untouched))
        drawn.append(Drawn(ratio=ratio, image=image, seconds=seconds, psnr=near))
    return drawn


def side_by_side_picture(drawn: Sequence[Drawn], title: str) -> Image.Image:
    """Images in one row, and under each how it differs from the first, four times as bright.

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
    if each.ratio == 0:
        return ("untouched", f"{each.seconds:.1f} s") if row == 0 else ()
    if row == 0:
        return f"ratio {each.ratio:g}", f"{each.seconds:.1f} s"
    return f"difference, {DIFFERENCE_GAIN} times as bright", f"PSNR {each.psnr:.1f} dB"


def _difference(image: Image.Image, reference: Image.Image) -> Image.Image:
    gap = np.abs(np.asarray(image, dtype=int) - np.asarray(reference, dtype=int))
    return Image.fromarray((gap * DIFFERENCE_GAIN).clip(0, 255).astype(np.uint8))
