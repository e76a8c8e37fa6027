"""Calibration: its images, its choices and its refusals."""

import itertools
import math
import pickle
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import toma_fx
from tests.pipelines import tiny_flux_pipeline, tiny_sdxl_pipeline
from toma_fx import Calibration, MergeConfig
from toma_fx.arithmetic import count, first_call
from toma_fx.build import recipe_of_transformed
from toma_fx.calibrate import RATIOS, UNIFORM, _parts, error_of
from toma_fx.cli import main
from toma_fx.errors import ConfigError, ModelError
from toma_fx.transform import model_of
from toma_fx.variants import Merging, parse_variant

PIPELINES = {"sdxl": tiny_sdxl_pipeline, "flux": tiny_flux_pipeline}


def draw(pipe: Any) -> Any:
    size = {"height": 128, "width": 128, "num_inference_steps": 2, "output_type": "np"}
    return pipe(["a cat", "b"], generator=torch.Generator().manual_seed(0), **size).images


Calibrated = tuple[Any, Calibration, list[str]]


@pytest.fixture(scope="module", params=PIPELINES)
def calibrated(request: pytest.FixtureRequest) -> Calibrated:
    pipe = PIPELINES[request.param]()
    said: list[str] = []

    def progress(done: int, total: int, what: str) -> None:
        assert done == len(said) < total
        said.append(what)

    found = toma_fx.calibrate(pipe, draw, name="of the tests", progress=progress)
    return pipe, found, said


def test_the_pipeline_is_as_before(calibrated: Calibrated) -> None:
    pipe, found, said = calibrated
    assert not hasattr(model_of(pipe), "toma_recipe")
    assert not model_of(pipe)._forward_pre_hooks
    assert len(said) == 2 + len(found.parts) + len(RATIOS)


def test_it_says_what_it_was_made_with(calibrated: Calibrated) -> None:
    pipe, found, _ = calibrated
    assert found.origin is not None
    assert (found.origin.name, found.origin.steps) == ("of the tests", 2)
    assert found.origin.guidance == pipe.guidance_scale > 1
    found.check(pipe)


def test_every_block_is_in_one_part(calibrated: Calibrated) -> None:
    pipe, found, _ = calibrated
    merged: list[str] = []
    for patterns in found.parts.values():
        ratios = tuple((pattern, 0.5) for pattern in patterns)
        model = toma_fx.transform(model_of(pipe), ratio=0, block_ratios=ratios, skip=())
        recipe = recipe_of_transformed(model)
        merged += [block.path for block in recipe.merged]
    assert sorted(merged) == sorted(block.path for block in recipe.blocks) != []


def test_errors_are_those_of_the_images(calibrated: Calibrated) -> None:
    pipe, found, _ = calibrated
    untouched = draw(pipe)
    name, patterns = next(iter(found.parts.items()))
    ratios = tuple((pattern, 0.5) for pattern in patterns)
    toma_fx.transform(pipe, ratio=0, block_ratios=ratios, skip=())
    merged = draw(pipe)
    toma_fx.restore(pipe)
    squares = ((merged.astype("float64") - untouched) ** 2).mean((1, 2, 3))
    assert found.errors[name] == pytest.approx(math.sqrt(squares.prod()), rel=1e-4)
    assert found.by_ratio[0.5] == 1


def test_an_equal_image_does_not_decide() -> None:
    untouched = np.random.default_rng(0).random((4, 8, 8))
    images = untouched + 0.01
    images[1] = untouched[1]
    assert 1e-6 < error_of(images, untouched) < 1e-4


@pytest.mark.parametrize("ratio", [0.25, 0.33, 0.5])
def test_an_allotment_is_no_dearer_than_the_uniform_ratio(
    calibrated: Calibrated, ratio: float
) -> None:
    pipe, found, _ = calibrated
    model = model_of(pipe)
    config = found.config(ratio)
    call = first_call(model, lambda: draw(pipe))
    whole = count(model, call)
    uniform = whole - count(toma_fx.transform(model, ratio=ratio), call)
    allotted = whole - count(toma_fx.transform(model, config), call)
    # A ratio between those that were counted is interpolated.
    assert allotted >= uniform * 0.99
    toma_fx.transform(pipe, config)
    assert draw(pipe).shape == (2, 128, 128, 3)
    toma_fx.restore(pipe)


def test_skipped_blocks_are_in_no_part() -> None:
    skip = ("mid_block.*", "down_blocks.*", "up_blocks.0.*")
    config = MergeConfig(skip=skip, merge_below=0.9)
    found = toma_fx.calibrate(tiny_sdxl_pipeline(), draw, config)
    assert all(name.startswith("up_blocks.1") for name in found.parts)
    assert (found.config(0.5).skip, found.config(0.5).merge_below) == (skip, 0.9)


