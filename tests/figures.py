"""Tables of the docs, made from the results in the repository; `tests.test_figures` compares."""

import csv
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from statistics import median

from tabulate import tabulate

from benchmarks import methods

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
BENCH = "2026-11-21-amd-epyc-"
FAMILIES = "2026-11-26-amd-epyc-families-"
GPU = "2026-11-27-nvidia-h200"
Row = dict[str, str]


def results(name: str) -> list[Row]:
    with (RESULTS / f"{name}.csv").open() as file:
        return list(csv.DictReader(file))


def markdown(heads: Iterable[str], lines: Iterable[Iterable[str]]) -> str:
    return tabulate(list(lines), list(heads), tablefmt="pipe", disable_numparse=True)


def numbers(text: str) -> list[float]:
    return [float(each) for each in text.split()]


# The tables of docs/speed.md.


def kept(bound: Row, row: Row, base: Row) -> str:
    """The share of the bound's saving, and its range in single rounds."""
    rounds = [
        100 * (untouched - call) / (untouched - least)
        for untouched, call, least in zip(
            *(numbers(each["calls"]) for each in (base, row, bound)), strict=True
        )
    ]
    return f"{100 * float(row['kept']):.1f} ({min(rounds):.0f} to {max(rounds):.0f})"


def forward(label: str, name: str, title: str = "", contender: str = "default") -> list[list[str]]:
    """A line for each ratio of the contender, in the table whose title holds ``title``."""
    rows = [each for each in results(name) if title in each["table"] and each.get("contender")]
    base = next(each for each in rows if each["baseline"] == "True")
    bounds = {each["ratio"]: each for each in rows if each["contender"] == "lower_bound"}
    lines = []
    for row in (each for each in rows if each["contender"] == contender):
        bound = bounds[row["ratio"]]
        low, high = numbers(row["times_spread"])
        planning = f"{100 * float(row['planning']):.1f}" if row["planning"] else ""
        lines.append(
            [
                label,
                row["ratio"],
                f"{float(base['seconds']):.2f}",
                f"{float(row['seconds']):.2f}",
                f"{float(row['times']):.2f} ({low:.2f} to {high:.2f})",
                f"{float(bound['times']):.2f}",
                kept(bound, row, base),
                planning,
            ]
        )
    return lines


def forwards(*asked: tuple[str, ...]) -> str:
    heads = (
        "one forward",
        "ratio",
        "untouched, s",
        "merged, s",
        "times as fast",
        "the bound, times as fast",
        "of its saving, %",
        "planning, %",
    )
    return markdown(heads, [line for each in asked for line in forward(*each)])


def on_a_gpu() -> str:
    lines = []
    for label, name, title in (
        ("Flux, one forward", GPU, "flux"),
        ("SDXL's UNet, one forward of batch 2", GPU, "sdxl"),
        ("Flux, an image in 25 steps", f"{GPU}-flux-images", "flux"),
    ):
        for row in results(name):
            if title not in row["table"] or not row["times"] or "eager" in row["contender"]:
                continue
            low, high = numbers(row["times_spread"])
            seconds = float(row["seconds"])
            lines.append(
                [
                    label,
                    row["contender"],
                    row["ratio"],
                    f"{1000 * seconds:.0f} ms" if seconds < 1 else f"{seconds:.2f} s",
                    f"{float(row['times']):.2f} ({low:.2f} to {high:.2f})",
                    f"{int(row['peak_bytes']) / 2**20:.0f} MiB",
                ]
            )
    return markdown(("", "", "ratio", "time", "times as fast", "peak memory"), lines)


def operator(name: str, **wanted: str) -> Row | None:
    wanted = {"by": "toma_fx", "batch": "1", "region_tokens": "64", **wanted}
    rows = (each for each in results(name) if wanted.items() <= each.items())
    return next(rows, None)


def beside_tomesd() -> str:
    columns = [
        ("ratio 0.25", "operators", "0.25"),
        ("0.5", "operators", "0.5"),
        ("0.75", "operators", "0.75"),
        ("0.5, again", "readme", "0.5"),
        ("0.75, again", "readme", "0.75"),
    ]
    lines = []
    for tokens, width in (("4096", "640"), ("1024", "1280")):
        for kind in ("merge", "unmerge"):
            line = [f"{kind}, {tokens} tokens x {width}"]
            for _, name, ratio in columns:
                row = operator(BENCH + name, operator=kind, tokens=tokens, width=width, ratio=ratio)
                assert row is not None
                reached = 100 * float(row["reached"])
                line.append(f"{float(row['against_tomesd']):.1f} ({reached:.0f} %)")
            lines.append(line)
    return markdown(("", *(title for title, _, _ in columns)), lines)


def growth() -> str:
    sizes = ("1024", "4096", "16384", "65536")
    found = {
        kind: [
            row
            for tokens in sizes
            if (row := operator(BENCH + "growth", operator=kind, tokens=tokens, ratio="0.5"))
        ]
        for kind in ("select", "weigh", "merge", "unmerge", "reorder")
    }
    lines = [
        [
            f"{kind}, us a token",
            *(f"{1e6 * float(each['seconds']) / int(each['tokens']):.2f}" for each in rows),
        ]
        for kind, rows in found.items()
    ]
    lines += [
        [
            f"{kind}, peak memory, KiB a token",
            *(
                f"{int(each['peak_bytes']) / int(each['tokens']) / 1024:.2f}"
                for each in found[kind]
            ),
        ]
        for kind in ("select", "weigh")
    ]
    return markdown(("tokens", *sizes), lines)


