"""The help of every command fits a screen of 80 columns, and says the same as its golden text.

``EXPECTTEST_ACCEPT=1`` writes the golden texts anew.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
COMMANDS = (
    "",
    "report",
    "bench",
    "bench model",
    "bench block",
    "bench image",
    "demo",
    "eval",
    "calibrate",
    "app",
)


@pytest.mark.parametrize("command", COMMANDS)
def test_help(command: str) -> None:
    words = [sys.executable, "-m", "toma_fx", *command.split(), "--help"]
    how = {**os.environ, "COLUMNS": "80"}
    done = subprocess.run(words, capture_output=True, text=True, cwd=ROOT, env=how, check=True)
    assert max(map(len, done.stdout.splitlines())) <= 80
    file = Path(__file__).with_name(f"{command.replace(' ', '_') or 'toma-fx'}.expected")
    if os.environ.get("EXPECTTEST_ACCEPT"):
        file.write_text(done.stdout)
    assert done.stdout == file.read_text()
