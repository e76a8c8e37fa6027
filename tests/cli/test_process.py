"""A process that is interrupted, that has no reader, or that cannot reach the hub."""

import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest
import torch

from toma_fx.cli import main

ROOT = Path(__file__).parents[2]
COMMAND = [sys.executable, "-m", "toma_fx"]


def environment(**changes: str) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if name != "HF_HUB_OFFLINE"}
    return {**kept, "OMP_NUM_THREADS": "1", **changes}


def lines_of(error: str) -> list[str]:
    """What the command itself says, without what libraries do."""
    return [line for line in error.splitlines() if line.startswith("toma-fx: ")]


@pytest.mark.parametrize("command", [["report"], ["bench", "model"], ["bench", "image"]])
def test_an_unreachable_hub_is_asked_once_and_named(command: list[str], tmp_path: Path) -> None:
    # A port of this machine that nobody listens at.
    how = environment(HF_ENDPOINT="http://127.0.0.1:9", HF_HOME=str(tmp_path))
    words = [*COMMAND, *command, "someone/some-model"]
    done = subprocess.run(words, capture_output=True, text=True, cwd=ROOT, env=how, timeout=60)
    assert done.returncode == 2
    (line,) = lines_of(done.stderr)
    assert "'someone/some-model'" in line
    assert "http://127.0.0.1:9, cannot be reached: Connection refused" in line
    assert "Retry" not in done.stderr


def test_offline_is_said_without_asking(tmp_path: Path) -> None:
    how = environment(HF_HUB_OFFLINE="1", HF_HOME=str(tmp_path))
    words = [*COMMAND, "report", "someone/some-model"]
    done = subprocess.run(words, capture_output=True, text=True, cwd=ROOT, env=how, timeout=60)
    assert done.returncode == 2
    (line,) = lines_of(done.stderr)
    assert "HF_HUB_OFFLINE is set" in line


def test_ctrl_c_is_one_line(tmp_path: Path) -> None:
    small = ROOT / "examples" / "small_models"
    words = [*COMMAND, "eval", str(small / "sdxl"), "--prompts", str(small / "prompts.txt")]
    words += ["--out", str(tmp_path)]  # which takes many minutes
    process = subprocess.Popen(
        words, stderr=subprocess.PIPE, text=True, cwd=ROOT, env=environment(COLUMNS="80")
    )
    # At work: torch is loaded, so that Python's own start is over.
    maps = Path(f"/proc/{process.pid}/maps")
    while "libtorch_cpu" not in maps.read_text():
        assert process.poll() is None
        time.sleep(0.1)
    error = ""
    while process.returncode is None:
        time.sleep(1)
        process.send_signal(signal.SIGINT)
        # An import that tries a module out may take the signal for the module's failure.
        with suppress(subprocess.TimeoutExpired):
            _, error = process.communicate(timeout=60)
    assert process.returncode == 130
    assert lines_of(error) == ["toma-fx: interrupted"]
    assert "Traceback" not in error


def test_a_reader_that_goes_ends_it_quietly() -> None:
    words = " ".join([*COMMAND, "report", "flux", "--placement", "component"])
    done = subprocess.run(
        ["bash", "-c", f"{words} | true; echo ${{PIPESTATUS[0]}}"],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=environment(),
    )
    assert done.stdout.strip() == "1"
    assert "BrokenPipe" not in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nmore"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried 9 bytes"),
    ],
)
def test_out_of_memory_is_one_line_that_says_what_to_lower(
    error: Exception, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*args: object, **options: object) -> None:
        raise error

    monkeypatch.setattr("toma_fx.checkpoints.architecture", fail)
    assert main(["report", "sdxl"]) == 1
    said = capsys.readouterr().err
    assert said.startswith("toma-fx: out of memory (") and "--height" in said
    assert said.count("\n") == 1


def test_other_errors_keep_their_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object, **options: object) -> None:
        raise RuntimeError("a bug")

    monkeypatch.setattr("toma_fx.checkpoints.architecture", fail)
    with pytest.raises(RuntimeError, match="a bug"):
        main(["report", "sdxl"])


def test_long_work_says_so_every_while(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from toma_fx import progress

    monkeypatch.setattr(progress, "SECONDS", 0.05)
    with progress.progress("compile", 4, "call") as bar:
        bar.update()
        said = ""
        while said.count("compile") < 2:  # no step is done meanwhile
            time.sleep(0.01)
            said += capsys.readouterr().err
    monkeypatch.setattr(progress, "SECONDS", 600.0)
    with progress.progress("quick work", 1, "call") as bar:
        bar.update()
    assert "quick work" not in capsys.readouterr().err  # which needs no sign of life
