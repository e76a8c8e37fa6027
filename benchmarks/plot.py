"""Quality against cost, a curve for each variant, as in the paper's Figure 5.

python -m benchmarks.plot RESULTS --y psnr ssim
"""

import argparse
import csv
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.options import command_options
from toma_fx.errors import ConfigError
from toma_fx.lab.measures import MEASURES
from toma_fx.lab.tables import SUMMARY
from toma_fx.variants import STEPS, UNTOUCHED

X_LABELS = {
    "arithmetic": "arithmetic of the denoising model (% of untouched)",
    "seconds": "time for an image (s)",
}
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#7f3c8d", "#666666")
"""Colours of Okabe and Ito, which colour-blind people can tell apart, and two more."""
MARKERS = "osD^vPX*"
FEWER_STEPS = "fewer steps"


@dataclass(frozen=True, kw_only=True)
class Point:
    """A contender in a panel."""

    x: float
    y: float
    low: float
    high: float
    text: str
    """The ratio, or the number of steps."""


def plot(
    results: Path, *, x: str = "arithmetic", ys: Sequence[str] = ("psnr",), file: Path | None = None
) -> Path:
    """Draw the measures of `toma_fx.lab.evaluate.evaluate`.

    Args:
        results: its ``out``, or a table of `benchmarks.study.run_study`.
        x: ``"arithmetic"`` or ``"seconds"``.
        ys: names of measures, a panel each.
        file: the PNG file; named after the table and the axes, beside the table, when left out.

    Returns:
        the file.

    Raises:
        ConfigError: when there is no summary, or no figures of a measure in it; the message gives
            the reason that stands there instead.
    """
    table = results if results.is_file() else results / SUMMARY
    rows = _rows(table)
    figure = Figure(figsize=(1.6 + 4.6 * len(ys), 4.8), layout="constrained")
    panels = figure.subplots(1, len(ys), squeeze=False)[0]
    curves: list[str] = []
    for axes, y in zip(panels, ys, strict=True):
        for name in draw_panel(axes, rows, x, y):
            if name not in curves:
                curves.append(name)
    handles = {h.get_label(): h for axes in panels for h in axes.get_legend_handles_labels()[0]}
    figure.legend(
        [handles[name] for name in curves],
        curves,
        loc="outside lower center",
        ncols=4,
        frameon=False,
    )
    figure.suptitle(_title(table.parent, rows), fontsize=10)
    if file is None:
        of = "" if table.name == SUMMARY else f"{table.stem}_"
        file = table.parent / f"{of}{'_'.join(ys)}_{x}.png"
    figure.savefig(file, dpi=150, bbox_inches="tight")  # a legend may be wider than the panels
    return file


def draw_panel(axes: Axes, rows: Sequence[dict[str, str]], x: str, y: str) -> list[str]:
    """Draw one measure's curves; returns their names in the order of the legend.

    Args:
        axes: where to draw.
        rows: of the summary.
        x: ``"arithmetic"`` or ``"seconds"``.
        y: a measure.

    Raises:
        ConfigError: when the measure has no figures.
    """
    curves, untouched = points(rows, x, y)
    for number, (name, its) in enumerate(curves.items()):
        fewer = name == FEWER_STEPS
        colour = "black" if fewer else COLOURS[number % len(COLOURS)]
        style: dict[str, Any] = {"color": colour, "linestyle": "--" if fewer else "-"}
        marker = "|" if fewer else MARKERS[number % len(MARKERS)]
        axes.plot([p.x for p in its], [p.y for p in its], marker=marker, label=name, **style)
        spread = [[p.y - p.low for p in its], [p.high - p.y for p in its]]
        axes.errorbar(
            [p.x for p in its], [p.y for p in its], spread, fmt="none", ecolor=colour, alpha=0.4
        )
        for point in its:
            axes.annotate(
                point.text,
                (point.x, point.y),
                xytext=(4, 5),
                textcoords="offset points",
                fontsize=7,
                color=colour,
            )
    names = list(curves)
    if untouched is not None:
        axes.axhline(untouched, color="grey", linewidth=1, linestyle=":", label=UNTOUCHED)
        names.append(UNTOUCHED)
    axes.set_xlabel(X_LABELS[x])
    axes.set_ylabel(f"{MEASURES[y].label}, {MEASURES[y].better} is better")
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    return names


def points(
    rows: Sequence[dict[str, str]], x: str, y: str
) -> tuple[dict[str, list[Point]], float | None]:
    """A measure's points by curve, in the order of x, and the untouched model's value, if any.

    All variants with fewer steps are one curve. Points at infinity (the PSNR of equal images) are
    left out, since they have no place.

    Args:
        rows: of the summary.
        x: ``"arithmetic"``, which becomes per cent, or ``"seconds"``.
        y: a measure.

    Raises:
        ConfigError: when there is nothing to draw.
    """
    curves: dict[str, list[Point]] = {}
    untouched = None
    values = [row.get(y, "") for row in rows]
    for row, value in zip(rows, values, strict=True):
        number = _number(value)
        if not math.isfinite(number):
            continue
        if row["variant"] == UNTOUCHED:
            untouched = number
            continue
        fewer = row["variant"].partition("=")[0] == STEPS
        low, high = (_number(row[f"{y}_{end}"]) for end in ("low", "high"))
        point = Point(
            x=float(row[x]) * (100 if x == "arithmetic" else 1),
            y=number,
            low=low if math.isfinite(low) else number,
            high=high if math.isfinite(high) else number,
            text=f"{row['steps']} steps" if fewer else f"{float(row['ratio']):g}",
        )
        curves.setdefault(FEWER_STEPS if fewer else row["variant"], []).append(point)
    if not curves:
        reasons = {value for value in values if value and not math.isfinite(_number(value))}
        raise ConfigError(
            f"y={y!r} has no figures to plot: {'; '.join(sorted(reasons)) or 'it was not measured'}"
        )
    return {name: sorted(its, key=lambda p: p.x) for name, its in curves.items()}, untouched


def _rows(file: Path) -> list[dict[str, str]]:
    try:
        with file.open(newline="", encoding="utf-8") as stream:
            return list(csv.DictReader(stream))
    except OSError as error:
        raise ConfigError(
            f"{file} cannot be read: {error.strerror}; give the --out of toma-fx eval, or the "
            "table of a study"
        ) from error


def _title(folder: Path, rows: Sequence[dict[str, str]]) -> str:
    settings = json.loads((folder / "settings.json").read_text())
    model = Path(settings["model"]).name
    return (
        f"{model}, {settings['steps']} steps, {rows[0]['images']} images a point; "
        "bars: 95 % intervals; numbers: share of tokens merged"
    )


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return math.nan


def main(arguments: Sequence[str] | None = None) -> None:
    """Plot the results of an evaluation or a study."""
    parser = argparse.ArgumentParser(description="Plot quality against cost.")
    add = parser.add_argument
    add(
        "results",
        type=Path,
        metavar="RESULTS",
        help="the --out of toma-fx eval, or a study's table such as DIR/variants.csv",
    )
    add("--x", choices=tuple(X_LABELS), default="arithmetic")
    add("--y", nargs="+", choices=tuple(MEASURES), default=["psnr"], help="a panel each (psnr)")
    add("--out", type=Path, metavar="FILE", help="(psnr_arithmetic.png there)")
    options = command_options(parser, "benchmarks.plot", arguments)
    print(plot(options.results, x=options.x, ys=tuple(options.y), file=options.out))


if __name__ == "__main__":
    main()
