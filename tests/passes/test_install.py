"""A graph as the forward of a block: for everyone else the block is what it was."""

import copy
import inspect
import linecache
import pickle
import subprocess
import sys
import traceback
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import fx, nn

from tests.passes.blocks import (
    NAMES,
    OPTIONS,
    assert_close,
    block_of,
    capture,
    flow_of,
    inputs_of,
    is_equal,
    rewrite,
    row_of,
    run,
    scope_kwargs,
)
from toma_fx.passes.install import generated_class, install
from toma_fx.passes.merge_once import MergeOnce
from toma_fx.passes.share_plan import MEMORY, SharePlan
from toma_fx.runtime.plan import PlanScope
from toma_fx.runtime.schedule import PlanMemory

EVERY_BLOCK = pytest.mark.parametrize("name", NAMES)


def graph_of(block: nn.Module, memory: PlanMemory | None = None) -> fx.GraphModule:
    merge = MergeOnce(options=OPTIONS, flow=flow_of(block))
    if memory is None:
        return rewrite(block, merge)
    kwargs = row_of(block).attention_kwargs
    return rewrite(
        block, merge, SharePlan(attention_kwargs=kwargs, blocks="Block", role="lead", memory=memory)
    )


def installed(name: str, memory: PlanMemory | None = None) -> Any:
    block = block_of(name)
    install(block, graph_of(block, memory))
    return block


def memory_of() -> PlanMemory:
    return PlanMemory(**asdict(OPTIONS), select_every=10, weigh_every=5)


@EVERY_BLOCK
def test_the_block_runs_the_graph(name: str) -> None:
    block, inputs = block_of(name), inputs_of(name)
    gm = graph_of(block)
    before = run(block, inputs)
    install(block, gm)
    assert is_equal(run(block, inputs), run(gm, inputs))
    assert not is_equal(run(block, inputs), before)


@EVERY_BLOCK
def test_the_block_is_of_its_class_in_every_way_that_shows(name: str) -> None:
    plain, block = block_of(name), installed(name)
    original = type(plain)
    assert isinstance(block, original)
    for attribute in ("__name__", "__qualname__", "__module__", "__doc__"):
        assert getattr(type(block), attribute) == getattr(original, attribute)
    ours, theirs = inspect.signature(block.forward), inspect.signature(plain.forward)
    assert list(ours.parameters) == list(theirs.parameters)
    assert repr(block) == repr(plain)


@EVERY_BLOCK
def test_submodules_parameters_and_hooks_stay(name: str) -> None:
    block, inputs = block_of(name), inputs_of(name)
    modules, state = dict(block.named_modules()), block.state_dict()
    called: list[str] = []
    block.register_forward_hook(lambda *_: called.append("block"))
    first, child = next(block.named_children())
    child.register_forward_hook(lambda *_: called.append(first))
    install(block, graph_of(block))
    assert dict(block.named_modules()) == modules
    assert list(block.state_dict()) == list(state)
    assert all(torch.equal(value, state[key]) for key, value in block.state_dict().items())
    run(block, inputs)
    assert called == [first, "block"]


def test_a_submodule_that_a_pass_added_is_copied_for_each_block() -> None:
    memory = memory_of()
    first, second = installed("unet", memory), installed("unet", memory)
    assert isinstance(first.get_submodule(MEMORY), PlanMemory)
    assert first.get_submodule(MEMORY) is not second.get_submodule(MEMORY)
    assert list(first.state_dict()) == list(block_of("unet").state_dict())
    assert type(first) is type(second)


def test_blocks_with_the_same_code_share_their_class() -> None:
    """So that they share one code object, which is compiled once."""
    first, second = installed("unet"), installed("unet")
    assert type(first) is type(second)
    assert type(first).forward.__code__ is type(second).forward.__code__
    other = block_of("unet")
    assert generated_class(type(other), capture(other)) is not type(first)


@EVERY_BLOCK
@pytest.mark.parametrize(
    "duplicate",
    [copy.deepcopy, lambda block: pickle.loads(pickle.dumps(block))],
    ids=["deepcopy", "pickle"],
)
def test_a_copy_is_a_block_of_its_own(name: str, duplicate: Any) -> None:
    block, inputs = installed(name), inputs_of(name)
    before = run(block, inputs)
    twin = duplicate(block)
    assert type(twin) is type(block)
    assert is_equal(run(twin, inputs), before)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.zero_()
    assert is_equal(run(block, inputs), before)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, copy.copy], ids=["deepcopy", "copy"])
def test_a_copy_with_a_memory(duplicate: Any) -> None:
    block, inputs = installed("unet", memory_of()), inputs_of("unet")
    scope = PlanScope((torch.tensor(0), torch.tensor(1)))
    kwargs = scope_kwargs(block, scope)
    expected = run(block, inputs, **kwargs)
    assert is_equal(run(duplicate(block), inputs, **kwargs), expected)


def test_a_pickled_block_can_be_loaded_by_another_process(tmp_path: Path) -> None:
    block, inputs = installed("flux_double"), inputs_of("flux_double")
    (tmp_path / "block.pkl").write_bytes(pickle.dumps((block, inputs)))
    script = (
        "import pickle, sys, torch\n"
        "with open(sys.argv[1], 'rb') as file: block, inputs = pickle.load(file)\n"
        "with torch.no_grad(): torch.save(block(**inputs), sys.argv[2])\n"
    )
    paths = tmp_path / "block.pkl", tmp_path / "result.pt"
    subprocess.run([sys.executable, "-c", script, *map(str, paths)], check=True)
    assert_close(torch.load(paths[1]), run(block, inputs))


def test_a_traceback_shows_the_line_of_the_generated_forward() -> None:
    block = installed("unet")
    for _ in range(2):
        try:
            block(torch.zeros(1, 16, 33), encoder_hidden_states=torch.zeros(1, 7, 32))
        except RuntimeError:
            text = traceback.format_exc()
        assert "norm1 = self.norm1(merged)" in text
        assert "<toma_fx BasicTransformerBlock " in text
        linecache.checkcache()  # forgets the files that have changed or are gone


def test_the_source_of_the_forward_can_be_read() -> None:
    """Debuggers and torch.compile's messages ask for it."""
    source = inspect.getsource(type(installed("unet")).forward)
    assert source.startswith("def forward(self, hidden_states")
    assert "torch.ops.toma.merge" in source


def test_installing_into_a_block_on_another_device_moves_nothing() -> None:
    block = block_of("unet").to("meta")
    install(block, graph_of(block))
    assert {parameter.device.type for parameter in block.parameters()} == {"meta"}
