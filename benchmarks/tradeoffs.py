"""A plot of what `benchmarks.methods` measured: how close images stay, for how much arithmetic.

    python -m benchmarks.tradeoffs docs/images/tradeoffs.png sdxl-25 flux-25 video-25

Each scenario is a panel. A point is a row of its table at the real model's arithmetic. A hollow
point is the same row at the small model's, where that was counted.
"""

import argparse
import csv
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from matplotlib import pyplot

from benchmarks.methods import RESULTS
from benchmarks.scenarios import SCENARIOS

KINDS: Mapping[str, tuple[str, tuple[str, ...]]] = {
    # the words with which the rows of a kind begin; the first kind that fits counts
    "memory": ("#d1495b", ("memory",)),
    "merging": ("#edae49", ("merged", "references")),
    "searched schedule": ("#00798c", ("12 steps, s", "18 steps, s", "3 steps, s")),
    "fewer steps": ("#66a182", tuple("123456789")),
    "others' caches and merging": ("#8d96a3", ("",)),
}
EQUAL = 70
"""PSNR in dB above which images are untouched, and left out."""


def main(arguments: list[str] | None = None) -> None:
    """Draw the panels into a file."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("file", type=Path)
    parser.add_argument("scenario", nargs="+", choices=tuple(SCENARIOS))
    options = parser.parse_args(arguments)
    names = options.scenario
    figure, axes = pyplot.subplots(
        1, len(names), figsize=(4 * len(names), 4.2), layout="constrained", squeeze=False
    )
    for axis, name in zip(axes[0], names, strict=True):
        draw(axis, name)
    axes[0, 0].set_ylabel("PSNR to untouched, dB (higher is closer)")
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False)
    figure.savefig(options.file, dpi=110)


def draw(axis: Any, name: str) -> None:
    """One panel."""
    with (RESULTS / f"methods-{name}.csv").open() as lines:
        rows = [row for row in csv.DictReader(lines) if row["psnr"] and float(row["psnr"]) < EQUAL]
    for kind, (colour, _) in KINDS.items():
        of_kind = [row for row in rows if kind_of(row["row"]) == kind]
        real = [(100 * float(row["arithmetic"]), float(row["psnr"])) for row in of_kind]
        axis.scatter(*zip(*real, strict=True) if real else ([], []), color=colour, label=kind, s=30)
        if kind in ("memory", "merging"):
            for (x, y), row in zip(real, of_kind, strict=True):
                if row["small"]:
                    small = 100 * float(row["small"])
                    axis.plot([x, small], [y, y], color=colour, linewidth=0.6)
                    axis.scatter([small], [y], facecolors="white", edgecolors=colour, s=30)
    axis.set_title(f"{name.replace('-', ', ')} steps")
    axis.set_xlabel("arithmetic, % of untouched (lower is cheaper)")
    axis.grid(alpha=0.3)


def kind_of(row: str) -> str:
    """The kind of a row, by its name."""
    return next(kind for kind, (_, starts) in KINDS.items() if row.startswith(starts))


if __name__ == "__main__":
    main()
