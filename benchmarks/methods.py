"""Merging beside what users do instead, by both questions: the same image, and as good an image?

    python -m benchmarks.methods sdxl-25
    python -m benchmarks.methods flux-25 --only "steps" "memory"
    python -m benchmarks.methods sdxl-25 --table --against "18 steps, searched schedule"

Every row of a scenario draws the same prompts and seeds with a small trained model. *The same
image?* PSNR and SSIM to what the untouched model draws. *As good an image?* The judge's share of
right answers about what the prompt says, and Frechet's distance in the judge's features to true
pictures; of a clip, the judge sees the first, the middle and the last frame. The arithmetic is that
of the real model at its own size, and for merging and fewer steps also that of the small model.
Images that are there are not drawn again.

``--against`` compares rows image by image. This tells rows apart whose own intervals overlap, since
all draw the same prompts and seeds.
"""

import argparse
import csv
import itertools
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
from numpy.typing import NDArray
from tabulate import tabulate

import toma_fx
from benchmarks.scenarios import SCENARIOS, Item, Merging, Row, Scenario
from examples.small_models.check import drawn_by, size_of
from examples.small_models.judge import Judge, distance_to_true, load_judge, shares
from examples.small_models.videos import looked_at
from toma_fx.lab.distances import ssim
from toma_fx.lab.intervals import mean_interval
from toma_fx.lab.small_models import FOLDER
from toma_fx.transform import while_transformed

RESULTS = Path(__file__).parent / "results"
IMAGES = Path(__file__).parent.parent / "build" / "methods"
FIRST_SCENE, FIRST_OTHER = 40_000_000, 60_000_000
"""Scenes that no training saw: of the prompts, and of calibrations."""
DEVICE, TOGETHER = ("cuda", 16) if torch.cuda.is_available() else ("cpu", 4)
"""Where images are drawn, and how many at a time."""
Images = NDArray[np.uint8]
"""``(N, H, W, 3)``, or clips ``(N, frames, H, W, 3)``."""


class Bench:
    """A small pipeline, what its untouched model draws, and the judge."""

    def __init__(self, scenario: Scenario, prompts: int, folder: Path, judge: Judge) -> None:
        self.scenario = scenario
        self.pipe: Any = scenario.load(folder).to(DEVICE)
        self.pipe.set_progress_bar_config(disable=True)
        if scenario.scheduler == "dpm":
            made = diffusers.DPMSolverMultistepScheduler.from_config(self.pipe.scheduler.config)
            self.pipe.scheduler = made
        self._judge = judge
        size = size_of(self.pipe)
        self._size = {} if "strength" in scenario.call else {"height": size, "width": size}
        indices = range(FIRST_SCENE, FIRST_SCENE + prompts)
        self._items = [scenario.item(index, index % 2 == 1, size) for index in indices]
        others = range(FIRST_OTHER, FIRST_OTHER + 4)
        self._others = [scenario.item(index, False, size) for index in others]
        self._powers: dict[int, float] = {}

    def _draw(self, items: Sequence[Item], **changes: Any) -> Images:
        steps = self.scenario.nominal(self.scenario.steps)
        call = {"num_inference_steps": steps, **self._size, **self.scenario.call, **changes}
        images = []
        for place in range(0, len(items), TOGETHER):
            some = items[place : place + TOGETHER]
            if "negative_prompt" in call:  # Flux wants as many as there are prompts
                call["negative_prompt"] = [""] * len(some)
            call |= {key: [each.inputs[key] for each in some] for key in some[0].inputs}
            seeds = range(place, place + len(some))
            call["generator"] = [torch.Generator().manual_seed(seed) for seed in seeds]
            call["prompt"] = [each.prompt for each in some]
            images.append(drawn_by(self.pipe(**call, output_type="np")))
        return np.concatenate(images)

    def draw_others(self, **changes: Any) -> NDArray[np.float32]:
        """Prompts on which theta and schedules are chosen, from 0 to 1."""
        drawn: NDArray[np.float32] = (self._draw(self._others, **changes) / 255).astype(np.float32)
        return drawn

    def scheduled(self, steps: int, power: float) -> dict[str, Any]:
        """A call by a schedule whose steps lie at ``(1 - n / steps) ** power``."""
        at = (1 - np.arange(steps) / steps) ** power
        if self.scenario.real.name == "flux":  # Kontext too
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
            return self._draw(self._items), 1.0
        with row.on(self) as (changes, share):
            return self._draw(self._items, **changes), share()

    def small_share(self, row: Row | None) -> float | None:
        """The arithmetic of the small model's own run; None for a row that is not counted.

        Those are others' methods, and merging whose theta is calibrated.
        """
        if row is None:
            return 1.0
        if type(row) is Row:
            return (row.steps or self.scenario.steps) / self.scenario.steps
        if not isinstance(row, Merging) or row.calibrated:
            return None
        with while_transformed(self.pipe, row.config):
            # The report speaks of the last call's sizes, which any run has.
            self._draw(self._items[:1], num_inference_steps=self.scenario.nominal(2))
            counted = toma_fx.report(self.pipe, steps=self.scenario.steps)
        return counted.flops_after / counted.flops_before

    def record(
        self, name: str, share: float, images: Images, untouched: Images | None
    ) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        """A row of the results, and a row for each of its images.

        ``untouched`` is None for the untouched model itself.
        """
        record: dict[str, Any] = {"row": name, "arithmetic": share, "images": len(images)}
        each: list[dict[str, Any]] = [{"row": name, "image": n} for n in range(len(images))]
        if untouched is not None:
            gap = images.astype(np.float64) - untouched
            errors = np.square(gap).reshape(len(images), -1).mean(1)
            psnrs = 10 * np.log10(255**2 / np.maximum(errors, 1e-3))
            record |= _with_interval("psnr", psnrs)
            for image, psnr in zip(each, psnrs, strict=True):
                image["psnr"] = f"{psnr:.3f}"
            pairs = zip(_frames(images), _frames(untouched), strict=True)
            record["ssim"] = np.mean([ssim(_tensor(one), _tensor(other)) for one, other in pairs])
        pictures, scenes = looked_at(images, [each.scene for each in self._items])
        answers = shares(self._judge, pictures, scenes).reshape(len(images), -1).mean(1)
        record |= _with_interval("answers", answers)
        record["frechet"] = distance_to_true(self._judge, pictures)
        for image, right in zip(each, answers, strict=True):
            image["answers"] = f"{right:.4f}"
        return record, each


