"""Mistakes are told before torch is loaded, and so within a second or two."""

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PROGRAM = (
    "import sys; from toma_fx.cli import main; status = main(sys.argv[1:]); "
    "assert 'torch' not in sys.modules; sys.exit(status)"
)


def said(words: str, folder: Path) -> str:
    """The one line of a mistake, in a process that has no network."""
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, *shlex.split(words)],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2, done.stderr
    assert done.stdout == "" and done.stderr.count("\n") == 1, done.stderr
    return done.stderr


@pytest.mark.parametrize(
    "words",
    [
        "report no/model",
        "demo --model no/model",
        "bench model no/model",
        "bench image no/model",
        "calibrate no/model --out a.json",
        pytest.param("eval no/model --out a", id="eval"),
        pytest.param("app --model no/model", id="app"),
    ],
)
def test_a_model_that_is_not_there(words: str, tmp_path: Path) -> None:
    assert "'no/model': there is no such folder, nothing of it was loaded before, and HF_HUB" in (
        said(words, tmp_path)
    )


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("report sdxl --out file/report.txt", "cannot be made, since"),
        ("report sdxl --out .", "out='.' is a folder; name a file"),
        ("calibrate . --out file/a.json", "cannot be made, since"),
        ("eval . --out file", "out='file' is a file; name a folder"),
        ("bench model sdxl --out file", "out='file' is a file; name a folder"),
        ("demo --out file", "out='file' is a file; name a folder"),
    ],
)
def test_a_place_that_cannot_be_written(words: str, expected: str, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    assert expected in said(words, tmp_path)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("report sdxl --steps 0", "steps=0 must be a whole number of at least 1"),
        ("report sdxl --batch -1", "batch=-1 must be a whole number of at least 1"),
        ("report wan2.1-14b --frames 0", "frames=0 must be"),
        ("bench model sdxl --batch 2 0", "batch=0 must be"),
        ("bench image . --steps 0", "steps=0 must be"),
        ("demo --steps 0", "steps=0 must be"),
        ("bench block wan2.1-14b", "blocks of wan2.1-14b run only in a call of their model"),
    ],
)
def test_counts_and_models_that_mean_nothing(words: str, expected: str, tmp_path: Path) -> None:
    assert expected in said(words, tmp_path)
