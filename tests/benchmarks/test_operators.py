"""The operators' table, their growth, and its plot."""

from pathlib import Path

import pytest
import torch

from benchmarks.growth import curves, plot_growth, varies
from benchmarks.operators import OPERATORS, Shape, operators
from toma_fx.errors import ConfigError


def test_ours_and_tomesds_at_every_shape(tmp_path: Path) -> None:
    shapes = [Shape(tokens=tokens, width=16, dtype=torch.float32) for tokens in (64, 256)]
    table = operators(shapes, device="cpu", repeats=1, compiled=False, small=True)
    for shape in shapes:
        rows = [row for row in table.rows if row["tokens"] == shape.tokens]
        ours = {row["operator"]: row for row in rows if row["by"] == "toma_fx"}
        theirs = {row["operator"]: row for row in rows if row["by"] == "tomesd"}
        assert tuple(ours) == OPERATORS
        assert tuple(theirs) == ("merge", "unmerge")
        for name, row in theirs.items():
            assert ours[name]["against_tomesd"] == row["seconds"] / ours[name]["seconds"]
        for row in ours.values():
            assert row["reached"] == row["bound_seconds"] / row["seconds"]
            assert row["peak_bytes"] > 0
    assert varies(table.rows) == ["tokens"]
    assert plot_growth(table.rows, tmp_path / "growth.png").stat().st_size > 10_000


def test_what_tomesd_cannot_do_is_said() -> None:
    shapes = [Shape(tokens=64, width=8, ratio=0.9), Shape(tokens=128, width=8)]
    table = operators(shapes, device="cpu", repeats=1, compiled=False, small=True)
    assert {row["by"] for row in table.rows} == {"toma_fx"}
    assert any("at most 0.75" in note for note in table.notes)
    assert any("128 tokens are no square" in note for note in table.notes)


def test_curves_follow_one_thing_and_hold_the_others() -> None:
    rows = [
        {
            "by": "toma_fx",
            "operator": "merge",
            "tokens": tokens,
            "batch": batch,
            "ratio": 0.5,
            "region_tokens": 64,
            "seconds": tokens * batch,
        }
        for batch in (1, 2)
        for tokens in (256, 64)
    ]
    assert varies(rows) == ["tokens", "batch"]
    assert curves(rows, "tokens", "seconds") == [("toma_fx: merge", [64, 256], [64, 256])]
    assert curves(rows, "batch", "seconds") == [("toma_fx: merge", [1, 2], [256, 512])]


def test_nothing_to_plot_is_an_error() -> None:
    with pytest.raises(ConfigError, match="nothing varies"):
        plot_growth([{"tokens": 1, "ratio": 0.5, "batch": 1, "region_tokens": 4}], Path("no.png"))
