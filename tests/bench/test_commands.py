"""``toma-fx bench`` from end to end, on models of test size."""

import json
from pathlib import Path
from typing import Any

import pytest

from toma_fx.cli import main

HOW = ["--height", "128", "--repeats", "1", "--eager", "--dtype", "float32"]
FOLDERS = pytest.mark.parametrize("folder", ["sdxl", "flux"])


@pytest.fixture
def model(request: pytest.FixtureRequest, folder: str) -> str:
    """Folder of a tiny pipeline."""
    return str(request.getfixturevalue(folder))


def run(kind: str, model: str, *arguments: str, out: Path) -> list[dict[str, Any]]:
    assert main(["bench", kind, model, *HOW, *arguments, "--out", str(out)]) == 0
    (file,) = out.glob("*.json")
    whole = json.loads(file.read_text())
    assert f"toma-fx bench {kind}" in whole["command"]
    tables: list[dict[str, Any]] = whole["tables"]
    return tables


@FOLDERS
def test_a_model(model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (table,) = run("model", model, "--ratio", "0.25", "0.5", "--cpu-time", out=tmp_path)
    shown = [(row["contender"], row["ratio"]) for row in table["rows"]]
    ours = [(name, ratio) for ratio in (0.25, 0.5) for name in ("lower_bound", "default")]
    assert shown == [("untouched, eager", None), *ours]
    assert any("CPU time" in note for note in table["notes"])
    assert "of the bound's saving" in capsys.readouterr().out


@FOLDERS
def test_blocks_and_batches(model: str, tmp_path: Path) -> None:
    tables = run("block", model, "--batch", "1", "2", out=tmp_path)
    assert len(tables) >= 4
    assert {"batch 1" in table["title"] for table in tables} == {True, False}


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # diffusers' own
@FOLDERS
def test_images_of_a_checkpoint_have_a_psnr(model: str, tmp_path: Path) -> None:
    (table,) = run("image", model, "--steps", "2", "--variant", "default:skip=", out=tmp_path)
    untouched, merged = table["rows"]
    assert untouched["psnr"] is None
    assert 5 < merged["psnr"] < 100


def test_mistakes_are_one_line(
    sdxl: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for arguments, message in (
        (["model", str(sdxl), "--variant", "steps=4"], "takes fewer steps"),
        (["model", "sdxl", "--repeats", "0"], "repeats=0"),
        (["model", "sdxl", "--batch", "1", "0"], "batch=0"),
        (["image", "sdxl", "--steps", "0"], "steps=0"),
        (["model", "sdxl", "--blocks", "1", "2"], "no lists of blocks to shorten"),
    ):
        assert main(["bench", *arguments]) == 2
        assert message in capsys.readouterr().err
    monkeypatch.setattr("toma_fx.bench.contenders.available_memory", lambda: 2**20)
    assert main(["bench", "model", "flux"]) == 2
    assert "--blocks 1" in capsys.readouterr().err
