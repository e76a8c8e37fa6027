"""Rows: one model on several processes, and many prompts on several processes."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.matrix.frame import Cell, difference, row
from tests.matrix.pictures import pipeline
from tests.matrix.ranks import (
    RANKS,
    call,
    on_ranks,
    split_before,
    tensor_parallelism,
    ulysses,
)
from tests.tiny import tiny_flux
from toma_fx import MergeConfig, Schedule, transform
from toma_fx.errors import ModelError

SECTION = "More than one machine"
TOKENS = 16 * 16
"""What `call` has."""
GLOO = "two processes on the CPU"


def alone(config: MergeConfig) -> Tensor:
    """What one process computes."""
    with torch.no_grad():
        return call(transform(tiny_flux(), config))


# On ranks, and in one process.
SAME = [
    (MergeConfig(), MergeConfig()),
    (MergeConfig(placement="component"), MergeConfig(placement="component")),
    (MergeConfig(region="stripe"), MergeConfig(region="stripe")),
    (
        MergeConfig(schedule=Schedule(select_every=3, weigh_every=2)),
        MergeConfig(schedule=Schedule(select_every=3, weigh_every=2)),
    ),
    # A rank merges among its own tokens, so the whole image becomes the rank's part of it.
    (MergeConfig(region="image"), MergeConfig(region="stripe", region_tokens=TOKENS // RANKS)),
]


@row(
    "Context parallelism by Ulysses",
    section=SECTION,
    families=("flux",),
    note=f"{GLOO}; `enable_parallelism` after `transform`",
)
def test_ulysses(cell: Cell, tmp_path: Path) -> None:
    pairs = SAME if cell.mode == "eager" else SAME[:1]
    outputs = on_ranks(ulysses, tmp_path, cell.mode, cell.backend, [there for there, _ in pairs])
    untouched = alone(MergeConfig(ratio=0))
    for output, (_, here) in zip(outputs, pairs, strict=True):
        assert difference(output, alone(here)) < 1e-5
        assert difference(output, untouched) > 1e-2


@row(
    "Context parallelism enabled before `transform`",
    section=SECTION,
    families=("flux",),
    modes=("eager",),
    quick=(),
)
def test_split_before(cell: Cell, tmp_path: Path) -> None:
    message = on_ranks(split_before, tmp_path)
    with cell.refuses(ModelError, match="transform first, then enable context parallelism"):
        name, _, said = message.partition(": ")
        assert name == "ModelError"
        raise ModelError(said)


@pytest.mark.parametrize("when", ["before", "after"])
@row(
    "Tensor parallelism, enabled {when} `transform`",
    section=SECTION,
    families=("flux",),
    quick=(),
    note=GLOO,
)
def test_tensor_parallelism(cell: Cell, when: str, tmp_path: Path) -> None:
    output, part = on_ranks(tensor_parallelism, tmp_path, cell.mode, cell.backend, when)
    width = tiny_flux().inner_dim
    assert part == (width // RANKS, width)
    assert difference(output, alone(MergeConfig())) < 1e-5
    assert difference(output, alone(MergeConfig(ratio=0))) > 1e-2


@row(
    "Many prompts by `accelerate launch`",
    section=SECTION,
    modes=("eager",),
    quick=(),
    note=f"{GLOO}; `examples/generate.py`",
)
def test_many_prompts(cell: Cell, tmp_path: Path) -> None:
    pipeline(cell.family).save_pretrained(tmp_path / "model")
    (tmp_path / "prompts.txt").write_text("a cat\na dog\na cow\n")
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--cpu"]
    launch += ["--num_processes", str(RANKS)]
    for processes, start in ((1, [sys.executable]), (RANKS, launch)):
        command = [*start, "examples/generate.py", "--model", str(tmp_path / "model")]
        command += [
            "--prompts",
            str(tmp_path / "prompts.txt"),
            "--out",
            str(tmp_path / str(processes)),
        ]
        run([*command, "--steps", "2", "--size", "128"])
    one, two = (sorted((tmp_path / str(count)).glob("*.png")) for count in (1, RANKS))
    assert [file.name for file in one] == ["0.png", "1.png", "2.png"]
    assert [file.read_bytes() for file in one] == [file.read_bytes() for file in two]


def run(command: list[str]) -> Any:
    """Run a command at the root of the repository."""
    root = Path(__file__).parents[2]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(root), *sys.path])}
    return subprocess.run(command, cwd=root, env=environment, check=True)
