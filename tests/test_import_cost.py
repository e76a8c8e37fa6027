"""Importing toma_fx, or asking the command line for help, loads nothing heavy."""

import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
HEAVY = (
    "diffusers",
    "transformers",
    "torch._dynamo",
    "torch._inductor",
    "torch._functorch",
    "sympy",
    "triton",
    "matplotlib",
    "torchmetrics",
    "tomesd",
    "gradio",
)
MOST_MODULES = 30
"""Beyond those that torch loads, most of which are Python's own; the command line adds 16."""

HELP = """
import contextlib, io, sys
from toma_fx.cli import main
for command in ([], *(name.split() for name in sys.argv[1:])):
    with contextlib.redirect_stdout(io.StringIO()) as said, contextlib.suppress(SystemExit):
        main([*command, "--help"])
    assert "usage: toma-fx" in said.getvalue(), command
"""
BENCH = ("bench", "bench model", "bench block", "bench image")
COMMANDS = ("report", *BENCH, "demo", "eval", "calibrate", "app")


@cache
def modules(program: str, *arguments: str) -> frozenset[str]:
    """The modules that a new process holds after a program."""
    program += "\nimport sys; print('\\n'.join(sys.modules))"
    command = [sys.executable, "-c", program, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=True)
    return frozenset(done.stdout.split())


@pytest.mark.parametrize(
    ("program", "arguments"),
    [
        ("import toma_fx", ()),
        ("import toma_fx; toma_fx.MergeConfig(), toma_fx.Schedule, toma_fx.TomaError", ()),
        (HELP, COMMANDS),
    ],
    ids=["import", "config", "help"],
)
def test_nothing_heavy_is_loaded(program: str, arguments: tuple[str, ...]) -> None:
    loaded = modules(program, *arguments)
    added = loaded - modules("import torch")
    assert [name for name in HEAVY if name in added] == []
    assert not any(name.startswith(("toma_fx.runtime", "toma_fx.passes")) for name in loaded)
    assert len(added) <= MOST_MODULES, sorted(added)


def test_the_command_line_is_light_to_start_as_a_module() -> None:
    command = [sys.executable, "-X", "importtime", "-m", "toma_fx", "bench", "--help"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=True)
    loaded = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert "toma_fx.bench.cli" in loaded
    assert not loaded & {*HEAVY, "torch"}
