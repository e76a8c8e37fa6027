"""Calls of merged FLUX.2, Qwen-Image, Z-Image and Wan, beside calls of the untouched models."""

import copy
import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import toma_fx
from tests.family_cases import (
    ALL,
    CASES,
    TOLERANCE,
    built,
    cut_off,
    difference,
    merging,
    run,
    sized,
)
from tests.tiny import lossless
from toma_fx import transform


@pytest.fixture(autouse=True)
def _no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


def alone(inputs: dict[str, Any], row: int, batch: int) -> dict[str, Any]:
    """The call of one row of a batch."""

    def own(value: Any) -> Any:
        if not isinstance(value, Tensor | list) or len(value) not in (batch, 2 * batch):
            return value
        each = len(value) // batch  # Wan's two images are rows in turn
        return value[row * each : (row + 1) * each]

    return {name: own(value) for name, value in inputs.items()}


@ALL
@pytest.mark.parametrize("region", ["tile", "stripe"])
def test_rows_of_a_batch(name: str, region: str) -> None:
    """Each row gets what it gets alone, whatever the others' texts."""
    case = CASES[name]
    # Destinations that rounding cannot change.
    transformed = merging(case.model, region=region, region_tokens=16, selector="grid")
    inputs = case.inputs_of(3)
    argument = "t" if case.family == "z_image" else "timestep"
    ages = torch.tensor([1.0, 0.9, 0.8])
    time = inputs[argument]
    inputs[argument] = time * (ages if time.ndim == 1 else ages[:, None])
    together = run(transformed, inputs)
    for row in range(3):
        mine = run(transformed, alone(inputs, row, 3))
        assert difference(together[row : row + 1], mine) < TOLERANCE
        assert difference(together[row : row + 1], together[row - 1 : row or None]) > 1e-2


@ALL
def test_the_given_model_stays_as_it_is(name: str) -> None:
    case = cut_off(CASES[name])
    model, inputs = copy.deepcopy(built(case.model)), case.inputs_of(2)
    before, weights = run(model, inputs), copy.deepcopy(model.state_dict())
    classes = [type(module) for module in model.modules()]
    merged = run(transform(model, skip=()), inputs)
    assert not torch.equal(merged, before)
    assert torch.equal(run(model, inputs), before)
    assert classes == [type(module) for module in model.modules()]
    assert all(torch.equal(weights[key], value) for key, value in model.state_dict().items())
    assert torch.equal(run(transform(model, ratio=0), inputs), before)


@ALL
@pytest.mark.parametrize("placement", ["block", "component"])
@pytest.mark.parametrize("region", ["tile", "stripe"])
def test_lossless(name: str, placement: str, region: str) -> None:
    """Where every token is kept, merging moves tokens, and all that belongs to them with them."""
    case = cut_off(CASES[name])
    model, inputs = built(case.model), case.inputs_of(2)
    config = lossless(placement=placement, region=region, region_tokens=16, skip=())
    assert difference(run(transform(model, config), inputs), run(model, inputs)) < TOLERANCE


@pytest.mark.parametrize("name", ["wan i2v", "wan i2v embeds", "wan flf2v", "wan given"])
@pytest.mark.parametrize("region", ["tile", "stripe"])
def test_given_frames_go_through_blocks_unmerged(name: str, region: str) -> None:
    case = CASES[name]
    model, inputs = built(case.model), case.inputs_of(2)
    transformed = transform(model, skip=(), region=region, region_tokens=16)
    area = case.picture.unmerged
    seen: dict[str, Any] = {}

    def see(path: str) -> Callable[..., None]:
        def hook(module: Any, args: Any, output: Any) -> None:
            seen[path] = args, output

        hook.any_tokens = True  # type: ignore[attr-defined]
        return hook

    for path, module in transformed.named_modules():
        if path.startswith("blocks."):
            module.register_forward_hook(see(path))

    def see_order(*_: Any) -> None:
        seen["order"] = toma_fx.token_order()

    see_order.any_tokens = True  # type: ignore[attr-defined]
    transformed.blocks[0].register_forward_hook(see_order)
    run(transformed, inputs)
    order = seen["order"]
    first = torch.arange(area) if order is None else order[:area]
    frames, each = torch.unique(first // math.prod(case.grids[0][1:]), return_counts=True)
    assert frames.tolist() == list(case.given)
    assert each.tolist() == [area // len(case.given)] * len(case.given)
    assert first.unique().numel() == area
    for index, block in enumerate(model.blocks):
        (hidden, text, time, _), out = seen[f"blocks.{index}"]
        (merged,), _ = seen[f"blocks.{index}.norm1"]
        (*_, rotary), _ = seen[f"blocks.{index}.attn1"]
        drawn = case.picture.tokens - area
        assert merged.shape[1] == area + drawn // 2
        assert torch.equal(merged[:, :area], hidden[:, :area])
        # The block, as diffusers wrote it, on those tokens.
        after = block(merged, text, time, rotary)
        assert torch.allclose(after[:, :area], out[:, :area], atol=1e-5)


@pytest.mark.parametrize("name", ["wan i2v", "wan ti2v"])
@pytest.mark.parametrize("region", ["tile", "stripe", "image"])
def test_a_video_of_given_frames_alone_is_not_merged(name: str, region: str) -> None:
    case = sized(name, (1, 8, 8))
    model, inputs = built(case.model), case.inputs_of(2)
    transformed = merging(case.model, region=region)
    assert difference(run(transformed, inputs), run(model, inputs)) < TOLERANCE


@pytest.mark.parametrize("name", ["qwen", "z", "z captions"])
@pytest.mark.parametrize("region", ["tile", "stripe"])
def test_what_a_controlnet_adds_goes_to_its_tokens(name: str, region: str) -> None:
    case = cut_off(CASES[name])
    model, inputs = built(case.model), case.inputs_of(2)
    generator = torch.Generator().manual_seed(1)
    text = 0 if name == "qwen" else 32 if name == "z" else 64  # behind Z-Image's tokens
    samples = torch.randn(2, 2, case.picture.tokens + text, 32, generator=generator)
    by_block = dict(enumerate(samples)) if case.family == "z_image" else list(samples)
    inputs["controlnet_block_samples"] = by_block
    config = lossless(region=region, region_tokens=16, skip=())
    assert difference(run(transform(model, config), inputs), run(model, inputs)) < TOLERANCE


@pytest.mark.parametrize("region", ["tile", "stripe"])
def test_latents_that_make_no_whole_token_are_left_over(region: str) -> None:
    case = CASES["wan t2v"]
    model, inputs = built(case.model), case.inputs_of(2)
    odd = torch.nn.functional.pad(inputs["hidden_states"], (0, 1, 0, 1))
    transformed = merging(case.model, region=region)
    expected = run(transformed, inputs)
    assert run(model, {**inputs, "hidden_states": odd}).shape == expected.shape
    assert difference(run(transformed, {**inputs, "hidden_states": odd}), expected) < TOLERANCE
