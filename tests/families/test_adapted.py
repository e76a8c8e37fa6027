"""LoRA, controls, caches and other people's code in transformed models of the newer families."""

import contextlib
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from diffusers.hooks import (
    FirstBlockCacheConfig,
    MagCacheConfig,
    PyramidAttentionBroadcastConfig,
    TaylorSeerCacheConfig,
)
from torch import Tensor, nn

from tests.families.lives import LIVES, adapt, quick_first, run
from tests.matrix.frame import difference
from tests.tiny import lossless
from toma_fx import restore, transform
from toma_fx.errors import InputError, ModelError, TomaWarning
from toma_fx.families import family_of

FAMILIES = pytest.mark.parametrize("name", LIVES)


@pytest.mark.filterwarnings("ignore:Already found a .peft_config. attribute:UserWarning")
@FAMILIES
def test_lora_on_every_layer(name: str) -> None:
    life = LIVES[name]
    plain, adapted = life.build(), adapt(life.build())
    call = life.exact(plain)
    expected = run(adapted, call)
    assert difference(expected, run(plain, call)) > 1e-2
    before = transform(adapted, lossless(skip=()))
    after = adapt(transform(plain, lossless(skip=())))
    assert difference(run(before, call), expected) < 1e-4
    assert torch.equal(run(after, call), run(before, call))
    merged = adapt(transform(plain, ratio=0.5))
    drawn = run(merged, call)
    assert torch.equal(run(transform(adapted, ratio=0.5), call), drawn)
    assert difference(drawn, expected) > 1e-3
    if not hasattr(merged, "fuse_lora"):
        return
    merged.set_adapters("default", 0.5)
    half = run(merged, call)
    assert difference(half, drawn) > 1e-3
    merged.fuse_lora()
    fused = run(merged, call)
    # Which tokens are kept may hang on rounding.
    assert difference(fused, half) < difference(half, drawn) / 3
    merged.unfuse_lora()
    merged.set_adapters("default", 1.0)
    assert difference(run(merged, call), drawn) < 1e-2
    assert difference(run(restore(merged), call), expected) < 1e-5
    merged.unload_lora()
    assert difference(run(merged, call), run(plain, call)) < 1e-5


