"""The commands, from the words of a command line to files."""

from pathlib import Path

import pytest

from toma_fx.cli import main
from toma_fx.lab import cli

DRAWING = ["--steps", "2", "--height", "128", "--width", "128"]


def test_eval_then_plot(flux: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "prompts.txt").write_text("a b\nc\nd\n")
    out = str(tmp_path / "out")
    command = ["eval", str(flux), "--prompts", str(tmp_path / "prompts.txt"), "--out", out]
    chosen = ["--limit", "2", "--variants", "toma:skip=", "steps=1", "--ratio", "0.25", "0.5"]
    chosen += ["--measures", "psnr", "ssim", "--schedule", "2/1", "--guidance", "2"]
    assert main([*command, *chosen, *DRAWING]) == 0
    printed = capsys.readouterr().out
    assert "toma:skip=" in printed and "PSNR (dB), higher" in printed
    identity = (tmp_path / "out/images/toma_skip=_r0.5/contender.json").read_text()
    assert "select_every=2, weigh_every=1" in identity
    assert main(["plot", out, "--y", "psnr", "ssim"]) == 0
    file = Path(capsys.readouterr().out.strip())
    assert file.name == "psnr_ssim_arithmetic.png" and file.exists()


def test_show(sdxl: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["show", str(sdxl), "--prompt", "a b", "--out", str(tmp_path / "out"), *DRAWING]
    assert main([*command, "--layers", "2", "--columns", "2", "--clusters", "3"]) == 0
    for file in capsys.readouterr().out.split():
        assert Path(file).exists()


def test_mistakes_are_one_line(
    sdxl: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prompts = tmp_path / "prompts.txt"
    command = ["eval", str(sdxl), "--prompts", str(prompts), "--out", str(tmp_path / "out")]
    assert main(command) == 2
    assert "prompts.txt' cannot be read" in capsys.readouterr().err
    prompts.write_text("a\n")
    for options, expected in (
        (["--variants", "nothing"], "variant='nothing' is unknown"),
        (["--schedule", "often"], "schedule='often'"),
        (["--rival", "none.py"], "rival='none.py' cannot be read"),
        (["--reference", str(tmp_path)], "holds 0 images"),
        (["--ratio", "2", "--variants", "default"], "ratio=2.0"),
    ):
        assert main([*command, *options, *DRAWING]) == 2
        error = capsys.readouterr().err
        (line,) = [line for line in error.splitlines() if line.startswith("toma-fx: ")]
        assert expected in line
    assert not (tmp_path / "out").exists()
    assert main(["show", str(sdxl), "--prompt", "a", "--variant", "steps", "--out", "x"]) == 2
    assert "merges nothing; use a preset" in capsys.readouterr().err


def test_missing_packages_are_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(cli, "PACKAGES", ("matplotlib", "no_such_package"))
    assert main(["plot", str(tmp_path)]) == 2
    assert "needs no_such_package: pip install 'toma-fx[lab]'" in capsys.readouterr().err
