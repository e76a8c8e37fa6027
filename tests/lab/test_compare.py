"""One image with several settings, side by side."""

import math
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.pipelines import tiny_sdxl_pipeline
from toma_fx.config import MergeConfig
from toma_fx.lab.compare import CELL_PIXELS, Drawn, draw_settings, side_by_side_picture
from toma_fx.lab.draw import Task
from toma_fx.lab.prompts import Prompt

TASK = Task(model="", prompts=(Prompt(text="a"),), steps=2, height=128, width=128)


def ratios(*values: float) -> dict[str, MergeConfig]:
    return {f"ratio {value:g}": MergeConfig(ratio=value) for value in values}


def flat(value: int) -> Image.Image:
    return Image.new("RGB", (128, 128), (value,) * 3)


def test_more_is_merged_away_and_the_pipeline_is_as_before() -> None:
    pipeline = tiny_sdxl_pipeline()
    unet = pipeline.unet
    untouched, half, most = draw_settings(pipeline, TASK, ratios(0.5, 0.9))
    assert pipeline.unet is unet
    assert [each.name for each in (untouched, half, most)] == [
        "untouched",
        "ratio 0.5",
        "ratio 0.9",
    ]
    assert untouched.psnr == math.inf
    assert untouched.psnr > half.psnr > most.psnr
    assert all(each.seconds > 0 for each in (untouched, half, most))


def test_the_same_image_differs_in_nothing() -> None:
    untouched, same = draw_settings(tiny_sdxl_pipeline(), TASK, ratios(0.0))
    assert same.psnr == untouched.psnr == math.inf


def test_the_pipeline_is_restored_when_drawing_fails() -> None:
    pipeline = tiny_sdxl_pipeline()
    unet, decode = pipeline.unet, pipeline.vae.decode

    def fail(*args: object, **kwargs: object) -> object:
        if pipeline.unet is not unet:
            raise KeyboardInterrupt
        return decode(*args, **kwargs)

    pipeline.vae.decode = fail
    with pytest.raises(KeyboardInterrupt):
        draw_settings(pipeline, TASK, ratios(0.5))
    assert pipeline.unet is unet


def test_picture_shows_images_and_four_times_their_difference(tmp_path: Path) -> None:
    drawn = [
        Drawn(name="untouched", image=flat(100), seconds=1.0, psnr=math.inf),
        Drawn(name="ratio 0.5", image=flat(110), seconds=0.5, psnr=28.1),
    ]
    file = tmp_path / "picture.png"
    side_by_side_picture(drawn, "a title").save(file)
    pixels = np.asarray(Image.open(file))
    columns, counts = np.unique(pixels.reshape(-1, 3), axis=0, return_counts=True)
    areas = {tuple(map(int, c)): int(n) for c, n in zip(columns, counts, strict=True)}
    cell = CELL_PIXELS**2
    assert areas[100, 100, 100] >= cell
    assert areas[110, 110, 110] >= cell
    assert areas[40, 40, 40] >= cell
