"""``toma-fx calibrate``: calibrate a pipeline on prompts, and what comes of it as a table."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tabulate import tabulate
from tqdm import tqdm

from toma_fx.calibrate import PROBE, Calibration, calibrate
from toma_fx.config import MergeConfig
from toma_fx.errors import ConfigError, ModelError
from toma_fx.lab.draw import Task, draw, load_pipeline

SEED = 1_000_000
"""The first seed of calibration, far from those that images are compared with."""


def calibrate_to_file(task: Task, config: MergeConfig, file: Path) -> Calibration:
    """Calibrate a pipeline and save what was found, which is then a variant of the lab.

    Args:
        task: what is drawn; other prompts than those of later comparison.
        config: all options that are not allotted.
        file: ends in ``.json``.

    Raises:
        TomaError: when the model or an option is not what it must be.
    """
    if file.suffix != ".json":
        raise ConfigError(f"out={str(file)!r} must end in .json, as eval knows it by")
    pipeline = load_pipeline(task.model, dtype=task.dtype)

    def images(pipeline: Any) -> Any:
        return np.stack(
            [
                draw(pipeline, task, prompt, SEED + seed, output="np")[0]
                for prompt in task.prompts
                for seed in range(task.seeds)
            ]
        )

    with tqdm(unit="set") as bar:

        def progress(done: int, total: int, what: str) -> None:
            bar.total, bar.n = total, done
            bar.set_description(what)

        found = calibrate(pipeline, images, config, progress=progress)
    found.save(file)
    return found


def as_text(found: Calibration, ratios: Sequence[float]) -> str:
    """A table: what each part costs alone, its share of the saving, and what it gets.

    Args:
        found: a calibration of images with values from 0 to 1.
        ratios: uniform ratios, whose arithmetic is allotted.
    """
    notes, configs = [], {}
    for ratio in ratios:
        try:
            configs[ratio] = found.config(ratio)
        except ModelError as error:
            notes.append(str(error))
    whole = sum(saving[PROBE] for saving in found.savings.values())
    given = [dict(config.block_ratios) for config in configs.values()]
    rows = [
        (
            name,
            f"{-10 * math.log10(found.errors[name]):.1f}",
            f"{found.savings[name][PROBE] / whole:.0%}",
            *(f"{ratios[patterns[0]]:g}" for ratios in given),
        )
        for name, patterns in found.parts.items()
    ]
    headers = ["part", f"alone at {PROBE}, dB", "of the saving"]
    headers += [f"in place of {ratio:g}" for ratio in configs]
    return "\n".join([tabulate(rows, headers, disable_numparse=True), *notes])
