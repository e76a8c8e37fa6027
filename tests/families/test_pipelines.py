"""Pipelines of the newer families: transformed, restored, and merging below a noise level."""

from collections import Counter
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline
from torch import Tensor

from tests.family_pipelines import FAMILY_PIPELINES
from tests.matrix.frame import difference
from tests.more_family_pipelines import MORE_PIPELINES
from toma_fx import restore, transform
from toma_fx.families import knows
from toma_fx.transform import pipeline_models

pytestmark = [
    # diffusers, of its own import in Chroma, and numpy, of how diffusers hands it a tensor.
    pytest.mark.filterwarnings("ignore:.FluxPosEmbed. is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),
]

PIPELINES: dict[str, tuple[Any, Any]] = {**FAMILY_PIPELINES, **MORE_PIPELINES}
QUICK = ("FLUX.2", "Qwen-Image", "Z-Image", "Wan 2.2", "Wan 2.2 TI2V from an image", "sd3")
KNOWN = [
    pytest.param(name, marks=() if name in QUICK else (pytest.mark.slow,))
    for name, (build, _) in PIPELINES.items()
]


def pipeline(name: str) -> tuple[Any, dict[str, Any]]:
    """A pipeline and the arguments of a call; skips where no model of it is known."""
    build, arguments = PIPELINES[name]
    pipe = build()
    pipe.set_progress_bar_config(disable=True)
    if not isinstance(pipe, DiffusionPipeline) or not any(map(knows, pipe.components.values())):
        pytest.skip("toma_fx does not know its model")
    return pipe, arguments


def image(pipe: Any, arguments: Any, **changes: Any) -> Tensor:
    """What it draws, as latents."""
    drawn = pipe(**{**arguments(), **changes, "return_dict": False})[0]
    return drawn if isinstance(drawn, Tensor) else torch.as_tensor(drawn)


@pytest.mark.parametrize("name", KNOWN)
def test_transformed_and_restored(name: str) -> None:
    pipe, arguments = pipeline(name)
    expected = image(pipe, arguments)
    models = pipeline_models(pipe)
    merged = {part: transform(model, ratio=0.5) for part, model in models.items()}
    assert transform(pipe, ratio=0.5) is pipe
    drawn = image(pipe, arguments)
    assert difference(drawn, expected) > 1e-3
    restore(pipe)
    assert torch.equal(image(pipe, arguments), expected)
    for part, model in merged.items():
        setattr(pipe, part, model)
    assert torch.equal(image(pipe, arguments), drawn)


@pytest.mark.parametrize("name", KNOWN)
def test_merges_in_the_steps_below(name: str) -> None:
    pipe, arguments = pipeline(name)
    image(pipe, arguments, num_inference_steps=4)
    levels = [float(t) / 1000 for t in pipe.scheduler.timesteps]
    below = sum(levels[-3:-1]) / 2
    transform(pipe, merge_below=below)
    seen: Counter[tuple[int, str]] = Counter()

    def count(model: Any) -> None:
        run = model._run

        def counted(call: Any, variant: str, *others: Any) -> Any:
            index = pipe.scheduler.step_index
            if index is None:  # before the first step
                index = pipe.scheduler.begin_index or 0
            seen[index, variant] += 1
            return run(call, variant, *others)

        model._run = counted

    for model in pipeline_models(pipe).values():
        count(model)
    image(pipe, arguments, num_inference_steps=4)
    assert {variant for _, variant in seen} == {"merged", "untouched"}
    for index, variant in seen:
        assert (levels[index] < below) == (variant == "merged"), (index, levels)
