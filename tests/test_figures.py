"""Figures in the docs are those of the results in the repository.

``EXPECTTEST_ACCEPT=1`` writes the tables of the pages anew, between their marks.
"""

import os
import re
from collections.abc import Callable, Iterable
from statistics import fmean, median

import pytest

from benchmarks import methods
from tests.figures import (
    BENCH,
    GPU,
    RESULTS,
    ROOT,
    TABLES,
    forward,
    operator,
    results,
    seconds_of_steps,
)
from toma_fx.families.flux import FAMILY as FLUX
from toma_fx.families.rows import Family
from toma_fx.families.wan import FAMILY as WAN


@pytest.mark.parametrize(("page", "name"), TABLES)
def test_tables(page: str, name: str) -> None:
    path = ROOT / "docs" / f"{page}.md"
    text = path.read_text()
    start, end = f"<!-- figures: {name} -->\n", f"<!-- end of {name} -->"
    expected = f"{start}\n{TABLES[page, name]()}\n\n{end}"
    if os.environ.get("EXPECTTEST_ACCEPT"):
        between = re.escape(start) + ".*?" + re.escape(end)
        path.write_text(re.sub(between, lambda _: expected, text, flags=re.S))
        return
    assert expected in text


def test_every_mark_has_a_table() -> None:
    marks = {
        (path.stem, name)
        for path in (ROOT / "docs").glob("*.md")
        for name in re.findall(r"<!-- figures: (.*) -->", path.read_text())
    }
    assert marks == set(TABLES)


def test_figures_that_the_readme_names() -> None:
    rows = {each["row"]: each for each in results("methods-sdxl-25")}
    readme = (ROOT / "README.md").read_text()
    named = (
        *("20 steps", "15 steps"),
        *("merged at every step, ratio 0.25", "merged at every step, ratio 0.5"),
        *(f"memory below noise level 0.8, every 2, {more}" for more in ("ratio 0.9", "theta 0")),
    )
    for name in named:
        row = rows[name]
        arithmetic, answers = (
            f"{100 * float(row[key]):.0f} %" for key in ("arithmetic", "answers")
        )
        figures = f"| {arithmetic} | {float(row['psnr']):.1f} dB | {answers} |"
        assert figures in readme, f"{name}: {figures}"
    assert f"{100 * float(rows['untouched']['answers']):.0f} % for the untouched model" in readme
    second, unet_few, flux, few, edits = (
        {each["row"]: each for each in results(f"methods-{name}")}
        for name in ("second-pass", "sdxl-4", "flux-25", "flux-4", "kontext-25")
    )
    clips = {each["row"]: each for each in results("methods-video-25")}
    for row, words in (
        (rows["memory below noise level 0.8, every 2, theta 0"], "PSNR {:.1f} dB at {:.0f} %; in"),
        (rows["18 steps"], "in 18 steps it is {:.1f} dB at {:.0f} %"),
        (
            clips["memory below noise level 0.8, every 2, ratio 0.9"],
            "PSNR {:.1f} dB at {:.0f} %; 18 steps:",
        ),
        (clips["18 steps"], "; 18 steps: {:.1f} dB at {:.0f} %"),
        (
            clips["first-block cache, threshold 0.1"],
            "; a first-block cache: {:.1f} dB at {:.0f} % ([figures](docs/choose.md#video",
        ),
        (rows["18 steps, searched schedule"], "and {:.1f} dB on a searched schedule"),
        (unet_few["merged at every step, ratio 0.5"], "PSNR {:.1f} dB at {:.0f} %, and a judge"),
        (unet_few["2 steps"], "; 2 steps: {:.1f} dB at {:.0f} %"),
        (
            unet_few["3 steps, searched schedule"],
            "; 3 steps on a searched schedule: {:.1f} dB at {:.0f} %",
        ),
        (
            clips["merged at every step, ratio 0.25"],
            "Merging without memory is far away: {:.1f} dB at {:.0f} %",
        ),
        (second["6 steps"], "6 of 10 steps: {:.1f} dB at {:.0f} %"),
        (second["memory every 2, theta 0"], "a memory: {:.1f} dB at {:.0f} %"),
        (
            few["3 steps, searched schedule"],
            "| 3 steps on a searched schedule: {:.1f} dB at {:.0f} %",
        ),
        *(
            (model[row], words)
            for model in (flux, edits)
            for row, words in (
                (
                    "memory below noise level 0.8, every 2, theta 0",
                    "PSNR {:.1f} dB at {:.0f} %; 18",
                ),
                (
                    "18 steps, searched schedule",
                    "; 18 steps on a searched schedule: {:.1f} dB at {:.0f} %",
                ),
                ("TaylorSeer lite, every 2, order 1", "; TaylorSeer: {:.1f} dB at {:.0f} %"),
            )
        ),
    ):
        said = words.format(float(row["psnr"]), 100 * float(row["arithmetic"]))
        assert said in readme, said
    forwards = [each for each in results(GPU) if each["contender"] == "default"]
    longer = [
        round(100 / float(each["times"])) - 100 for each in forwards if "sdxl" in each["table"]
    ]
    assert f"takes {min(longer)} to {max(longer)} % *longer* merged" in readme
    (flux_half,) = (r for r in forwards if "flux" in r["table"] and r["ratio"] == "0.5")
    assert f"ratio 0.5 takes {100 / float(flux_half['times']):.0f} %" in readme
    drawn = results(f"{GPU}-flux-images")
    (memory,) = (each for each in drawn if "theta=0," in each["contender"])
    assert f"takes {100 / float(memory['times']):.0f} % of the time with memory" in readme
    times = {
        each["ratio"]: f"| {100 / float(each['times']):.0f} % |"
        for each in results("2026-11-27-amd-epyc-sdxl-1024")
        if each["ratio"]
    }
    assert sorted(times) == ["0.25", "0.5"]
    for ratio, time in times.items():
        (line,) = (each for each in readme.splitlines() if each.startswith(f"| `ratio={ratio}`"))
        assert line.endswith(time), (line, time)


