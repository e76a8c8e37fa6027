"""A checkout without links, as git makes it on Windows, takes its own folders and no others."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PROGRAM = """
import toma_fx.passes.capture, toma_fx.runtime.plan
print(toma_fx.passes.capture.__file__, toma_fx.runtime.plan.__file__, sep="\\n")
"""


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """The links are text files that hold their targets."""
    for folder in ("toma_fx", "passes", "runtime"):
        shutil.copytree(
            ROOT / folder,
            tmp_path / folder,
            symlinks=True,
            ignore=shutil.ignore_patterns("__pycache__"),
        )
    for name in ("passes", "runtime"):
        (tmp_path / "toma_fx" / name).unlink()
        (tmp_path / "toma_fx" / name).write_text(f"../{name}")
    return tmp_path


def imported(checkout: Path) -> subprocess.CompletedProcess[str]:
    # The tests run with an editable install of this very tree, which must not be taken.
    environment = {**os.environ, "PYTHONPATH": str(checkout)}
    command = [sys.executable, "-W", "ignore", "-c", PROGRAM]
    return subprocess.run(command, capture_output=True, text=True, cwd=checkout, env=environment)


def test_folders_beside_it_are_taken(checkout: Path) -> None:
    done = imported(checkout)
    assert done.returncode == 0, done.stderr
    files = [Path(line) for line in done.stdout.splitlines()]
    assert files == [checkout / "passes" / "capture.py", checkout / "runtime" / "plan.py"]


def test_a_missing_folder_is_named(checkout: Path) -> None:
    shutil.rmtree(checkout / "runtime")
    done = imported(checkout)
    assert done.returncode == 1
    said = done.stderr.splitlines()[-1]
    assert said.startswith(f"ImportError: {checkout / 'toma_fx'} holds no folder 'runtime', and ")
    assert said.endswith("install it with pip install, or check the repository out again")
