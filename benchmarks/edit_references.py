"""What merging references costs an edit, on the small Kontext of the repository.

Pairs of scenes that training did not show are edited with the untouched model, with references
merged, with everything merged in blocks, and with fewer steps at the arithmetic of each of those.
The distance is measured inside and outside the edited part: to the untouched model's picture, and
to the true one.

    python -m benchmarks.edit_references --out benchmarks/results
"""

import argparse
import csv
import inspect
import shlex
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import FluxKontextPipeline, FluxTransformer2DModel
from PIL import Image

from examples.small_models.edits import Edit, Picture, draw_edit, edit_of
from examples.small_models.train import UNSEEN
from toma_fx import MergeConfig, restore, transform
from toma_fx.arithmetic import Call, first_call, run_operations
from toma_fx.bench.record import Column, Record, Table, beside, percent
from toma_fx.build import recipe_of_transformed
from toma_fx.calls import LastCall, to_meta
from toma_fx.lab.contenders import affordable
from toma_fx.lab.intervals import mean_interval
from toma_fx.model_border import grids_in

FOLDER = Path(__file__).resolve().parents[1] / "examples" / "small_models"
TOKEN = 8
"""Pixels along a side."""
CONFIGS = {
    **{f"references, {r:g}": MergeConfig(ratio=r, tokens="references") for r in (0.5, 0.75, 0.9)},
    **{f"everything, {r:g}": MergeConfig(ratio=r) for r in (0.25, 0.5)},
}
MEASURES = {
    "inside_untouched": "inside, to untouched",
    "outside_untouched": "outside, to untouched",
    "inside_true": "inside, to true",
    "outside_true": "outside, to true",
}
UNTOUCHED = "untouched"


@dataclass(frozen=True)
class Contender:
    """What edits the pictures, and what it costs."""

    name: str
    config: MergeConfig | None
    steps: int
    arithmetic: float
    """Relative to the untouched model's at all steps."""


@dataclass(frozen=True)
class Pair:
    """A scene before and after an edit, and where the two differ."""

    index: int
    edit: Edit
    before: Picture
    after: Picture
    inside: np.ndarray[Any, np.dtype[np.bool_]]
    """``(H, W)``: whole tokens."""


