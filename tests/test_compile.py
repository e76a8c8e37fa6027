"""Compiled models: a graph for each variant of their blocks, which serves all steps and images.

The numbers are those of the uncompiled model.
"""

import copy
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from typing import Any

import pytest
import torch
from diffusers import FluxTransformer2DModel
from peft import LoraConfig
from torch import Tensor, fx, nn
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.testing import CompileCounterWithBackend
from torch._functorch._aot_autograd.utils import make_boxed_func
from torch._ops import HigherOrderOperator

from tests.tiny import (
    flux_inputs,
    smallest_flux,
    smallest_unet,
    tiny_flux,
    tiny_sdxl_unet,
    unet_inputs,
)
from toma_fx import MergeConfig, Schedule, transform
from toma_fx.config import PRESETS

STEPS = 12
"""More than the paper's 10 steps between two selections."""
# What a sum in another order changes; merging itself changes the output by more than 1e-2.
TOLERANCE = 1e-5


def images(model: nn.Module, **size: int) -> Iterator[dict[str, Any]]:
    """The calls of two denoising runs of one prompt, from different noise."""
    make = flux_inputs if isinstance(model, FluxTransformer2DModel) else unet_inputs
    for seed in range(2):
        call, noise = make(model, **size), make(model, **size, seed=seed + 1)
        tokens = "hidden_states" if "hidden_states" in call else "sample"
        for step in range(STEPS):
            left = 1 - step / STEPS
            time = call["timestep"] * left
            yield {**call, tokens: call[tokens] + left * noise[tokens], "timestep": time}


def difference(a: Tensor, b: Tensor) -> float:
    """Root mean square of ``a - b``, in standard deviations of ``b``."""
    return float((a - b).square().mean().sqrt() / b.std())


@pytest.fixture(autouse=True)
def _fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    with torch.no_grad():
        yield
    torch._dynamo.reset()


SCHEDULES = {"toma", "toma_tile", "toma_stripe", "toma_once"}
"""Presets that plan at some steps, weigh at others and reuse a plan at the rest."""


# How many graphs there are is decided before the backend, so the quickest will do for the others.
@pytest.mark.parametrize(
    ("preset", "backend"),
    [(name, "aot_eager" if name in ("default", "toma") else "eager") for name in PRESETS],
)
@pytest.mark.parametrize("build", [smallest_unet, smallest_flux])
def test_whole_model_is_one_graph_for_each_variant(
    build: Callable[[], Any], preset: str, backend: str
) -> None:
    uncompiled = transform(build(), MergeConfig.preset(preset))
    frames = CompileCounterWithBackend(backend)
    compiled: Any = torch.compile(
        copy.deepcopy(uncompiled), backend=frames, fullgraph=True, dynamic=False
    )
    for index, call in enumerate(images(uncompiled, height=8, width=8)):
        # The first run meets every variant.
        with torch._dynamo.config.patch(error_on_recompile=index >= STEPS):
            expected = uncompiled(**call).sample
            assert difference(compiled(**call).sample, expected) < TOLERANCE
    assert frames.frame_count == (3 if preset in SCHEDULES else 1)


# A graph for each structure and shape of a block, and one for each shape of a plan that is made or
# weighed. Later
# single-stream blocks get text tokens in another memory layout than the first, merged or not. A
# plan made from what the block's norm returns, as in "toma", is part of the block, whose followers
# then are another structure, as it is itself where it weighs a plan or reuses it.
@pytest.mark.parametrize(
    ("build", "preset", "blocks", "graphs"),
    [
        (tiny_sdxl_unet, "default", 11, 2 + 2),
        (tiny_sdxl_unet, "toma", 11, 3 + 2 + 2),
        (tiny_sdxl_unet, "toma_once", 11, 2 + 2 + 2),
        (tiny_flux, "default", 5, 3 + 2),
        (tiny_flux, "toma", 5, 4 + 2 + 2),
        (tiny_flux, "toma_once", 5, 3 + 2 + 2),
    ],
)
def test_blocks_are_one_graph_for_each_kind(
    build: Callable[[], Any], preset: str, blocks: int, graphs: int
) -> None:
    uncompiled = transform(build(), MergeConfig.preset(preset))
    size = {"height": 16, "width": 16} if build is tiny_sdxl_unet else {"height": 8, "width": 8}
    calls = images(uncompiled, **size)
    compiled = copy.deepcopy(uncompiled)
    frames = CompileCounterWithBackend("aot_eager")
    compiled.compile_repeated_blocks(backend=frames, fullgraph=True, dynamic=False)
    assert sum(m._compiled_call_impl is not None for m in compiled.modules()) == blocks
    for index, call in enumerate(calls):
        with torch._dynamo.config.patch(error_on_recompile=index >= STEPS):
            expected = uncompiled(**call).sample
            assert difference(compiled(**call).sample, expected) < TOLERANCE
    assert frames.frame_count == graphs


def inputs_for(model: Any, **size: int) -> dict[str, Any]:
    make = flux_inputs if isinstance(model, FluxTransformer2DModel) else unet_inputs
    return make(model, **size)


# Batch, height and width; all token counts but those of the last, 4 x 10 and 8 x 20, fill regions
# of 64 tokens. No two dimensions are equal at first, or the graph would hold that they are.
SIZES = [(2, 16, 48), (3, 32, 48), (5, 48, 64), (2, 64, 16), (2, 8, 20)]


