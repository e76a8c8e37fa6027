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
from tests.tiny import (
    flux_inputs,
    smallest_flux,
    smallest_unet,
    tiny_flux,
    tiny_sdxl_unet,
    unet_inputs,
)
from toma_fx import Schedule
from toma_fx.export import initial_state
from toma_fx.inputs import random_inputs

FAMILIES: dict[str, tuple[Any, Any]] = {
    "unet": (tiny_sdxl_unet, unet_inputs),
    "flux": (tiny_flux, flux_inputs),
}
SCHEDULED = Schedule(select_every=3, weigh_every=2)

LOAD = """
import sys, torch
program = torch.export.load(sys.argv[1]).module()
inputs, expected = torch.load(sys.argv[2])
torch.testing.assert_close(program(**inputs)[0], expected, rtol=1e-3, atol=1e-4)
assert not any(name.startswith(("toma_fx", "diffusers")) for name in sys.modules)
"""


def request_at(make_inputs: Any, model: Any, step: int, seed: int = 0) -> dict[str, Any]:
    """Inputs of one request at a step: the prompt stays, latents and timestep change."""
    inputs: dict[str, Any] = make_inputs(model, seed=seed)
    name = "sample" if "sample" in inputs else "hidden_states"
    inputs[name] = make_inputs(model, seed=seed + 100 * step)[name]
    inputs["timestep"] = torch.full_like(inputs["timestep"], 1 - step / 20)
    return inputs


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
    subprocess.run(
        [sys.executable, "-P", "-c", LOAD, tmp_path / "model.pt2", tmp_path / "call.pt"],
        check=True,
        cwd=tmp_path,
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_two_requests_with_states_of_their_own_do_not_mix(family: str, tmp_path: Path) -> None:
    make, make_inputs = FAMILIES[family]
    original = make()
    model = toma_fx.transform(original, skip=(), schedule=SCHEDULED)
    program = toma_fx.export(model, make_inputs(model), path=tmp_path / "model.pt2")
    loaded = torch.export.load(tmp_path / "model.pt2")
    fresh = loaded.example_inputs[1]["state"]
    assert fresh.keys() == program.example_inputs[1]["state"].keys()
    run = loaded.module()
    states, references = {}, {}
    with torch.no_grad():
        for step in range(7):
            for seed in (1, 2):
                if step == 0:
                    states[seed] = {name: value.clone() for name, value in fresh.items()}
                    references[seed] = toma_fx.transform(original, skip=(), schedule=SCHEDULED)
                inputs = request_at(make_inputs, model, step, seed)
                # The same prompt for both: only the states tell the requests apart.
                inputs["encoder_hidden_states"] = torch.ones_like(inputs["encoder_hidden_states"])
                output, states[seed] = run(state=states[seed], **inputs)
                expected = references[seed](**inputs, return_dict=False)[0]
                torch.testing.assert_close(output, expected, rtol=1e-3, atol=1e-4)


def test_the_state_has_room_for_plans_of_its_own_shapes_alone() -> None:
    model = toma_fx.transform(tiny_flux(), skip=(), schedule=SCHEDULED)
    first = initial_state(model, flux_inputs(model))
    with torch.no_grad():
        model(**random_inputs(model, height=256))
    again = initial_state(model, flux_inputs(model))
    assert {name: value.shape for name, value in again.items()} == {
        name: value.shape for name, value in first.items()
    }
    larger = initial_state(model, random_inputs(model, height=256))
    assert larger.keys() - first.keys()


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
run = torch._inductor.aoti_load_package(sys.argv[1])
for inputs, state, expected in torch.load(sys.argv[2]):
    with torch.no_grad():
        outputs = run(**inputs) if state is None else run(state=state, **inputs)
    torch.testing.assert_close(outputs[0], expected, rtol=1e-3, atol=1e-4)
assert not any(name.startswith(("toma_fx", "diffusers")) for name in sys.modules)
"""


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("schedule", [Schedule(), SCHEDULED])
def test_package_of_aot_inductor_agrees_in_a_process_with_only_torch(
    family: str, schedule: Schedule, tmp_path: Path
) -> None:
    make, make_inputs = FAMILIES[family]
    model = toma_fx.transform(make(), skip=(), schedule=schedule)
    program = toma_fx.export(model, make_inputs(model))
    path = torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "m.pt2"))
    run = program.module()
    state = program.example_inputs[1].get("state")
    calls = []
    with torch.no_grad():
        for step in range(5):
            inputs = request_at(make_inputs, model, step)
            expected = model(**inputs, return_dict=False)[0]
            calls.append((inputs, state, expected))
            if state is not None:
                _, state = run(state=state, **inputs)
    torch.save(calls, tmp_path / "calls.pt")
    subprocess.run(
        [sys.executable, "-P", "-c", RUN_PACKAGE, path, tmp_path / "calls.pt"],
        check=True,
        cwd=tmp_path,
    )
