"""Exported programs agree with the model, name their operators, and load without toma_fx."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import onnxruntime
import pytest
import torch
from torch.utils import _pytree as pytree

import toma_fx
from tests.pipelines import PROMPT_TOKENS, tiny_flux_pipeline
from tests.tiny import (
    flux_inputs,
    smallest_flux,
    smallest_unet,
    tiny_flux,
    unet_inputs,
)
from toma_fx import Schedule

FAMILIES: dict[str, tuple[Any, Any]] = {
    "unet": (smallest_unet, unet_inputs),
    "flux": (smallest_flux, flux_inputs),
}
SCHEDULED = Schedule(select_every=3, weigh_every=2)
OPTIONS: dict[str, Any] = {"schedule": {"schedule": SCHEDULED}, "level": {"merge_below": 0.75}}

LOAD = """
import sys, torch

program = torch.export.load(f"{sys.argv[1]}/model.pt2").module()
inputs, expected = torch.load(f"{sys.argv[1]}/call.pt")
torch.testing.assert_close(program(**inputs)[0], expected, rtol=1e-3, atol=1e-4)
assert not any(name.startswith(("toma_fx", "diffusers")) for name in sys.modules)
"""


# A loop as users write it: it chooses the program of each step, and hands plans on.
DRIVE = """
import sys, torch

folder, kind, *names = sys.argv[1:]
programs = {name: torch.export.load(f"{folder}/model.{name}.pt2").module() for name in names}

def variant(step, level):
    if kind == "level":
        return "merged" if level <= 0.75 else "untouched"
    return "merged" if step % 3 == 0 else "weigh" if step % 2 == 0 else "reuse"

plans, ran = {}, set()
for request, step, level, inputs, expected in torch.load(f"{folder}/calls.pt"):
    name = variant(step, level)
    ran.add(name)
    given = {"plan": plans[request]} if name in ("weigh", "reuse") else {}
    with torch.no_grad():
        output, *plan = programs[name](**given, **inputs)
    if plan:
        (plans[request],) = plan
    torch.testing.assert_close(output, expected, rtol=1e-3, atol=1e-4)
