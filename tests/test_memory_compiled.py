"""Models with memory, compiled: a graph for each kind of step, and none again."""

import copy
from collections.abc import Iterator
from itertools import chain
from typing import Any

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from tests.memory_runs import build, calls_of, difference, draw, merging
from toma_fx import transform

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


def _cases(names: list[str], *options: str) -> list[Any]:
    return [pytest.param(n, o, id=f"{n}-{o}") for o in options for n in names]


WHOLE = [
    *_cases(["unet", "flux", "wan", "z-image"], "memory"),
    *_cases(["flux"], "every 3", "no control", "theta 0", "below"),
]


@pytest.mark.parametrize(("name", "kind"), WHOLE)
def test_a_whole_model_is_one_graph_for_each_kind_of_step(name: str, kind: str) -> None:
    uncompiled = merging(name, **OPTIONS[kind])
    compiled = copy.deepcopy(uncompiled)
    frames = CompileCounterWithBackend("aot_eager" if kind == "memory" else "eager")
    compiled.compile(backend=frames, fullgraph=True, dynamic=False)
    run_twice(compiled, uncompiled, name)
    assert frames.frame_count == (3 if kind == "below" else 2)


# A graph for each structure and shape of a block, one for the leader's plan of each shape, and all
# but the plans once for each kind of step. Flux's second single-stream block gets its text in
# another memory layout than the first.
@pytest.mark.parametrize(
    ("name", "kind", "graphs"),
    [
        ("unet", "memory", None),
        ("flux", "memory", None),
        ("wan", "memory", None),
        ("z-image", "memory", None),
        ("flux", "theta 0", None),
        ("flux", "no control", None),
        ("flux", "below", None),
    ],
)
def test_blocks_are_one_graph_for_each_kind_of_step(
    name: str, kind: str, graphs: int | None
) -> None:
    uncompiled = merging(name, **OPTIONS[kind])
    compiled = copy.deepcopy(uncompiled)
    frames = CompileCounterWithBackend("aot_eager" if kind == "memory" else "eager")
    compiled.compile_repeated_blocks(backend=frames, fullgraph=True, dynamic=False)
    run_twice(compiled, uncompiled, name)
    assert frames.frame_count == graphs


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


def test_a_model_is_compiled_and_copied_and_restored() -> None:
    import toma_fx

    model, calls = merging("flux"), calls_of("flux")
    expected = draw(merging("flux"), calls)
    model.compile_repeated_blocks(backend="eager", fullgraph=True)
    for output, each in zip(draw(model, calls), expected, strict=True):
        assert difference(output, each) < TOLERANCE
    restored = toma_fx.restore(model)
    for output, each in zip(draw(restored, calls), draw(build("flux"), calls), strict=True):
        assert difference(output, each) < TOLERANCE
    assert draw(transform(build("flux"), memory=None), calls[:1])


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
@pytest.mark.parametrize("name", ["unet", "flux"])
def test_inductor_agrees(name: str, mode: str) -> None:
    uncompiled = merging(name)
    compiled = copy.deepcopy(uncompiled)
    compiled.compile(fullgraph=True, dynamic=False, mode=mode)
    run_twice(compiled, uncompiled, name, 5)
