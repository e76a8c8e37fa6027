"""Models with memory and other changes of models: hooks, caches, gradients, files."""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FluxTransformer2DModel
from diffusers.hooks import (
    FirstBlockCacheConfig,
    HookRegistry,
    LayerSkipConfig,
    PyramidAttentionBroadcastConfig,
    apply_layer_skip,
)
from torch import Tensor

from tests.memory_runs import build, calls_of, difference, draw, merging, output_of, same
from toma_fx import Memory, transform
from toma_fx.errors import ModelError

GROUPS = {"unet": "mid_block.attentions.0.transformer_blocks", "wan": "blocks"}
"""A list of two blocks, of which the first makes the plan.

Flux's are no example: diffusers' own hook gives back the text in the place of the image.
"""
with_groups = pytest.mark.parametrize("name", GROUPS)
both_models = pytest.mark.parametrize("name", ["unet", "flux"])


def leader(name: str, model: Any) -> Any:
    return model.get_submodule(f"{GROUPS[name]}.0")


def skip_leader(name: str, model: Any) -> Any:
    apply_layer_skip(model, LayerSkipConfig(indices=[0], fqn=GROUPS[name]))
    return model


def skip_no_more(name: str, model: Any) -> Any:
    HookRegistry.check_if_exists_or_initialize(leader(name, model)).remove_hook("layer_skip_hook")
    return model


# Skipped blocks


@with_groups
@pytest.mark.parametrize("options", [{}, {"control": False}, {"theta": 0.0}], ids=str)
def test_a_block_that_is_always_skipped_leaves_its_plan_to_the_next(
    name: str, options: dict[str, Any]
) -> None:
    """Which sees the same tokens, since the first is skipped."""
    calls = calls_of(name)
    expected = draw(skip_leader(name, merging(name, **options, skip=(f"{GROUPS[name]}.0",))), calls)
    assert same(draw(skip_leader(name, merging(name, **options)), calls), expected)


@with_groups
def test_a_block_without_a_memory_runs_in_full(name: str) -> None:
    """One that was skipped at the full step, and is not at the next; the others recall."""
    calls, model = calls_of(name), skip_leader(name, merging(name, region="stripe"))
    draw(model, calls[:1])
    skip_no_more(name, model)
    counts: list[int] = []
    for block in model.get_submodule(GROUPS[name]):
        inner = block.ff if name == "unet" else block.ffn
        inner.register_forward_pre_hook(lambda _, args: counts.append(args[0].shape[1]))
    (output,) = draw(model, calls[1:2])
    assert output.isfinite().all()
    # The leader on merged tokens, which it remembers, and in full; the other on merged ones.
    assert counts == [16, 64, 16]
    draw(model, calls[2:])


@with_groups
def test_a_block_may_be_skipped_between_full_steps(name: str) -> None:
    calls, model = calls_of(name), merging(name)
    expected = draw(merging(name), calls)
    assert torch.equal(*(draw(m, calls[:1])[0] for m in (model, merging(name))))
    (skipped,) = draw(skip_leader(name, model), calls[1:2])
    assert skipped.isfinite().all()
    assert not torch.equal(skipped, expected[1])
    assert same(draw(skip_no_more(name, model), calls[2:3]), expected[2:3])


@with_groups
def test_two_calls_a_step_of_which_one_skips(name: str) -> None:
    """As skip-layer guidance makes them: one prompt, one timestep, and a block left out."""
    calls, model = calls_of(name), merging(name)
    whole, skipped = [], []
    for call in calls:
        whole += draw(model, [call])
        skipped += draw(skip_leader(name, model), [call])
        skip_no_more(name, model)
    assert same(whole, draw(merging(name), calls))
    assert same(skipped, draw(skip_leader(name, merging(name)), calls))


# Caches


def cached(threshold: float) -> FluxTransformer2DModel:
    model = merging("flux", region="stripe")
    model.enable_cache(FirstBlockCacheConfig(threshold=threshold))
    return model


def draw_cached(model: Any, calls: list[dict[str, Any]]) -> list[Tensor]:
    with model.cache_context("cond"):
        return draw(model, calls)


def test_a_cache_that_skips_nothing_changes_nothing() -> None:
    calls = calls_of("flux")
    expected = draw(merging("flux", region="stripe"), calls)
    assert same(draw_cached(cached(1e-9), calls), expected)


def test_blocks_that_a_cache_skipped_at_a_full_step_run_in_full_later() -> None:
    first, *_, last = calls_of("flux")
    model = cached(0.05)
    counts: list[int] = []
    block = model.single_transformer_blocks[0]
    block.norm.register_forward_pre_hook(lambda _, args: counts.append(args[0].shape[1]))
    # Alike but for their timesteps, so that all but the first are skipped; then another.
    alike = [{**first, "timestep": first["timestep"] * (1 - step / 1e6)} for step in range(3)]
    draw_cached(model, alike)
    assert counts == [16 + 6, 64 + 6]
    (output,) = draw_cached(model, [last])
    assert counts[2:] == [16 + 6, 64 + 6]
    assert output.isfinite().all()


def test_a_cache_inside_a_block_is_refused_whatever_the_selector() -> None:
    """A full step runs the block twice, on all tokens and on merged ones."""
    for selector in ("facility_location", "grid"):
        model = merging("flux", selector=selector)
        config = PyramidAttentionBroadcastConfig(
            spatial_attention_block_skip_range=2, current_timestep_callback=lambda: 500
        )
        with pytest.raises(ModelError, match="memory=None"):
            model.enable_cache(config)
        draw(model, calls_of("flux", 2))


