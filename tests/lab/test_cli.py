"""The commands, from the words of a command line to files."""

from pathlib import Path

import pytest

from toma_fx.cli import main
from toma_fx.errors import ConfigError
from toma_fx.lab.cli import need_packages

DRAWING = ["--steps", "2", "--height", "128", "--width", "128"]


def test_eval(flux: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "prompts.txt").write_text("a b\nc\nd\n")
    out = str(tmp_path / "out")
    command = ["eval", str(flux), "--prompts", str(tmp_path / "prompts.txt"), "--out", out]
    chosen = [
        "--limit",
        "2",
        "--variant",
        "toma:skip=,schedule=2/1",
        "steps=1",
        "--ratio",
        "0.25",
        "0.5",
    ]
    chosen += ["--measures", "psnr", "ssim", "--guidance", "2"]
    assert main([*command, *chosen, *DRAWING]) == 0
    printed = capsys.readouterr().out
    for word in ("toma:", "steps=1", "PSNR", "arithmetic"):
        assert word in printed
    assert max(map(len, printed.splitlines())) <= 80
    identity = (tmp_path / "out/images/toma_skip=_schedule=2_1_r0.5/contender.json").read_text()
    assert "select_every=2, weigh_every=1" in identity


def test_mistakes_are_one_line(
    sdxl: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prompts = tmp_path / "prompts.txt"
    command = ["eval", str(sdxl), "--prompts", str(prompts), "--out", str(tmp_path / "out")]
    assert main(command) == 2
    assert "prompts.txt' cannot be read" in capsys.readouterr().err
    prompts.write_text("a\n")
    for options, expected in (
        (["--variant", "nothing"], "variant='nothing' is unknown"),
        (["--variant", "toma:schedule=often"], "schedule='often'"),
        (["--reference", str(tmp_path)], "holds 0 images"),
        (["--ratio", "2", "--variant", "default"], "ratio=2.0"),
    ):
        assert main([*command, *options, *DRAWING]) == 2
        error = capsys.readouterr().err
        (line,) = [line for line in error.splitlines() if line.startswith("toma-fx: ")]
        assert expected in line
    assert not (tmp_path / "out").exists()
    calibrate = ["calibrate", str(sdxl), "--merge-below", "2", "--out", "x.json"]
    assert main(calibrate) == 2
    assert "merge_below=2.0 must be a number in (0, 1]" in capsys.readouterr().err


def test_missing_packages_are_named() -> None:
    with pytest.raises(ConfigError, match=r"needs no_such: pip install 'toma-fx\[lab\]'"):
        need_packages("torch", "no_such")
