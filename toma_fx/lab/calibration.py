"""``toma-fx calibrate``: find a ratio for each block, and write it as a variant for the lab."""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tabulate import tabulate
from tqdm import tqdm

from toma_fx.calibrate import NOISE_LEVELS, PROBE, Calibration, calibrate
from toma_fx.errors import ConfigError
from toma_fx.lab.draw import Task, draw, load_pipeline
from toma_fx.lab.gallery import write_whole
from toma_fx.lab.variants import Allotted, Merging, parse_variant

SEED = 1_000_000
"""The first seed of calibration, far from those that images are compared with."""


def calibrate_to_file(
    task: Task,
    variant: Merging,
    ratios: Sequence[float],
    file: Path,
    noise_levels: Sequence[float] = NOISE_LEVELS,
) -> str:
    """Calibrate a pipeline, and write what is allotted at the arithmetic of each ratio.

    Args:
        task: what is drawn to calibrate; other prompts than those of later comparison.
        variant: all options that are not allotted.
        ratios: uniform ratios, whose arithmetic is allotted anew.
        file: ends in ``.json``; `load_allotted` reads it.
        noise_levels: to choose from; see `toma_fx.calibrate`.

    Returns:
        a table: what each group costs, saves and gets.

    Raises:
        TomaError: when the model or an option is not what it must be.
    """
    if file.suffix != ".json":
        raise ConfigError(f"out={str(file)!r} must end in .json")
    pipeline = load_pipeline(task.model, dtype=task.dtype)

    def images(pipeline: Any) -> Any:
        return np.stack(
            [
                np.asarray(draw(pipeline, task, prompt, SEED + seed)[0]) / 255
                for prompt in task.prompts
                for seed in range(task.seeds)
            ]
        )

    with tqdm(unit="set") as bar:

        def progress(what: str) -> None:
            bar.set_description(what)
            bar.update()

        found = calibrate(
            pipeline, images, variant.config(PROBE), noise_levels=noise_levels, progress=progress
        )
    configs = {ratio: found.config(ratio) for ratio in ratios}
    content = {
        "variant": variant.name,
        "by_ratio": {
            str(ratio): {
                "block_ratios": dict(config.block_ratios),
                "merge_below": config.merge_below,
                "skip": [],
            }
            for ratio, config in configs.items()
        },
    }
    text = json.dumps(content, indent=1) + "\n"
    write_whole(file, lambda part: part.write_text(text, encoding="utf-8"))
    return _table(found, configs)


def load_allotted(file: Path) -> Allotted:
    """What `calibrate_to_file` wrote, as a variant with the name of the file.

    Raises:
        ConfigError: when there is no such file, or it holds something else.
    """
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        base: Any = parse_variant(content["variant"])
        by_ratio = {float(ratio): fields for ratio, fields in content["by_ratio"].items()}
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise ConfigError(
            f"variant={str(file)!r} is no file that toma-fx calibrate wrote: {error}"
        ) from error
    assert isinstance(base, Merging)
    allotted = Allotted(name=file.stem, preset=base.preset, changes=base.changes, by_ratio=by_ratio)
    for ratio in by_ratio:
        allotted.config(ratio)
    return allotted


def _table(found: Calibration, configs: dict[float, Any]) -> str:
    whole = found.uniform(PROBE)
    rows = [
        (
            name,
            _db(found.errors[name]),
            f"{found.savings[name][PROBE] / whole:.0%}",
            *(config.ratio_of(_path(patterns)) for config in configs.values()),
        )
        for name, patterns in found.groups.items()
    ]
    levels = (config.merge_below for config in configs.values())
    rows.append(("merge_below", "", "", *levels))
    headers = ["group", f"alone at {PROBE}, dB", "of the saving"]
    headers += [f"in place of {ratio:g}" for ratio in configs]
    return tabulate(rows, headers, disable_numparse=True)


def _path(patterns: Sequence[str]) -> str:
    return patterns[0].replace("*", "0")


def _db(error: float) -> str:
    return f"{-10 * math.log10(error):.1f}"
