"""Merging beside what users do instead, by both questions: the same image, and as good an image?

    python -m benchmarks.methods sdxl-25
    python -m benchmarks.methods flux-25 --only "steps" "memory"
    python -m benchmarks.methods sdxl-25 --table

Every row of a scenario draws the same prompts and seeds with a small trained model. *The same
image?* PSNR and SSIM to what the untouched model draws. *As good an image?* The judge's share of
right answers about what the prompt says, and Frechet's distance in the judge's features to true
pictures. The arithmetic is that of the real model at 1024 x 1024. Images that are there are not
drawn again.
"""

import argparse
import csv
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from tabulate import tabulate

import toma_fx
from benchmarks.caches import DeepCache, first_block_cache, taylor_seer
from benchmarks.real_size import real_share
from examples.small_models.judge import Judge, distance_to_true, load_judge, shares
from examples.small_models.pictures import DETAILED_SIZE, Scene, caption, draw, scene_of
from toma_fx import Memory, MergeConfig
from toma_fx.lab.distances import ssim
from toma_fx.lab.intervals import mean_interval
from toma_fx.lab.small_models import FOLDER
from toma_fx.transform import while_transformed

RESULTS = Path(__file__).parent / "results"
IMAGES = Path(__file__).parent.parent / "build" / "methods"
FIRST_SCENE, FIRST_OTHER = 40_000_000, 60_000_000
"""Scenes that no training saw: of the prompts, and of calibrations."""
Images = NDArray[np.uint8]
Applied = Iterator[tuple[Mapping[str, Any], Callable[[], float]]]
"""Changes of the pipeline's call, and a function to the arithmetic of the run that was drawn."""


@dataclass(frozen=True, kw_only=True)
class Scenario:
    """What is drawn: a small model in the place of a real one."""

    model: str
    steps: int
    call: Mapping[str, Any]
    rows: Callable[[int], Iterator["Row"]]
    scheduler: str | None = None
    strength: float | None = None
    """Of a second pass over a true picture that is enlarged to twice the side; None for none."""

    @property
    def real_side(self) -> int:
        """Pixels along a side of the real model's image, whose arithmetic is counted."""
        return 1024 if self.strength is None else 2048

    def nominal(self, steps: int) -> int:
        """The pipeline's number of steps so that it runs ``steps``; a second pass runs some."""
        return steps if self.strength is None else round(steps / self.strength)


@dataclass(frozen=True)
class Row:
    """A way to draw with less arithmetic; this one leaves out steps.

    Attributes:
        name: in tables.
        steps: of the run; None for the scenario's.
        power: of the schedule. Above 1, more of the steps lie where noise is low; "searched" takes
            the power that draws other prompts closest to the untouched model.
    """

    name: str
    steps: int | None = None
    power: float | str = 1.0

    @contextmanager
    def on(self, bench: "Bench") -> Applied:
        """The pipeline changed."""
        steps = self.steps or bench.scenario.steps
        changes: dict[str, Any] = {"num_inference_steps": bench.scenario.nominal(steps)}
        if self.power != 1:
            power = bench.best_power(steps) if self.power == "searched" else float(self.power)
            changes = bench.scheduled(steps, power)
        yield changes, lambda: steps / bench.scenario.steps


@dataclass(frozen=True)
class Merging(Row):
    """A configuration of `toma_fx.transform`, whose theta may be calibrated on other prompts."""

    config: MergeConfig = field(default_factory=MergeConfig)
    calibrated: bool = False

    @contextmanager
    def on(self, bench: "Bench") -> Applied:
        """The pipeline transformed."""
        config = self.config
        if self.calibrated:
            found = toma_fx.calibrate_theta(bench.pipe, lambda _: bench.draw_others(), config)
            config = found.config
        kind, steps, side = bench.scenario.model, bench.scenario.steps, bench.scenario.real_side
        with while_transformed(bench.pipe, config):
            yield {}, lambda: real_share(bench.pipe, kind, config, steps, side)


@dataclass(frozen=True)
class Cached(Row):
    """A cache of another project."""

    cache: Any = None

    @contextmanager
    def on(self, bench: "Bench") -> Applied:
        """The pipeline with the cache."""
        with self.cache.on(bench.pipe, bench.scenario.real_side) as share:
            yield {}, share


