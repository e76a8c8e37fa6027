"""Pipelines with memory: images one after another, adapters, ControlNets, offloading, ranks."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from accelerate.hooks import CpuOffload, add_hook_to_module
from diffusers import ControlNetModel, StableDiffusionXLControlNetPipeline
from torch import Tensor

import toma_fx
from tests import memory_ranks
from tests.checks.adapters import add
from tests.families.lives import LIVES, run
from tests.family_pipelines import FAMILY_PIPELINES
from tests.matrix.ranks import on_ranks
from tests.memory_runs import difference
from tests.pipelines import PROMPT_TOKENS, tiny_flux_pipeline, tiny_sdxl_pipeline
from toma_fx import Memory, MergeConfig, transform
from toma_fx.model_border import ModelBorder

pytestmark = [
    # diffusers' own schedulers, and a ControlNet that is made from a UNet
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*:FutureWarning"),
]

MEMORY = MergeConfig(ratio=0.75, region_tokens=16, skip=(), memory=Memory(every=2))
STEPS = 5


class Case(NamedTuple):
    """How to build a pipeline, and the arguments of a call of it."""

    build: Callable[[], Any]
    arguments: Callable[..., dict[str, Any]]


def _text_to_image(**changes: Any) -> dict[str, Any]:
    return {"prompt": "a cat", "height": 128, "width": 128, **changes}


def _flux(**changes: Any) -> dict[str, Any]:
    return _text_to_image(max_sequence_length=PROMPT_TOKENS, **changes)


def _true_guidance(**changes: Any) -> dict[str, Any]:
    """Two calls a step, with one prompt each."""
    return _flux(negative_prompt="a dog", true_cfg_scale=3.0, **changes)


CASES = {
    "sdxl": Case(tiny_sdxl_pipeline, _text_to_image),
    "flux": Case(tiny_flux_pipeline, _flux),
    "flux, true guidance": Case(tiny_flux_pipeline, _true_guidance),
    **{
        name: Case(*FAMILY_PIPELINES[name])
        for name in ("FLUX.2", "FLUX.2 edit", "Qwen-Image", "Z-Image", "Wan 2.1", "Wan 2.2 TI2V")
    },
    "Wan 2.2": Case(*FAMILY_PIPELINES["Wan 2.2"]),
}
both = pytest.mark.parametrize("name", ["sdxl", "flux"])


def draw(pipe: Any, arguments: dict[str, Any], seed: int = 0) -> Tensor:
    """Latents, of an image from the noise of a seed."""
    generator = torch.Generator().manual_seed(seed)
    given = {"num_inference_steps": STEPS, "generator": generator, "output_type": "latent"}
    return torch.as_tensor(pipe(**{**arguments, **given})[0])


def merged_models(pipe: Any) -> list[Any]:
    return [each for each in pipe.components.values() if isinstance(each, ModelBorder)]


@pytest.mark.parametrize("name", CASES)
def test_images_are_those_of_a_fresh_pipeline(name: str) -> None:
    case = CASES[name]
    arguments, pipe = case.arguments(), case.build()
    untouched = draw(pipe, arguments)
    transform(pipe, MEMORY)
    first, second = draw(pipe, arguments), draw(pipe, arguments, seed=1)
    models = merged_models(pipe)
    assert len(models) == (2 if name == "Wan 2.2" else 1)
    assert all((len(m.toma_state), m.toma_state.nbytes()) == (0, 0) for m in models)
    again = draw(pipe, arguments)
    fresh = draw(transform(case.build(), MEMORY), arguments, seed=1)
    assert torch.equal(first, again)
    assert torch.equal(second, fresh)
    assert not torch.equal(first, untouched)
    toma_fx.restore(pipe)
    assert torch.equal(draw(pipe, arguments), untouched)


@both
def test_an_image_with_memory_is_nearer_than_one_merged_at_every_step(name: str) -> None:
    case = CASES[name]
    images = {}
    for memory in (None, Memory(every=2), Memory(every=1)):
        pipe = transform(case.build(), ratio=0.75, region_tokens=16, skip=(), memory=memory)
        images[memory] = draw(pipe, case.arguments())
    untouched = draw(case.build(), case.arguments())
    assert torch.equal(images[Memory(every=1)], untouched)
    with_memory = difference(images[Memory(every=2)], untouched)
    assert with_memory < difference(images[None], untouched)


@both
def test_an_interrupted_image_leaves_nothing_to_the_next(name: str) -> None:
    case = CASES[name]
    pipe, arguments = transform(case.build(), MEMORY), case.arguments()
    expected = draw(pipe, arguments)

    def stop(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> Any:
        if step == 1:
            raise KeyboardInterrupt
        return tensors

    with pytest.raises(KeyboardInterrupt):
        draw(pipe, {**arguments, "callback_on_step_end": stop}, seed=1)
    assert torch.equal(draw(pipe, arguments), expected)


def denoiser(pipe: Any) -> Any:
    return pipe.unet if hasattr(pipe, "unet") else pipe.transformer


@both
def test_an_adapter_may_come_before_or_after(name: str) -> None:
    case = CASES[name]
    scale = "cross_attention_kwargs" if name == "sdxl" else "joint_attention_kwargs"
    arguments = {**case.arguments(), scale: {"scale": 0.5}}
    before, after = case.build(), case.build()
    add(denoiser(before))
    transform(before, MEMORY)
    transform(after, MEMORY)
    plain = draw(after, case.arguments())
    add(denoiser(after))
    adapted = draw(before, arguments)
    assert torch.equal(adapted, draw(after, arguments))
    assert difference(adapted, plain) > 1e-3
    denoiser(after).delete_adapters("default")
    assert torch.equal(draw(after, case.arguments()), plain)


def test_a_controlnet_adds_to_what_is_recalled() -> None:
    base = tiny_sdxl_pipeline()
    torch.manual_seed(0)
    net = ControlNetModel.from_unet(base.unet)
    for parameter in net.controlnet_mid_block.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    pipe = StableDiffusionXLControlNetPipeline(**base.components, controlnet=net)
    pipe.set_progress_bar_config(disable=True)
    picture = torch.rand(1, 3, 128, 128, generator=torch.Generator().manual_seed(0))
    arguments = _text_to_image(image=picture, controlnet_conditioning_scale=1.0)
    untouched = draw(pipe, arguments)
    transform(pipe, MEMORY)
    output = draw(pipe, arguments)
    assert torch.equal(output, draw(pipe, arguments))
    without = draw(pipe, {**arguments, "controlnet_conditioning_scale": 0.0})
    assert difference(output, untouched) < difference(without, untouched)


@both
def test_an_offloaded_model(name: str) -> None:
    case = CASES[name]
    pipe = transform(case.build(), MEMORY)
    expected = draw(pipe, case.arguments())
    # What enable_model_cpu_offload does, which asks for a GPU.
    add_hook_to_module(denoiser(pipe), CpuOffload("cpu"), append=True)
    assert torch.equal(draw(pipe, case.arguments()), expected)


@both
def test_offloaded_groups_of_blocks(name: str) -> None:
    case = CASES[name]
    pipe = transform(case.build(), MEMORY)
    expected = draw(pipe, case.arguments())
    cpu = torch.device("cpu")
    denoiser(pipe).enable_group_offload(cpu, offload_type="block_level", num_blocks_per_group=1)
    assert torch.equal(draw(pipe, case.arguments()), expected)


SQUARE = {"height": 16, "width": 16, "text": 8}
SPLIT: list[tuple[str, MergeConfig, dict[str, Any]]] = [
    ("FLUX.2", MEMORY, SQUARE),
    ("Qwen-Image", MEMORY, SQUARE),
    ("Wan", MEMORY, {"frames": 8, "height": 8, "width": 8}),
]


def test_ranks_draw_what_one_process_draws(tmp_path: Path) -> None:
    for (name, config, size), outputs in zip(
        SPLIT, on_ranks(memory_ranks.split, tmp_path, SPLIT), strict=True
    ):
        alone = transform(LIVES[name].build(), config)
        for output, call in zip(outputs, memory_ranks.calls_of(name, size), strict=True):
            assert difference(output, run(alone, call)) < 1e-5, name
