"""The benchmarks' command lines, at small size."""

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import cold_start, operators, plot, show, stack
from benchmarks.roofline import measure_peaks
from toma_fx.cli import main

SIZES = ["--tokens", "64", "256", "--channels", "16", "--region-tokens", "16", "64"]


def rows_in(out: Path) -> list[dict[str, Any]]:
    (file,) = out.glob("*.json")
    (table,) = json.loads(file.read_text())["tables"]
    rows: list[dict[str, Any]] = table["rows"]
    return rows


@pytest.fixture
def small_peaks(monkeypatch: pytest.MonkeyPatch) -> None:
    """The machine's peaks measured at sizes of a test."""

    def small(*given: Any, **how: Any) -> Any:
        return measure_peaks(*given, **{**how, "small": True})

    monkeypatch.setattr("benchmarks.operators.measure_peaks", small)


@pytest.mark.usefixtures("small_peaks")
def test_operators_write_a_plot_of_what_varies(tmp_path: Path) -> None:
    operators.main(["--cpu-time", "--repeats", "1", "--eager", *SIZES, "--out", str(tmp_path)])
    assert {row["region_tokens"] for row in rows_in(tmp_path)} == {16, 64}
    assert len(list(tmp_path.glob("*.png"))) == 1


@pytest.mark.usefixtures("small_peaks")
def test_operators_vary_one_by_one_from_the_first(tmp_path: Path) -> None:
    how = ["--one-by-one", "--batch", "1", "2", "--repeats", "1", "--eager"]
    operators.main([*how, *SIZES, "--out", str(tmp_path)])
    found = {(row["tokens"], row["batch"], row["region_tokens"]) for row in rows_in(tmp_path)}
    assert found == {(64, 1, 16), (256, 1, 16), (64, 2, 16), (64, 1, 64)}


def test_additions_to_a_pipeline(flux: Path, capsys: pytest.CaptureFixture[str]) -> None:
    how = ["--height", "128", "--repeats", "1", "--eager", "--dtype", "float32"]
    stack.main([str(flux), "--image", "--steps", "2", *how])
    assert "projections," in capsys.readouterr().out


def test_additions_to_families_that_are_not_known() -> None:
    with pytest.raises(ValueError, match="not by z-image"):
        stack.main(["z-image", "--image", "--blocks", "1"])


@pytest.mark.slow
def test_cold_starts_have_processes_of_their_own(
    sdxl: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cold_start.main([str(sdxl), "--height", "128", "--repeats", "1"])
    out = capsys.readouterr().out
    assert "untouched" in out and "default 0.5" in out


def test_show(sdxl: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    drawing = ["--steps", "2", "--height", "128", "--width", "128"]
    command = [str(sdxl), "--prompt", "a b", "--out", str(tmp_path / "out"), *drawing]
    show.main([*command, "--layers", "2", "--columns", "2"])
    for file in capsys.readouterr().out.split():
        assert Path(file).exists()


def test_plot_of_an_evaluation(
    flux: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "prompts.txt").write_text("a b\n")
    out = str(tmp_path / "out")
    drawing = ["--steps", "2", "--height", "128", "--width", "128", "--measures", "psnr", "ssim"]
    prompts = ["--prompts", str(tmp_path / "prompts.txt")]
    assert main(["eval", str(flux), *prompts, *drawing, "--ratio", "0.5", "--out", out]) == 0
    capsys.readouterr()
    plot.main([out, "--y", "psnr", "ssim"])
    file = Path(capsys.readouterr().out.strip())
    assert file.name == "psnr_ssim_arithmetic.png" and file.exists()
