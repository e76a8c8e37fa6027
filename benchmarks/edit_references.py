"""Distances of edits whose references merge, on the small Kontext of the repository.

Pairs of scenes that training did not show are edited with the untouched model, with references
merged, with everything merged in blocks, and with fewer steps at the arithmetic of each of those.
The distance is measured inside and outside the edited part: to the untouched model's picture, and
to the true one. ``--images`` keeps the pictures, and the same command goes on where it was
stopped. The model runs in bfloat16 by autocast, as in its training, the decoder in float32.

    python -m benchmarks.edit_references --out benchmarks/results
"""

import argparse
import csv
import inspect
import shlex
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import FluxKontextPipeline, FluxTransformer2DModel
from PIL import Image
from torch import Tensor

from examples.small_models.edits import Edit, Picture, draw_edit, edit_of
from examples.small_models.losses import autocast, to_pixels
from examples.small_models.train import UNSEEN
from toma_fx import MergeConfig, transform
from toma_fx.arithmetic import Call, first_call, run_operations
from toma_fx.bench.record import Record
from toma_fx.build import recipe_of_transformed
from toma_fx.calls import LastCall, to_meta
from toma_fx.lab.contenders import affordable
from toma_fx.lab.intervals import mean_interval
from toma_fx.model_border import grids_in
from toma_fx.tables import Column, Table, percent

FOLDER = Path(__file__).resolve().parents[1] / "examples" / "small_models"
TOKEN = 8
"""Pixels along a side of a token."""
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
BEFORE = "the picture before"
THROUGH_VAE = "the true one, through the VAE"


@dataclass(frozen=True)
class Contender:
    """A model that edits the pictures, with its arithmetic."""

    name: str
    transformer: Any
    steps: int
    arithmetic: float
    """Arithmetic relative to the untouched model's at all steps."""


@dataclass(frozen=True)
class Pair:
    """A scene before and after an edit, and where the two differ."""

    index: int
    edit: Edit
    before: Picture
    after: Picture
    inside: np.ndarray[Any, np.dtype[np.bool_]]
    """``(H, W)``: the tokens that the edit changed, as whole squares of pixels."""


def pair_of(index: int) -> Pair:
    """A pair of scenes that training did not show."""
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


@torch.no_grad()
def draw(pipe: Any, pair: Pair, steps: int) -> Picture:
    """The edited picture; its noise follows from the index of the pair."""
    with autocast(pipe.device):
        tokens = pipe(
            image=Image.fromarray(pair.before),
            prompt=pair.edit.prompt,
            height=128,
            width=128,
            max_area=128 * 128,
            _auto_resize=False,
            max_sequence_length=24,
            num_inference_steps=steps,
            generator=torch.Generator().manual_seed(pair.index),
            output_type="latent",
        ).images
    config = pipe.vae.config
    latents = pipe._unpack_latents(tokens, 128, 128, pipe.vae_scale_factor).float()
    return decoded(pipe, latents / config.scaling_factor + config.shift_factor)


def decoded(pipe: Any, latents: Tensor) -> Picture:
    """The picture of latents, decoded in float32."""
    pixels = pipe.vae.decode(latents).sample[0].permute(1, 2, 0).numpy()
    return np.asarray(np.clip((pixels + 1) * 127.5 + 0.5, 0, 255), np.uint8)


def arithmetic_of(pipe: Any, call: Call, config: MergeConfig, steps: int) -> float:
    """The arithmetic of a run, relative to the untouched model's."""
    merging = transform(pipe.transformer, config)
    named = inspect.signature(merging.forward).bind(*call.args, **call.kwargs).arguments
    last = LastCall(to_meta(named), grids_in(merging, named))
    counted = run_operations(merging, recipe_of_transformed(merging), last, steps, pipe.scheduler)
    return counted.after[""] / counted.before[""]


