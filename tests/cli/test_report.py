"""``toma-fx report``: all of transform's options, for people and for programs."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import TorchAoConfig, UNet2DConditionModel
from torchao.quantization import Int8Tensor, Int8WeightOnlyConfig

import toma_fx
from tests.tiny_families import tiny_wan
from toma_fx import checkpoints
from toma_fx.cli import main
from toma_fx.setting import config_of

ROOT = Path(__file__).parents[2]


def report(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    assert main(["report", *words]) == 0
    return capsys.readouterr().out


def test_json_is_one_object_with_every_figure(
    sdxl: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "new" / "report.json"
    size = ["--height", "256", "--dtype", "float32"]
    out = report(capsys, str(sdxl), *size, "--ratio", "0.25", "--json", "--out", str(file))
    found: dict[str, Any] = json.loads(out)
    assert json.loads(file.read_text()) == found
    assert found["config"]["ratio"] == 0.25
    assert found["saved"] == pytest.approx(1 - found["flops_after"] / found["flops_before"])
    assert found["speedup"] == pytest.approx(found["flops_before"] / found["flops_after"])
    assert {"path", "blocks", "merged", "tokens_before", "flops_after"} <= found["groups"][0].keys()


def test_text_is_kept_too_and_fits_a_screen(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = report(capsys, "sdxl", "--out", str(tmp_path / "report.txt"))
    assert (tmp_path / "report.txt").read_text() == out
    assert max(map(len, out.splitlines())) <= 80
    assert "whole model, 70 blocks" in out


def test_it_takes_what_transform_takes(flux: Path, capsys: pytest.CaptureFixture[str]) -> None:
    how = [str(flux), "--dtype", "float32", "--height", "256", "--json"]
    merged = ["--skip", "--placement", "keys", "--region", "stripe", "--selector", "grid"]
    found = json.loads(report(capsys, *how, *merged, "--steps", "10", "--batch", "2"))
    assert found["config"]["skip"] == [] and found["config"]["selector"] == "grid"
    assert (found["steps"], found["image"].split()[1]) == (10, "2")
    remembering = ["--skip", "--memory", "5", "--theta", "0.25", "--no-control"]
    found = json.loads(report(capsys, *how, *remembering))
    assert found["config"]["memory"]["control"] is False and found["theta"] == 0.25
    chosen = json.loads(report(capsys, *how, "--skip", "--speedup", "1.2"))
    assert chosen["asked"] == 1.2 and 0 < chosen["config"]["ratio"] < 1


def saved_wan(folder: Path) -> Path:
    tiny_wan().save_pretrained(folder)  # some of whose weights stay in float32
    return folder


@pytest.mark.parametrize("name", ["sdxl", "flux", "wan"])
def test_a_configuration_says_as_much_as_the_weights(
    name: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    folder = saved_wan(tmp_path) if name == "wan" else request.getfixturevalue(name)
    options = config_of({"skip": (), "memory": 2})
    loaded, outlined = (
        toma_fx.report(toma_fx.transform(model, options), height=256).as_dict()
        for model in (
            checkpoints.load_model(str(folder), dtype=torch.bfloat16),
            checkpoints.architecture(str(folder), torch.bfloat16),
        )
    )
    assert outlined == loaded
    assert loaded["kept_bytes"] > 0


def test_no_weights_are_read(tmp_path: Path, sdxl: Path) -> None:
    """So that of a model on the hub only the configuration is loaded."""
    shutil.copytree(sdxl, tmp_path, dirs_exist_ok=True)
    for weights in tmp_path.rglob("*.safetensors"):
        weights.unlink()
    assert main(["report", str(tmp_path), "--height", "256"]) == 0


def test_quantised_weights_are_loaded(sdxl: Path, tmp_path: Path) -> None:
    """The configuration alone would make layers of other classes."""
    how = TorchAoConfig(Int8WeightOnlyConfig())
    unet = UNet2DConditionModel.from_pretrained(sdxl / "unet", quantization_config=how)
    unet.save_pretrained(tmp_path, safe_serialization=False)
    model = checkpoints.architecture(str(tmp_path), torch.float32)
    assert any(isinstance(parameter, Int8Tensor) for parameter in model.parameters())


@pytest.mark.parametrize(
    ("words", "meant"), [("report sdlx", "sdxl"), ("bench model flx", "flux"), ("eval sdxl", "")]
)
def test_a_name_that_is_none_is_refused_before_torch_is_loaded(words: str, meant: str) -> None:
    command = [sys.executable, "-X", "importtime", "-m", "toma_fx", *words.split()]
    command += ["--out", "unused"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 2
    loaded = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert "toma_fx.hub" in loaded and "torch" not in loaded
    assert "there is no such folder" in done.stderr
    assert not meant or f"did you mean {meant}?" in done.stderr


def test_mistakes_are_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    for words, said in (
        (["flux", "--ratio", "1.5"], "ratio=1.5 must be a number in [0, 1)"),
        (["sdxl", "--speedup", "2", "--ratio", "0.5"], "speedup=2 chooses the ratio"),
        (["sdxl", "--calibration", "none.json"], "there is no such file"),
        (["no/such/folder"], "there is no such folder"),
    ):
        assert main(["report", *words]) == 2
        error = capsys.readouterr().err
        assert said in error and error.count("\n") == 1 and error.startswith("toma-fx: ")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["reprot"], "did you mean report?"),
        (
            ["report", "sdxl", "--ration", "0.5"],
            "unknown option --ration; did you mean --ratio?",
        ),
        (["report", "sdxl", "--region", "stipe"], "did you mean stripe?"),
        (["bench", "modle", "sdxl"], "did you mean model?"),
        (["bench", "model", "sdxl", "--variants", "toma"], "did you mean --variant?"),
        (["report", "sdxl", "--memory", "often"], "memory='often' must be a whole number"),
    ],
)
def test_wrong_words_are_one_line_that_says_what_was_meant(
    words: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(words)
    assert ended.value.code == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1
