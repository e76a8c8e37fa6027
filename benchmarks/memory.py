"""How close memory stays to the untouched image, for its arithmetic, on the small trained models.

Every row draws the same prompts and seeds, and compares them with what the untouched model draws.
The arithmetic is that of the real model at 1024 x 1024, where blocks are a larger share of the
whole than in the small one: fewer steps, and a cache that runs nothing between full steps
(``Memory(theta=0)``), stand beside it.

    python -m benchmarks.memory sdxl --scheduler euler
    python -m benchmarks.memory sdxl --scheduler dpm
    python -m benchmarks.memory flux
    python -m benchmarks.memory sdxl --steps 4

A row that the results hold already is not drawn again. ``--table`` prints them.
"""

import argparse
import csv
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
from numpy.typing import NDArray
from tabulate import tabulate

import toma_fx
from benchmarks.real_size import RealSize, real_share
from toma_fx import Memory, MergeConfig
from toma_fx.lab.intervals import mean_interval
from toma_fx.lab.small_models import CALIBRATION, FOLDER, PROMPTS

RESULTS = Path(__file__).parent / "results"
ARGUMENTS: Mapping[str, Mapping[str, Any]] = {
    "sdxl": {"guidance_scale": 7.5},
    "flux": {"true_cfg_scale": 2.0, "max_sequence_length": 24, "negative_prompt": ""},
}
"""SDXL has a usual guidance; Flux has the guidance of the small model's card."""
THETA = {"sdxl": 1.0, "flux": 0.25}
"""Theta of the rows that are not calibrated."""
COLUMNS = ("row", "arithmetic", "psnr", "low", "high", "prompts", "psnr of each")
Images = NDArray[np.float32]


@dataclass(frozen=True)
class Row:
    """A row of the table: some steps of the untouched model, or all steps of a transformed one."""

    name: str
    config: MergeConfig | None = None
    steps: int | None = None
    calibrated: bool = False
    """Whether `toma_fx.calibrate_theta` chooses theta, on other prompts."""


def rows(kind: str, steps: int) -> Iterator[Row]:
    """The rows of a model, for runs with this number of steps."""
    fewer = (20, 18, 16, 14) if steps == 25 else (3, 2)
    for count in fewer:
        yield Row(f"{count} steps", steps=count)
    for ratio in (0.25, 0.5, 0.75):
        yield Row(f"merged at every step, {ratio}", _config(ratio))
    for every in (2, 3, 4, 6) if steps == 25 else (2,):
        yield Row(f"nothing run between, every {every}", _config(0.5, every, theta=0.0))
        yield Row(f"(1), every {every}, 0.5", _config(0.5, every, theta=1.0, form=1))
        yield Row(f"(2), every {every}, 0.9", _config(0.9, every, theta=1.0, form=2))
        yield Row(f"(3), every {every}, 0.9", _config(0.9, every, theta=THETA[kind]))
        yield Row(f"(3), every {every}, 0.9, calibrated", _config(0.9, every), calibrated=True)
    if steps == 25:
        for level, every in ((0.8, 2), (0.8, 3), (0.6, 2), (0.6, 3), (0.6, 4), (0.6, 6)):
            below = f"below {level}, every {every}"
            for ratio in (0.75, 0.9):
                config = _config(ratio, every, level=level, theta=THETA[kind])
                yield Row(f"(3), {ratio}, {below}", config)
            yield Row(
                f"(3), 0.9, {below}, calibrated", _config(0.9, every, level=level), calibrated=True
            )
            yield Row(f"nothing run between, {below}", _config(0.5, every, level=level, theta=0.0))
        for level, ratio in ((0.8, 0.5), (0.6, 0.5), (0.6, 0.75)):
            yield Row(f"merged below {level}, {ratio}", _config(ratio, level=level))


def _config(
    ratio: float,
    every: int | None = None,
    *,
    level: float = 1.0,
    theta: float | None = None,
    form: int = 3,
) -> MergeConfig:
    memory = None
    if every is not None:
        memory = Memory(every=every, theta=theta, extrapolate=form == 3, control=form != 1)
    # Every block merges: memory has no use for unmerged blocks, and rows must compare alike.
    return MergeConfig(ratio=ratio, merge_below=level, memory=memory, skip=())


