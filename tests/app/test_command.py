"""``toma-fx app`` says what it lacks in a sentence."""

import signal
import socket
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from toma_fx.cli import main
from toma_fx.lab import small_models

ROOT = Path(__file__).parents[2]
needs_gradio = pytest.mark.skipif(find_spec("gradio") is None, reason="there is no gradio")


def test_without_gradio_it_says_how_to_install_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "gradio", None)
    assert main(["app"]) == 2
    said = capsys.readouterr().err
    assert said == "toma-fx: the app needs gradio, which is not here: pip install 'toma-fx[app]'\n"


@needs_gradio
def test_without_the_small_pipelines_it_asks_for_a_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(small_models, "FOLDER", tmp_path)
    assert main(["app"]) == 2
    said = capsys.readouterr().err
    assert f"{tmp_path} is not there; name one of yours: --model" in said


@needs_gradio
def test_a_port_that_is_taken_is_a_sentence(folder: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        given = ["app", "--model", str(folder / "sdxl"), "--port", str(port)]
        # A process of its own, since gradio leaves sockets open where it finds no port.
        command = [sys.executable, "-m", "toma_fx", *given]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2
    assert f"toma-fx: no page at host='127.0.0.1', port={port}: " in done.stderr
    assert "Traceback" not in done.stderr


@needs_gradio
def test_ctrl_c_ends_it_in_one_line(folder: Path) -> None:
    command = [sys.executable, "-u", "-m", "toma_fx", "app", "--model", str(folder / "sdxl")]
    with subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as server:
        assert server.stdout is not None and server.stderr is not None
        assert "toma-fx app is at http://" in server.stdout.readline()
        server.send_signal(signal.SIGINT)
        rest, errors = server.communicate(timeout=60)
    assert server.returncode == 130
    assert rest == ""
    assert errors.strip().splitlines()[-1] == "toma-fx: interrupted"
    assert "Traceback" not in errors


@needs_gradio
def test_a_port_that_there_is_not(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "toma_fx", "app", "--port", "999999"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    assert "no page at host='127.0.0.1', port=999999" in done.stderr
    assert "Traceback" not in done.stderr
