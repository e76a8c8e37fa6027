"""``toma-fx bench`` on every family whose models have random weights, at test size."""

from collections import Counter
from typing import Any

import pytest
import torch
from torch._dynamo.testing import CompileCounter

from benchmarks.tiny import TINY, tiny
from toma_fx.bench.compare import compare
from toma_fx.bench.contenders import Setting, compile_blocks, fitted, load, twin
from toma_fx.bench.depth import counted, one_of_each
from toma_fx.bench.levels import blocks, models
from toma_fx.build import recipe_of
from toma_fx.checkpoints import FAMILIES, model_class, random_weights
from toma_fx.cli import main
from toma_fx.config import MergeConfig
from toma_fx.inputs import random_inputs
from toma_fx.tables import Table
from toma_fx.transform import transform
from toma_fx.variants import merging

VARIANTS = tuple(merging({"preset": name}) for name in ("lower_bound", "default"))
NEWER = ("flux2-klein-4b", "qwen-image", "z-image", "wan2.1-1.3b", "wan2.2-5b", "wan2.1-vace-1.3b")
SMALL = [name for name, family in FAMILIES.items() if family.name in TINY]
IN_LISTS = [name for name in SMALL if FAMILIES[name].block_counts]


def made_small(model: str, **changes: Any) -> Any:
    cls, config = model_class(model)
    return random_weights(cls, {**config, **tiny(model), **changes}, torch.float32)


def measured(model: str, **changes: Any) -> Table:
    how: dict[str, Any] = {"height": 128, "dtype": torch.float32, "repeats": 1, "compiled": False}
    setting = Setting(model=model, overrides=tiny(model), variants=VARIANTS, **{**how, **changes})
    (timed,) = models(load(setting), setting)
    return compare(timed, setting, title=setting.label)


@pytest.mark.parametrize("model", NEWER)
def test_one_block_of_each_list_is_timed(model: str) -> None:
    table = measured(model, blocks=(1,))
    assert [row["contender"] for row in table.rows][1:] == ["lower_bound", "default"]
    assert not any(row["failure"] for row in table.rows)
    assert any("tokens in attention" in note for note in table.notes)


def test_longer_videos_have_more_tokens() -> None:
    size = {"height": 64, "width": 128}
    tables = [measured("wan2.1-1.3b", frames=frames, **size) for frames in (5, 9)]
    assert ["64 x 128 pixels, 5 frames" in tables[0].title, "9 frames" in tables[1].title]
    notes = [next(n for n in table.notes if "attention" in n) for table in tables]
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
        Setting(model="z-image", overrides=tiny("z-image")),
    ):
        assert fitted(setting) == setting
    assert fitted(Setting(model="elsewhere")).blocks is None


@pytest.mark.parametrize("model", NEWER)
def test_a_list_that_merges_compiles_to_one_graph_more(model: str) -> None:
    setting = Setting(
        model=model, overrides=tiny(model), blocks=(4,), height=64, dtype=torch.float32
    )
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


def test_mistakes_are_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, message in (
        (
            ["model", "qwen-image", "--blocks", "1", "2"],
            "the lists of qwen-image are transformer_blocks",
        ),
        (["model", "flux2-dev", "--blocks", "0"], "at least 1"),
        (["image", "qwen-image", "--blocks", "1"], "not by qwen-image"),
    ):
        assert main(["bench", *arguments]) == 2
        assert message in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_cuda_graphs_want_a_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "model", "sdxl", "--cuda-graphs"]) == 2
    assert "needs a GPU of NVIDIA" in capsys.readouterr().err


def test_cuda_graphs_hold_one_decision(capsys: pytest.CaptureFixture[str]) -> None:
    for variant in ("merge_below=0.8", "memory=2"):
        arguments = ["bench", "model", "sdxl", "--cuda-graphs", "--variant", variant]
        assert main(arguments) == 2
        assert f"{variant!r} decides by the timestep" in capsys.readouterr().err


def test_what_a_model_cannot_be_asked_is_said() -> None:
    for model, changes, message in (
        ("qwen-image", {"frames": 5}, "draws images"),
        ("wan2.2-5b", {"frames": 6}, "frames"),
    ):
        with pytest.raises(ValueError, match=message):
            measured(model, **changes)
    setting = Setting(model="z-image", overrides=tiny("z-image"), dtype=torch.float32)
    with pytest.raises(ValueError, match="bench model --blocks 1"):
        next(blocks(load(setting), setting))
