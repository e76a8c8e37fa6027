"""Rows: schedulers, callbacks and images in a row, where models that keep state go wrong.

Each runs stateless, the default, and with plans that are kept for some steps.
"""

import copy
from typing import Any

import pytest
import torch
from diffusers import (
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    HeunDiscreteScheduler,
    LCMScheduler,
    UniPCMultistepScheduler,
)
from diffusers.callbacks import SDXLCFGCutoffCallback
from torch import Tensor

from tests.matrix.frame import Cell, difference, row
from tests.matrix.pictures import (
    SCHEDULED,
    STATELESS,
    check,
    drawing,
    holding,
    model_of,
    pipeline,
)
from tests.pipelines import PROMPT_TOKENS
from toma_fx import MergeConfig, transform

pytestmark = [
    # diffusers' Euler scheduler hands a tensor to NumPy in a way that NumPy 2 is about to change.
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),
    pytest.mark.parametrize("config", [STATELESS, SCHEDULED], ids=["stateless", "scheduled"]),
]

SECTION = "Pipelines"
SDXL_SCHEDULERS: dict[str, tuple[Any, dict[str, Any]]] = {
    "Euler": (EulerDiscreteScheduler, {}),
    "DPM++ 2M": (DPMSolverMultistepScheduler, {"use_karras_sigmas": True}),
    "Heun (two calls a step)": (HeunDiscreteScheduler, {}),
    "UniPC": (UniPCMultistepScheduler, {}),
    "LCM": (LCMScheduler, {}),
}


@pytest.mark.parametrize("scheduler", SDXL_SCHEDULERS)
@row("Scheduler: {scheduler}", section=SECTION, families=("sdxl",))
def test_sdxl_schedulers(cell: Cell, scheduler: str, config: MergeConfig) -> None:
    pipe = pipeline("sdxl")
    cls, options = SDXL_SCHEDULERS[scheduler]
    pipe.scheduler = cls.from_config(pipe.scheduler.config, **options)
    check(cell, pipe, drawing(), config, keeping=False)


@row("Scheduler: flow-match Euler", section=SECTION, families=("flux",))
def test_flow_match_euler(cell: Cell, config: MergeConfig) -> None:
    pipe = pipeline("flux")
    pipe.scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    check(cell, pipe, drawing(num_inference_steps=5), config, keeping=False)


@row(
    "Scheduler: flow-match Heun (two calls a step)",
    section=SECTION,
    families=("flux",),
    note="in a loop of one's own: diffusers' FluxPipeline gives every scheduler sigmas, which this "
    "one does not take",
)
def test_flow_match_heun(cell: Cell, config: MergeConfig) -> None:
    @torch.no_grad()
    def draw(pipe: Any, seed: int) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        text, pooled, text_ids = pipe.encode_prompt(
            ("a cat", "a dog")[seed], None, max_sequence_length=PROMPT_TOKENS
        )
        latents, ids = pipe.prepare_latents(
            1, 4, 128, 128, torch.float32, torch.device("cpu"), generator
        )
        scheduler = FlowMatchHeunDiscreteScheduler()
        scheduler.set_timesteps(4)
        for timestep in scheduler.timesteps:
            velocity = pipe.transformer(
                hidden_states=latents,
                timestep=timestep.expand(1) / 1000,
                guidance=torch.full((1,), 3.5),
                encoder_hidden_states=text,
                pooled_projections=pooled,
                txt_ids=text_ids,
                img_ids=ids,
            ).sample
            latents = scheduler.step(velocity, timestep, latents).prev_sample
        drawn: Tensor = latents
        return drawn

    check(cell, pipeline("flux"), draw, config, keeping=False)


@row("Callbacks that change the latents", section=SECTION)
def test_changed_latents(cell: Cell, config: MergeConfig) -> None:
    def brighten(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        return {"latents": tensors["latents"] + (step == 1) * 0.5}

    pipe = pipeline(cell.family)
    draw = drawing(callback_on_step_end=brighten)
    check(cell, pipe, draw, config, keeping=False)
    if cell.mode == "eager":
        transform(pipe, config)
        assert difference(draw(pipe, 0), drawing()(pipe, 0)) > 1e-2


@row("Callbacks that end the guidance, which halves the batch", section=SECTION, families=("sdxl",))
def test_guidance_that_ends(cell: Cell, config: MergeConfig) -> None:
    pipe = pipeline("sdxl")
    cutoff = SDXLCFGCutoffCallback(cutoff_step_ratio=0.5)
    options = {"callback_on_step_end": cutoff, "negative_prompt": "a blurred dog"}
    batches: list[int] = []
    pipe.unet.register_forward_pre_hook(lambda _, args: batches.append(len(args[0])))
    drawing(**options)(pipe, 0)
    assert batches == [2, 2, 2, 1]
    pipe = pipeline("sdxl")
    check(cell, pipe, drawing(**options), config, keeping=False)


@row("Callbacks that interrupt (`pipe._interrupt = True`, an exception)", section=SECTION)
@pytest.mark.parametrize("how", ["flag", "exception"])
def test_interrupted(cell: Cell, config: MergeConfig, how: str) -> None:
    def stop(pipe: Any, step: int, *_: Any) -> dict[str, Any]:
        if step == 1 and how == "exception":
            raise KeyboardInterrupt
        pipe._interrupt = step >= 1
        return {}

    draw, broken_off = drawing(), drawing(callback_on_step_end=stop)
    pipe = pipeline(cell.family)
    with holding(pipe, transform(model_of(pipe), config)):
        expected = draw(pipe, 1)
    cell.apply(model_of(transform(pipe, config)))
    # The same prompt as the next image's, so that only its beginning tells them apart.
    if how == "exception":
        with pytest.raises(KeyboardInterrupt):
            broken_off(pipe, 1)
    else:
        assert difference(broken_off(pipe, 1), expected) > 1e-2
    with cell.steady():
        cell.agree(draw(pipe, 1), expected)


@row("Images in a row: other seed, prompt, size and number", section=SECTION)
def test_images_in_a_row(cell: Cell, config: MergeConfig) -> None:
    images: list[tuple[int, dict[str, Any]]] = [
        (0, {}),
        (1, {}),
        (0, {"prompt": "another cat"}),
        (0, {"height": 192, "width": 128}),
        (0, {"num_images_per_prompt": 2}),
        (0, {}),
    ]
    pipe = pipeline(cell.family)
    fresh = transform(model_of(pipe), config)
    used = cell.apply(copy.deepcopy(fresh))
    for again in (False, True):
        for seed, options in images:
            with holding(pipe, copy.deepcopy(fresh)):
                expected = drawing(**options)(pipe, seed)
            with holding(pipe, used):
                if again:
                    with cell.steady():
                        cell.agree(drawing(**options)(pipe, seed), expected)
                else:
                    cell.agree(drawing(**options)(pipe, seed), expected)
        if cell.mode == "eager":
            break
