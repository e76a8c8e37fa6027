"""Plots of how the operators' time and memory grow, with matplotlib."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from benchmarks.plot import COLOURS, MARKERS
from toma_fx.errors import ConfigError

AXES = {
    "tokens": "tokens of an image",
    "ratio": "share of tokens merged away",
    "batch": "images",
    "region_tokens": "tokens of a region",
}
PANELS = (("seconds", "time of a call (s)"), ("peak_bytes", "peak memory of a call (bytes)"))


def plot_growth(rows: Sequence[Mapping[str, Any]], file: Path) -> Path:
    """Draw time and memory against everything that varies, other things at their first value.

    Args:
        rows: the rows of `benchmarks.operators.operators`.
        file: the PNG file.

    Returns:
        the file.

    Raises:
        ConfigError: when nothing varies.
    """
    varying = varies(rows)
    if not varying:
        raise ConfigError(
            "nothing varies, so there is nothing to plot; give several --tokens, --ratio, --batch "
            "or --region-tokens"
        )
    figure = Figure(figsize=(1 + 4.8 * len(varying), 8), layout="constrained")
    panels = figure.subplots(len(PANELS), len(varying), squeeze=False)
    for column, axis in enumerate(varying):
        for line, (key, label) in enumerate(PANELS):
            axes = panels[line][column]
            for number, (name, xs, ys) in enumerate(curves(rows, axis, key)):
                style = {"color": COLOURS[number % len(COLOURS)], "marker": MARKERS[number % 8]}
                axes.plot(xs, ys, label=name, linestyle="--" if "tomesd" in name else "-", **style)
            axes.set_yscale("log")
            if axis != "ratio":
                axes.set_xscale("log", base=2)
            axes.set_xlabel(AXES[axis])
            axes.set_ylabel(label)
            axes.grid(alpha=0.25)
            axes.spines[["top", "right"]].set_visible(False)
    handles = {h.get_label(): h for a in panels.flat for h in a.get_legend_handles_labels()[0]}
    figure.legend(
        handles.values(),
        handles.keys(),
        loc="outside lower center",
        ncols=3 * len(varying),
        frameon=False,
    )
    first = rows[0]
    held = ", ".join(f"{label} {first[axis]:g}" for axis, label in AXES.items())
    figure.suptitle(f"width {first['width']}, {first['dtype']}; held:\n{held}", fontsize=9)
    figure.savefig(file, dpi=150)
    return file


def varies(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Those of `AXES` that have more than one value."""
    return [axis for axis in AXES if len({row[axis] for row in rows}) > 1]


def curves(
    rows: Sequence[Mapping[str, Any]], axis: str, key: str
) -> list[tuple[str, list[float], list[float]]]:
    """Name, x and y of every operator's curve, in the order of x.

    Args:
        rows: the rows of `benchmarks.operators.operators`.
        axis: the key that varies; every other of `AXES` stays as in the first row.
        key: the key to draw against it.
    """
    fixed = {other: rows[0][other] for other in AXES if other != axis}
    found: dict[str, list[tuple[float, float]]] = {}
    for row in rows:
        if all(row[other] == value for other, value in fixed.items()):
            found.setdefault(f"{row['by']}: {row['operator']}", []).append((row[axis], row[key]))
    return [
        (name, [x for x, _ in sorted(its)], [y for _, y in sorted(its)])
        for name, its in found.items()
    ]
