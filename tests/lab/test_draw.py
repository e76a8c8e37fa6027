"""One image from a folder."""

from dataclasses import replace
from pathlib import Path

import pytest

from tests.pipelines import tiny_flux_pipeline, tiny_sdxl_pipeline
from toma_fx.checkpoints import load_pipeline
from toma_fx.errors import ConfigError, ModelError
from toma_fx.lab.draw import Task, draw, takes_negative
from toma_fx.lab.prompts import Prompt

PROMPT = Prompt(text="a b")
TASK = Task(model="", prompts=(PROMPT,), steps=2, height=128, width=128)


def test_the_seed_decides_the_image(sdxl: Path) -> None:
    pipeline = load_pipeline(str(sdxl))
    first, seconds = draw(pipeline, TASK, PROMPT, 3)
    again, _ = draw(pipeline, TASK, PROMPT, 3)
    other, _ = draw(pipeline, TASK, PROMPT, 4)
    assert first.size == (128, 128)
    assert first.tobytes() == again.tobytes() != other.tobytes()
    assert 0 < seconds < 60


def test_settings_reach_the_pipeline(sdxl: Path) -> None:
    pipeline = load_pipeline(str(sdxl))
    plain, _ = draw(pipeline, TASK, PROMPT, 0)
    stronger = Task(model="", prompts=(PROMPT,), steps=2, height=128, width=128, guidance=30.0)
    negative = Prompt(text="a b", negative="z y x")
    images = [
        draw(pipeline, stronger, PROMPT, 0)[0],
        draw(pipeline, TASK, negative, 0)[0],
        draw(pipeline, TASK, PROMPT, 0, steps=3)[0],
    ]
    assert len({image.tobytes() for image in [plain, *images]}) == 4
    wide, _ = draw(pipeline, Task(model="", prompts=(PROMPT,), steps=2, height=64), PROMPT, 0)
    assert wide.size == (256, 64)  # the width is the pipeline's own


def test_flux_uses_a_negative_prompt_with_true_guidance_alone() -> None:
    guided = replace(TASK, arguments={"true_cfg_scale": 4.0})
    assert takes_negative(tiny_sdxl_pipeline(), TASK)
    assert not takes_negative(tiny_flux_pipeline(), TASK)
    assert takes_negative(tiny_flux_pipeline(), guided)
    pipeline, negative = tiny_flux_pipeline(), Prompt(text="a b", negative="z y x")
    images = [
        draw(pipeline, task, prompt, 0)[0].tobytes()
        for task in (TASK, guided)
        for prompt in (PROMPT, negative)
    ]
    assert images[0] == images[1]
    assert len(set(images)) == 3


def test_arguments_that_the_pipeline_does_not_take_are_named() -> None:
    pipeline = tiny_flux_pipeline()
    for name in ("clip_skip", "height"):
        with pytest.raises(ConfigError, match=rf"{name}=2 .* FluxPipeline; it takes .*max_seq"):
            draw(pipeline, replace(TASK, arguments={name: 2}), PROMPT, 0)


def test_settings_leave_out_the_number_of_seeds() -> None:
    settings = Task(model="m", prompts=(PROMPT,), seeds=4).settings()
    assert "seeds" not in settings
    assert settings == Task(model="m", prompts=(PROMPT,)).settings()
    assert settings != Task(model="m", prompts=(PROMPT,), arguments={"eta": 1}).settings()
    assert settings["prompts"] == [{"text": "a b", "negative": ""}]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"seeds": 0}, "seeds=0"),
        ({"steps": 0}, "steps=0"),
        ({"prompts": ()}, "at least one"),
        ({"dtype": "int8"}, "dtype='int8'"),
    ],
)
def test_mistakes_are_named(options: dict[str, object], expected: str) -> None:
    with pytest.raises(ConfigError, match=expected):
        Task(**{"model": "", "prompts": (PROMPT,), **options})  # type: ignore[arg-type]


def test_a_folder_without_a_pipeline_is_named(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"no pipeline could be loaded from .*model_index"):
        load_pipeline(str(tmp_path))
