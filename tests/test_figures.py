"""Figures in the docs are those of the results in the repository.

``EXPECTTEST_ACCEPT=1`` writes the tables of `docs/memory.md` anew.
"""

import csv
import os
import re
from pathlib import Path

import pytest
from tabulate import tabulate

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "memory.md"
RESULTS = ROOT / "benchmarks" / "results"
# By the name of a table, its columns and the results that they show.
TABLES = {
    "sdxl": {
        "Euler": "memory-sdxl-euler-25-steps",
        "DPM++ 2M": "memory-sdxl-dpm-25-steps",
    },
    "flux": {"flow-match Euler": "memory-flux-euler-25-steps"},
    "sdxl, 4 steps": {"Euler": "memory-sdxl-euler-4-steps"},
    "flux, 4 steps": {"flow-match Euler": "memory-flux-euler-4-steps"},
}


def rows_of(name: str) -> dict[str, dict[str, str]]:
    with (RESULTS / f"{name}.csv").open() as file:
        return {each["row"].partition(": theta")[0]: each for each in csv.DictReader(file)}


def cell(row: dict[str, str] | None) -> str:
    if row is None:
        return ""
    theta = row["row"].partition(": theta ")[2]
    found = f"{float(row['psnr']):.1f} ({float(row['low']):.1f} to {float(row['high']):.1f})"
    return f"{found}, theta {theta}" if theta else found


def table(columns: dict[str, str]) -> str:
    results = {title: rows_of(name) for title, name in columns.items()}
    cost = {row: float(each["arithmetic"]) for one in results.values() for row, each in one.items()}
    lines = [
        (row, f"{100 * cost[row]:.0f} %", *(cell(one.get(row)) for one in results.values()))
        for row in sorted(cost, key=lambda row: (-round(cost[row], 2), row))
    ]
    heads = ("", "arithmetic", *(f"{title}, dB" for title in columns))
    return tabulate(lines, heads, tablefmt="pipe", disable_numparse=True)


@pytest.mark.parametrize("name", TABLES)
def test_tables_of_memory(name: str) -> None:
    page = PAGE.read_text()
    start, end = f"<!-- figures: {name} -->\n", f"<!-- end of {name} -->"
    expected = f"{start}\n{table(TABLES[name])}\n\n{end}"
    if os.environ.get("EXPECTTEST_ACCEPT"):
        between = re.escape(start) + ".*?" + re.escape(end)
        PAGE.write_text(re.sub(between, lambda _: expected, page, flags=re.S))
        return
    assert expected in page


def test_figures_that_the_readme_names() -> None:
    euler = rows_of("memory-sdxl-euler-25-steps")
    readme = (ROOT / "README.md").read_text()
    named = (
        "18 steps",
        "merged at every step, 0.25",
        "merged at every step, 0.5",
        "(3), 0.9, below 0.8, every 2, calibrated",
        "nothing run between, below 0.8, every 2",
    )
    for name in named:
        row = euler[name]
        figures = f"| {100 * float(row['arithmetic']):.0f} % | {float(row['psnr']):.1f} dB |"
        assert figures in readme, f"{name}: {figures}"