def test_what_is_saved_is_loaded(calibrated: Calibrated, tmp_path: Path) -> None:
    _, found, _ = calibrated
    found.save(tmp_path / "new/folder.json")
    assert Calibration.load(tmp_path / "new/folder.json") == found
    assert pickle.loads(pickle.dumps(found)) == found


def test_every_option_of_the_base_is_loaded(tmp_path: Path) -> None:
    base = MergeConfig.preset("toma_stripe", skip=("mid_block.*",), temperature=0.01)
    found = made_up({"a": 1.0}, {"a": 100}, base=base)
    found.save(tmp_path / "a.json")
    assert Calibration.load(tmp_path / "a.json") == found


def made_up(errors: dict[str, float], savings: dict[str, int], **changes: Any) -> Calibration:
    """Errors that grow with the square of the ratio, and savings in proportion to it."""
    return replace(
        Calibration(
            base=MergeConfig(skip=()),
            parts={name: (f"{name}.*",) for name in errors},
            errors=errors,
            savings={n: {r: int(s * r / 0.5) for r in RATIOS} for n, s in savings.items()},
            by_ratio={r: (r / 0.5) ** 2 for r in RATIOS},
            uniform={r: int(sum(savings.values()) * r / 0.5) for r in UNIFORM},
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
    assert saved >= found.uniform[0.5]
    every = map(of, itertools.product((0.0, *RATIOS), repeat=4))
    assert error == min(e for e, s in every if s >= saved)


def test_what_cannot_be_saved_is_said() -> None:
    found = made_up({"a": 1.0, "b": 1.0}, {"a": 100, "b": 100})
    less = replace(found, uniform={r: 2 * saving for r, saving in found.uniform.items()})
    with pytest.raises(ModelError, match=r"no allotment saves what ratio=0.9 everywhere does"):
        less.config(0.9)
    ratios: tuple[Any, ...] = (0, 1, 0.95, "half", True)
    for ratio in ratios:
        with pytest.raises(ConfigError, match=rf"ratio={ratio!r} must be a number above 0 and"):
            found.config(ratio)


def test_lists_are_parted_where_there_are_few() -> None:
    flux = [f"transformer_blocks.{i}" for i in range(19)]
    flux += [f"single_transformer_blocks.{i}" for i in range(38)]
    parts = _parts(flux)
    assert list(parts)[:2] == ["transformer_blocks.0-4", "transformer_blocks.5-9"]
    assert [path for part in parts.values() for path in part] == flux
    lists = [f"down_blocks.{i}.transformer_blocks" for i in range(11)]
    assert _parts([f"{name}.{i}" for name in lists for i in range(10)]) == {
        name: (f"{name}.*",) for name in lists
    }


def test_slips_are_named_before_anything_is_drawn() -> None:
    pipe = tiny_sdxl_pipeline()
    drawn: list[Any] = []
    config = MergeConfig(block_ratios=(("*", 0.5),))
    with pytest.raises(ConfigError, match="are what calibrate finds; leave them out"):
        toma_fx.calibrate(pipe, drawn.append, config)  # type: ignore[arg-type]
    with pytest.raises(ModelError, match="needs a pipeline, not a UNet2DConditionModel alone"):
        toma_fx.calibrate(pipe.unet, drawn.append)  # type: ignore[arg-type]
    assert not drawn


def test_a_drawing_that_changes_is_refused() -> None:
    pipe = tiny_sdxl_pipeline()
    generator = torch.Generator().manual_seed(0)

    def other(pipe: Any) -> Any:
        return draw(pipe) + torch.rand(1, generator=generator).numpy()

    with pytest.raises(
        ModelError, match=r"draw gave other images .* by 0.*make its generator anew"
    ):
        toma_fx.calibrate(pipe, other)
    with pytest.raises(ModelError, match=r"all their values numbers"):
        toma_fx.calibrate(pipe, lambda pipe: draw(pipe) * float("nan"))


def test_a_file_is_a_variant(
    sdxl: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "spread.json"
    (tmp_path / "prompts.txt").write_text("a b\n")
    drawing = ["--prompts", str(tmp_path / "prompts.txt"), "--steps", "2"]
    drawing += ["--height", "128", "--width", "128", "--ratio", "0.25", "0.5"]
    made = ["calibrate", str(sdxl), "--out", str(file), "--region", "stripe"]
    assert main([*made, *drawing]) == 0
    assert "in place of" in capsys.readouterr().out
    variant = parse_variant(str(file))
    assert isinstance(variant, Merging)
    config = variant.config(0.4)
    assert (variant.name, config.region, config.ratio) == ("spread", "stripe", 0)
    assert config == Calibration.load(file).config(0.4)
    out = ["--out", str(tmp_path / "out"), "--measures", "psnr", "--variant", str(file), "steps"]
    assert main(["eval", str(sdxl), *drawing, *out]) == 0
    assert "spread" in capsys.readouterr().out
    assert main(["calibrate", str(sdxl), "--out", "x.txt", *drawing]) == 2
    assert "out='x.txt' must end in .json" in capsys.readouterr().err
