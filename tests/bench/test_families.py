"""``toma-fx bench`` on every family whose models have random weights, as small as a test's."""

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._dynamo.testing import CompileCounter

from tests.bench.test_commands import run
from toma_fx.bench.compare import planned
from toma_fx.bench.contenders import Setting, compile_blocks, fitted, load, twin
from toma_fx.bench.live import peak_of_model
from toma_fx.bench.small import TINY, counted, one_of_each, tiny
from toma_fx.build import recipe_of
from toma_fx.checkpoints import FAMILIES, model_class, random_weights
from toma_fx.cli import main
from toma_fx.config import MergeConfig
from toma_fx.inputs import random_inputs
from toma_fx.transform import transform

NEWER = ("flux2-klein-4b", "qwen-image", "z-image", "wan2.1-1.3b", "wan2.2-5b", "wan2.1-vace-1.3b")
SMALL = [name for name, family in FAMILIES.items() if family.name in TINY]
IN_LISTS = [name for name in SMALL if FAMILIES[name].block_counts]


def made_small(model: str, **changes: Any) -> Any:
    cls, config = model_class(model)
    return random_weights(cls, {**config, **tiny(model), **changes}, torch.float32)


@pytest.mark.parametrize("model", NEWER)
def test_one_block_of_each_list_is_timed(model: str, tmp_path: Path) -> None:
    (table,) = run(model, "--blocks", "1", "--no-memory", out=tmp_path)
    assert [row["contender"] for row in table["rows"]][1:] == ["lower_bound", "default"]
    assert not any(row["failure"] for row in table["rows"])
    assert table["rows"][2]["planning_seconds"] > 0
    assert any("tokens in attention" in note for note in table["notes"])


def test_videos_of_several_lengths_are_tables_that_grow(tmp_path: Path) -> None:
    frames = ["--frames", "5", "9", "--size", "64", "--width", "128"]
    tables = run("wan2.1-1.3b", *frames, "--no-memory", out=tmp_path)
    assert ["64 x 128 pixels, 5 frames" in tables[0]["title"], "9 frames" in tables[1]["title"]]
    notes = [next(n for n in table["notes"] if "attention" in n) for table in tables]
    assert [[int(w) for w in n.split(":")[1].split(",")[:1]] for n in notes] == [[64], [96]]


@pytest.mark.parametrize("model", SMALL)
def test_every_small_model_runs(model: str) -> None:
    small = made_small(model)
    with torch.inference_mode():
        output = small(**random_inputs(small, height=64)).sample
    assert all(each.isfinite().all() for each in output)


@pytest.mark.parametrize("model", IN_LISTS)
def test_blocks_are_counted_in_every_list_that_merges(model: str) -> None:
    paths = FAMILIES[model].block_counts
    numbers = tuple(range(len(paths) + 1, 1, -1))
    small = made_small(model, **counted(model, numbers))
    merged = recipe_of(small, MergeConfig(skip=())).merged
    found = Counter(block.path.rpartition(".")[0] for block in merged)
    assert found == dict(zip(paths, numbers, strict=True))
    assert counted(model, (1,)) == counted(model, one_of_each(model))


def test_one_block_of_each_where_all_do_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("toma_fx.bench.contenders.available_memory", lambda: 2**30)
    assert fitted(Setting(model="flux2-dev")).blocks == (1, 1)
    assert "1 + 1 blocks" in fitted(Setting(model="flux2-dev")).label
    for setting in (
        Setting(model="wan2.1-vace-14b", blocks=(2,)),
        Setting(model="z-image", tiny=True),
    ):
        assert fitted(setting) == setting
    assert fitted(Setting(model="elsewhere")).blocks is None


def test_plans_are_those_of_image_tokens_alone() -> None:
    config = MergeConfig()
    for model, frames, shapes in (
        ("flux2-klein-4b", None, {64: 2}),  # text behind the image, and before it
        ("z-image", None, {64: 2}),
        ("wan2.1-vace-1.3b", 5, {2 * 64: 2}),
        ("wan2.2-5b", 9, {2 * 16: 1}),  # without the first frame, which may be given
    ):
        how: dict[str, Any] = {"height": 128, "frames": frames, "dtype": torch.float32}
        setting = Setting(model=model, tiny=True, **how)
        plans = planned(transform(load(setting), config), setting)
        assert {shape[1]: count for (shape, _), count in plans.items()} == shapes
        assert all(cut[2::2] == (shape[1],) for shape, cut in plans if len(cut) == 4), model


@pytest.mark.parametrize("model", NEWER)
def test_a_list_that_merges_compiles_to_one_graph_more(model: str) -> None:
    setting = Setting(model=model, tiny=True, blocks=(4,), height=64, dtype=torch.float32)
    untouched = load(setting)
    before, after = (
        graphs_of(each, setting)
        for each in (twin(untouched), transform(untouched, MergeConfig(skip=())))
    )
    # That of the block which makes the plan that the others of the list follow.
    assert after == before + len(one_of_each(model))


def graphs_of(model: Any, setting: Setting) -> int:
    torch._dynamo.reset()
    counter = CompileCounter()
    compile_blocks(model, backend=counter)
    inputs = random_inputs(model, **setting.size)
    with torch.inference_mode():
        for _ in range(2):
            model(**inputs)
    return counter.frame_count


@pytest.mark.parametrize("model", ["qwen-image", "wan2.1-vace-14b"])
def test_peak_memory_is_known_from_shapes(model: str) -> None:
    how = {"height": 128, **tiny(model)}
    bound = peak_of_model(model, MergeConfig(ratio=0.75), **how)
    assert 0 < bound != peak_of_model(model, **how)


def test_mistakes_are_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, message in (
        (["qwen-image", "--tiny", "--blocks", "1", "2"], "its lists are transformer_blocks"),
        (["flux2-dev", "--tiny", "--blocks", "0"], "at least 1"),
        (["qwen-image", "--tiny", "--frames", "5"], "draws images"),
        (["wan2.2-5b", "--tiny", "--frames", "6"], "frames"),
        (["z-image", "--tiny", "--level", "block"], "--level model --blocks 1"),
        (["wan2.1-14b", "--tiny", "--level", "stage"], "--level model --blocks 1"),
        (["qwen-image", "--tiny", "--level", "image"], "not by qwen-image"),
        (["z-image", "--tiny", "--level", "image", "--stack"], "not by z-image"),
        (["flux2-dev", "--tiny", "--stack"], "additions to FLUX.2 dev and klein"),
        (["z-image", "--level", "op"], "give --tokens"),
        (["wan2.1-1.3b", "--cold", "--frames", "5", "9"], "must be one number with --cold"),
    ):
        assert main(["bench", *arguments]) == 2
        assert message in capsys.readouterr().err


def test_rivals_that_know_no_transformer_say_so(tmp_path: Path) -> None:
    (table,) = run("z-image", "--variants", "default", "tomesd", "--no-memory", out=tmp_path)
    assert "merges in UNets" in table["rows"][-1]["failure"]
