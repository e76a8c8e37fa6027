"""The tiny models and pipelines that other tests are made of do what real ones do."""

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.more_family_pipelines import MORE_PIPELINES
from tests.tiny_more_families import MORE_FAMILIES

pytestmark = [
    # numpy, of how diffusers hands it a tensor.
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),
    # torch, of how Mochi asks for full precision.
    pytest.mark.filterwarnings("ignore:In CPU autocast:UserWarning"),
]

MODEL_OF = {"anima": "cosmos"}
"""The models of pipelines that are called otherwise."""


@pytest.mark.parametrize("name", MORE_FAMILIES)
@torch.no_grad()
def test_a_tiny_model_takes_its_inputs_and_looks_at_the_image(name: str) -> None:
    make_model, make_inputs = MORE_FAMILIES[name]
    model = make_model()
    inputs = make_inputs(model)

    output = model(**inputs).sample
    inputs["hidden_states"] = changed(inputs["hidden_states"])
    other = model(**inputs).sample

    assert output.isfinite().all()
    assert output.std() > 0.01
    assert (output - other).abs().max() > 1e-3


def changed(image: Tensor) -> Tensor:
    """The image, or the packed tokens, with one corner changed."""
    image = image.clone()
    image.flatten(1)[:, 0] += 1.0
    return image


@pytest.mark.parametrize("name", MORE_PIPELINES)
def test_a_tiny_pipeline_calls_its_model_as_the_inputs_do(name: str) -> None:
    make_pipeline, make_arguments = MORE_PIPELINES[name]
    pipeline = make_pipeline()
    calls = record_calls(pipeline.transformer)

    output = pipeline(**make_arguments())
    latents = output[0] if isinstance(output, tuple) else output

    _, make_inputs = MORE_FAMILIES[MODEL_OF.get(name, name)]
    assert latents.isfinite().all()
    assert len(calls) >= 2  # steps
    assert kinds(calls[0]) == kinds(make_inputs(pipeline.transformer))


def record_calls(model: torch.nn.Module) -> list[dict[str, Any]]:
    """Fills with the arguments of each call, except for how the output is wanted."""
    calls: list[dict[str, Any]] = []

    def record(_: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        names = ["hidden_states"][: len(args)]
        call = {**dict(zip(names, args, strict=True)), **kwargs}
        call.pop("return_dict", None)
        calls.append(call)

    model.register_forward_pre_hook(record, with_kwargs=True)
    return calls


def kinds(value: Any) -> Any:
    """What a value is but for its sizes: dtypes and numbers of dimensions, names, types."""
    if isinstance(value, Tensor):
        return value.dtype, value.ndim
    if isinstance(value, dict):
        return {name: kinds(inner) for name, inner in value.items()}
    if isinstance(value, tuple | list):
        return [kinds(inner) for inner in value]
    return type(value)
