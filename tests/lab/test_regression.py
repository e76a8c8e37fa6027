"""How close the defaults stay to the untouched images of the small trained models.

``EXPECTTEST_ACCEPT=1 python -m pytest tests/lab/test_regression.py`` records the values anew, in
``regression.json`` beside this file, after new weights or a better default. Read the difference.
"""

import json
import os
from dataclasses import replace
from pathlib import Path
from statistics import fmean

import pytest
import torch

import toma_fx
from toma_fx.checkpoints import load_pipeline
from toma_fx.lab.compare import draw_settings
from toma_fx.lab.draw import Task
from toma_fx.lab.prompts import load_prompts
from toma_fx.lab.small_models import FOLDER, PROMPTS, own_settings

RECORD = Path(__file__).with_name("regression.json")
RATIOS = {"sdxl": (0.25, 0.5), "flux": (toma_fx.MergeConfig().ratio,)}
STEPS, IMAGES = 6, 4
TOLERANCE = 0.5
"""In dB, of the mean PSNR. Rounding can choose another token where two are nearly equal. Measured:
weights changed by a millionth of themselves, and ATen's kernels in place of oneDNN's, move the
means by at most 0.02 dB; bfloat16 in place of float32, far coarser than the difference between two
CPUs, by 0.35."""


def measured(kind: str) -> dict[str, float]:
    """The mean PSNR in dB of the defaults against untouched, by ratio."""
    folder = str(FOLDER / kind)
    pipeline = load_pipeline(folder)
    prompts = load_prompts(PROMPTS, limit=IMAGES)
    task = Task(model=folder, prompts=prompts, steps=STEPS, **own_settings(folder))
    settings = {f"{ratio:g}": toma_fx.MergeConfig(ratio=ratio) for ratio in RATIOS[kind]}
    drawn = [
        draw_settings(pipeline, replace(task, prompts=(prompt,)), settings)[1:]
        for prompt in prompts
    ]
    return {
        name: fmean(images[index].psnr for images in drawn) for index, name in enumerate(settings)
    }


@pytest.mark.parametrize("kind", RATIOS)
def test_defaults_stay_as_close_as_recorded(kind: str) -> None:
    found = measured(kind)
    record = json.loads(RECORD.read_text()) if RECORD.exists() else {}
    if os.environ.get("EXPECTTEST_ACCEPT") == "1":
        record[kind] = {ratio: round(value, 2) for ratio, value in found.items()}
        record["recorded with"] = f"torch {torch.__version__}, {STEPS} steps, {IMAGES} images"
        RECORD.write_text(json.dumps(record, indent=1, sort_keys=True) + "\n")
        return
    assert found == pytest.approx(record[kind], abs=TOLERANCE), (
        f"PSNR in dB of {kind} by ratio: {found} is not within {TOLERANCE} of {record[kind]}; if "
        "weights or defaults changed and the quality is what it should be, record it anew with "
        f"EXPECTTEST_ACCEPT=1 python -m pytest {Path(__file__).name}"
    )
