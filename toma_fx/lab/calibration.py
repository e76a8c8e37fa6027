"""``toma-fx calibrate``: calibrate a pipeline on prompts, and show the result as a table."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from toma_fx.calibrate import PROBE, Calibration, calibrate
from toma_fx.checkpoints import load_pipeline
from toma_fx.config import MergeConfig
from toma_fx.errors import ConfigError, ModelError
from toma_fx.lab.draw import Task, draw
from toma_fx.progress import progress
from toma_fx.tables import Column, Table, number

SEED = 1_000_000
"""The first seed of calibration, far from those that images are compared with."""


def calibrate_to_file(task: Task, config: MergeConfig, file: Path) -> Calibration:
    """Calibrate a pipeline and save the result, which the lab's commands take as a variant.

    Args:
        task: prompts and settings to draw; take other prompts than for later comparisons.
        config: the options that calibration leaves as they are.
        file: the file to write; its name must end in ``.json``.

    Raises:
        TomaError: when the model cannot be loaded, or an option has a value that it cannot take.
    """
    if file.suffix != ".json":
        raise ConfigError(f"out={str(file)!r} must end in .json, by which eval knows it")
    with progress(f"load {task.model}"):
        pipeline = load_pipeline(task.model, dtype=task.dtype)

    def images(pipeline: Any) -> Any:
        return np.stack(
            [
                draw(pipeline, task, prompt, SEED + seed, output="np")[0]
                for prompt in task.prompts
                for seed in range(task.seeds)
            ]
        )

    with progress("draw", 1, "set") as bar:

        def note(done: int, total: int, what: str) -> None:
            bar.total, bar.n = total, done
            bar.set_description(what)

        found = calibrate(pipeline, images, config, progress=note)
    found.save(file)
    return found


def as_table(found: Calibration, ratios: Sequence[float]) -> Table:
    """Table of the parts: the error of each alone, its share of the saving, and its ratios.

    Args:
        found: a calibration of images with values from 0 to 1.
        ratios: uniform ratios; the parts share out the arithmetic that each of them saves.
    """
    notes, configs = [], {}
    for ratio in ratios:
        try:
            configs[ratio] = found.config(ratio)
        except ModelError as error:
            notes.append(str(error))
    whole = sum(saving[PROBE] for saving in found.savings.values())
    given = {f"{ratio:g}": dict(config.block_ratios) for ratio, config in configs.items()}
    rows = [
        {
            "part": name,
            "alone": -10 * math.log10(found.errors[name]),
            "saving": found.savings[name][PROBE] / whole,
            **{ratio: ratios[patterns[0]] for ratio, ratios in given.items()},
        }
        for name, patterns in found.parts.items()
    ]
    columns = (
        Column("part", "part"),
        Column("alone", f"alone at {PROBE}, dB", lambda value: f"{value:.1f}"),
        Column("saving", "of the saving", lambda value: f"{value:.0%}"),
        *(Column(ratio, f"in place of {ratio}", number) for ratio in given),
    )
    return Table(title="", columns=columns, rows=rows, notes=tuple(notes))