def cached(made: Any) -> Cached:
    """A row of a cache, under its own name."""
    return Cached(made.name, cache=made)


def sdxl_rows(steps: int) -> Iterator[Row]:
    """Rows of a scenario with a UNet."""
    yield from _fewer(steps)
    yield from _merging(steps)
    for every in (2, 3, 5) if steps == 25 else (2,):
        yield cached(DeepCache(every))


def flux_rows(steps: int) -> Iterator[Row]:
    """Rows of a scenario with a transformer."""
    yield from _fewer(steps)
    yield from _merging(steps)
    for threshold in (0.06, 0.1, 0.15) if steps == 25 else (0.1,):
        yield cached(first_block_cache(threshold))
    for every in (2, 3) if steps == 25 else (2,):
        yield cached(taylor_seer(every))


def second_pass_rows(steps: int) -> Iterator[Row]:
    """Rows of a second pass with a UNet."""
    yield from (Row(f"{count} steps", steps=count) for count in (8, 6, 4))
    for ratio in (0.25, 0.5, 0.75):
        yield Merging(f"merged at every step, ratio {ratio:g}", config=_config(ratio))
    yield Merging("memory every 2, ratio 0.9", config=_config(0.9, 2), calibrated=True)
    yield Merging("memory every 2, theta 0", config=_config(0.5, 2, theta=0.0))
    yield cached(DeepCache(2))


def _fewer(steps: int) -> Iterator[Row]:
    counts = (20, 18, 15, 12, 10) if steps == 25 else (3, 2)
    yield from (Row(f"{count} steps", steps=count) for count in counts)
    for count in (18, 12) if steps == 25 else (3,):
        yield Row(f"{count} steps, searched schedule", steps=count, power="searched")


def _merging(steps: int) -> Iterator[Row]:
    for ratio in (0.25, 0.5, 0.75):
        yield Merging(f"merged at every step, ratio {ratio:g}", config=_config(ratio))
    if steps == 25:
        for ratio in (0.5, 0.75):
            name = f"merged below noise level 0.8, ratio {ratio:g}"
            yield Merging(name, config=_config(ratio, level=0.8))
    for every in (2, 3) if steps == 25 else (2,):
        level = 0.8 if steps == 25 else 1.0
        where = f"below noise level {level:g}, every {every}" if level < 1 else f"every {every}"
        yield Merging(
            f"memory {where}, ratio 0.9", config=_config(0.9, every, level), calibrated=True
        )
        yield Merging(f"memory {where}, theta 0", config=_config(0.5, every, level, theta=0.0))


def _config(
    ratio: float, every: int | None = None, level: float = 1.0, theta: float | None = None
) -> MergeConfig:
    memory = None if every is None else Memory(every=every, theta=theta)
    # Every block merges: memory has no use for unmerged blocks, and rows must compare alike.
    return MergeConfig(ratio=ratio, merge_below=level, memory=memory, skip=())


SDXL: Mapping[str, Any] = {"guidance_scale": 7.5}
FLUX: Mapping[str, Any] = {
    "true_cfg_scale": 2.0,
    "max_sequence_length": 24,
    "negative_prompt": "",
}
SCENARIOS = {
    "sdxl-25": Scenario(model="sdxl", steps=25, call=SDXL, rows=sdxl_rows),
    "sdxl-25-dpm": Scenario(model="sdxl", steps=25, call=SDXL, rows=sdxl_rows, scheduler="dpm"),
    "sdxl-4": Scenario(model="sdxl", steps=4, call=SDXL, rows=sdxl_rows),
    "second-pass": Scenario(model="sdxl", steps=10, call=SDXL, rows=second_pass_rows, strength=0.4),
    "flux-25": Scenario(model="flux", steps=25, call=FLUX, rows=flux_rows),
    "flux-4": Scenario(model="flux", steps=4, call=FLUX, rows=flux_rows),
}


