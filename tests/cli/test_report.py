"""``toma-fx report``: all of transform's options, for people and for programs."""

import json
from pathlib import Path
from typing import Any

import pytest

from toma_fx.cli import main


def report(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    assert main(["report", *words]) == 0
    return capsys.readouterr().out


def test_json_is_one_object_with_every_figure(
    sdxl: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "new" / "report.json"
    size = ["--height", "256", "--dtype", "float32"]
    out = report(capsys, str(sdxl), *size, "--ratio", "0.25", "--json", "--out", str(file))
    found: dict[str, Any] = json.loads(out)
    assert json.loads(file.read_text()) == found
    assert found["config"]["ratio"] == 0.25
    assert found["saved"] == pytest.approx(1 - found["flops_after"] / found["flops_before"])
    assert found["speedup"] == pytest.approx(found["flops_before"] / found["flops_after"])
    assert {"path", "blocks", "merged", "tokens_before", "flops_after"} <= found["groups"][0].keys()


def test_text_is_kept_too_and_fits_a_screen(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = report(capsys, "sdxl", "--out", str(tmp_path / "report.txt"))
    assert (tmp_path / "report.txt").read_text() == out
    assert max(map(len, out.splitlines())) <= 80
    assert "whole model, 70 blocks" in out


def test_it_takes_what_transform_takes(flux: Path, capsys: pytest.CaptureFixture[str]) -> None:
    how = [str(flux), "--dtype", "float32", "--height", "256", "--json"]
    merged = ["--skip", "--placement", "keys", "--region", "stripe", "--selector", "grid"]
    found = json.loads(report(capsys, *how, *merged, "--steps", "10", "--batch", "2"))
    assert found["config"]["skip"] == [] and found["config"]["selector"] == "grid"
    assert (found["steps"], found["image"].split()[1]) == (10, "2")
    remembering = ["--skip", "--memory", "5", "--theta", "0.25", "--no-control"]
    found = json.loads(report(capsys, *how, *remembering))
    assert found["config"]["memory"]["control"] is False and found["theta"] == 0.25
    chosen = json.loads(report(capsys, *how, "--skip", "--speedup", "1.2"))
    assert chosen["asked"] == 1.2 and 0 < chosen["config"]["ratio"] < 1


def test_mistakes_are_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    for words, said in (
        (["sdlx"], "did you mean sdxl?"),
        (["flux", "--ratio", "1.5"], "ratio=1.5 must be a number in [0, 1)"),
        (["sdxl", "--speedup", "2", "--ratio", "0.5"], "speedup=2 chooses the ratio"),
        (["sdxl", "--calibration", "none.json"], "there is no such file"),
        (["no/such/folder"], "there is no such folder"),
    ):
        assert main(["report", *words]) == 2
        error = capsys.readouterr().err
        assert said in error and error.count("\n") == 1 and error.startswith("toma-fx: ")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["reprot"], "did you mean report?"),
        (
            ["report", "sdxl", "--ration", "0.5"],
            "--ration is nothing that it takes; did you mean --ratio?",
        ),
        (["report", "sdxl", "--region", "stipe"], "did you mean stripe?"),
        (["bench", "modle", "sdxl"], "did you mean model?"),
        (["bench", "model", "sdxl", "--variants", "toma"], "did you mean --variant?"),
        (["report", "sdxl", "--memory", "often"], "memory='often' must be a whole number"),
    ],
)
def test_wrong_words_are_one_line_that_says_what_was_meant(
    words: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(words)
    assert ended.value.code == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1