def span(values: Iterable[float]) -> str:
    found = list(values)
    return f"{min(found):.1f} to {max(found):.1f}"


def of_operators() -> str:
    """Of the three runs that hold 4096 tokens at ratio 0.5."""

    def speeds(kind: str) -> list[float]:
        rows = [
            operator(BENCH + name, operator=kind, tokens="4096", width="640", ratio="0.5")
            for name in ("operators", "readme", "growth")
        ]
        return [float(each["against_tomesd"]) for each in rows if each is not None]

    merge, unmerge = speeds("merge"), speeds("unmerge")
    assert len(merge) == len(unmerge) == 3
    return f"give merge {span(merge)} times and unmerge {span(unmerge)} times tomesd's speed"


def of_one_block() -> str:
    speeds = [
        float(row["times"])
        for row in results(BENCH + "readme")
        if row["contender"] == "default" and "batch 2" in row["table"]
    ]
    large, small = (" and ".join(f"{each:.1f}" for each in speeds[i : i + 2]) for i in (0, 2))
    return f"it is {large} times as fast with 4096 tokens, and {small} times with 1024 tokens"


def of_whole_models() -> str:
    sdxl, flux = (
        forward("", BENCH + name)[0][4].split()[0]
        for name in ("sdxl-1024-batch-2", "flux-3-6-blocks-1024")
    )
    return (
        f"SDXL's whole UNet {sdxl} times as fast at 1024 x 1024, and Flux at full width with "
        f"3 + 6 blocks {flux} times as fast"
    )


def of_the_gpu() -> str:
    flux, image = (
        next(
            f"{float(each['times']):.2f}"
            for each in results(name)
            if "flux" in each["table"] and each["contender"] == contender and each["ratio"] == "0.5"
        )
        for name, contender in ((GPU, "default"), (f"{GPU}-flux-images", "ratio=0.5"))
    )
    return (
        f"ratio 0.5 makes Flux's forward {flux} times as fast, and an image in 25 steps {image} "
        "times"
    )


def of_edits() -> str:
    outside: dict[str, list[float]] = {}
    for row in results("2026-11-26-amd-epyc-small-kontext-25-steps-images"):
        if row["outside_true"]:
            outside.setdefault(row["contender"], []).append(float(row["outside_true"]))
    untouched, *rest = (
        f"{fmean(outside[name]):.1f}" for name in ("untouched", "18 steps", "14 steps", "12 steps")
    )
    return f"{untouched} dB untouched, and {rest[0]}, {rest[1]} and {rest[2]} dB after 18, 14 and"


@pytest.mark.parametrize(
    ("page", "sentence"),
    [
        ("speed", of_operators),
        ("speed", of_one_block),
        ("speed", of_whole_models),
        ("speed", of_the_gpu),
        ("measured", of_edits),
    ],
)
def test_figures_that_a_text_names(page: str, sentence: Callable[[], str]) -> None:
    text = " ".join((ROOT / "docs" / f"{page}.md").read_text().split())
    assert sentence() in text


