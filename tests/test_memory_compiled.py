"""Models with memory, compiled: a graph for each kind of step, and none again."""

import copy
from collections.abc import Iterator
from itertools import chain
from typing import Any

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

import toma_fx
from tests.memory_runs import build, calls_of, difference, draw, merging

STEPS = 7
TOLERANCE = 1e-5


@pytest.fixture(autouse=True)
def _fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def run_twice(compiled: Any, uncompiled: Any, name: str, steps: int = STEPS) -> None:
    """Compare two runs with those of the uncompiled model; the second compiles nothing."""
    for seed in range(2):
        calls = calls_of(name, steps, seed=seed, text=seed)
        with torch._dynamo.config.patch(error_on_recompile=seed > 0):
            outputs = draw(compiled, calls)
        for output, expected in zip(outputs, draw(uncompiled, calls), strict=True):
            assert difference(output, expected) < TOLERANCE
        for model in (compiled, uncompiled):
            model._reset_stateful_cache()


OPTIONS: dict[str, dict[str, Any]] = {
    "memory": {},
    "every 3": {"every": 3, "extrapolate": False},
    "no control": {"control": False},
    "theta 0": {"theta": 0.0},
    "below": {"merge_below": 0.3},
}


def _slow(*values: Any) -> Any:
    return pytest.param(*values, marks=pytest.mark.slow)


def compiled_and_not(name: str, kind: str) -> tuple[Any, Any]:
    """A model to compile, and one to compare with; Z-Image makes a table at its first call."""
    model = merging(name, **OPTIONS[kind])
    draw(model, calls_of(name, 1))
    model._reset_stateful_cache()
    return copy.deepcopy(model), model


# How many graphs there are is decided before the backend, so the quickest will do for most.
@pytest.mark.parametrize(
    ("name", "kind", "backend"),
    [
        ("unet", "memory", "eager"),
        ("flux", "memory", "aot_eager"),
        ("wan", "memory", "eager"),
        ("z-image", "memory", "eager"),
        ("flux", "below", "eager"),
        _slow("unet", "memory", "aot_eager"),
        _slow("flux", "every 3", "aot_eager"),
        _slow("flux", "no control", "eager"),
        _slow("flux", "theta 0", "eager"),
    ],
)
def test_a_whole_model_is_one_graph_for_each_kind_of_step(
    name: str, kind: str, backend: str
) -> None:
    compiled, uncompiled = compiled_and_not(name, kind)
    frames = CompileCounterWithBackend(backend)
    compiled.compile(backend=frames, fullgraph=True, dynamic=False)
    run_twice(compiled, uncompiled, name)
    assert frames.frame_count == (3 if kind == "below" else 2)


# For each kind of step, a graph for each structure and shape of a block, and one for the plan of
# each shape. Flux's second single-stream block gets its text in another memory layout than the
# first, where nothing else has changed it; and Z-Image refines its caption by blocks of its own.
@pytest.mark.parametrize(
    ("name", "kind", "graphs"),
    [
        ("unet", "memory", 2 * 2 + 2),
        ("flux", "memory", 2 * 2 + 2 + 1),
        ("wan", "memory", 2 * 1 + 1),
        ("z-image", "memory", 2 * 2 + 2 + 1),
        _slow("flux", "theta 0", 2 * 2 + 1),
        _slow("flux", "no control", 2 * 2 + 2 + 1),
        _slow("flux", "below", 3 * 2 + 2 + 2),
    ],
)
def test_blocks_are_one_graph_for_each_kind_of_step(name: str, kind: str, graphs: int) -> None:
    compiled, uncompiled = compiled_and_not(name, kind)
    frames = CompileCounterWithBackend("eager")
    compiled.compile_repeated_blocks(backend=frames, fullgraph=True, dynamic=False)
    run_twice(compiled, uncompiled, name)
    assert frames.frame_count == graphs


@pytest.mark.slow
def test_sizes_and_images_that_take_turns_compile_nothing_again() -> None:
    uncompiled = merging("flux")
    compiled = copy.deepcopy(uncompiled)
    frames = CompileCounterWithBackend("eager")
    compiled.compile(backend=frames, fullgraph=True, dynamic=False)
    runs = [calls_of("flux", 5), calls_of("flux", 5, text=1), calls_of("flux", 5, height=16)]
    turns = list(chain(*zip(*runs, strict=True)))
    for again in range(2):
        with torch._dynamo.config.patch(error_on_recompile=again > 0):
            outputs = draw(compiled, turns)
        for output, expected in zip(outputs, draw(uncompiled, turns), strict=True):
            assert difference(output, expected) < TOLERANCE
    assert frames.frame_count == 4


def test_a_compiled_model_is_restored() -> None:
    model, calls = merging("flux"), calls_of("flux")
    expected = draw(merging("flux"), calls)
    model.compile_repeated_blocks(backend="eager", fullgraph=True)
    for output, each in zip(draw(model, calls), expected, strict=True):
        assert difference(output, each) < TOLERANCE
    restored = toma_fx.restore(model)
    for output, each in zip(draw(restored, calls), draw(build("flux"), calls), strict=True):
        assert difference(output, each) < TOLERANCE


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
@pytest.mark.parametrize("name", ["unet", "flux"])
def test_inductor_agrees(name: str, mode: str) -> None:
    uncompiled = merging(name)
    compiled = copy.deepcopy(uncompiled)
    compiled.compile(fullgraph=True, dynamic=False, mode=mode)
    run_twice(compiled, uncompiled, name, 5)