def _controls(name: str, model: Any, call: dict[str, Any]) -> dict[str, Any]:
    """Arguments that a ControlNet gives: random values for the output of some blocks."""
    generator = torch.Generator().manual_seed(3)
    config = model.config

    def samples(tokens: int, width: int, count: int) -> list[Tensor]:
        return [torch.randn(2, tokens, width, generator=generator) for _ in range(count)]

    if name.startswith("Qwen-Image"):
        tokens = call["hidden_states"].shape[1]
        return {"controlnet_block_samples": samples(tokens, model.inner_dim, 2)}
    if name.startswith("sd3"):
        tokens = (call["hidden_states"].shape[-1] // config.patch_size) ** 2
        return {"block_controlnet_hidden_states": samples(tokens, model.inner_dim, 2)}
    if name.startswith("Z-Image"):
        images, captions = call["x"], call["cap_feats"]
        longest = max(map(len, captions))
        tokens = images[0].shape[-1] * images[0].shape[-2] // 4 + -(-longest // 32) * 32
        return {
            "controlnet_block_samples": dict(
                zip((0, 2), samples(tokens, config.dim, 2), strict=True)
            )
        }
    tokens = call["hidden_states"].shape[1]
    return {
        "controlnet_block_samples": samples(tokens, model.inner_dim, 2),
        "controlnet_single_block_samples": samples(tokens, model.inner_dim, 1),
    }


CONTROLLED = ("Qwen-Image", "Qwen-Image-Edit 2511", "Z-Image", "sd3.5", "chroma")


@pytest.mark.parametrize("name", [name for name in CONTROLLED if name in LIVES])
def test_control(name: str) -> None:
    life = LIVES[name]
    model = life.build()
    call = life.exact(model)
    controlled = {**call, **_controls(name, model, call)}
    expected = run(model, controlled)
    assert difference(expected, run(model, call)) > 1e-2
    assert difference(run(transform(model, lossless(skip=())), controlled), expected) < 1e-4
    merged = transform(model, ratio=0.5)
    assert difference(run(merged, controlled), expected) > 1e-3
    assert difference(run(merged, controlled), run(merged, call)) > 1e-2


STEPS = 4
BLOCK_CACHES = {
    "first block": lambda: FirstBlockCacheConfig(threshold=0.2),
    "magnitude": lambda: MagCacheConfig(
        threshold=1.0,
        max_skip_steps=1,
        retention_ratio=0.25,
        num_inference_steps=STEPS,
        mag_ratios=torch.ones(STEPS),
    ),
}
ATTENTION_CACHES = {
    "TaylorSeer": lambda: TaylorSeerCacheConfig(
        cache_interval=2, disable_cache_before_step=1, taylor_factors_dtype=torch.float32
    ),
    "pyramid": lambda: PyramidAttentionBroadcastConfig(
        spatial_attention_block_skip_range=2,
        spatial_attention_timestep_skip_range=(-1, 1001),
        current_timestep_callback=lambda: 500,
    ),
}
CACHED = [name for name, life in LIVES.items() if hasattr(life.build(), "enable_cache")]


def draw(model: Any, call: dict[str, Any]) -> Tensor:
    """What comes of some steps, the noise of which becomes less."""
    picture, outputs = "x" if "x" in call else "hidden_states", []
    for step in range(STEPS):
        left = 1 - 0.05 * step
        noise = call[picture]
        noise = [left * each for each in noise] if isinstance(noise, list) else left * noise
        with model.cache_context("cond"):
            outputs.append(run(model, {**call, picture: noise}))
    model._reset_stateful_cache()
    return torch.stack(outputs)


def cached(name: str, cache: Any) -> tuple[Any, dict[str, Any], Tensor]:
    """A model with a cache, a call of it, and what it draws; skips where diffusers cannot."""
    model = LIVES[name].build()
    call = LIVES[name].exact(model)
    plain = draw(model, call)
    try:
        model.enable_cache(cache())
        drawn = draw(model, call)
    except Exception as error:
        pytest.skip(f"diffusers' own {type(error).__name__}: {error}")
    if difference(drawn, plain) == 0:
        pytest.skip("the cache finds nothing in the untouched model")
    return model, call, drawn


@pytest.mark.parametrize("cache", BLOCK_CACHES)
@pytest.mark.parametrize("name", quick_first(CACHED))
def test_caches_of_blocks(name: str, cache: str) -> None:
    model, call, expected = cached(name, BLOCK_CACHES[cache])
    for before in (True, False):
        moved = transform(model if before else LIVES[name].build(), lossless())
        if not before:
            moved.enable_cache(BLOCK_CACHES[cache]())
        assert difference(draw(moved, call), expected) < 1e-3
    assert difference(draw(transform(model), call), expected) > 1e-3


@pytest.mark.parametrize("cache", ATTENTION_CACHES)
@pytest.mark.parametrize("name", quick_first(CACHED))
def test_caches_of_attention(name: str, cache: str) -> None:
    model, call, expected = cached(name, ATTENTION_CACHES[cache])
    with pytest.raises(ModelError, match="transform with selector='grid'"):
        transform(model)
    merged = transform(LIVES[name].build())
    with pytest.raises(ModelError, match="transform with selector='grid'"):
        merged.enable_cache(ATTENTION_CACHES[cache]())
    assert not merged.is_cache_enabled
    moved = transform(model, lossless(selector="grid"))
    assert difference(draw(moved, call), expected) < 1e-3
    assert difference(draw(transform(model, selector="grid"), call), expected) > 1e-3


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("error", TomaWarning)
        warnings.filterwarnings("ignore", "merging without memory")  # of which transformers warn
        yield


def give_processors(model: Any, any_tokens: bool) -> None:
    """Give attention layers processors of a class that is not diffusers'."""
    for path, module in model.named_modules():
        if "processor" in vars(module) and "refiner" not in path and "token_" not in path:
            known = type(module.processor)
            own = type("Own", (known,), {"any_tokens": any_tokens, "__module__": "elsewhere"})
            module.processor = own()


@FAMILIES
def test_what_others_put_into_a_model(name: str) -> None:
    life = LIVES[name]
    model = life.build()
    call = life.call(model)
    with quiet():
        expected = run(transform(model), call)
    given = life.build()
    give_processors(given, any_tokens=False)
    with pytest.warns(TomaWarning, match="attention processor elsewhere.Own"):
        assert torch.equal(run(transform(given), call), expected)
    merged = transform(model)
    give_processors(merged, any_tokens=False)
    with pytest.warns(TomaWarning, match="attention processor elsewhere.Own"):
        assert torch.equal(run(merged, call), expected)
    give_processors(merged, any_tokens=True)
    path = merged.toma_recipe.merged[-1].path
    block = merged.get_submodule(path)
    with quiet():
        run(merged, call)
    handle = block.register_forward_hook(lambda *_: None)
    with pytest.warns(TomaWarning, match="sees image tokens in token order"):
        run(merged, call)
    handle.remove()
    layer = next(module for module in block.modules() if isinstance(module, nn.Linear))
    forward = layer.forward
    layer.forward = lambda *args: forward(*args)  # type: ignore[method-assign]
    with pytest.raises(InputError, match="has a forward of its own"):
        run(merged, call)
    del layer.forward
    kwargs = family_of(model).attention_kwargs
    if kwargs is not None:
        tokens = max(family_of(model).sequence_lengths(call))
        with pytest.raises(InputError, match=r"all|masks|each of"):
            run(merged, {**call, kwargs: {"bias": torch.zeros(tokens, tokens)}})