PAIRED = (
    # scenario, row, other row, measure, the words on the page
    (
        "video-25",
        "memory below noise level 0.8, every 2, ratio 0.9",
        "18 steps",
        "psnr",
        "({:.1f} dB less, {:.1f} to {:.1f})",
    ),
    (
        "video-25",
        "memory below noise level 0.8, every 2, ratio 0.9",
        "memory below noise level 0.8, every 2, theta 0",
        "psnr",
        "({:.1f} dB less, {:.1f} to {:.1f})",
    ),
    (
        "sdxl-25",
        "memory below noise level 0.8, every 2, theta 0",
        "18 steps, searched schedule",
        "psnr",
        "({:.1f} dB less, {:.1f} to {:.1f})",
    ),
    (
        "second-pass",
        "6 steps",
        "memory every 2, theta 0",
        "psnr",
        "({:.1f} dB less, {:.1f} to {:.1f})",
    ),
    (
        "sdxl-4",
        "merged at every step, ratio 0.5",
        "tomesd, ratio 0.5",
        "psnr",
        "(toma_fx {:.1f} dB closer, {:.1f} to {:.1f})",
    ),
    (
        "sdxl-4",
        "merged at every step, ratios by block for 0.25",
        "merged at every step, ratio 0.25",
        "psnr",
        "are {:.1f} dB closer at the small model's",
    ),
    (
        "sdxl-4",
        "merged at every step, ratio 0.5",
        "2 steps",
        "answers",
        "ratio 0.5 has {:.0f} points ({:.0f} to {:.0f}) more right answers than 2 steps",
    ),
    (
        "sdxl-4",
        "merged at every step, ratio 0.75",
        "2 steps",
        "answers",
        "ratio 0.75 {:.0f} points ({:.0f} to {:.0f})",
    ),
)


@pytest.mark.parametrize(("scenario", "row", "other", "measure", "words"), PAIRED)
def test_paired_differences(scenario: str, row: str, other: str, measure: str, words: str) -> None:
    found = methods.paired(RESULTS / f"images-{scenario}.csv", row, other, measure)
    said = words.format(*(each * (100 if measure == "answers" else 1) for each in found))
    page = " ".join((ROOT / "docs" / "choose.md").read_text().split())
    assert said in page, said


@pytest.mark.parametrize(("model", "family"), [("flux", FLUX), ("video", WAN)])
def test_a_warning_names_what_was_measured(model: str, family: Family) -> None:
    rows = {each["row"]: each for each in results(f"methods-{model}-25")}
    untouched, every, below = (
        f"{100 * float(rows[name]['answers']):.0f} %"
        for name in (
            "untouched",
            "merged at every step, ratio 0.5",
            "merged below noise level 0.8, ratio 0.5",
        )
    )
    said = f"in {every} of cases instead of {untouched}, and in {below} when"
    assert said in family.regretted


def test_the_time_of_a_run_with_theta_0() -> None:
    """Of 25 steps, 5 lie above the noise level; of the others every second one is full."""
    steps = {name: median(each) for name, each in seconds_of_steps().items()}
    run = 5 * steps["untouched"] + 10 * steps["full, and remembered"] + 10 * steps["between"]
    share = f"{100 * run / (25 * steps['untouched']):.0f} %"
    assert f"takes {share} of the untouched time" in (ROOT / "docs" / "memory.md").read_text()
    readme = (ROOT / "README.md").read_text()
    assert f"| 70 % | 40.7 dB | 74 % | {share} (512 x 512, likewise) |" in readme


def test_the_docstring_of_merge_below_names_what_was_measured() -> None:
    rows = {each["row"]: each for each in results("methods-sdxl-25")}
    every, below = (
        rows[f"merged {when}, ratio 0.5"] for when in ("at every step", "below noise level 0.8")
    )
    source = " ".join((ROOT / "toma_fx" / "config.py").read_text().split())
    psnr = f"from {float(every['psnr']):.1f} to {float(below['psnr']):.1f} dB"
    left, whole = (f"{100 * float(each['arithmetic']):.0f} %" for each in (below, every))
    assert f"PSNR {psnr} (higher is closer), and leaves {left} of the arithmetic instead" in source
    assert f"instead of {whole}" in source
