"""Curves hold the points that were measured."""

import json
from pathlib import Path
from typing import Any

import pytest
from matplotlib.figure import Figure
from PIL import Image

from benchmarks.plot import draw_panel, plot, points
from toma_fx.errors import ConfigError
from toma_fx.lab.tables import write_table


def row(variant: str, ratio: Any, steps: int, arithmetic: float, psnr: Any) -> dict[str, Any]:
    known = isinstance(psnr, float)
    return {
        "variant": variant,
        "ratio": ratio,
        "steps": steps,
        "arithmetic": arithmetic,
        "images": 8,
        "seconds": 4 * arithmetic,
        "psnr": psnr,
        "psnr_low": psnr - 1 if known else "",
        "psnr_high": psnr + 2 if known else "",
        "clip": 30.0 + arithmetic,
        "clip_low": "",
        "clip_high": "",
        "lpips": "unavailable: no torchvision",
        "lpips_low": "",
        "lpips_high": "",
    }


ROWS = [
    row("untouched", "", 20, 1.0, ""),
    row("toma", 0.25, 20, 0.8, 35.0),
    row("toma", 0.5, 20, 0.6, 30.0),
    row("steps", 0.5, 12, 0.6, 28.0),
    row("steps=18", "", 18, 0.9, 40.0),
    row("default", 0.0, 20, 1.0, float("inf")),
]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_table(ROWS, tmp_path / "summary.csv")
    (tmp_path / "settings.json").write_text(json.dumps({"model": "/a/sdxl", "steps": 20}))
    return tmp_path


def as_read(rows: list[dict[str, Any]]) -> list[dict[str, str]]:
    return [{name: str(value) for name, value in row.items()} for row in rows]


def test_points_are_in_order_and_fewer_steps_are_one_curve() -> None:
    curves, untouched = points(as_read(ROWS), "arithmetic", "psnr")
    assert {name: [(p.x, p.y, p.text) for p in its] for name, its in curves.items()} == {
        "toma": [(60, 30, "0.5"), (80, 35, "0.25")],
        "fewer steps": [(60, 28, "12 steps"), (90, 40, "18 steps")],
    }
    assert (curves["toma"][0].low, curves["toma"][0].high) == (29, 32)
    assert untouched is None
    curves, untouched = points(as_read(ROWS), "seconds", "clip")
    assert untouched == 31.0
    assert [p.x for p in curves["toma"]] == pytest.approx([2.4, 3.2])
    assert curves["toma"][0].low == curves["toma"][0].y


def test_a_panel_is_labelled() -> None:
    axes = Figure().subplots()
    assert draw_panel(axes, as_read(ROWS), "seconds", "clip") == [
        "toma",
        "fewer steps",
        "default",
        "untouched",
    ]
    assert axes.get_xlabel() == "time for an image (s)"
    assert axes.get_ylabel() == "CLIP score, higher is better"
    assert {text.get_text() for text in axes.texts} == {"0.25", "0.5", "12 steps", "18 steps", "0"}


def test_a_file_is_drawn(folder: Path) -> None:
    file = plot(folder, ys=("psnr", "clip"))
    assert file == folder / "psnr_clip_arithmetic.png"
    with Image.open(file) as image:
        assert image.width > 1.3 * image.height > 500
        assert len(image.convert("RGB").getcolors(2**24)) > 50  # type: ignore[arg-type]
    assert plot(folder, x="seconds", file=folder / "mine.png").exists()


def test_what_was_not_measured_says_why(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="'lpips' has no figures to plot: unavailable: no torch"):
        plot(folder, ys=("lpips",))
    with pytest.raises(ConfigError, match="'fid' has no figures to plot: it was not measured"):
        plot(folder, ys=("fid",))
    with pytest.raises(ConfigError, match=r"summary\.csv cannot be read"):
        plot(tmp_path / "none")
