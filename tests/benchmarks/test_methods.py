"""Caches beside merging: their arithmetic is that of the calls they computed, and they come off."""

import csv
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline, WanPipeline
from PIL import Image

from benchmarks import methods, scenarios, tradeoffs
from benchmarks.caches import CacheDit, DeepCache, first_block_cache, taylor_seer
from benchmarks.real_size import RealSize
from examples.small_models import judge as judge_module
from examples.small_models.architecture import pipeline, video_pipeline
from examples.small_models.check import drawn_by
from examples.small_models.judge import Judge
from toma_fx.lab.small_models import FOLDER

STEPS = 6


def drawn(pipe: Any) -> Any:
    more: dict[str, Any] = {"height": 128, "width": 128}
    if hasattr(pipe, "transformer"):
        more["max_sequence_length"] = 24
    if isinstance(pipe, WanPipeline):
        more |= {"height": 32, "width": 32, "num_frames": 5}
    output = pipe(
        "a small red star on a plain green ground under a blue sky",
        num_inference_steps=STEPS,
        generator=torch.Generator().manual_seed(0),
        output_type="np",
        **more,
    )
    return drawn_by(output)


def pipeline_of(kind: str) -> Any:
    """The repository's, and for Wan an untrained one, as its size is not what is tested."""
    pipe = tiny_wan() if kind == "wan" else DiffusionPipeline.from_pretrained(FOLDER / kind)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def tiny_wan() -> WanPipeline:
    pipe = video_pipeline(tiny=True)
    torch.manual_seed(0)
    torch.nn.init.normal_(pipe.transformer.proj_out.weight, std=0.1)  # else it says nothing
    return pipe


@pytest.mark.parametrize(
    ("kind", "cache", "least", "most"),
    [
        ("sdxl", DeepCache(1), 1.0, 1.0),
        ("sdxl", DeepCache(2), 0.5, 0.55),
        ("sdxl", DeepCache(3), 0.33, 0.4),
        ("flux", first_block_cache(0.0), 1.0, 1.0),
        ("flux", first_block_cache(100.0), 1 / STEPS, 0.25),
        ("flux", taylor_seer(2), 0.6, 0.9),
        ("flux", CacheDit(0.0, guided=False), 1.0, 1.0),
        ("flux", CacheDit(100.0, guided=False), 3 / STEPS, 0.7),
        ("wan", first_block_cache(0.0), 1.0, 1.0),
        ("wan", first_block_cache(100.0), 1 / STEPS, 0.25),
        ("wan", taylor_seer(2), 0.6, 0.9),
    ],
    ids=lambda value: getattr(value, "name", str(value)),
)
def test_a_cache_costs_what_it_computed_and_comes_off(
    kind: str, cache: Any, least: float, most: float
) -> None:
    pipe = pipeline_of(kind)
    untouched = drawn(pipe)
    real = RealSize("wan2.1-1.3b", height=None) if kind == "wan" else RealSize(kind)
    with cache.on(pipe, real) as share:
        images = drawn(pipe)
        assert least <= share() <= most
    assert np.array_equal(images, untouched) == (least == 1.0)
    assert np.array_equal(drawn(pipe), untouched)


