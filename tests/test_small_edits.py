"""The small Kontext: its pairs of pictures, its training at a tiny size, and its files."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import FluxTransformer2DModel

from examples.small_models.architecture import pipeline
from examples.small_models.edits import Edit, draw_edit, edit_of
from examples.small_models.pictures import caption, is_held_out, parse
from examples.small_models.train_edits import main

KONTEXT = Path(__file__).parent.parent / "examples" / "small_models" / "kontext"


def changed(edit: Edit, seed: int) -> Any:
    before, after = draw_edit(edit, seed)
    return (before != after).any(-1)


def test_an_edit_changes_one_thing_and_keeps_all_else() -> None:
    kinds = set()
    for index in range(40):
        edit = edit_of(index)
        kinds.add(edit.kind)
        assert 0 < changed(edit, index).mean() < 0.4
        assert parse(edit.prompt).sky == edit.before.scene.sky
        assert edit.before.caption != edit.prompt
        assert not is_held_out(edit.after.scene.first)
        if edit.kind != "recolour":
            assert edit.before.scene == edit.after.scene
            one, two = sorted([edit.before.caption, edit.prompt], key=len)
            assert parse(one).second is None
            assert two == caption(edit.before.scene)
    assert kinds == {"recolour", "remove", "add"}


def test_pictures_depend_on_their_index_alone() -> None:
    for index in (3, 4):
        again = draw_edit(edit_of(index), index)
        assert all(map(np.array_equal, again, draw_edit(edit_of(index), index)))


@pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight:UserWarning")
def test_training_goes_on_where_it_stopped(tmp_path: Path) -> None:
    pipeline("flux", tiny=True).save_pretrained(tmp_path / "flux")
    common = f"--batch 2 --pictures 4 --start {tmp_path}/flux"
    for folder, lengths in (("whole", [3]), ("parts", [2, 3])):
        for steps in lengths:
            own = f"--steps {steps} --work {tmp_path}/{folder} --output {tmp_path}/{folder}"
            main([*common.split(), *own.split()])
    records = [
        json.loads((tmp_path / each / "training.json").read_text()) for each in ("whole", "parts")
    ]
    assert [record["steps"] for record in records] == [3, 3]
    model = FluxTransformer2DModel.from_pretrained(tmp_path / "parts", subfolder="transformer")
    assert all(parameter.isfinite().all() for parameter in model.parameters())


@pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight:UserWarning")
def test_shipped_transformer_keeps_what_is_not_edited() -> None:
    from benchmarks.edit_references import draw, measured, pair_of, pipeline

    assert sum(file.stat().st_size for file in KONTEXT.rglob("*")) < 20e6
    assert "Apache-2.0" in (KONTEXT / "README.md").read_text()
    pipe, pair = pipeline(KONTEXT), pair_of(10_000_004)
    with torch.no_grad():
        drawn = draw(pipe, pair, 4)
    found = measured(pair, drawn, drawn)
    assert found["outside_true"] > 20
    assert found["inside_untouched"] == float("inf")
    before = measured(pair, pair.before, None)
    assert found["inside_true"] > before["inside_true"]