class Bench:
    """A small pipeline, what its untouched model draws, and the judge."""

    def __init__(self, scenario: Scenario, prompts: int, folder: Path, judge: Judge) -> None:
        self.scenario = scenario
        self.pipe: Any = diffusers.DiffusionPipeline.from_pretrained(folder)
        self.pipe.set_progress_bar_config(disable=True)
        if scenario.scheduler == "dpm":
            made = diffusers.DPMSolverMultistepScheduler.from_config(self.pipe.scheduler.config)
            self.pipe.scheduler = made
        self._judge = judge
        self._size = self.pipe.vae.config.sample_size
        if scenario.strength is not None:
            self.pipe = diffusers.AutoPipelineForImage2Image.from_pipe(self.pipe)
            self.pipe.set_progress_bar_config(disable=True)
        indices = range(FIRST_SCENE, FIRST_SCENE + prompts)
        self._scenes = [scene_of(index, held_out=index % 2 == 1) for index in indices]
        self._others = [scene_of(index) for index in range(FIRST_OTHER, FIRST_OTHER + 4)]
        self._powers: dict[int, float] = {}

    def _draw(self, scenes: list[Scene], **changes: Any) -> Images:
        steps = self.scenario.nominal(self.scenario.steps)
        call = {"num_inference_steps": steps, **self.scenario.call, **changes}
        images = []
        for place in range(0, len(scenes), 4):
            some = scenes[place : place + 4]
            seeds = range(place, place + len(some))
            if "negative_prompt" in call:  # Flux wants as many as there are prompts
                call["negative_prompt"] = [""] * len(some)
            if self.scenario.strength is None:
                call |= {"height": self._size, "width": self._size}
            else:
                call |= {"image": [*map(self._enlarged, some, seeds)]}
                call |= {"strength": self.scenario.strength}
            generators = [torch.Generator().manual_seed(seed) for seed in seeds]
            prompts = [caption(scene) for scene in some]
            images.append(self.pipe(prompts, generator=generators, output_type="np", **call).images)
        drawn: Images = np.asarray(np.concatenate(images) * 255 + 0.5, np.uint8)
        return drawn

    def _enlarged(self, scene: Scene, seed: int) -> Image.Image:
        detailed = self._size == DETAILED_SIZE
        picture = Image.fromarray(draw(scene, seed, size=self._size, detailed=detailed))
        side = 2 * self._size
        return picture.resize((side, side), Image.Resampling.BICUBIC)

    def draw_others(self, **changes: Any) -> NDArray[np.float32]:
        """Prompts on which theta and schedules are chosen, from 0 to 1."""
        drawn: NDArray[np.float32] = (self._draw(self._others, **changes) / 255).astype(np.float32)
        return drawn

    def scheduled(self, steps: int, power: float) -> dict[str, Any]:
        """A call by a schedule whose steps lie at ``(1 - n / steps) ** power``."""
        at = (1 - np.arange(steps) / steps) ** power
        if self.scenario.model == "flux":
            return {"num_inference_steps": steps, "sigmas": at.tolist()}
        times = np.unique((at * 999).round().astype(int))[::-1]
        return {"num_inference_steps": None, "timesteps": times.tolist()}

    def best_power(self, steps: int) -> float:
        """The power that draws other prompts closest to the untouched model."""
        if steps not in self._powers:
            goal = self.draw_others()
            errors = {
                power: float(
                    np.square(self.draw_others(**self.scheduled(steps, power)) - goal).mean()
                )
                for power in (0.7, 0.85, 1.0, 1.15, 1.3)
            }
            self._powers[steps] = min(errors, key=errors.__getitem__)
        return self._powers[steps]

    def draw(self, row: Row | None) -> tuple[Images, float]:
        """The images of a row, None for the untouched model, and the run's arithmetic."""
        if row is None:
            return self._draw(self._scenes), 1.0
        with row.on(self) as (changes, share):
            return self._draw(self._scenes, **changes), share()

    def record(
        self, name: str, share: float, images: Images, untouched: Images | None
    ) -> dict[str, Any]:
        """A row of the results; ``untouched`` is None for the untouched model itself."""
        record: dict[str, Any] = {"row": name, "arithmetic": share, "images": len(images)}
        if untouched is not None:
            gap = images.astype(np.float64) - untouched
            errors = np.square(gap).reshape(len(images), -1).mean(1)
            each = 10 * np.log10(255**2 / np.maximum(errors, 1e-3))
            record |= _with_interval("psnr", each)
            pairs = zip(images, untouched, strict=True)
            record["ssim"] = np.mean([ssim(_tensor(one), _tensor(other)) for one, other in pairs])
        record |= _with_interval("answers", shares(self._judge, images, self._scenes))
        record["frechet"] = distance_to_true(self._judge, images)
        return record


