"""Rows: a model's life besides drawing images."""

import copy
import os
import pickle
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.matrix.frame import Cell, difference, row
from tests.matrix.pictures import (
    BELOW,
    SCHEDULED,
    STATELESS,
    drawing,
    holding,
    model_of,
    part_of,
    pipeline,
)
from tests.tiny import flux_inputs, tiny_flux, tiny_sdxl_unet, unet_inputs
from toma_fx import MergeConfig, export, restore, transform

# diffusers' Euler scheduler hands a tensor to NumPy in a way that NumPy 2 is about to change.
pytestmark = [
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),
    # Its check of torch's version, in bfloat16.
    pytest.mark.filterwarnings("ignore:Dynamo detected a call to a .functools.lru_cache"),
]

SECTION = "Life of a model"
EITHER = pytest.mark.parametrize("config", [STATELESS, SCHEDULED], ids=["stateless", "scheduled"])


def untouched(family: str, seed: int = 0) -> Any:
    return tiny_sdxl_unet(seed) if family == "sdxl" else tiny_flux(seed=seed)


def call(model: Any, seed: int = 0, **options: Any) -> dict[str, Any]:
    """Arguments of a call with 64 image tokens, in the dtype of the model."""
    if "Flux" in type(model).__name__:
        return flux_inputs(model, height=8, width=8, seed=seed, **options)
    return unet_inputs(model, height=16, width=16, seed=seed, **options)


@torch.no_grad()
def output(model: Any, seed: int = 0) -> Tensor:
    sample: Tensor = model(**call(model, seed)).sample
    return sample


@row(
    "`.to(dtype)`, `half()`, `bfloat16()`",
    section=SECTION,
    note="the original shares the weights and is cast with them",
)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
@EITHER
def test_cast(cell: Cell, dtype: torch.dtype, config: MergeConfig) -> None:
    ways: dict[torch.dtype, Callable[[Any], Any]] = {
        torch.float16: lambda model: model.half(),
        torch.bfloat16: lambda model: model.bfloat16(),
        torch.float64: lambda model: model.to(torch.float64),
    }
    cast = ways[dtype]
    # The plans of a schedule are kept in the dtype of the first call.
    expected = output(transform(cast(untouched(cell.family)), config))
    model = transform(untouched(cell.family), config)
    if config is SCHEDULED:
        output(model, seed=1)
    model = cell.apply(cast(model))
    got = output(model)
    assert got.dtype == dtype
    if cell.mode == "eager":
        cell.agree(got, expected)
    else:  # rounding to 8 or 11 bits, in another order
        assert difference(got, expected) < {torch.float64: 1e-6}.get(dtype, 0.1)
    with cell.steady():
        cell.agree(output(model), got)
    assert restore(model).dtype == dtype


@row("`.to(device)`: away and back", section=SECTION, modes=("eager",))
@EITHER
def test_device(cell: Cell, config: MergeConfig) -> None:
    model = transform(untouched(cell.family), config)
    expected, state = output(model), copy.deepcopy(model.state_dict())
    device = torch.device("cuda" if torch.cuda.is_available() else "meta")
    model.to(device)
    tensors = [*model.parameters(), *model.buffers()]
    assert {tensor.device.type for tensor in tensors} == {device.type}
    if device.type == "meta":  # which keeps no values
        for module in model.modules():
            for name, buffer in module._buffers.items():
                module._buffers[name] = (
                    None if buffer is None else torch.zeros_like(buffer, device="cpu")
                )
        model.to_empty(device="cpu", recurse=True)
        model.load_state_dict(state)
    model.to("cpu")
    cell.agree(output(model), expected)


@row("`save_pretrained` and reload: the folder is the untouched model's", section=SECTION, quick=())
def test_save(cell: Cell, tmp_path: Path) -> None:
    pipe, draw = pipeline(cell.family), drawing()
    original, expected = model_of(pipe), draw(pipe, 0)
    pipe.save_pretrained(tmp_path / "untouched")
    cell.apply(model_of(transform(pipe)))
    merged = draw(pipe, 0)
    assert difference(merged, expected) > 1e-2
    pipe.save_pretrained(tmp_path / "transformed")
    part = part_of(pipe)
    for name in ("config.json", "diffusion_pytorch_model.safetensors"):
        saved = [tmp_path / which / part / name for which in ("untouched", "transformed")]
        assert saved[0].read_bytes() == saved[1].read_bytes()
    loaded = type(pipe).from_pretrained(tmp_path / "transformed")
    loaded.set_progress_bar_config(disable=True)
    assert type(model_of(loaded)) is type(original)
    # Not bit-identical, because loaded tensors are aligned in another way than built ones.
    assert difference(draw(loaded, 0), expected) < 1e-4
    assert difference(draw(transform(loaded), 0), merged) < 1e-2
    alone = type(original).from_pretrained(tmp_path / "transformed", subfolder=part)
    assert all(torch.equal(alone.state_dict()[k], v) for k, v in original.state_dict().items())


@row("`copy.deepcopy`", section=SECTION)
@EITHER
def test_copied(cell: Cell, config: MergeConfig) -> None:
    original = untouched(cell.family)
    model = transform(original, config)
    expected = output(model)
    output(model, seed=1)
    twin = cell.apply(copy.deepcopy(model))
    cell.agree(output(twin), expected)
    assert torch.equal(output(restore(copy.deepcopy(model))), output(original))
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.zero_()
    cell.agree(output(cell.apply(model)), expected)


