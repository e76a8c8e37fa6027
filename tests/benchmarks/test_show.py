"""Pictures of merging inside a model, on tiny pipelines."""

import csv
from pathlib import Path

import pytest
import torch
from PIL import Image

from benchmarks.show import Look, overlap, show
from toma_fx.checkpoints import load_pipeline
from toma_fx.config import MergeConfig
from toma_fx.errors import ConfigError
from toma_fx.lab.draw import Task, draw
from toma_fx.lab.prompts import Prompt


def task(folder: Path, steps: int = 4) -> Task:
    return Task(
        model=str(folder), prompts=(Prompt(text="a b"),), steps=steps, height=128, width=128
    )


def test_overlap_is_with_the_first_step_of_the_interval() -> None:
    steps = [torch.tensor(its) for its in ([0, 1, 2, 3], [0, 1, 2, 9], [8, 7, 6, 0], [8, 7, 6, 5])]
    assert overlap(steps, 2) == [1.0, 0.75, 1.0, 0.75]
    assert overlap(steps, 10) == [1.0, 0.75, 0.25, 0.0]


@pytest.mark.parametrize("name", ["sdxl", "flux"])
def test_all_of_it(name: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    work = task(request.getfixturevalue(name))
    config = MergeConfig(ratio=0.5, region_tokens=16, skip=())
    look = Look(config=config, layers=3, columns=2, interval=2)
    files = show(work, look, tmp_path / "out")
    assert {file.name for file in files} == {
        "image.png",
        "destinations.png",
        "overlap.png",
        "overlap.csv",
    }
    for file in files:
        assert file.stat().st_size > 200
    with Image.open(tmp_path / "out" / "image.png") as image:
        expected, _ = draw(load_pipeline(work.model), work, work.prompts[0], 0)
        assert image.tobytes() == expected.tobytes()
    with (tmp_path / "out" / "overlap.csv").open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert len(rows) == 3 * 4 and len({row["layer"] for row in rows}) == 3
    assert all(float(row["overlap"]) == 1 for row in rows if row["step"] in ("1", "3"))
    assert any(0 < float(row["overlap"]) < 1 for row in rows)


def test_one_layer_and_one_step_are_enough(flux: Path, tmp_path: Path) -> None:
    look = Look(config=MergeConfig(region="stripe", skip=()), layers=1, columns=1)
    assert len(show(task(flux, steps=1), look, tmp_path)) == 4


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"layers": 0}, "layers=0"),
        ({"interval": 0}, "interval=0"),
        ({"config": MergeConfig(ratio=0)}, "ratio=0 merges nothing"),
    ],
)
def test_mistakes_are_named(options: dict[str, object], expected: str) -> None:
    with pytest.raises(ConfigError, match=expected):
        Look(**{"config": MergeConfig(), **options})  # type: ignore[arg-type]
