"""Studies: every row can be run, and the table names its setting."""

import csv
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks.plot import plot
from benchmarks.rivals import named_variant
from benchmarks.studies import NO_BODY, STUDIES
from benchmarks.study import main, paper_cells, study_rows
from toma_fx.checkpoints import load_pipeline
from toma_fx.errors import ConfigError
from toma_fx.lab import small_models
from toma_fx.lab.contenders import Contender
from toma_fx.lab.intervals import mean_interval
from toma_fx.lab.score import Scores
from toma_fx.lab.tables import Outcome
from toma_fx.transform import model_of, transform
from toma_fx.variants import Merging

DRAWING = ["--steps", "4", "--height", "128", "--width", "128"]


def read(file: Path) -> list[dict[str, str]]:
    with file.open(newline="", encoding="utf-8") as stream:
        return list(csv.DictReader(stream))


def run(capsys: pytest.CaptureFixture[str], *words: object) -> str:
    main([*map(str, words)])
    return capsys.readouterr().out


@pytest.fixture(scope="module")
def pipelines() -> dict[str, Any]:
    return {kind: load_pipeline(str(small_models.FOLDER / kind)) for kind in ("sdxl", "flux")}


@pytest.mark.parametrize("name", STUDIES)
def test_the_small_models_take_every_row(name: str, pipelines: dict[str, Any]) -> None:
    study = STUDIES[name]
    model = model_of(pipelines[study.model])
    rows = [variant for group in study.variants(25) for variant in group]
    assert len(set(rows)) == len(rows)
    variants = [named_variant(row) for row in rows]
    configs = {v.name: v.config(0.5) for v in variants if isinstance(v, Merging)}
    assert len(set(configs.values())) == len(configs)
    for row, config in configs.items():
        if "skip" in row or "components" in row:  # whose values depend on the model
            transform(model, config)
    if study.paper is not None:
        cells = {(variant, ratio) for variant in rows for ratio in study.ratios}
        assert set(study.paper.figures) <= cells | {("untouched", None)}
        assert {len(f) for f in study.paper.figures.values()} <= {len(study.paper.columns)}


def test_a_study_of_a_pipeline(
    sdxl: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "prompts.txt").write_text("a b\nc d\n")
    out = tmp_path / "out"
    options = ["--prompts", tmp_path / "prompts.txt", "--seeds", 2, "--out", out, *DRAWING]
    printed = run(capsys, "unmerge", sdxl, *options, "--measures", "mse", "psnr")
    assert printed.strip() == (out / "unmerge.md").read_text().strip()
    for word in ("# Unmerging", "Table 6: MSE", "1288.2609", "`toma:schedule=1/1`", "4 steps"):
        assert word in printed
    rows, images = read(out / "unmerge.csv"), read(out / "unmerge_images.csv")
    assert len(rows) == 5 and len(images) == 5 * 4
    by_name = {row["variant"]: row for row in rows}
    changed = by_name["toma:schedule=1/1,unmerge=pinv"]
    assert changed["paper_mse"] == "1288.2609" and by_name["default"]["paper_mse"] == ""
    assert (changed["group"], by_name["default"]["group"]) == ("1", "2")
    means = [
        np.mean([float(image["mse"]) for image in images if image["variant"] == variant])
        for variant in ("toma:schedule=1/1,unmerge=pinv", "toma:schedule=1/1")
    ]
    assert float(changed["mse_difference"]) == pytest.approx(means[0] - means[1])
    assert by_name["default"]["mse_difference"] == ""

    drawn = {file: file.stat().st_mtime_ns for file in out.rglob("*.png")}
    assert run(capsys, "unmerge", sdxl, *options, "--measures", "mse", "psnr") == printed
    run(capsys, "share", sdxl, *options, "--ratio", "0.25", "--measures", "mse")
    assert {file: file.stat().st_mtime_ns for file in drawn} == drawn
    assert {row["ratio"] for row in read(out / "share.csv")} == {"", "0.25"}
    assert plot(out / "unmerge.csv", ys=("psnr",)) == out / "unmerge_psnr_arithmetic.png"


def test_a_table_without_a_body_says_so() -> None:
    study = STUDIES["regions"]
    row = {"variant": study.groups[0][0], "ratio": 0.5}
    assert paper_cells(study.paper, row, study.groups[0]) == {"paper": NO_BODY}
    assert paper_cells(study.paper, {**row, "variant": "steps"}, study.groups[0]) == {"paper": ""}
    assert paper_cells(None, row, study.groups[0]) == {}


