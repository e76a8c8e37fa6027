from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from tests.family_pipelines import FAMILY_PIPELINES
from tests.tiny_families import FAMILY_MODELS

BLOCKS = {
    "Flux2SingleTransformerBlock",
    "Flux2TransformerBlock",
    "QwenImageTransformerBlock",
    "WanTransformerBlock",
    "WanVACETransformerBlock",
    "ZImageTransformerBlock",
}


def run(model: Any, inputs: dict[str, Any]) -> Tensor:
    """The model's output, whose images are a list where they were one before."""
    with torch.no_grad():
        output = model(**inputs, return_dict=False)[0]
    return output if isinstance(output, Tensor) else torch.stack(output)


@pytest.mark.parametrize("name", FAMILY_MODELS)
def test_model_depends_on_its_picture(name: str) -> None:
    family = FAMILY_MODELS[name]
    model = family.build()
    inputs = family.inputs(model)
    other = {**inputs, family.picture: family.inputs(model, seed=1)[family.picture]}
    output = run(model, inputs)
    assert output.isfinite().all()
    assert (run(model, other) - output).std() > 0.1 * output.std()
    torch.testing.assert_close(run(family.build(), family.inputs(model)), output)


@pytest.mark.parametrize("name", [name for name in FAMILY_MODELS if "Edit" in name.title()])
def test_picture_depends_on_its_references(name: str) -> None:
    family = FAMILY_MODELS[name]
    model = family.build()
    inputs, tokens = family.inputs(model), 16 * 12
    other = {**inputs, "hidden_states": inputs["hidden_states"].clone()}
    other["hidden_states"][:, tokens:] *= -1
    output = run(model, inputs)[:, :tokens]
    assert (run(model, other)[:, :tokens] - output).std() > 1e-3 * output.std()


def altered(value: Any) -> Any:
    """Something else of the same kind, with None and options as they are."""
    if isinstance(value, Tensor):
        return 0.5 * value.roll(1, -1) if value.is_floating_point() else value // 2
    if isinstance(value, list):
        return [altered(item) for item in value]
    if isinstance(value, tuple):
        frames, height, width = value
        return frames, width, height
    return value


@pytest.mark.parametrize("name", FAMILY_MODELS)
def test_every_input_matters(name: str) -> None:
    family = FAMILY_MODELS[name]
    model = family.build()
    inputs = family.inputs(model)
    output = run(model, inputs)
    given = {key: value for key, value in inputs.items() if isinstance(value, Tensor | list)}
    for key, value in given.items():
        other = run(model, {**inputs, key: altered(value)})
        assert (other - output).std() > 1e-4 * output.std(), key


@pytest.mark.parametrize("name", FAMILY_MODELS)
def test_blocks_change_their_input(name: str) -> None:
    family = FAMILY_MODELS[name]
    model = family.build()
    changes: list[float] = []

    def hook(block: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        given = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
        for new in [output] if isinstance(output, Tensor) else output:
            old = [value for value in given if value.shape == new.shape]
            changes.append(min(float((new - value).norm() / value.norm()) for value in old))

    blocks = [block for block in model.modules() if type(block).__name__ in BLOCKS]
    for block in blocks:
        block.register_forward_hook(hook, with_kwargs=True)
    run(model, family.inputs(model))
    assert len(changes) >= len(blocks) >= 4
    assert min(changes) > 0.05


@pytest.mark.parametrize("name", FAMILY_PIPELINES)
def test_pipeline_runs(name: str) -> None:
    family = FAMILY_PIPELINES[name]
    pipeline = family.build()
    steps: list[int] = []

    def count(_: Any, step: int, __: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        steps.append(step)
        return tensors

    (output,) = pipeline(
        **family.arguments(output_type="np"), callback_on_step_end=count, return_dict=False
    )
    assert steps == [0, 1]
    assert np.isfinite(output).all()
    assert output.std() > 0.01
