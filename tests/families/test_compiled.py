"""torch.compile and torch.export of transformed models of the newer families."""

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

import toma_fx
from tests.families.lives import LIVES, quick_first, run
from tests.matrix.frame import difference
from toma_fx import MergeConfig, Schedule, transform
from toma_fx.families import family_of

FAMILIES = pytest.mark.parametrize("name", quick_first(LIVES))
BRANCHING = ("hunyuan-video-1.5", "hunyuan-image")
"""Whose forward branches on values, or counts by them, merged or not: their blocks compile."""
WHOLE = pytest.mark.parametrize(
    "name", quick_first(name for name in LIVES if name not in BRANCHING)
)
STEPS = 6
TOLERANCE = 1e-4
POLICIES = {
    "always": (MergeConfig(), 1),
    "below": (MergeConfig(merge_below=0.6), 2),
    "schedule": (MergeConfig(schedule=Schedule(select_every=4, weigh_every=2)), 3),
}
"""Options, and how many graphs they make of a model."""


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def steps(model: Any, call: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The calls of a denoising run, whose noise goes from nearly 1 to nearly 0."""
    name = "t" if "t" in call else "timestep"
    time: Tensor = call[name]
    family = family_of(model)
    for step in range(STEPS):
        share = 0.95 - 0.9 * step / STEPS
        now = 2 * (1 - share if family.time_rises else share)  # calls are in the middle of a run
        yield {**call, name: (time * now).to(time.dtype)}


@pytest.mark.parametrize("policy", POLICIES)
@WHOLE
def test_a_whole_model_is_a_graph_for_each_variant(name: str, policy: str) -> None:
    config, graphs = POLICIES[policy]
    life = LIVES[name]
    plain = transform(life.build(), config)
    compiled = transform(life.build(), config)
    frames = CompileCounterWithBackend("aot_eager" if policy == "always" else "eager")
    call = life.call(plain)
    run(compiled, call)  # Z-Image makes its table of positions, which no graph can hold
    compiled.compile(fullgraph=True, backend=frames)
    for again in range(2):
        for each in steps(plain, call):
            with torch._dynamo.config.patch(error_on_recompile=again > 0):
                assert difference(run(compiled, each), run(plain, each)) < TOLERANCE
    if policy == "schedule" and plain.toma_recipe.needs_new_rows(call):
        graphs -= 1  # a kept plan is weighed anew, with the rows of the step
    assert frames.frame_count == graphs


@FAMILIES
def test_blocks_compile_once_for_each_kind(name: str) -> None:
    life = LIVES[name]
    plain = transform(life.build())
    compiled = copy.deepcopy(plain)
    compiled.compile_repeated_blocks(fullgraph=True, backend="eager")
    call = life.call(plain)
    for again in range(2):
        for each in list(steps(plain, call))[:2]:
            with torch._dynamo.config.patch(error_on_recompile=again > 0):
                assert difference(run(compiled, each), run(plain, each)) < TOLERANCE


@WHOLE
def test_another_size(name: str) -> None:
    """Under dynamic shapes, as diffusers' own models are; a model that lists sizes makes two."""
    life = LIVES[name]
    plain = transform(life.build())
    compiled = copy.deepcopy(plain)
    frames = CompileCounterWithBackend("eager")
    run(compiled, life.call(plain))
    compiled.compile(fullgraph=True, backend=frames, dynamic=True)
    for call in (life.call(plain), life.other(plain), life.call(plain, seed=1)):
        assert difference(run(compiled, call), run(plain, call)) < TOLERANCE
    assert frames.frame_count <= 2


@WHOLE
def test_exported_saved_and_loaded(name: str, tmp_path: Path) -> None:
    life = LIVES[name]
    model = transform(life.build())
    call = {key: value for key, value in life.call(model).items() if value is not None}
    torch.export.save(toma_fx.export(model, call), tmp_path / "model.pt2")
    loaded = torch.export.load(tmp_path / "model.pt2").module()
    for seed in (0, 1):
        other = {**call, **{k: v for k, v in life.call(model, seed=seed).items() if k in call}}
        with torch.no_grad():
            output = loaded(**other)
        output = output[0] if isinstance(output, tuple) else output.sample
        output = torch.stack(output) if isinstance(output, list) else output
        assert difference(output, run(model, other)) < TOLERANCE


@pytest.mark.slow
@WHOLE
def test_inductor_agrees(name: str) -> None:
    life = LIVES[name]
    plain = transform(life.build())
    compiled = copy.deepcopy(plain)
    call = life.call(plain)
    run(compiled, call)
    compiled.compile(fullgraph=True, backend="inductor")
    assert difference(run(compiled, call), run(plain, call)) < 1e-3