assert ran == set(names)
assert not any(name.startswith(("toma_fx", "diffusers")) for name in sys.modules)
"""


def request_at(make_inputs: Any, model: Any, level: float, seed: int) -> dict[str, Any]:
    """Inputs of one request at a noise level: its prompt stays, latents and timestep change."""
    inputs: dict[str, Any] = make_inputs(model, height=16, width=16)
    name = "sample" if "sample" in inputs else "hidden_states"
    seed = round(1000 * level) + seed
    inputs[name] = make_inputs(model, height=16, width=16, seed=seed)[name]
    scale = 1000.0 if name == "sample" else 1.0
    inputs["timestep"] = torch.full((2,), level * scale)
    return inputs


def requests(make_inputs: Any, model: Any, options: Any) -> list[tuple[Any, ...]]:
    """Calls of two requests that take turns, with what a model of their own returns."""
    own = [toma_fx.transform(model, **options) for _ in range(2)]
    calls = []
    for step in range(6):
        level = 1 - step / 10
        for request, merged in enumerate(own):
            inputs = request_at(make_inputs, model, level, seed=request)
            with torch.no_grad():
                expected = merged(**inputs, return_dict=False)[0]
            calls.append((request, step, level, inputs, expected))
    return calls


@pytest.mark.parametrize("family", FAMILIES)
def test_stateless_program_agrees_and_loads_in_a_fresh_process(family: str, tmp_path: Path) -> None:
    make, make_inputs = FAMILIES[family]
    model = toma_fx.transform(make(), skip=())
    inputs = make_inputs(model)
    program = toma_fx.export(model, inputs, path=tmp_path / "model.pt2")
    names = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    wanted = {f"toma.{name}.default" for name in ("select", "weigh", "merge", "unmerge", "reorder")}
    assert wanted <= names
    with torch.no_grad():
        expected = model(**inputs, return_dict=False)[0]
        assert torch.equal(program.module()(**inputs)[0], expected)
    lowered = program.run_decompositions().graph.nodes
    left = {str(n.target).partition(".")[0] for n in lowered if n.op == "call_function"}
    assert left <= {"aten", "while_loop", "<built-in function getitem>"}
    torch.save((inputs, expected), tmp_path / "call.pt")
    run_alone(LOAD, tmp_path)


# Decomposing a program takes seconds, so the other two are slow.
@pytest.mark.parametrize(
    ("family", "kind"),
    [
        ("unet", "schedule"),
        ("flux", "level"),
        pytest.param("unet", "level", marks=pytest.mark.slow),
        pytest.param("flux", "schedule", marks=pytest.mark.slow),
    ],
)
def test_a_loop_over_programs_needs_only_torch_and_keeps_requests_apart(
    family: str, kind: str, tmp_path: Path
) -> None:
    make, make_inputs = FAMILIES[family]
    model, options = make(), {"skip": (), **OPTIONS[kind]}
    merged = toma_fx.transform(model, **options)
    example = request_at(make_inputs, model, 0.5, seed=5)
    programs = toma_fx.export(merged, example, path=tmp_path / "model.pt2")
    assert {*programs} == {
        "merged",
        *(("weigh", "reuse") if kind == "schedule" else ("untouched",)),
    }
    assert {path.name for path in tmp_path.iterdir()} == {f"model.{name}.pt2" for name in programs}
    assert len(merged.toma_state) == 0
    # The same prompt for both requests: only the plans that the loop hands on tell them apart.
    torch.save(requests(make_inputs, model, options), tmp_path / "calls.pt")
    run_alone(DRIVE, tmp_path, kind, *programs)


def run_alone(code: str, folder: Path, *words: str) -> None:
    """Run code with the folder and some words in a process that finds no toma_fx."""
    command = [sys.executable, "-P", "-c", code, str(folder), *words]
    subprocess.run(command, check=True, cwd=folder)


@pytest.mark.parametrize("kind", OPTIONS)
@torch.no_grad()
def test_a_loop_over_programs_draws_what_the_pipeline_draws(kind: str) -> None:
    steps = 6
    pipe = toma_fx.transform(tiny_flux_pipeline(), skip=(), **OPTIONS[kind])
    calls: list[dict[str, Any]] = []
    handle = pipe.transformer.register_forward_pre_hook(
        lambda _, args, kwargs: calls.append(kwargs), with_kwargs=True
    )
    drawn = pipe(
        "a cat",
        height=128,
        width=128,
        num_inference_steps=steps,
        max_sequence_length=PROMPT_TOKENS,
        generator=torch.Generator().manual_seed(0),
        output_type="latent",
    ).images
    handle.remove()
    tensors = {k: v for k, v in calls[0].items() if isinstance(v, torch.Tensor)}
    programs = toma_fx.export(pipe, tensors)
    modules = {name: program.module() for name, program in programs.items()}
    latents, plan = tensors["hidden_states"], None
    sigmas = [float(call["timestep"][0]) for call in calls]
    for step, (sigma, lower) in enumerate(zip(sigmas, [*sigmas[1:], 0.0], strict=True)):
        inputs = {**tensors, "hidden_states": latents, "timestep": calls[step]["timestep"]}
        if kind == "level":
            name = "merged" if sigma <= 0.75 else "untouched"
        else:
            name = "merged" if step % 3 == 0 else "weigh" if step % 2 == 0 else "reuse"
        given = {"plan": plan} if name in ("weigh", "reuse") else {}
        velocity, *made = modules[name](**given, **inputs)
        plan = made[0] if made else plan
        latents = latents + (lower - sigma) * velocity
    torch.testing.assert_close(latents, drawn, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("ways", [{}, {"ratio": 0.0}, {"schedule": Schedule()}], ids=str)
def test_a_model_that_always_does_the_same_is_one_program(ways: dict[str, Any]) -> None:
    model = toma_fx.transform(smallest_flux(), **ways)
    program = toma_fx.export(model, flux_inputs(model, height=8, width=8))
    assert isinstance(program, torch.export.ExportedProgram)


def test_one_flux_program_serves_many_sizes_and_batches() -> None:
    model = toma_fx.transform(tiny_flux(), skip=())
    inputs = flux_inputs(model)
    batch, regions = torch.export.Dim("batch", min=2, max=8), torch.export.Dim("regions", min=2)
    shapes: dict[str, Any] = {name: {0: batch} for name in inputs.keys() - {"img_ids", "txt_ids"}}
    shapes["hidden_states"][1] = 64 * regions
    shapes["img_ids"] = {0: 64 * regions}
    program = toma_fx.export(model, inputs, dynamic_shapes=shapes).module()
    with torch.no_grad():
        for size in [(2, 16, 16), (5, 8, 24), (3, 24, 40)]:
            inputs = flux_inputs(model, *size)
            torch.testing.assert_close(
                program(**inputs)[0], model(**inputs, return_dict=False)[0], rtol=1e-4, atol=1e-5
            )


def test_one_unet_program_serves_many_sizes() -> None:
    model = toma_fx.transform(smallest_unet())
    # Tokens at both attention levels, all latents and a quarter of them, must fill regions.
    shapes = {"sample": {2: 16 * torch.export.Dim("rows"), 3: 16 * torch.export.Dim("columns")}}
    program = toma_fx.export(
        model, unet_inputs(model, height=32, width=48), dynamic_shapes=shapes
    ).module()
    with torch.no_grad():
        for height, width in [(32, 48), (48, 16)]:
            inputs = unet_inputs(model, height=height, width=width)
            torch.testing.assert_close(
                program(**inputs)[0], model(**inputs, return_dict=False)[0], rtol=1e-4, atol=1e-5
            )


# torch.onnx's own.
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:.*torchvision is not installed")
@pytest.mark.parametrize("build", [smallest_unet, smallest_flux])
def test_onnx_runtime_agrees(build: Any, tmp_path: Path) -> None:
    model = toma_fx.transform(build())
    make = unet_inputs if build is smallest_unet else flux_inputs
    inputs = make(model, height=16, width=16)
    program = torch.onnx.export(toma_fx.export(model, inputs), dynamo=True, verbose=False)
    assert program is not None
    program.save(tmp_path / "model.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
    names = [each.name for each in session.get_inputs()]
    values = [tensor.numpy() for tensor in pytree.tree_leaves(inputs)]
    (output,) = session.run(None, dict(zip(names, values, strict=True)))
    with torch.no_grad():
        expected = model(**inputs, return_dict=False)[0]
    torch.testing.assert_close(torch.from_numpy(output), expected, rtol=1e-3, atol=1e-4)


RUN_PACKAGE = """
import sys, torch

