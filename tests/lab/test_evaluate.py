"""The whole of ``toma-fx eval`` on tiny pipelines."""

import csv
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from benchmarks.rivals import load_rival, tomesd
from toma_fx.arithmetic import first_call
from toma_fx.checkpoints import load_pipeline
from toma_fx.errors import ConfigError
from toma_fx.lab.contenders import contend
from toma_fx.lab.draw import Task, draw
from toma_fx.lab.evaluate import Plan, Processes, draw_missing, evaluate, pictures
from toma_fx.lab.gallery import Gallery, seconds_of
from toma_fx.lab.measures import MEASURES, OF_SMALL_MODELS
from toma_fx.lab.networks import Networks
from toma_fx.lab.prompts import Prompt
from toma_fx.variants import parse_variant

ROOT = Path(__file__).parents[2]
PROMPTS = (Prompt(text="a b"), Prompt(text="c d", negative="e"))


def task(folder: Path, **options: Any) -> Task:
    settings: dict[str, Any] = {"steps": 2, "height": 128, "width": 128, "seeds": 2}
    return Task(model=str(folder), prompts=PROMPTS, **{**settings, **options})


def plan(*variants: str, **options: Any) -> Plan:
    settings: dict[str, Any] = {"ratios": (0.5,), "measures": ("mse", "psnr")}
    return Plan(variants=tuple(map(parse_variant, variants)), **{**settings, **options})


def rows(file: Path) -> list[dict[str, str]]:
    with file.open(newline="") as stream:
        return list(csv.DictReader(stream))


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int, int]]:
    """Prompt, seed and steps of every image that is drawn, beside the drawing of it."""
    calls: list[tuple[str, int, int]] = []

    def noted(pipeline: Any, task: Task, prompt: Prompt, seed: int, **options: Any) -> Any:
        if "steps" in options:  # the call that is only looked at has none
            calls.append((prompt.text, seed, options["steps"]))
        return draw(pipeline, task, prompt, seed, **options)

    monkeypatch.setattr("toma_fx.lab.evaluate.draw", noted)
    return calls


def test_all_of_it_on_sdxl(sdxl: Path, clip: Path, dino: Path, tmp_path: Path) -> None:
    variants = (
        parse_variant("default"),
        parse_variant("steps=1"),
        tomesd(),
        *(load_rival(ROOT / f"examples/rivals/{name}.py") for name in ("todo", "tofu")),
    )
    networks = Networks(clip=str(clip), dino=str(dino), fid=str(dino))
    measures = tuple(name for name in MEASURES if name not in OF_SMALL_MODELS)
    contest = Plan(variants=variants, ratios=(0.5,), measures=measures, networks=networks)
    text = evaluate(task(sdxl), contest, tmp_path)
    for word in ("untouched", "default", "steps=1", "tomesd", "todo", "tofu", "CLIP"):
        assert word in text
    images, summary = rows(tmp_path / "images.csv"), rows(tmp_path / "summary.csv")
    assert len(images) == 6 * 4 and len(summary) == 6
    by_name = {row["variant"]: row for row in summary}
    for name in ("default", "steps=1", "tomesd", "todo", "tofu"):
        assert float(by_name[name]["arithmetic"]) < 1
        low, mean, high = (float(by_name[name][f"psnr{end}"]) for end in ("_low", "", "_high"))
        assert low <= mean <= high
        assert 0 < float(by_name[name]["dino"]) < 2
    assert by_name["untouched"]["psnr"] == "" and float(by_name["untouched"]["clip"]) >= 0
    assert by_name["default"]["lpips"] != ""  # a figure, or why there is none
    for row in images:
        file = tmp_path / row["file"]
        assert float(row["seconds"]) == seconds_of(file)


def test_flux_and_its_note_on_negative_prompts(flux: Path, tmp_path: Path) -> None:
    text = evaluate(task(flux, seeds=1), plan("toma_tile:skip=", "steps"), tmp_path)
    assert "1 prompts have a negative prompt, which FluxPipeline does not use" in text
    assert len(rows(tmp_path / "images.csv")) == 6