def test_fewer_of_four_steps_are_three_two_and_one(
    flux: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "prompts.txt").write_text("a b\n")
    options = ["--prompts", tmp_path / "prompts.txt", "--out", tmp_path / "out", *DRAWING]
    run(capsys, "fewer-steps", flux, *options, "--ratio", "0.25", "0.75")
    rows = read(tmp_path / "out" / "fewer-steps.csv")
    equal = [row for row in rows if row["variant"] == "steps"]
    counted = [row for row in rows if row["variant"].startswith("steps=")]
    assert [row["ratio"] for row in equal] == ["0.25", "0.75"]
    assert [row["steps"] for row in counted] == ["3", "2", "1"]
    for row in (*equal, *counted):
        assert int(row["steps"]) < 4 and float(row["arithmetic"]) == int(row["steps"]) / 4
    assert all(row["psnr_difference"] for row in equal)
    assert not any(row["psnr_difference"] for row in counted)


def outcome(variant: str, ratio: float | None, psnr: list[float]) -> Outcome:
    contender = Contender(
        variant=variant, ratio=ratio, steps=4, arithmetic=0.5, identity="", changed=nullcontext
    )
    scores: Scores = {"psnr": psnr} if psnr else {}
    return Outcome(contender=contender, files=(Path("x"),) * 4, seconds=(1.0,) * 4, scores=scores)


def test_differences_are_narrower_than_intervals_of_means() -> None:
    inf = float("inf")
    hard, gaps = np.array([20.0, 22, 40, 44]), np.array([1.0, 1.2, 0.9, 1.1])
    outcomes = [
        outcome("untouched", None, []),
        outcome("a", 0.5, list(hard)),
        outcome("b", 0.5, list(hard + gaps)),
        outcome("b", 0.75, list(hard)),
        outcome("c", 0.5, [20.0, inf, 40, 44]),
    ]
    rows = study_rows([("a", "b"), ("a", "c")], outcomes, 2, ("psnr",))
    assert [row["variant"] for row in rows] == ["untouched", "a", "b", "b", "a", "c"]
    assert rows[2]["psnr_difference"] == pytest.approx(gaps.mean())
    low, high = mean_interval(gaps.reshape(2, 2))
    assert rows[2]["psnr_difference_low"] == pytest.approx(low)
    assert rows[2]["psnr_difference_high"] == pytest.approx(high)
    assert rows[2]["psnr_high"] - rows[2]["psnr_low"] > 10 * (high - low)
    assert rows[3]["psnr_difference"] == ""  # no row at its ratio to compare with
    assert rows[5]["psnr_difference"] == inf and rows[5]["psnr_difference_low"] == 0


def test_images_of_other_steps_are_not_mixed(flux: Path, tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("a b\n")
    options = ["--prompts", str(tmp_path / "prompts.txt"), "--out", str(tmp_path / "out")]
    command = ["share", str(flux), *options, "--measures", "psnr", *DRAWING]
    main(command)
    with pytest.raises(ConfigError, match="steps was 4 and is 3"):
        main([*command, "--steps", "3"])
    with pytest.raises(ConfigError, match="needs --prompts FILE"):
        main(["share", str(flux), "--out", str(tmp_path / "other")])


def test_the_small_models_are_called_as_they_were_checked() -> None:
    from examples.small_models.check import CALL

    for kind, name in (("sdxl", "StableDiffusionXLPipeline"), ("flux", "FluxPipeline")):
        own = small_models.own_settings(str(small_models.FOLDER / kind))
        ours = {"guidance_scale": own.get("guidance"), **own.get("arguments", {})}
        theirs = {k: v for k, v in CALL[name].items() if k != "num_inference_steps" and v != ""}
        assert {k: v for k, v in ours.items() if v is not None} == theirs
    assert small_models.own_settings("sdxl") == {}


def test_rivals_of_the_repository_have_names() -> None:
    assert [named_variant(name).name for name in ("todo", "tofu", "tomesd", "steps")] == [
        "todo",
        "tofu",
        "tomesd",
        "steps",
    ]
    with pytest.raises(ConfigError, match="variant='toda' is unknown"):
        named_variant("toda")
