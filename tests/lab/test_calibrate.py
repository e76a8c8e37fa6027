"""Calibration: what it draws, what it chooses, and what it refuses."""

import itertools
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import toma_fx
from tests.pipelines import tiny_flux_pipeline, tiny_sdxl_pipeline
from toma_fx import Calibration, MergeConfig
from toma_fx.calibrate import RATIOS, _groups
from toma_fx.cli import main
from toma_fx.errors import ConfigError, ModelError
from toma_fx.lab.calibration import load_allotted
from toma_fx.transform import model_of, rewrite_of

PIPELINES = {"sdxl": tiny_sdxl_pipeline, "flux": tiny_flux_pipeline}


def draw(pipe: Any) -> Any:
    size = {"height": 128, "width": 128, "num_inference_steps": 2, "output_type": "np"}
    return pipe("a cat", generator=torch.Generator().manual_seed(0), **size).images


@pytest.fixture(scope="module", params=PIPELINES)
def calibrated(request: pytest.FixtureRequest) -> tuple[Any, Calibration, list[str]]:
    pipe = PIPELINES[request.param]()
    said: list[str] = []
    found = toma_fx.calibrate(pipe, draw, noise_levels=(1.0, 0.7), progress=said.append)
    return pipe, found, said


Calibrated = tuple[Any, Calibration, list[str]]


def test_the_pipeline_is_as_before(calibrated: Calibrated) -> None:
    pipe, found, said = calibrated
    assert not hasattr(model_of(pipe), "_toma")
    assert len(said) == 2 + len(found.groups) + len(RATIOS) + 1


def test_every_block_is_in_one_group(calibrated: Calibrated) -> None:
    pipe, found, _ = calibrated
    merged: list[str] = []
    for patterns in found.groups.values():
        ratios = tuple((pattern, 0.5) for pattern in patterns)
        model = toma_fx.transform(model_of(pipe), ratio=0, block_ratios=ratios, skip=())
        merged += list(rewrite_of(model).merged)
    blocks = rewrite_of(model).treatments
    assert sorted(merged) == sorted(blocks) != []


def test_errors_are_those_of_the_images(calibrated: Calibrated) -> None:
    pipe, found, _ = calibrated
    untouched = draw(pipe)
    name, patterns = next(iter(found.groups.items()))
    ratios = tuple((pattern, 0.5) for pattern in patterns)
    toma_fx.transform(pipe, ratio=0, block_ratios=ratios, skip=())
    merged = draw(pipe)
    toma_fx.restore(pipe)
    assert found.errors[name] == pytest.approx(((merged - untouched) ** 2).mean(), rel=1e-4)
    assert found.by_ratio[0.5] == found.by_noise[1.0] == 1


@pytest.mark.parametrize("ratio", [0.25, 0.5])
@pytest.mark.parametrize("levels", [(1.0,), None])
def test_an_allotment_is_no_dearer_than_the_uniform_ratio(
    calibrated: Calibrated, ratio: float, levels: tuple[float, ...] | None
) -> None:
    pipe, found, _ = calibrated
    config = found.config(ratio, noise_levels=levels)
    uniform = toma_fx.report(toma_fx.transform(model_of(pipe), ratio=ratio, skip=()))
    allotted = toma_fx.report(toma_fx.transform(model_of(pipe), config))
    share = found.steps[config.merge_below]
    # Groups that share a plan were counted with a plan each, and the other way round.
    assert allotted.saved * share >= uniform.saved * 0.99
    assert levels is None or config.merge_below == 1
    draw(toma_fx.transform(PIPELINES["sdxl" if hasattr(pipe, "unet") else "flux"](), config))


def made_up(errors: dict[str, float], savings: dict[str, int], **changes: Any) -> Calibration:
    """Errors that grow with the square of the ratio, and savings in proportion to it."""
    return replace(
        Calibration(
            base=MergeConfig(skip=()),
            groups={name: (f"{name}.*",) for name in errors},
            errors=errors,
            savings={n: {r: int(s * r / 0.5) for r in RATIOS} for n, s in savings.items()},
            by_ratio={r: (r / 0.5) ** 2 for r in RATIOS},
            by_noise={1.0: 1.0},
            steps={1.0: 1.0},
            uniform=lambda ratio: int(sum(savings.values()) * ratio / 0.5),
        ),
        **changes,
    )


