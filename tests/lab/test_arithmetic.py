"""Operations are those of the calls that a pipeline makes."""

import torch

import toma_fx
from tests.pipelines import tiny_flux_pipeline, tiny_sdxl_pipeline
from tests.tiny import flux_inputs, tiny_flux
from toma_fx.arithmetic import Call, count, first_call
from toma_fx.inputs import random_inputs
from toma_fx.lab.draw import Task, draw
from toma_fx.lab.prompts import Prompt

TASK = Task(model="", prompts=(Prompt(text="a b"),), steps=2, height=128, width=256)


def test_the_first_call_has_the_pipelines_own_shapes() -> None:
    pipeline = tiny_sdxl_pipeline()
    calls = []
    pipeline.unet.register_forward_hook(lambda *_: calls.append(1))
    call = first_call(pipeline.unet, lambda: draw(pipeline, TASK, TASK.prompts[0], 0))
    assert not calls
    assert call.args[0].shape == (2, 4, 16, 32)  # doubled by guidance
    assert call.kwargs["encoder_hidden_states"].shape[1] == 16
    draw(pipeline, TASK, TASK.prompts[0], 0)
    assert len(calls) == 2


def test_counts_agree_with_the_report() -> None:
    model = tiny_flux()
    inputs = random_inputs(model, height=256)
    transformed = toma_fx.transform(model, ratio=0.5, skip=())
    report = toma_fx.report(transformed, height=256)
    call = Call((), inputs)
    assert count(model, call) == report.flops_before
    assert count(transformed, call) == report.flops_after


def test_counting_with_data_gives_the_same() -> None:
    model = tiny_flux()
    call = Call((), flux_inputs(model))
    state = torch.get_rng_state()
    assert count(model, call, data=True) == count(model, call) > 0
    assert torch.equal(torch.get_rng_state(), state)


def test_flux_too_is_stopped_at_its_first_call() -> None:
    pipeline = tiny_flux_pipeline()
    call = first_call(pipeline.transformer, lambda: draw(pipeline, TASK, TASK.prompts[0], 0))
    assert call.kwargs["hidden_states"].shape[1] == 8 * 16
    assert count(pipeline.transformer, call) > 0