class Bench:
    """A small pipeline, and the images of its untouched model."""

    def __init__(self, kind: str, scheduler: str, steps: int, prompts: list[str]) -> None:
        self._kind, self._steps, self._prompts = kind, steps, prompts
        self._pipe = diffusers.DiffusionPipeline.from_pretrained(FOLDER / kind)
        self._pipe.set_progress_bar_config(disable=True)
        if scheduler == "dpm":
            made = diffusers.DPMSolverMultistepScheduler.from_config(self._pipe.scheduler.config)
            self._pipe.scheduler = made
        self._untouched = self._draw(self._prompts)

    def _draw(self, prompts: list[str], steps: int | None = None) -> Images:
        images = []
        for place in range(0, len(prompts), 8):
            some = prompts[place : place + 8]
            seeds = range(place, place + len(some))
            images.append(
                self._pipe(
                    some,
                    height=128,
                    width=128,
                    num_inference_steps=steps or self._steps,
                    generator=[torch.Generator().manual_seed(seed) for seed in seeds],
                    output_type="np",
                    **ARGUMENTS[self._kind],
                ).images
            )
        return np.concatenate(images)

    def measure(self, row: Row) -> dict[str, Any]:
        """A row of the results."""
        config, name = row.config, row.name
        if row.calibrated:
            assert config is not None
            others = CALIBRATION.read_text().splitlines()[:4]
            found = toma_fx.calibrate_theta(self._pipe, lambda pipe: self._draw(others), config)
            config, name = found.config, f"{name}: theta {found.theta:g}"
        if config is not None:
            toma_fx.transform(self._pipe, config)
        images = self._draw(self._prompts, row.steps)
        if config is None:
            share = (row.steps or self._steps) / self._steps
        else:
            share = real_share(self._pipe, RealSize(self._kind), config, self._steps)
            toma_fx.restore(self._pipe)
        errors = ((images - self._untouched) ** 2).reshape(len(images), -1).mean(1)
        each = -10 * np.log10(np.maximum(errors, 1e-12))
        low, high = mean_interval(each[:, None])
        found_row = (name, share, each.mean(), low, high, len(each))
        numbers = " ".join(f"{value:.2f}" for value in each)
        return dict(zip(COLUMNS, (*found_row, numbers), strict=True))


def main() -> None:
    """Measure the missing rows, or print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("kind", choices=tuple(ARGUMENTS))
    parser.add_argument("--scheduler", choices=("euler", "dpm"), default="euler")
    parser.add_argument("--steps", type=int, choices=(4, 25), default=25)
    parser.add_argument("--prompts", type=int, default=16)
    parser.add_argument(
        "--only", nargs="+", default=[""], help="rows whose name holds one of these"
    )
    parser.add_argument("--table", action="store_true", help="print the results")
    options = parser.parse_args()
    file = RESULTS / f"memory-{options.kind}-{options.scheduler}-{options.steps}-steps.csv"
    known = list(csv.DictReader(file.open())) if file.exists() else []
    if not options.table:
        prompts = PROMPTS.read_text().splitlines()[: options.prompts]
        bench = Bench(options.kind, options.scheduler, options.steps, prompts)
        for row in rows(options.kind, options.steps):
            if not any(each in row.name for each in options.only):
                continue
            if not any(each["row"].partition(": theta")[0] == row.name for each in known):
                known.append(bench.measure(row))
                print(known[-1]["row"], known[-1]["arithmetic"], known[-1]["psnr"], flush=True)
                with file.open("w", newline="") as out:
                    writer = csv.DictWriter(out, COLUMNS)
                    writer.writeheader()
                    writer.writerows(known)
    known.sort(key=lambda each: -float(each["arithmetic"]))
    lines = [
        (
            each["row"],
            f"{100 * float(each['arithmetic']):.0f} %",
            f"{float(each['psnr']):.1f}",
            f"{float(each['low']):.1f} to {float(each['high']):.1f}",
        )
        for each in known
    ]
    print(tabulate(lines, ("", "arithmetic", "PSNR, dB", "95 %"), tablefmt="github"))


if __name__ == "__main__":
    main()