@pytest.mark.parametrize("build", [smallest_unet, smallest_flux])
def test_dynamic_shapes_are_one_graph_for_all_sizes_that_regions_divide(
    build: Callable[[], Any],
) -> None:
    uncompiled = transform(build())
    frames = CompileCounterWithBackend("eager")
    compiled: Any = torch.compile(
        copy.deepcopy(uncompiled), backend=frames, fullgraph=True, dynamic=True
    )
    for batch, height, width in SIZES:
        call = inputs_for(uncompiled, batch=batch, height=height, width=width)
        assert difference(compiled(**call).sample, uncompiled(**call).sample) < TOLERANCE
        assert frames.frame_count == (2 if (height, width) == SIZES[-1][1:] else 1)


# With default shapes torch compiles a changed number once more, and from then on as a symbol, in
# untouched models too; with dynamic shapes it is a symbol from the start.
@pytest.mark.parametrize(("dynamic", "graphs"), [(None, 2), (True, 1)])
@pytest.mark.parametrize(
    ("build", "kwargs"),
    [
        (smallest_unet, "cross_attention_kwargs"),
        (smallest_flux, "joint_attention_kwargs"),
    ],
)
def test_lora_scale_changes_without_a_new_graph(
    build: Callable[[], Any], kwargs: str, dynamic: bool | None, graphs: int
) -> None:
    model = build()
    model.add_adapter(LoraConfig(r=4, init_lora_weights=False, target_modules=["to_q", "to_v"]))
    uncompiled = transform(model)
    frames = CompileCounterWithBackend("eager")
    compiled: Any = torch.compile(
        copy.deepcopy(uncompiled), backend=frames, fullgraph=True, dynamic=dynamic
    )
    call = inputs_for(uncompiled, height=16, width=24)
    outputs = []
    for scale in (0.9, 0.5, 0.25, 2.0):
        expected = uncompiled(**call, **{kwargs: {"scale": scale}}).sample
        outputs.append(compiled(**call, **{kwargs: {"scale": scale}}).sample)
        assert difference(outputs[-1], expected) < TOLERANCE
    assert frames.frame_count == graphs
    assert difference(outputs[0], outputs[-1]) > 0.01


def lowered(model: nn.Module, calls: Iterable[dict[str, Any]]) -> list[fx.Graph]:
    """The graphs of ATen operators that a compiled model becomes, in the order of their calls."""
    graphs: list[fx.Graph] = []

    def note(gm: fx.GraphModule, example_inputs: Any) -> Any:
        graphs.append(gm.graph)
        return make_boxed_func(gm.forward)

    backend = aot_autograd(fw_compiler=note, keep_inference_input_mutations=True)
    compiled: Any = torch.compile(model, backend=backend, fullgraph=True)
    for call in calls:
        compiled(**call)
    return graphs


# Inductor puts a graph into CUDA graphs around its loops; a decision, a number taken from a tensor
# or an input that is written to would keep more than a loop out of them. Which variant runs, and
# what is kept of a plan, is decided outside.
@pytest.mark.parametrize(
    ("options", "loops"),
    [
        ({}, [2]),
        ({"schedule": Schedule(select_every=3, weigh_every=2)}, [2, 0, 0]),
        ({"merge_below": 0.4}, [0, 2]),
    ],
    ids=["always", "schedule", "merge_below"],
)
@pytest.mark.parametrize("build", [smallest_unet, smallest_flux])
def test_only_the_selectors_loops_stay_outside_of_cuda_graphs(
    build: Callable[[], Any], options: dict[str, Any], loops: list[int]
) -> None:
    model = transform(build(), **options)
    calls = islice(images(model, height=16, width=24), STEPS)
    graphs = lowered(model, calls)
    found = []
    for graph in graphs:
        higher = [n.target for n in graph.nodes if isinstance(n.target, HigherOrderOperator)]
        assert set(higher) <= {torch.ops.higher_order.while_loop}
        found.append(len(higher))
        written = [n.args[0] for n in graph.nodes if str(n.target) == "aten.copy_.default"]
        assert not any(node.op == "placeholder" for node in written)
        assert not any("_local_scalar_dense" in str(node.target) for node in graph.nodes)
    assert found == loops


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:TypedStorage is deprecated:UserWarning")  # autotuning's own
@pytest.mark.parametrize("mode", ["default", "reduce-overhead", "max-autotune"])
@pytest.mark.parametrize(("build", "preset"), [(smallest_unet, "default"), (smallest_flux, "toma")])
def test_inductor_agrees(build: Callable[[], Any], preset: str, mode: str) -> None:
    uncompiled = transform(build(), MergeConfig.preset(preset))
    compiled: Any = torch.compile(
        copy.deepcopy(uncompiled), fullgraph=True, dynamic=False, mode=mode
    )
    for index, call in enumerate(images(uncompiled, height=8, width=8)):
        with torch._dynamo.config.patch(error_on_recompile=index >= STEPS):
            expected = uncompiled(**call).sample
            assert difference(compiled(**call).sample, expected) < TOLERANCE


def test_hooks_that_a_pipeline_registers_between_calls_recompile_nothing() -> None:
    model = transform(smallest_flux())
    call = next(iter(images(model, height=8, width=8)))
    frames = CompileCounterWithBackend("eager")
    compiled: Any = torch.compile(model, backend=frames, fullgraph=True)
    compiled(**call)
    with model.cache_context("cond"):  # makes the registry; Flux's pipelines enter it at each step
        compiled(**call)
    assert frames.frame_count == 1
