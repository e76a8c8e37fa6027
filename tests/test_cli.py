"""The command line and the examples run at small size."""

import re
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import toma_fx
from tests.pipelines import tiny_flux_pipeline, tiny_sdxl_pipeline
from tests.tiny import tiny_flux, tiny_sdxl_unet
from toma_fx import checkpoints, choices, demo
from toma_fx.bench.timing import Contender, Timing
from toma_fx.cli import main
from toma_fx.inputs import random_inputs

ROOT = Path(__file__).parent.parent
COMMANDS = ["report", "bench", "demo", "eval", "calibrate", "app"]


@pytest.fixture(params=[tiny_sdxl_unet, tiny_flux])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A small model in diffusers' own format."""
    request.param().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_report_of_memory(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = ["--height", "256", "--skip", "--dtype", "float32", "--memory", "5"]
    assert main(["report", str(folder), *given]) == 0
    assert "memory: 5 of 25 steps are full" in capsys.readouterr().out
    assert main(["report", str(folder), *given, "--merge-below", "0.6"]) == 0
    assert "below a noise level of 0.6" in capsys.readouterr().out


def test_report(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", str(folder), "--height", "256", "--skip", "--dtype", "float32"]) == 0
    assert "whole model" in capsys.readouterr().out


def test_bench_times_all_ratios_in_turn(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [
        "bench",
        "model",
        str(folder),
        "--height",
        "256",
        "--ratio",
        "0.25",
        "0.5",
        "--eager",
    ]
    variant = "default:skip=,placement=component"
    assert main([*arguments, "--eager", "--repeats", "2", "--variant", variant]) == 0
    out = capsys.readouterr().out
    for word in ("untouched,", "placement=component", "0.25", "times as fast", torch.__version__):
        assert word in out


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # diffusers' own
def test_demo_draws_and_shows_report_graphs_and_times(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    timed: list[tuple[list[str], int]] = []

    def interleaved(contenders: list[Contender], repeats: int, **options: object) -> list[Timing]:
        timed.append(([each.name for each in contenders], repeats))
        return [Timing(name=each.name, first_call=9.0, calls=(2.0,)) for each in contenders]

    monkeypatch.setattr("toma_fx.bench.compare.interleaved", interleaved)  # which compiles
    tiny_sdxl_pipeline().save_pretrained(tmp_path / "pipeline")
    demo.demo({}, model=str(tmp_path / "pipeline"), quick=True, steps=1, out=tmp_path / "pictures")
    out = capsys.readouterr().out
    assert (tmp_path / "pictures" / "pipeline.png").exists()
    for word in ("untouched", "ratio 0.25", "ratio 0.5", "memory every 2", "PSNR"):
        assert word in out
    assert "torch.ops.toma.merge(" in out.partition("after")[2]
    assert "torch.ops.toma.merge(" not in out.partition("after")[0]
    assert "whole model" in out
    assert "times as fast" in out
    assert timed == [(["untouched, compiled", "default"], 1)]


def test_mistakes_are_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", "no/such-folder"]) == 2
    assert "no model could be loaded from 'no/such-folder'" in capsys.readouterr().err
    assert main(["report", "flux", "--ratio", "1.5"]) == 2
    assert "ratio=1.5" in capsys.readouterr().err.strip()


def test_random_weights_fit_the_dtype_and_stay_finite() -> None:
    cls, config = checkpoints.model_class("flux")
    config |= {"num_layers": 1, "num_single_layers": 1, "in_channels": 4}
    config |= {"attention_head_dim": 16, "num_attention_heads": 2, "axes_dims_rope": (4, 6, 6)}
    model = checkpoints.random_weights(cls, config, torch.bfloat16)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    with torch.no_grad():
        output = model(**random_inputs(model, height=128)).sample
    assert output.isfinite().all()
    assert output.std() > 0


def test_help_is_a_sentence_for_each_command() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "toma_fx", "--help"], capture_output=True, text=True, cwd=ROOT
    )
    assert done.returncode == 0
    listed = done.stdout.partition("COMMAND\n")[2].partition("\n\n")[0]
    sentences = re.findall(r"^    (\w+)\s+([A-Z][^.]+\.)$", listed, re.MULTILINE)
    assert [name for name, _ in sentences] == COMMANDS
    assert len(re.findall(r"\.$", listed, re.MULTILINE)) == len(COMMANDS)


def test_choices_are_what_they_name() -> None:
    assert tuple(checkpoints.DTYPES) == choices.DTYPE_NAMES
    assert checkpoints.RANDOM == choices.MODEL_NAMES


def test_every_example_has_a_main() -> None:
    examples = list((ROOT / "examples").glob("*.py"))
    assert examples
    for path in examples:
        assert callable(runpy.run_path(str(path))["main"])


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # diffusers' own
@pytest.mark.parametrize("build", [tiny_sdxl_pipeline, tiny_flux_pipeline])
def test_export_example_draws_what_the_pipeline_draws(build: Any, tmp_path: Path) -> None:
    pipe = build()
    pipe.save_pretrained(tmp_path / "pipeline")
    export = runpy.run_path(str(ROOT / "examples/export.py"))["main"]
    run = runpy.run_path(str(ROOT / "examples/run_exported.py"))["main"]
    model = ["--model", str(tmp_path / "pipeline"), "--out", str(tmp_path / "exported")]
    export([*model, "--size", "128", "--steps", "3", "--prompt", "abc"])
    latents = run([str(tmp_path / "exported")])

    noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(0))
    toma_fx.transform(pipe, ratio=0.5)
    call = {"num_inference_steps": 3, "guidance_scale": 3.5, "height": 128, "width": 128}
    expected = pipe("abc", **call, latents=noise, output_type="latent").images
    assert (latents - expected).norm() < 1e-4 * expected.norm()
    image = (tmp_path / "exported" / "image.ppm").read_bytes()
    assert image.startswith(b"P6 128 128 255\n")
    assert len(image) == 15 + 3 * 128 * 128


def test_export_example_end_to_end(tmp_path: Path) -> None:
    export = runpy.run_path(str(ROOT / "examples/export.py"))["main"]
    run = runpy.run_path(str(ROOT / "examples/run_exported.py"))["main"]
    results = []
    for schedule in ([], ["--select-every", "3", "--weigh-every", "2"]):
        export(["--out", str(tmp_path), "--steps", "4", "--size", "128", *schedule])
        results.append(run([str(tmp_path)]))
    assert results[0].isfinite().all()
    assert not torch.equal(*results)