@row("Pickling, and reading it in another process", section=SECTION, modes=("eager",), quick=())
@EITHER
def test_pickled(cell: Cell, config: MergeConfig, tmp_path: Path) -> None:
    model = transform(untouched(cell.family), config)
    inputs, expected = call(model), output(model)
    output(model, seed=1)
    file = tmp_path / "model.pickle"
    file.write_bytes(pickle.dumps((model, inputs, expected)))
    code = (
        "import pathlib, pickle, sys, torch\n"
        "model, inputs, expected = pickle.loads(pathlib.Path(sys.argv[1]).read_bytes())\n"
        "with torch.no_grad(): assert torch.equal(model(**inputs).sample, expected)\n"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    subprocess.run([sys.executable, "-c", code, str(file)], env=environment, check=True)


@row("`state_dict` round trip", section=SECTION)
@EITHER
def test_state(cell: Cell, config: MergeConfig) -> None:
    one, other = untouched(cell.family), untouched(cell.family, seed=1)
    assert list(transform(one, config).state_dict()) == list(one.state_dict())
    expected = output(transform(other, config))
    model = transform(one, config)
    before = output(model)
    model.load_state_dict(transform(other, config).state_dict())
    model = cell.apply(model)
    cell.agree(output(model), expected)
    assert difference(before, expected) > 1e-2


@row("`train()` and `eval()`", section=SECTION)
def test_modes_of_a_module(cell: Cell) -> None:
    original = untouched(cell.family)
    for block in original.modules():  # dropout, as SDXL's blocks have it
        if isinstance(block, torch.nn.Dropout):
            block.p = 0.5
    fresh = transform(original)
    expected = output(fresh)
    model = cell.apply(transform(original))
    cell.agree(output(model), expected)
    model.train()
    assert all(module.training for module in model.modules())
    assert not original.training
    dropped = output(model)
    if cell.family == "sdxl":
        assert difference(dropped, expected) > 1e-2
    model.eval()
    with cell.steady():
        cell.agree(output(model), expected)


@row("`torch.inference_mode`", section=SECTION)
@EITHER
def test_inference_mode(cell: Cell, config: MergeConfig) -> None:
    original = untouched(cell.family)
    expected = output(transform(original, config))
    model = cell.apply(transform(original, config))
    inputs = call(model)
    with torch.inference_mode():
        inside = model(**inputs).sample
    cell.agree(inside.clone(), expected)
    # And out of it again, where tensors made inside could not be written to.
    cell.agree(output(model), expected)


@row("Two pipelines in two threads on one model", section=SECTION, quick=())
def test_threads(cell: Cell) -> None:
    check_threads(cell, STATELESS)


@row("Two pipelines in two threads on one model with a schedule", section=SECTION)
def test_threads_with_a_schedule(cell: Cell) -> None:
    check_threads(cell, SCHEDULED)


def check_threads(cell: Cell, config: MergeConfig) -> None:
    """Assert that each of two threads draws what it would draw alone."""
    draw = drawing(num_inference_steps=6)
    pipes = [pipeline(cell.family), pipeline(cell.family)]
    original = model_of(pipes[0])
    seeds = [0, 1]
    with holding(pipes[0], transform(original, config)):
        expected = [draw(pipes[0], seed) for seed in seeds]
    model = cell.apply(transform(original, config))
    with holding(pipes[0], model), holding(pipes[1], model):
        drawing()(pipes[0], 0)  # compile in one thread
        for _ in range(2):
            with ThreadPoolExecutor(2) as threads:
                drawn = list(threads.map(draw, pipes, seeds))
            for got, wanted in zip(drawn, expected, strict=True):
                cell.agree(got, wanted)
    assert len(model.toma_state) == 0


EXPORTED = {
    "at every step": (STATELESS, ("merged", "merged", "merged")),
    "with `merge_below`": (BELOW, ("untouched", "merged", "merged")),
    "with a schedule": (SCHEDULED, ("merged", "reuse", "weigh")),
}


@pytest.mark.parametrize("when", EXPORTED)
@row(
    "`toma_fx.export` of a model that merges {when}",
    section=SECTION,
    modes=("eager",),
    quick=(),
    note="a program for each variant, which the caller chooses",
)
def test_exported(cell: Cell, when: str) -> None:
    config, variants = EXPORTED[when]
    model = transform(untouched(cell.family), config)
    inputs = call(model)
    exported = export(model, inputs)
    programs = exported if isinstance(exported, dict) else {"merged": exported}
    plan: dict[str, Any] = {}
    for level, variant in zip((0.9, 0.5, 0.1), variants, strict=True):
        timestep = level if cell.family == "flux" else 1000 * level
        now = {**inputs, "timestep": torch.full_like(inputs["timestep"], timestep)}
        taken = plan if variant in ("weigh", "reuse") else {}
        with torch.no_grad():
            got, *made = programs[variant].module()(**now, **taken)
            torch.testing.assert_close(got, model(**now).sample, rtol=1e-4, atol=1e-4)
        plan = {"plan": made[0]} if made else plan
