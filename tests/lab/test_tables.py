"""Rows, files and text of known results."""

import csv
import math
from contextlib import nullcontext
from pathlib import Path

from toma_fx.lab.contenders import Contender
from toma_fx.lab.intervals import mean_interval
from toma_fx.lab.measures import Unavailable
from toma_fx.lab.prompts import Prompt
from toma_fx.lab.score import Scores
from toma_fx.lab.tables import Outcome, as_table, image_rows, summary_rows, write_table

CHOSEN = ("psnr", "lpips", "fid")


def outcome(variant: str, ratio: float | None, scores: Scores) -> Outcome:
    contender = Contender(
        variant=variant,
        ratio=ratio,
        steps=25,
        arithmetic=0.75,
        identity="",
        changed=nullcontext,
    )
    files = tuple(Path("out", "images", variant, f"{number}.png") for number in range(6))
    return Outcome(
        contender=contender, files=files, seconds=(9.0, 1.0, 2.0, 3.0, 4.0, 5.0), scores=scores
    )


PSNR = [30.0, 30.0, 30.0, 30.0, 36.0, 36.0]
"""Of three prompts with two seeds each."""
OUTCOMES = [
    outcome("untouched", None, {"fid": [7.0]}),
    outcome(
        "toma",
        0.5,
        {"psnr": PSNR, "lpips": Unavailable("no torchvision"), "fid": [8.5]},
    ),
]
PROMPTS = (Prompt(text="a, b"), Prompt(text="c"), Prompt(text="d"))


def test_an_image_row_holds_everything_about_it(tmp_path: Path) -> None:
    rows = image_rows(OUTCOMES, PROMPTS, 2, CHOSEN)
    assert len(rows) == 12
    assert rows[8] == {
        "variant": "toma",
        "ratio": 0.5,
        "steps": 25,
        "arithmetic": 0.75,
        "prompt": 1,
        "text": "c",
        "seed": 0,
        "seconds": 2.0,
        "psnr": 30.0,
        "lpips": "unavailable: no torchvision",
        "file": "images/toma/2.png",
    }
    assert rows[0]["psnr"] == "" and rows[0]["ratio"] == ""
    write_table(rows, tmp_path / "images.csv")
    with (tmp_path / "images.csv").open(newline="") as stream:
        read = list(csv.DictReader(stream))
    assert read[1]["text"] == "a, b" and float(read[11]["psnr"]) == 36.0


def test_a_summary_row_holds_means_intervals_and_reasons() -> None:
    untouched, toma = summary_rows(OUTCOMES, 2, CHOSEN)
    assert toma["psnr"] == 32 and toma["seconds"] == 3.5 and toma["images"] == 6
    ends = mean_interval([[30.0, 30.0], [30.0, 30.0], [36.0, 36.0]])
    assert ends == (30, 36)
    assert (toma["psnr_low"], toma["psnr_high"]) == ends
    assert toma["lpips"] == "unavailable: no torchvision" and toma["lpips_low"] == ""
    assert (toma["fid"], toma["fid_low"]) == (8.5, "")
    assert (untouched["psnr"], untouched["lpips"], untouched["fid"]) == ("", "", 7.0)


def test_the_text_gives_each_reason_once() -> None:
    table = as_table(summary_rows(OUTCOMES, 2, CHOSEN), CHOSEN)
    assert max(map(len, table.text().splitlines())) <= 80
    text = table.text("pipe")
    assert "PSNR (dB), higher" in text and "75.0%" in text
    assert "32 (30 to 36)" in text
    assert text.count("unavailable: no torchvision") == 1
    assert "[1] unavailable" in text.splitlines()[-1]
    assert "6 images each" in text


def test_infinite_values_stay_infinite() -> None:
    equal = outcome("default", 0.0, {"psnr": [math.inf] * 6})
    (row,) = summary_rows([equal], 2, ("psnr",))
    assert row["psnr"] == row["psnr_low"] == math.inf