def _with_interval(name: str, values: NDArray[Any]) -> dict[str, float]:
    low, high = mean_interval(values[:, None])
    return {name: float(values.mean()), f"{name} low": low, f"{name} high": high}


def _frames(images: Images) -> Images:
    return images.reshape(-1, *images.shape[-3:])


def _tensor(image: Images) -> torch.Tensor:
    return torch.from_numpy(image).permute(2, 0, 1)


COLUMNS = (
    *("row", "arithmetic", "small", "images", "psnr", "psnr low", "psnr high", "ssim"),
    *("answers", "answers low", "answers high", "frechet"),
)
IMAGE_COLUMNS = ("row", "image", "psnr", "answers")


def table(file: Path) -> str:
    """The table of a scenario's results, in Markdown; the most arithmetic first."""
    with file.open() as lines:
        known = sorted(csv.DictReader(lines), key=lambda each: -float(each["arithmetic"]))
    shown = [
        (
            each["row"],
            f"{100 * float(each['arithmetic']):.0f} %",
            f"{100 * float(each['small']):.0f} %" if each["small"] else "",
            _span(each, "psnr", 1, 1),
            f"{float(each['ssim']):.3f}" if each["ssim"] else "",
            _span(each, "answers", 100, 0),
            f"{float(each['frechet']):.1f}",
        )
        for each in known
    ]
    heads = (
        "",
        "arithmetic",
        "small model",
        "PSNR, dB (95 %)",
        "SSIM",
        "right answers, % (95 %)",
        "Frechet",
    )
    return tabulate(shown, heads, tablefmt="github")


def paired(file: Path, row: str, other: str, measure: str) -> tuple[float, float, float]:
    """The mean difference of a row to another, image by image, and its interval at 95 %.

    Args:
        file: of single images, as `images_file` names it.
        row: the one, and
        other: the other that is subtracted.
        measure: ``"psnr"``, in dB, or ``"answers"``, from 0 to 1.
    """
    with file.open() as lines:
        values = {
            (each["row"], each["image"]): float(each[measure])
            for each in csv.DictReader(lines)
            if each[measure]
        }
    gaps = [value - values[other, n] for (name, n), value in values.items() if name == row]
    low, high = mean_interval(np.asarray(gaps)[:, None])
    return float(np.mean(gaps)), low, high


def images_file(results: Path) -> Path:
    """The file with the figures of single images, beside a scenario's results."""
    return results.with_name(results.name.replace("methods-", "images-"))


def differences(results: Path, other: str) -> str:
    """The table of every row's paired differences to ``other``, in Markdown."""
    with results.open() as lines:
        names = [each["row"] for each in csv.DictReader(lines) if each["psnr"]]
    if other not in names:
        raise SystemExit(f"--against {other!r} must be one of {', '.join(map(repr, names))}")
    file = images_file(results)
    shown = [
        (
            name,
            _spanned(*paired(file, name, other, "psnr"), digits=1),
            _spanned(*(100 * each for each in paired(file, name, other, "answers")), digits=0),
        )
        for name in names
        if name != other
    ]
    heads = (f"minus {other!r}", "PSNR, dB (95 %)", "right answers, points (95 %)")
    return tabulate(shown, heads, tablefmt="github")


def _span(record: Mapping[str, str], name: str, scale: float, digits: int) -> str:
    if not record[name]:
        return ""
    ends = (scale * float(record[f"{name}{end}"]) for end in ("", " low", " high"))
    return _spanned(*ends, digits=digits)


def _spanned(mean: float, low: float, high: float, *, digits: int) -> str:
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
    parser.add_argument(
        "--against", metavar="ROW", help="also print each row's paired difference to this one"
    )
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
        records, each = zip(*_records(bench, rows, files), strict=True)
        _write(results, COLUMNS, records)
        _write(images_file(results), IMAGE_COLUMNS, itertools.chain(*each))
    print(table(results))
    if options.against is not None:
        print(f"\n{differences(results, options.against)}")


def _records(
    bench: Bench, rows: Mapping[str, Row | None], files: Mapping[str, Path]
) -> Iterator[tuple[dict[str, Any], list[dict[str, Any]]]]:
    drawn = {name: np.load(file) for name, file in files.items() if file.exists()}
    untouched = drawn["untouched"]["images"]
    for name, each in drawn.items():
        reference = None if name == "untouched" else untouched
        record, images = bench.record(name, float(each["share"]), each["images"], reference)
        yield record | {"small": bench.small_share(rows[name])}, images


def _write(file: Path, columns: Sequence[str], records: Iterable[Mapping[str, Any]]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("w", newline="") as out:
        writer = csv.DictWriter(out, columns)
        writer.writeheader()
        writer.writerows(records)


if __name__ == "__main__":
    main()
