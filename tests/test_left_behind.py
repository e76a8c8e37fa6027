"""A process that transforms hundreds of models holds no more in the end than after ten."""

import gc
import linecache
import threading
import weakref
from collections import Counter

import pytest
import torch
from diffusers import UNet2DConditionModel
from diffusers.hooks._helpers import TransformerBlockRegistry
from diffusers.models.attention import BasicTransformerBlock
from torch.fx import graph_module

from tests.pipelines import tiny_flux_pipeline
from tests.tiny import smallest_unet, tiny_flux, tiny_sdxl_unet, unet_inputs
from toma_fx import Schedule, report, restore, transform
from toma_fx.state import MOST_RUNS


def left_behind() -> Counter[str]:
    """What a process holds of the models that it transformed."""
    gc.collect()
    gc.collect()
    named = [name for name in linecache.cache if name.startswith(("<toma_fx", "<eval_with_key>"))]
    return Counter(
        {
            "classes of blocks": len(BasicTransformerBlock.__subclasses__()),
            "classes of models": len(UNet2DConditionModel.__subclasses__()),
            "rows of diffusers' registry": len(TransformerBlockRegistry._registry),
            "sources of torch.fx": len(graph_module._loader.eval_cache),
            "sources for tracebacks": len(named),
            "finalizers": len(weakref.finalize._registry),  # type: ignore[attr-defined]
            "threads": threading.active_count(),
        }
    )


def transform_often(times: int) -> None:
    """Transforms with a hundred ratios, of which some are called, restored, or reported on."""
    unet = smallest_unet()
    inputs = unet_inputs(unet, batch=1, height=16, width=16)
    for i in range(times):
        merged = transform(unet, ratio=0.1 + 0.008 * (i % 100), merge_below=1 - 0.5 * (i % 2))
        if i % 50 == 0:
            with torch.no_grad():
                merged(**inputs)
            report(merged)
        if i % 3 == 0:
            restore(merged)


def test_hundreds_of_transforms_leave_no_more_than_ten() -> None:
    transform_often(10)
    few = left_behind()
    transform_often(200)
    # Fewer is no fault: what other tests of this process left may go in between.
    assert left_behind() - few == Counter()


def test_models_that_live_keep_their_classes_and_sources() -> None:
    """Or the test above would hold of a library that forgets what is in use."""
    before = left_behind()
    alive = [transform(smallest_unet(), ratio=ratio) for ratio in (0.2, 0.4)]
    during = left_behind()
    for what in ("classes of blocks", "classes of models", "rows of diffusers' registry"):
        assert during[what] > before[what]
    assert during["sources for tracebacks"] > before["sources for tracebacks"]
    del alive
    assert left_behind() == before


def test_a_hundred_sizes_leave_a_bounded_store() -> None:
    merged = transform(tiny_sdxl_unet(), schedule=Schedule(select_every=2))
    held = []
    with torch.no_grad():
        for i in range(100):
            inputs = unet_inputs(
                merged, batch=1, height=16 + 4 * (i % 25), width=16 + 4 * (i // 25)
            )
            merged(**inputs)
            held.append(merged.toma_state.nbytes())
    assert len(merged.toma_state) <= MOST_RUNS
    assert max(held) <= MOST_RUNS * max(b - a for a, b in zip([0, *held], held, strict=False))
    merged._reset_stateful_cache()
    assert (len(merged.toma_state), merged.toma_state.nbytes()) == (0, 0)


def test_nothing_is_kept_once_a_pipeline_ends_the_image() -> None:
    pipe = transform(tiny_flux_pipeline(), skip=(), schedule=Schedule(select_every=2))
    seen = []

    def count(pipeline: object, step: int, timestep: object, values: dict[str, object]) -> object:
        seen.append(len(pipe.transformer.toma_state))
        return values

    pipe("a", num_inference_steps=3, height=128, width=128, callback_on_step_end=count)
    assert seen == [1, 1, 1]
    assert len(pipe.transformer.toma_state) == 0


@pytest.mark.parametrize("make", [tiny_sdxl_unet, tiny_flux])
def test_a_restored_model_holds_nothing_of_ours(make: object) -> None:
    model = make()  # type: ignore[operator]
    restored = restore(transform(model, skip=()))
    for module in restored.modules():
        assert not [name for name in vars(module) if "toma" in name]
        assert "toma" not in type(module).__module__
        assert "toma_base" not in vars(type(module))