def pair_of(index: int) -> Pair:
    """A pair that training did not show."""
    edit = edit_of(index)
    before, after = draw_edit(edit, index)
    changed = (before != after).any(-1)
    rows, columns = (size // TOKEN for size in changed.shape)
    tokens = changed.reshape(rows, TOKEN, columns, TOKEN).any((1, 3))
    return Pair(index, edit, before, after, tokens.repeat(TOKEN, 0).repeat(TOKEN, 1))


def pipeline(folder: Path) -> Any:
    """The small Kontext: its transformer, and all else of the small Flux."""
    transformer = FluxTransformer2DModel.from_pretrained(
        folder, subfolder="transformer", dtype=torch.float32
    )
    pipe = FluxKontextPipeline.from_pretrained(
        FOLDER / "flux", transformer=transformer, dtype=torch.float32
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def draw(pipe: Any, pair: Pair, steps: int) -> Picture:
    """The edited picture; its noise follows from the index of the pair."""
    made = pipe(
        image=Image.fromarray(pair.before),
        prompt=pair.edit.prompt,
        height=128,
        width=128,
        max_area=128 * 128,
        _auto_resize=False,
        max_sequence_length=24,
        num_inference_steps=steps,
        generator=torch.Generator().manual_seed(pair.index),
        output_type="np",
    ).images[0]
    return np.asarray(np.clip(made, 0, 1) * 255 + 0.5, np.uint8)


def arithmetic_of(pipe: Any, call: Call, config: MergeConfig, steps: int) -> float:
    """Of a run, relative to the untouched model's."""
    merging = transform(pipe.transformer, config)
    named = inspect.signature(merging.forward).bind(*call.args, **call.kwargs).arguments
    last = LastCall(to_meta(named), grids_in(merging, named))
    counted = run_operations(merging, recipe_of_transformed(merging), last, steps, pipe.scheduler)
    return counted.after[""] / counted.before[""]


def contenders(pipe: Any, steps: int) -> Iterator[Contender]:
    """The untouched model, what merges, and fewer steps of equal arithmetic."""
    call = first_call(pipe.transformer, lambda: draw(pipe, pair_of(UNSEEN), steps))
    yield Contender(UNTOUCHED, None, steps, 1.0)
    fewer: dict[int, Contender] = {}
    for name, config in CONFIGS.items():
        share = arithmetic_of(pipe, call, config, steps)
        yield Contender(name, config, steps, share)
        left = affordable(steps, share)
        fewer[left] = Contender(f"{left} steps", None, left, left / steps)
    yield from (fewer[left] for left in sorted(fewer, reverse=True))


def psnr(picture: Picture, other: Picture, where: Any) -> float:
    """In dB, over a part of the picture."""
    error = (picture[where].astype(float) - other[where].astype(float)) ** 2
    return float(10 * np.log10(255**2 / error.mean())) if error.any() else float("inf")


def measured(pair: Pair, picture: Picture, untouched: Picture | None) -> dict[str, float]:
    """The measures of a picture."""
    found = {}
    for place, where in (("inside", pair.inside), ("outside", ~pair.inside)):
        found[f"{place}_true"] = psnr(picture, pair.after, where)
        if untouched is not None:
            found[f"{place}_untouched"] = psnr(picture, untouched, where)
    return found


@torch.no_grad()
def through_vae(pipe: Any, picture: Picture) -> Picture:
    """A picture that was encoded and decoded: no model draws closer to it, but by luck."""
    pixels = torch.from_numpy(picture.copy()).permute(2, 0, 1)[None] / 127.5 - 1
    decoded = pipe.vae.decode(pipe.vae.encode(pixels).latent_dist.mean).sample[0]
    made = (decoded.permute(1, 2, 0).numpy() + 1) * 127.5 + 0.5
    return np.asarray(np.clip(made, 0, 255), np.uint8)


def summary(name: str, arithmetic: float | None, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Means and the ends of their 95 % intervals."""
    found: dict[str, Any] = {"contender": name, "arithmetic": arithmetic}
    for measure in MEASURES:
        values = [row[measure] for row in rows if measure in row]
        if values and np.isfinite(values).all():
            ends = mean_interval(np.array(values)[:, None])
            found[measure] = [float(np.mean(values)), *ends]
    return found


def _decibels(value: list[float]) -> str:
    mean, low, high = value
    return f"{mean:.1f} ({low:.1f} to {high:.1f})"


def main() -> None:
    """Measure, print, and write."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", type=Path, default=FOLDER / "kontext")
    parser.add_argument("--pairs", type=int, default=32)
    parser.add_argument("--steps", type=int, default=25)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    pipe = pipeline(options.model)
    pairs = [pair_of(UNSEEN + index) for index in range(options.pairs)]
    rows: list[dict[str, Any]] = []
    summaries: list[dict[str, Any]] = []

    def add(name: str, arithmetic: float | None, pictures: list[Picture]) -> None:
        own = [
            {"contender": name, "pair": pair.index, "edit": pair.edit.kind}
            | measured(pair, picture, close)
            for pair, picture, close in zip(pairs, pictures, untouched, strict=True)
        ]
        rows.extend(own)
        summaries.append(summary(name, arithmetic, own))
        print(summaries[-1], flush=True)

    untouched: list[Any] = [None] * len(pairs)
    add("the picture before", None, [pair.before for pair in pairs])
    add("the true one through the VAE", None, [through_vae(pipe, pair.after) for pair in pairs])
    for contender in list(contenders(pipe, options.steps)):
        if contender.config is not None:
            transform(pipe, contender.config)
        pictures = [draw(pipe, pair, contender.steps) for pair in pairs]
        if contender.config is not None:
            restore(pipe)
        add(contender.name, contender.arithmetic, pictures)
        if contender.name == UNTOUCHED:
            untouched = list(pictures)
    columns = (
        Column("contender", "contender"),
        Column("arithmetic", "arithmetic", percent),
        *(Column(key, header, _decibels) for key, header in MEASURES.items()),
    )
    title = f"Small Kontext, {options.pairs} edits, {options.steps} steps: PSNR in dB"
    command = shlex.join(["python", "-m", "benchmarks.edit_references", *sys.argv[1:]])
    record = Record(command=command, folder=options.out)
    record.add(Table(title=title, columns=columns, rows=summaries))
    print(record.tables[0].text())
    if record.stem is not None:
        with beside(record.stem, "-images.csv").open("w", newline="") as stream:
            writer = csv.DictWriter(stream, ["contender", "pair", "edit", *MEASURES])
            writer.writeheader()
            writer.writerows(rows)


if __name__ == "__main__":
    main()