@pytest.fixture
def untrained_judge(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its answers are not what is tested."""
    torch.manual_seed(0)
    judge = Judge().eval()
    monkeypatch.setattr(methods, "load_judge", lambda: judge)
    monkeypatch.setattr(judge_module, "TRUE_PICTURES", 8)  # each is drawn


def test_a_scenario_is_drawn_once_and_judged_from_its_files(
    tmp_path: Path, untrained_judge: None, capsys: pytest.CaptureFixture[str]
) -> None:
    pipeline("sdxl", tiny=True).save_pretrained(tmp_path / "pipe")
    words = ["sdxl-4", "--prompts", "2", "--model", str(tmp_path / "pipe")]
    words += ["--images", str(tmp_path / "images"), "--out", str(tmp_path)]
    methods.main([*words, "--only", "3 steps", "step, ratio 0.5"])
    first = (tmp_path / "methods-sdxl-4.csv").read_text()
    files = {file: file.stat().st_mtime_ns for file in (tmp_path / "images").rglob("*.npz")}
    assert len(files) == 4  # untouched too, and 3 steps on both schedules
    methods.main([*words, "--only", "3 steps", "step, ratio 0.5"])
    assert (tmp_path / "methods-sdxl-4.csv").read_text() == first
    assert {file: file.stat().st_mtime_ns for file in files} == files
    said = capsys.readouterr().out
    assert "3 steps" in said and "merged at every step, ratio 0.5" in said
    assert "75 %" in said and "60 %" in said
    rows = {row["row"]: row for row in csv.DictReader(first.splitlines())}
    merged = rows["merged at every step, ratio 0.5"]
    assert 0 < float(merged["small"]) < 1 and merged["small"] != merged["arithmetic"]
    assert float(rows["3 steps"]["small"]) == 0.75


def test_rows_are_paired_image_by_image(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    results = tmp_path / "methods-sdxl-4.csv"
    results.write_text("row,arithmetic,small,psnr\nuntouched,1,1,\none,1,,2\nother,1,,1\n")
    values = {"one": (30.0, 40.0, 50.0), "other": (29.0, 38.5, 49.5)}
    lines = [
        f"{name},{n},{psnr},{psnr / 100}"
        for name, each in values.items()
        for n, psnr in enumerate(each)
    ]
    methods.images_file(results).write_text("\n".join(["row,image,psnr,answers", *lines]))
    mean, low, high = methods.paired(methods.images_file(results), "one", "other", "psnr")
    # The rows' own intervals overlap widely; their differences are 1, 1.5 and 0.5.
    assert mean == pytest.approx(1) and (low, high) == (0.5, 1.5)
    assert "| one | 1.0 (0.5 to 1.5)" in " ".join(methods.differences(results, "other").split())
    with pytest.raises(SystemExit, match="--against 'none' must be one of 'one', 'other'"):
        methods.differences(results, "none")


def test_tradeoffs_are_drawn_and_every_row_has_its_kind(tmp_path: Path) -> None:
    file = tmp_path / "plot.png"
    tradeoffs.main([str(file), "sdxl-25", "kontext-25"])
    with Image.open(file) as picture:
        width, height = picture.size
    assert width > height > 300
    for name, kind in {
        "memory every 2, theta 0": "memory",
        "merged at every step, ratio 0.5": "merging",
        "references merged, ratio 0.5": "merging",
        "18 steps, searched schedule": "searched schedule",
        "15 steps": "fewer steps",
        "DeepCache, every 2": "others' caches and merging",
    }.items():
        assert tradeoffs.kind_of(name) == kind


def _shorten(monkeypatch: pytest.MonkeyPatch, name: str, steps: int) -> None:
    short = replace(scenarios.SCENARIOS[name], steps=steps)
    monkeypatch.setitem(scenarios.SCENARIOS, name, short)


def test_clips_are_compared_in_all_frames_and_judged_in_some(
    tmp_path: Path, untrained_judge: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    _shorten(monkeypatch, "video-25", steps=4)
    tiny_wan().save_pretrained(tmp_path / "pipe")
    words = ["video-25", "--prompts", "2", "--model", str(tmp_path / "pipe")]
    words += ["--images", str(tmp_path / "images"), "--out", str(tmp_path)]
    methods.main([*words, "--only", "3 steps", "every step, ratio 0.5", "every 2, theta 0", "0.1"])
    with (tmp_path / "methods-video-25.csv").open() as lines:
        rows = {row["row"]: row for row in csv.DictReader(lines)}
    assert [*rows] == [
        "untouched",
        "3 steps",
        "merged at every step, ratio 0.5",
        "memory every 2, theta 0",
        "first-block cache, threshold 0.1",
    ]
    assert all(row["images"] == "2" for row in rows.values())
    assert all(float(row["arithmetic"]) < 1 for row in [*rows.values()][1:4])
    assert float(rows["merged at every step, ratio 0.5"]["psnr"]) > 10
    clips = np.load(next((tmp_path / "images").rglob("untouched.npz")))["images"]
    assert clips.shape == (2, 17, 96, 96, 3)


def test_an_edit_is_drawn_and_only_its_reference_merges(
    tmp_path: Path, untrained_judge: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    _shorten(monkeypatch, "kontext-25", steps=3)
    # Five prompts are two calls of the pipeline, which must name a context for each.
    words = ["kontext-25", "--prompts", "5", "--only", "references merged, ratio 0.5", "Seer"]
    methods.main([*words, "--images", str(tmp_path), "--out", str(tmp_path)])
    with (tmp_path / "methods-kontext-25.csv").open() as file:
        rows = {row["row"]: row for row in csv.DictReader(file)}
    untouched, merged = rows["untouched"], rows["references merged, ratio 0.5"]
    assert "TaylorSeer lite, every 2, order 1" in rows
    # Half of the reference's 4,096 tokens are left out, of 8,704 with the text.
    assert 0.65 < float(merged["arithmetic"]) < 0.75 and untouched["arithmetic"] == "1.0"
    assert 10 < float(merged["psnr"]) < 50