def test_the_choice_is_the_best_of_all() -> None:
    errors = {"a": 1.0, "b": 3.0, "c": 0.2, "d": 7.0}
    savings = {"a": 100, "b": 120, "c": 30, "d": 200}
    found = made_up(errors, savings)
    chosen = found.config(0.5)

    def of(ratios: tuple[float, ...]) -> tuple[float, float]:
        parts = list(zip(ratios, errors, strict=True))
        saved = sum(found.savings[n][r] for r, n in parts if r)
        return sum(errors[n] * found.by_ratio[r] for r, n in parts if r), saved

    error, saved = of(tuple(chosen.ratio_of(f"{name}.0") for name in errors))
    assert saved >= found.uniform(0.5)
    every = map(of, itertools.product((0.0, *RATIOS), repeat=4))
    assert error == min(e for e, s in every if s >= saved)


def test_noise_is_chosen_with_the_ratios() -> None:
    errors, savings = {"a": 1.0, "b": 1.0}, {"a": 100, "b": 100}
    late = {"by_noise": {1.0: 1.0, 0.6: 0.01}, "steps": {1.0: 1.0, 0.6: 0.6}}
    found = made_up(errors, savings, **late)
    assert found.config(0.25).merge_below == 0.6
    assert found.config(0.25, noise_levels=(1.0,)).merge_below == 1
    assert found.config(0.75).merge_below == 1  # below 0.6 there is not so much to save
    with pytest.raises(ModelError, match=r"no allotment saves what ratio=0.95 .* does"):
        found.config(0.95)


def test_what_was_not_measured_is_named() -> None:
    found = made_up({"a": 1.0}, {"a": 100})
    with pytest.raises(ConfigError, match=r"noise_levels=\[0.5\] were not measured; .* \[1.0\]"):
        found.config(noise_levels=(1.0, 0.5))
    with pytest.raises(ConfigError, match=r"ratio=1.5 must be a number"):
        found.config(1.5)


def test_lists_are_parted_where_there_are_few() -> None:
    flux = [f"transformer_blocks.{i}" for i in range(19)]
    flux += [f"single_transformer_blocks.{i}" for i in range(38)]
    groups = _groups(flux)
    assert list(groups)[:2] == ["transformer_blocks.0-4", "transformer_blocks.5-9"]
    assert [path for group in groups.values() for path in group] == flux
    lists = [f"down_blocks.{i}.transformer_blocks" for i in range(11)]
    assert _groups([f"{name}.{i}" for name in lists for i in range(10)]) == {
        name: (f"{name}.*",) for name in lists
    }


def test_a_drawing_that_changes_is_refused() -> None:
    pipe = tiny_sdxl_pipeline()
    generator = torch.Generator().manual_seed(0)
    with pytest.raises(ModelError, match="draw gave other images when it was called again"):
        toma_fx.calibrate(pipe, lambda p: torch.rand(1, 4, generator=generator))
    with pytest.raises(ConfigError, match=r"noise_levels=\(0.5,\) must contain 1.0"):
        toma_fx.calibrate(pipe, draw, noise_levels=(0.5,))


def test_a_file_is_a_variant(
    sdxl: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "spread.json"
    (tmp_path / "prompts.txt").write_text("a b\n")
    drawing = ["--prompts", str(tmp_path / "prompts.txt"), "--steps", "2"]
    drawing += ["--height", "128", "--width", "128", "--ratio", "0.25", "0.5"]
    changed = ["--variant", "default:region=stripe", "--noise", "1", "0.6"]
    assert main(["calibrate", str(sdxl), "--out", str(file), *changed, *drawing]) == 0
    assert "in place of 0.25" in capsys.readouterr().out
    variant = load_allotted(file)
    assert variant.name == "spread"
    config = variant.config(0.5)
    assert config.region == "stripe" and config.ratio == 0 and config.block_ratios
    with pytest.raises(
        ConfigError, match=r"'spread' has nothing for ratio=0.75, only for 0.25, 0.5"
    ):
        variant.config(0.75)
    out = ["--out", str(tmp_path / "out"), "--measures", "psnr", "--variants", str(file), "steps"]
    assert main(["eval", str(sdxl), *drawing, *out]) == 0
    assert "spread" in capsys.readouterr().out


def test_other_files_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "other.json"
    for content in ("", "[]", '{"variant": "default"}', '{"variant": "x", "by_ratio": {}}'):
        file.write_text(content)
        with pytest.raises(ConfigError, match=r"other.json' is no file that toma-fx calibrate"):
            load_allotted(file)
    with pytest.raises(ConfigError, match=r"'gone.json' is no file that toma-fx calibrate wrote"):
        load_allotted(Path("gone.json"))