def _with_interval(name: str, values: NDArray[Any]) -> dict[str, float]:
    low, high = mean_interval(values[:, None])
    return {name: float(values.mean()), f"{name} low": low, f"{name} high": high}


def _tensor(image: Images) -> torch.Tensor:
    return torch.from_numpy(image).permute(2, 0, 1)


COLUMNS = (
    *("row", "arithmetic", "images", "psnr", "psnr low", "psnr high", "ssim"),
    *("answers", "answers low", "answers high", "frechet"),
)


def table(file: Path) -> str:
    """The table of a scenario's results, in Markdown; the most arithmetic first."""
    with file.open() as lines:
        known = sorted(csv.DictReader(lines), key=lambda each: -float(each["arithmetic"]))
    shown = [
        (
            each["row"],
            f"{100 * float(each['arithmetic']):.0f} %",
            _span(each, "psnr", 1, 1),
            f"{float(each['ssim']):.3f}" if each["ssim"] else "",
            _span(each, "answers", 100, 0),
            f"{float(each['frechet']):.1f}",
        )
        for each in known
    ]
    heads = ("", "arithmetic", "PSNR, dB (95 %)", "SSIM", "right answers, % (95 %)", "Frechet")
    return tabulate(shown, heads, tablefmt="github")


def _span(record: Mapping[str, str], name: str, scale: float, digits: int) -> str:
    if not record[name]:
        return ""
    mean, low, high = (scale * float(record[f"{name}{end}"]) for end in ("", " low", " high"))
    return f"{mean:.{digits}f} ({low:.{digits}f} to {high:.{digits}f})"


def main(arguments: list[str] | None = None) -> None:
    """Measure what is missing, or print what is there."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("scenario", choices=tuple(SCENARIOS))
    parser.add_argument("--prompts", type=int, default=48)
    parser.add_argument("--model", type=Path, help="another folder of a small pipeline")
    parser.add_argument(
        "--only", nargs="+", default=[""], help="rows whose name holds one of these"
    )
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results")
    parser.add_argument("--images", type=Path, default=IMAGES, help="folder of what is drawn")
    parser.add_argument("--table", action="store_true", help="print the results, draw nothing")
    options = parser.parse_args(arguments)
    scenario = SCENARIOS[options.scenario]
    results = options.out / f"methods-{options.scenario}.csv"
    if not options.table:
        bench = Bench(
            scenario, options.prompts, options.model or FOLDER / scenario.model, load_judge()
        )
        folder = options.images / f"{options.scenario}-{options.prompts}"
        folder.mkdir(parents=True, exist_ok=True)
        rows = {"untouched": None} | {row.name: row for row in scenario.rows(scenario.steps)}
        files = {name: folder / f"{re.sub('[^a-z0-9.]+', '_', name)}.npz" for name in rows}
        for name, row in rows.items():
            wanted = row is None or any(each in name for each in options.only)
            if wanted and not files[name].exists():
                images, share = bench.draw(row)
                np.savez(files[name], images=images, share=share)
                print(f"{name}: {share:.2f} of the arithmetic", flush=True)
        _write(results, _records(bench, files))
    print(table(results))


def _records(bench: Bench, files: Mapping[str, Path]) -> Iterator[dict[str, Any]]:
    drawn = {name: np.load(file) for name, file in files.items() if file.exists()}
    untouched = drawn["untouched"]["images"]
    for name, each in drawn.items():
        reference = None if name == "untouched" else untouched
        yield bench.record(name, float(each["share"]), each["images"], reference)


def _write(file: Path, records: Iterator[dict[str, Any]]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("w", newline="") as out:
        writer = csv.DictWriter(out, COLUMNS)
        writer.writeheader()
        writer.writerows(records)


if __name__ == "__main__":
    main()