def test_nothing_is_drawn_twice(
    flux: Path, tmp_path: Path, drawn: list[tuple[str, int, int]]
) -> None:
    first = evaluate(task(flux, seeds=1), plan("default"), tmp_path)
    assert sorted(drawn) == [(text, 0, 2) for text in ("a b", "a b", "c d", "c d")]
    drawn.clear()
    assert evaluate(task(flux, seeds=1), plan("default"), tmp_path) == first
    assert drawn == []
    evaluate(task(flux, seeds=2), plan("default", "steps=1"), tmp_path)
    old = [("a b", 1, 2), ("c d", 1, 2)]
    new = [(text, seed, 1) for text in ("a b", "c d") for seed in (0, 1)]
    assert sorted(drawn) == sorted([*old, *old, *new])
    drawn.clear()
    missing = tmp_path / "images" / "default_r0.5" / "p0001_s0.png"
    before = missing.read_bytes()
    missing.unlink()
    evaluate(task(flux, seeds=2), plan("default", "steps=1"), tmp_path)
    assert drawn == [("c d", 0, 2)]
    assert missing.stat().st_size == pytest.approx(len(before), abs=40)


def test_equally_few_steps_are_drawn_once(
    flux: Path, tmp_path: Path, drawn: list[tuple[str, int, int]]
) -> None:
    evaluate(task(flux, seeds=1), plan("steps=1", "default:skip=", "steps"), tmp_path)
    summary = rows(tmp_path / "summary.csv")
    assert [row["steps"] for row in summary] == ["2", "1", "2", "1"]
    assert summary[1]["psnr"] == summary[3]["psnr"]
    assert len(drawn) == 3 * len(PROMPTS)  # untouched, with steps=1, and merged


def test_other_settings_are_not_mixed(
    flux: Path, tmp_path: Path, drawn: list[tuple[str, int, int]]
) -> None:
    evaluate(task(flux, seeds=1), plan("default"), tmp_path)
    drawn.clear()
    with pytest.raises(ConfigError, match="steps was 2 and is 3"):
        evaluate(task(flux, seeds=1, steps=3), plan("default"), tmp_path)
    assert drawn == []
    settings = json.loads((tmp_path / "settings.json").read_text())
    assert settings["steps"] == 2 and settings["model"] == str(flux)


def test_a_ratio_of_0_changes_no_pixel(flux: Path, tmp_path: Path) -> None:
    evaluate(task(flux, seeds=1), plan("default", ratios=(0.0,)), tmp_path)
    row = rows(tmp_path / "summary.csv")[1]
    assert (float(row["mse"]), float(row["psnr"])) == (0, float("inf"))
    assert float(row["arithmetic"]) == 1


def test_processes_share_the_images(flux: Path, tmp_path: Path) -> None:
    pipeline = load_pipeline(str(flux))
    work, contest = task(flux, seeds=1), plan("default")
    call = first_call(pipeline.transformer, lambda: draw(pipeline, work, PROMPTS[0], 0))
    contenders = contend(pipeline, contest.variants, contest.ratios, work.steps, call)
    gallery = Gallery(tmp_path)
    gallery.open(work, contenders)
    drawn = []
    for share in (Processes(share=lambda units: units[::2]), Processes()):
        before = set(tmp_path.rglob("*.png"))
        draw_missing(pipeline, work, contenders, gallery, replace(share, first=False))
        drawn.append(set(tmp_path.rglob("*.png")) - before)
    assert [len(each) for each in drawn] == [2, 2]
    assert not drawn[0] & drawn[1]


@pytest.mark.slow
def test_accelerate_launches_several(flux: Path, tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("a\nb\nc\n")
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2"]
    command = ["-m", "toma_fx", "eval", str(flux), "--prompts", str(tmp_path / "prompts.txt")]
    options = ["--ratio", "0.5", "--variant", "default", "--steps", "2", "--height", "128"]
    options += ["--measures", "psnr", "--out", str(tmp_path / "out")]
    done = subprocess.run(
        [*launch, *command, *options],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("untouched") >= 1
    assert len(rows(tmp_path / "out" / "images.csv")) == 6


def test_real_images_come_from_a_folder(tmp_path: Path, flux: Path, dino: Path) -> None:
    with pytest.raises(ConfigError, match="holds 0 images"):
        pictures(tmp_path)
    evaluate(task(flux, seeds=1), plan("default"), tmp_path / "a")
    real = tmp_path / "a" / "images" / "untouched"
    assert len(pictures(real)) == 2
    networks = Networks(fid=str(dino))
    contest = plan("default", measures=("fid",), networks=networks, reference=real)
    evaluate(task(flux, seeds=1), contest, tmp_path / "a")
    untouched, merged = rows(tmp_path / "a" / "summary.csv")
    assert float(untouched["fid"]) == pytest.approx(0, abs=1e-9)
    assert float(merged["fid"]) > 1e-6