def contenders(pipe: Any, steps: int) -> list[Contender]:
    """The untouched model, the merging ones, and fewer steps of equal arithmetic."""
    call = first_call(pipe.transformer, lambda: draw(pipe, pair_of(UNSEEN), steps))
    merging, fewer = [], {}
    for name, config in CONFIGS.items():
        share = arithmetic_of(pipe, call, config, steps)
        merging.append(Contender(name, transform(pipe.transformer, config), steps, share))
        left = affordable(steps, share)
        fewer[left] = Contender(f"{left} steps", pipe.transformer, left, left / steps)
    untouched = Contender(UNTOUCHED, pipe.transformer, steps, 1.0)
    return [untouched, *merging, *(fewer[left] for left in sorted(fewer, reverse=True))]


def psnr(picture: Picture, other: Picture, where: Any) -> float:
    """PSNR in dB, over a part of the picture."""
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
    """A picture that was encoded and decoded; only luck lets a model draw a closer one."""
    return decoded(pipe, pipe.vae.encode(to_pixels(picture[None])).latent_dist.mean)


def rows_of(pipe: Any, pair: Pair, drawing: Sequence[Contender]) -> Iterator[dict[str, Any]]:
    """The measures of each contender on a pair; the first one is the untouched model."""
    own = {"pair": pair.index, "edit": pair.edit.kind}
    yield {"contender": BEFORE, **own, **measured(pair, pair.before, None)}
    yield {"contender": THROUGH_VAE, **own, **measured(pair, through_vae(pipe, pair.after), None)}
    untouched = None
    for contender in drawing:
        pipe.transformer = contender.transformer
        picture = draw(pipe, pair, contender.steps)
        yield {"contender": contender.name, **own, **measured(pair, picture, untouched)}
        untouched = picture if untouched is None else untouched


def summary(name: str, arithmetic: float | None, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Means and the ends of their 95 % intervals."""
    found: dict[str, Any] = {"contender": name, "arithmetic": arithmetic}
    for measure in MEASURES:
        values = [float(row[measure]) for row in rows if row.get(measure)]
        if values and np.isfinite(values).all():
            ends = mean_interval(np.array(values)[:, None])
            found[measure] = [float(np.mean(values)), *ends]
    return found


def _decibels(value: list[float]) -> str:
    mean, low, high = value
    return f"{mean:.1f} ({low:.1f} to {high:.1f})"


def read(file: Path) -> list[dict[str, Any]]:
    """The rows of an earlier run that was stopped."""
    if not file.exists():
        return []
    with file.open(newline="") as stream:
        return list(csv.DictReader(stream))


def main() -> None:
    """Measure, print, and write."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", type=Path, default=FOLDER / "kontext")
    parser.add_argument("--pairs", type=int, default=32)
    parser.add_argument("--steps", type=int, default=25)
    parser.add_argument("--images", type=Path, default=Path("edit_references.csv"))
    parser.add_argument("--out", type=Path, help="folder of the table")
    options = parser.parse_args()
    pipe = pipeline(options.model)
    drawing = contenders(pipe, options.steps)
    rows = read(options.images)
    done = {int(row["pair"]) for row in rows}
    for index in range(UNSEEN, UNSEEN + options.pairs):
        if index in done:
            continue
        rows += (new := list(rows_of(pipe, pair_of(index), drawing)))
        with options.images.open("a", newline="") as stream:
            writer = csv.DictWriter(stream, ["contender", "pair", "edit", *MEASURES])
            if stream.tell() == 0:
                writer.writeheader()
            writer.writerows(new)
    shares = {BEFORE: None, THROUGH_VAE: None} | {each.name: each.arithmetic for each in drawing}
    taken = range(UNSEEN, UNSEEN + options.pairs)
    table = Table(
        title=f"Small Kontext, {options.pairs} edits, {options.steps} steps: PSNR in dB",
        columns=(
            Column("contender", "contender"),
            Column("arithmetic", "arithmetic", percent),
            *(Column(key, header, _decibels) for key, header in MEASURES.items()),
        ),
        rows=[
            summary(
                name,
                share,
                [r for r in rows if r["contender"] == name and int(r["pair"]) in taken],
            )
            for name, share in shares.items()
        ],
    )
    command = shlex.join(["python", "-m", "benchmarks.edit_references", *sys.argv[1:]])
    record = Record(command=command, folder=options.out)
    record.add(table)
    print(table.text())


if __name__ == "__main__":
    main()