folder, *names = sys.argv[1:]
load = torch._inductor.aoti_load_package
programs = {name: load(f"{folder}/model.{name}.pt2") for name in names}
plan = None
for name, inputs, expected in torch.load(f"{folder}/calls.pt"):
    given = {"plan": plan} if name in ("weigh", "reuse") else {}
    with torch.no_grad():
        output, *made = programs[name](**given, **inputs)
    plan = made[0] if made else plan
    torch.testing.assert_close(output, expected, rtol=1e-3, atol=1e-4)
assert not any(name.startswith(("toma_fx", "diffusers")) for name in sys.modules)
"""


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", [None, "schedule"])
def test_package_of_aot_inductor_agrees_in_a_process_with_only_torch(
    family: str, kind: str | None, tmp_path: Path
) -> None:
    make, make_inputs = FAMILIES[family]
    options = {"skip": (), **(OPTIONS[kind] if kind else {})}
    model = toma_fx.transform(make(), **options)
    exported = toma_fx.export(model, request_at(make_inputs, model, 0.5, seed=5))
    programs = exported if kind else {"merged": exported}
    for name, program in programs.items():
        package_path = str(tmp_path / f"model.{name}.pt2")
        torch._inductor.aoti_compile_and_package(program, package_path=package_path)
    calls = []
    for step, name in enumerate(("merged", "reuse", "weigh") if kind else ("merged",) * 2):
        inputs = request_at(make_inputs, model, 0.9 - step / 10, seed=0)
        with torch.no_grad():
            calls.append((name, inputs, model(**inputs, return_dict=False)[0]))
    torch.save(calls, tmp_path / "calls.pt")
    run_alone(RUN_PACKAGE, tmp_path, *programs)
