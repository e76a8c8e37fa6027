"""One knob, a report of what is active, and a log."""

import logging
import os
import subprocess
import sys
import warnings
from typing import Any

import pytest
import torch

import toma_fx
from tests.pipelines import tiny_sdxl_pipeline
from tests.tiny import flux_inputs, tiny_flux, tiny_sdxl_unet
from tests.tiny_families import tiny_qwen_image, tiny_wan
from toma_fx import Memory, MergeConfig
from toma_fx.errors import ConfigError, ModelError, TomaWarning


# diffusers' Euler scheduler hands a tensor to NumPy in a way that NumPy 2 is about to change.
@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
def test_a_ratio_is_all_that_a_pipeline_needs() -> None:
    pipe = toma_fx.transform(tiny_sdxl_pipeline(), ratio=0.4)
    assert "ratio 0.4" in str(toma_fx.report(pipe))


def test_speedup_takes_the_smallest_ratio_that_reaches_it() -> None:
    model = tiny_flux()
    wanted = 1.4
    chosen = toma_fx.report(toma_fx.transform(model, speedup=wanted, skip=()))
    assert chosen.speedup >= wanted == chosen.asked
    step = 1 / chosen.config.region_tokens
    less = toma_fx.transform(model, ratio=chosen.config.ratio - step, skip=())
    assert toma_fx.report(less).speedup < wanted
    assert f"speedup={wanted}" in str(chosen)
    assert "not measured time" in str(chosen)
    assert toma_fx.report(less).asked is None
    assert "speedup" not in str(toma_fx.report(less))


def test_speedup_of_1_merges_nothing() -> None:
    assert toma_fx.report(toma_fx.transform(tiny_flux(), speedup=1)).config.ratio == 0


def test_speedup_takes_a_config_and_leaves_its_other_options() -> None:
    config = MergeConfig(region_tokens=16, skip=(), placement="component")
    model = toma_fx.transform(tiny_flux(), config, speedup=1.2)
    report = toma_fx.report(model)
    assert report.config == MergeConfig(
        ratio=report.config.ratio, region_tokens=16, skip=(), placement="component"
    )
    assert report.config.ratio * 16 == int(report.config.ratio * 16)


@pytest.mark.parametrize("speedup", [0.5, "fast", True, float("inf"), float("nan")])
def test_speedup_must_be_a_number(speedup: float) -> None:
    with pytest.raises(ConfigError, match=r"speedup=.* must be a number of at least 1, such as"):
        toma_fx.transform(tiny_flux(), speedup=speedup)


def test_what_speedup_cannot_do_is_said() -> None:
    said = r"speedup=50 cannot be reached on this Flux.*even with ratio=0.984 .* times less; ask"
    with pytest.raises(ModelError, match=said):
        toma_fx.transform(tiny_flux(), speedup=50)
    with pytest.raises(ConfigError, match=r"both ratio=0.5 and speedup=1.3"):
        toma_fx.transform(tiny_flux(), ratio=0.5, speedup=1.3)
    with pytest.raises(ModelError, match=r"speedup=1.3 is for diffusers models; give .* a ratio"):
        toma_fx.transform(torch.fx.symbolic_trace(torch.nn.Linear(1, 1)), speedup=1.3)
    with pytest.raises(ModelError, match="already transformed"):
        toma_fx.transform(toma_fx.transform(tiny_flux()), speedup=1.3)


def test_a_ratio_without_its_name_is_explained() -> None:
    with pytest.raises(ConfigError, match=r"config=0.5 must be a MergeConfig.*ratio=0.5"):
        toma_fx.transform(tiny_flux(), 0.5)  # type: ignore[arg-type]


def test_the_log_tells_what_was_transformed_and_planned(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG, "toma_fx")
    model = toma_fx.transform(tiny_flux(), skip=("transformer_blocks.0",))
    info = [r.getMessage() for r in caplog.records if r.levelno == logging.INFO]
    assert info[0].startswith("transformed FluxTransformer2DModel: 4 of 5 blocks merge tokens")
    assert info[1:] == ["left 1 blocks unmerged: skip='transformer_blocks.0'"]
    assert "transformer_blocks.1 merges around block and plans for its group" in caplog.messages
    caplog.clear()
    with torch.no_grad():
        model(**flux_inputs(model, height=8, width=8))
    plan = "facility_location keeps 32 of 64 tokens in each region of (B, N, D) = (2, 64, 32)"
    assert caplog.messages == [plan] * 2


def test_the_log_is_silent_unless_asked(capfd: pytest.CaptureFixture[str]) -> None:
    toma_fx.transform(tiny_sdxl_unet())
    assert capfd.readouterr().err == ""


def test_what_was_measured_to_ruin_images_is_warned_of() -> None:
    with pytest.warns(
        TomaWarning,
        match=r"memory ruins images: .* Flux .* %.* merge_below=0.8, memory=toma_fx.Memory",
    ):
        toma_fx.transform(tiny_flux(), ratio=0.25, skip=())
    with pytest.warns(TomaWarning, match="without memory ruins images"):
        toma_fx.transform(tiny_flux(), merge_below=0.8)
    with pytest.warns(TomaWarning, match="without memory ruins videos: .* Wan .* %"):
        toma_fx.transform(tiny_wan(), skip=())
    with pytest.warns(TomaWarning, match="Flux and a small Wan; on this one it was not measured"):
        toma_fx.transform(tiny_qwen_image(), skip=())


@pytest.mark.parametrize(
    "options",
    [
        {"ratio": 0},
        {"memory": Memory()},
        {"merge_below": 0.6},
        {"placement": "keys"},
        {"tokens": "references"},
    ],
)
def test_what_was_not_is_not(options: dict[str, Any]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        toma_fx.transform(tiny_sdxl_unet())
        toma_fx.transform(tiny_flux(), **options)


def test_a_large_ratio_is_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    toma_fx.transform(tiny_flux(), speedup=5, skip=())
    (warning,) = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
    assert "speedup=5 takes ratio=0." in warning
    assert "images change visibly" in warning


def test_torch_logs_turns_the_log_on() -> None:
    code = "import toma_fx; from tests.tiny import tiny_flux; toma_fx.transform(tiny_flux())"
    environment = {**os.environ, "TORCH_LOGS": "+toma_fx", "PYTHONPATH": os.pathsep.join(sys.path)}
    ran = subprocess.run(
        [sys.executable, "-c", code], env=environment, check=True, capture_output=True, text=True
    )
    assert "transformed FluxTransformer2DModel: 5 of 5 blocks" in ran.stderr
    assert "plans for its group" in ran.stderr