def stack() -> str:
    models = [
        {each["contender"]: each for each in results(f"{BENCH}stack-{name}")}
        for name in ("flux-1-2-blocks-512", "small-flux-images")
    ]
    measures: list[Callable[[Row], str]] = [
        lambda row: f"{100 * float(row['error']):.1f}",
        lambda row: f"{float(row['psnr']):.1f}",
    ]
    lines = []
    alone = [each for each in models[0] if not each.endswith("merged") and "eager" not in each]
    for name in alone:
        both = (name, "merged" if name == "untouched, compiled" else f"{name}, merged")
        line = [name]
        for rows, measure in zip(models, measures, strict=True):
            pair = [rows[each] for each in both]
            line += [f"{float(each['times']):.2f}" if each["times"] else "" for each in pair]
            line += [measure(each) if each["times"] else "" for each in pair]
        if any(line[1:]):
            lines.append(line)
    heads = ("", "forward", "merged", "error, %", "merged")
    return markdown((*heads, "image", "merged", "PSNR, dB", "merged"), lines)


# Those of docs/memory.md.

THETA_0 = "2026-11-27-amd-epyc-memory-speed-sdxl-512-theta-0"


def seconds_of_steps() -> dict[str, list[float]]:
    return {each["step"]: numbers(each["seconds"]) for each in results(THETA_0)}


def theta_0() -> str:
    steps = seconds_of_steps()
    lines = [
        [
            name,
            f"{median(each):.2f} ({min(each):.2f} to {max(each):.2f})",
            f"{median(each) / median(steps['untouched']):.2f}",
        ]
        for name, each in steps.items()
    ]
    return markdown(("step", "seconds", "relative to untouched"), lines)


# Those of docs/measured.md.


def edits() -> str:
    columns = ("inside_untouched", "outside_untouched", "inside_true", "outside_true")

    def mean(text: str) -> str:
        return "{:.1f} ({:.1f} to {:.1f})".format(*numbers(text)) if text else ""

    lines = [
        [
            row["contender"],
            f"{100 * float(row['arithmetic']):.1f} %" if row["arithmetic"] else "",
            *(mean(row[column]) for column in columns),
        ]
        for row in results("2026-11-26-amd-epyc-small-kontext-8-steps")
    ]
    heads = (column.replace("_", ", to ") for column in columns)
    return markdown(("", "arithmetic", *heads), lines)


# By the page and the name of its mark.
TABLES: dict[tuple[str, str], Callable[[], str]] = {
    **{
        ("choose", file.stem): partial(methods.table, file)
        for file in sorted(RESULTS.glob("methods-*.csv"))
    },
    ("speed", "whole models"): partial(
        forwards,
        ("SDXL's UNet, batch 2", BENCH + "sdxl-1024-batch-2"),
        ("SDXL's UNet, batch 2, stripes", BENCH + "sdxl-1024-batch-2", "", "default:region=stripe"),
        ("Flux, 3 + 6 blocks", BENCH + "flux-3-6-blocks-1024"),
        (
            "Flux, 3 + 6 blocks, stripes",
            BENCH + "flux-3-6-blocks-1024",
            "",
            "default:region=stripe",
        ),
    ),
    ("speed", "512 x 512"): partial(
        forwards,
        ("SDXL's UNet", BENCH + "sdxl-512"),
        ("SDXL's UNet, stripes", BENCH + "sdxl-512", "", "default:region=stripe"),
        ("SDXL's UNet, again", BENCH + "readme", "sdxl, 512"),
        ("Flux, 3 + 6 blocks", BENCH + "readme", "flux, 3 + 6 blocks, 512"),
    ),
    ("speed", "families"): partial(
        forwards,
        ("FLUX.2 klein 4B, 1 + 1 of 5 + 20, 1024 x 1024", FAMILIES + "flux2-klein-4b"),
        ("Qwen-Image, 1 of 60, 1024 x 1024", FAMILIES + "qwen-image"),
        ("Z-Image, 1 + 1 of 2 + 30, 512 x 512", FAMILIES + "z-image"),
        ("Wan 2.2 5B, 1 of 30, 9 frames of 704 x 1280", FAMILIES + "wan2.2-5b"),
        ("FLUX.2 dev, 1 + 1 of 8 + 48, 512 x 512", FAMILIES + "flux2-dev"),
        ("Wan 2.1 1.3B, 4 of 30, 1 frame", FAMILIES + "wan2.1-1.3b-4-blocks"),
        ("Wan 2.1 1.3B, 1 of 30, 1 frame", FAMILIES + "wan2.1-1.3b-growth", " 1 frames"),
        ("Wan 2.1 1.3B, 1 of 30, 9 frames", FAMILIES + "wan2.1-1.3b-growth", " 9 frames"),
        ("Wan 2.1 1.3B, 1 of 30, 21 frames", FAMILIES + "wan2.1-1.3b-growth", " 21 frames"),
    ),
    ("speed", "on a GPU"): on_a_gpu,
    ("speed", "operators"): beside_tomesd,
    ("speed", "growth"): growth,
    ("speed", "stack"): stack,
    ("memory", "theta 0"): theta_0,
    ("measured", "edits"): edits,
}
