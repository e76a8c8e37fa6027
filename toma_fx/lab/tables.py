"""The results of an evaluation as files and as text."""

import csv
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from toma_fx.lab.contenders import Contender
from toma_fx.lab.gallery import write_whole
from toma_fx.lab.intervals import LEVEL, mean_interval
from toma_fx.lab.measures import MEASURES, Unavailable
from toma_fx.lab.prompts import Prompt
from toma_fx.lab.score import Scores
from toma_fx.tables import Column, Table, percent

IMAGES = "images.csv"
SUMMARY = "summary.csv"


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """A contender, and the times and measures of its images, prompt by prompt and seed by seed."""

    contender: Contender
    files: tuple[Path, ...]
    seconds: tuple[float, ...]
    scores: Scores


def image_rows(
    outcomes: Sequence[Outcome], prompts: Sequence[Prompt], seeds: int, chosen: Sequence[str]
) -> list[dict[str, Any]]:
    """A row for each image: its contender, prompt and seed, and every measure of single images.

    Args:
        outcomes: one for each contender.
        prompts: the ``P`` prompts.
        seeds: ``S``, the number of seeds.
        chosen: names of the measures.
    """
    wanted = [name for name in chosen if MEASURES[name].kind != "set"]
    return [
        {
            "variant": outcome.contender.variant,
            "ratio": _or_blank(outcome.contender.ratio),
            "steps": outcome.contender.steps,
            "arithmetic": outcome.contender.arithmetic,
            "prompt": index // seeds,
            "text": prompts[index // seeds].text,
            "seed": index % seeds,
            "seconds": outcome.seconds[index],
            **{name: _of_image(outcome.scores.get(name), index) for name in wanted},
            "file": str(Path(*file.parts[-3:])),
        }
        for outcome in outcomes
        for index, file in enumerate(outcome.files)
    ]


def summary_rows(
    outcomes: Sequence[Outcome], seeds: int, chosen: Sequence[str]
) -> list[dict[str, Any]]:
    """A row for each contender: means with the ends of their 95 % intervals, and median seconds.

    A measure that could not be made holds its reason instead. A figure that does not exist (the
    untouched model compared with itself; an interval of FID) is blank.
    """
    return [
        {
            "variant": outcome.contender.variant,
            "ratio": _or_blank(outcome.contender.ratio),
            "steps": outcome.contender.steps,
            "arithmetic": outcome.contender.arithmetic,
            "images": len(outcome.files),
            "seconds": statistics.median(outcome.seconds),
            **{k: v for name in chosen for k, v in _mean(outcome, name, seeds).items()},
        }
        for outcome in outcomes
    ]


def write_table(rows: Sequence[dict[str, Any]], file: Path) -> None:
    """Write rows as CSV; an earlier file is replaced at once."""

    def write(part: Path) -> None:
        with part.open("w", newline="", encoding="utf-8") as stream:
            writer = csv.DictWriter(stream, fieldnames=list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)

    write_whole(file, write)


def as_table(rows: Sequence[dict[str, Any]], chosen: Sequence[str]) -> Table:
    """The summary for people, with the reasons for missing figures below it.

    Args:
        rows: those of `summary_rows`, perhaps with more keys.
        chosen: names of the measures.
    """
    reasons: list[str] = []
    shown = [{**row, **{name: cell(row, name, reasons) for name in chosen}} for row in rows]
    columns = (
        Column("variant", "variant"),
        Column("ratio", "ratio"),
        Column("steps", "steps"),
        Column("arithmetic", "arithmetic", percent),
        Column("seconds", "s an image", lambda value: f"{value:.3g}"),
        *(Column(n, f"{MEASURES[n].label}, {MEASURES[n].better}") for n in chosen),
    )
    legend = (
        f"{rows[0]['images']} images each; means with {LEVEL:.0%} intervals over prompts and seeds",
        "arithmetic of the denoising model relative to untouched; seconds are medians",
    )
    notes = [f"[{number}] {reason}" for number, reason in enumerate(reasons, 1)]
    return Table(title="", columns=columns, rows=shown, notes=(*legend, *notes))


def _mean(outcome: Outcome, name: str, seeds: int) -> dict[str, Any]:
    values = outcome.scores.get(name)
    ends = (f"{name}_low", f"{name}_high")
    if values is None:
        return dict.fromkeys((name, *ends), "")
    if isinstance(values, Unavailable):
        return {name: str(values), **dict.fromkeys(ends, "")}
    if MEASURES[name].kind == "set":
        return {name: values[0], **dict.fromkeys(ends, "")}
    interval = mean_interval(np.reshape(values, (-1, seeds)))
    blank = interval[0] != interval[0]
    shown: Iterable[Any] = ("", "") if blank else interval
    return {name: statistics.fmean(values), **dict(zip(ends, shown, strict=True))}


def cell(row: dict[str, Any], name: str, reasons: list[str]) -> str:
    """A mean with its interval, or the number of the reason why there is none.

    Args:
        row: a row of `summary_rows`.
        name: a measure.
        reasons: the reasons so far; a new one is added.
    """
    value = row[name]
    if isinstance(value, str):
        if not value:
            return ""
        if value not in reasons:
            reasons.append(value)
        return f"[{reasons.index(value) + 1}]"
    low, high = row[f"{name}_low"], row[f"{name}_high"]
    return f"{value:.4g}" if low == "" else f"{value:.4g} ({low:.4g} to {high:.4g})"


def _of_image(values: list[float] | Unavailable | None, index: int) -> Any:
    if values is None:
        return ""
    return str(values) if isinstance(values, Unavailable) else values[index]


def _or_blank(value: float | None) -> Any:
    return "" if value is None else value