# Gradients


@pytest.fixture
def training() -> Callable[..., tuple[dict[str, Tensor], Tensor]]:
    def gradients(
        name: str, step: int, checkpointing: bool, mode: Any = torch.no_grad
    ) -> tuple[dict[str, Tensor], Tensor]:
        """Those of a step, after the ones before it; and what the step gives."""
        model, calls = merging(name).train(), calls_of(name)
        model.requires_grad_(True)
        if checkpointing:
            model.enable_gradient_checkpointing()
        with mode():
            for call in calls[:step]:
                output_of(model, call)
        with torch.enable_grad():
            output = output_of(model, calls[step])
            output.square().mean().backward()
        found = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        return found, output.detach()

    return gradients


@both_models
@pytest.mark.parametrize("step", [2, 3])
def test_gradients_through_a_step_are_the_same_with_checkpointing(
    name: str, step: int, training: Callable[..., tuple[dict[str, Tensor], Tensor]]
) -> None:
    (plain, output), (checkpointed, again) = (training(name, step, each) for each in (False, True))
    torch.testing.assert_close(again, output)
    assert plain.keys() == checkpointed.keys()
    assert len(plain) > 10
    for each, gradient in plain.items():
        torch.testing.assert_close(checkpointed[each], gradient, rtol=1e-4, atol=1e-6)


@both_models
def test_gradients_after_steps_in_inference_mode(
    name: str, training: Callable[..., tuple[dict[str, Tensor], Tensor]]
) -> None:
    for step in (2, 3):
        expected, output = training(name, step, False)
        found, again = training(name, step, False, torch.inference_mode)
        torch.testing.assert_close(again, output)
        assert found.keys() == expected.keys()


@both_models
def test_no_gradient_reaches_an_earlier_step(name: str) -> None:
    model, (first, second) = merging(name), calls_of(name, 2)
    tokens = "sample" if name == "unet" else "hidden_states"
    earlier = first[tokens].clone().requires_grad_(True)
    output_of(model, {**first, tokens: earlier})
    output_of(model, {**second, tokens: second[tokens].requires_grad_(True)}).sum().backward()
    assert earlier.grad is None


@both_models
def test_steps_in_inference_mode_and_without_go_on_with_one_run(name: str) -> None:
    calls, model = calls_of(name), merging(name)
    expected = draw(merging(name), calls)
    outputs: list[Tensor] = []
    for index, call in enumerate(calls):
        with (torch.no_grad, torch.inference_mode)[index % 2]():
            outputs += [output_of(model, call).clone()]
    with torch.inference_mode():
        assert same(outputs, expected)


# Files, types and parts


@both_models
def test_a_saved_model_is_the_untouched_one(name: str, tmp_path: Path) -> None:
    model, calls = merging(name), calls_of(name)
    expected = draw(model, calls)
    model.save_pretrained(tmp_path)
    loaded = type(build(name)).from_pretrained(tmp_path)
    assert same(draw(loaded, calls), draw(build(name), calls))
    memory = Memory(every=2, theta=0.5)
    again = transform(loaded, ratio=0.75, region_tokens=16, skip=(), memory=memory)
    assert same(draw(again, calls), expected)


@both_models
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_other_types(name: str, dtype: torch.dtype) -> None:
    """Updates are kept in the type of the tokens, and what comes out has it too."""
    model, calls = merging(name).to(dtype), calls_of(name)
    cast = functools.partial(_cast, dtype=dtype)
    calls = [{name: cast(value) for name, value in call.items()} for call in calls]
    for output in draw(model, calls):
        assert output.dtype == dtype
        assert output.isfinite().all()
    (run,) = model.toma_state._runs
    assert {u.dtype for each in run.kept.memory.values() for u in each.update} == {dtype}


def _cast(value: Any, dtype: torch.dtype) -> Any:
    if isinstance(value, dict):
        return {name: _cast(each, dtype) for name, each in value.items()}
    return value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value


@both_models
def test_a_block_on_its_own_runs_in_full(name: str) -> None:
    """Without a call of the model there is no run."""
    model = merging(name)
    path = next(each.path for each in model.toma_recipe.merged)
    untouched = build(name).get_submodule(path)
    seen: list[Any] = []
    untouched_hook = untouched.register_forward_hook(
        lambda block, args, kwargs, output: seen.append((args, kwargs, output)), with_kwargs=True
    )
    draw(build(name), calls_of(name, 1))
    untouched_hook.remove()
    args, kwargs, expected = seen[0]
    with torch.no_grad():
        output = model.get_submodule(path)(*args, **kwargs)
    pairs = (
        zip(output, expected, strict=True) if isinstance(output, tuple) else [(output, expected)]
    )
    assert all(torch.equal(a, b) for a, b in pairs)


@both_models
def test_parts_of_a_block_that_merge(name: str) -> None:
    """Around components, the block's updates are those of all tokens, however it made them."""
    calls = calls_of(name)
    outputs = draw(merging(name, placement="component", region="stripe"), calls)
    for step, (output, expected) in enumerate(zip(outputs, draw(build(name), calls), strict=True)):
        assert torch.equal(output, expected) == (step % 2 == 0)
        assert difference(output, expected) < 1
