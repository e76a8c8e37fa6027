"""Repeated pure calls are made once."""

import operator

import pytest
import torch
from torch import fx, nn

from tests.passes.blocks import (
    NAMES,
    block_of,
    calls,
    capture,
    expect_change,
    inputs_of,
    is_equal,
    merge_pass,
    rewrite,
    run,
)
from toma_fx.passes.cleanup import Cleanup
from toma_fx.passes.pipeline import run_passes


def cluttered(block: nn.Module) -> fx.GraphModule:
    """The graph of a block, with the nodes of a plan for each of its components."""
    return rewrite(block, merge_pass(block))


@pytest.mark.parametrize("name", NAMES)
def test_a_block_computes_what_it_did(name: str) -> None:
    block, inputs = block_of(name), inputs_of(name)
    gm = cluttered(block)
    before = run(gm, inputs)
    run_passes(gm, [Cleanup()])
    assert is_equal(run(gm, inputs), before)


@pytest.mark.parametrize("name", NAMES)
def test_no_pure_call_is_left_twice(name: str) -> None:
    gm = cluttered(block_of(name))
    before = calls(gm)
    changed = Cleanup().apply(gm)
    gm.graph.lint()
    assert (before - calls(gm)).total() == changed
    assert not calls(gm) - before
    pure = [
        (node.target, str(node.args))
        for node in gm.graph.nodes
        if node.target in (getattr, operator.getitem)
    ]
    assert len(pure) == len(set(pure))
    assert Cleanup().apply(gm) == 0


def test_only_calls_that_are_alike_are_joined() -> None:
    graph = fx.Graph()
    x, y = graph.placeholder("x"), graph.placeholder("y")
    results = []
    for source in (x, y):
        shape = graph.call_function(getattr, (source, "shape"))
        again = graph.call_function(getattr, (source, "shape"))
        results += [
            graph.call_function(operator.getitem, (shape, 0)),
            graph.call_function(operator.getitem, (shape, 1)),
            graph.call_function(operator.getitem, (again, 0)),
            graph.call_function(operator.getitem, (source, (slice(None), slice(None, 1)))),
            graph.call_function(operator.getitem, (source, (slice(None), slice(1, None)))),
        ]
    graph.output(tuple(results))
    gm = fx.GraphModule(nn.Module(), graph)
    inputs = torch.rand(2, 3), torch.rand(4, 5)
    before = gm(*inputs)
    # For x and for y: the second shape, and then also its first size.
    assert Cleanup().apply(gm) == 2 * 2
    gm.recompile()
    for result, like in zip(gm(*inputs), before, strict=True):
        assert torch.equal(torch.as_tensor(result), torch.as_tensor(like))


def test_calls_that_may_differ_from_time_to_time_stay() -> None:
    """Dropout draws new numbers at each call."""
    graph = fx.Graph()
    x = graph.placeholder("x")
    drops = [graph.call_module("drop", (x,)) for _ in range(2)]
    noise = [graph.call_function(torch.rand_like, (x,)) for _ in range(2)]
    graph.output((*drops, *noise))
    root = nn.Module()
    root.drop = nn.Dropout()
    gm = fx.GraphModule(root, graph)
    assert Cleanup().apply(gm) == 0
    assert calls(gm) == {"drop": 2, "rand_like": 2}


def test_a_graph_that_knows_no_example_values() -> None:
    """What others captured, and nothing was merged in."""

    def twice(x: torch.Tensor) -> torch.Tensor:
        return x.reshape(x.shape[0], 1) + x.reshape(x.shape[0], 1)

    gm = run_passes(fx.symbolic_trace(twice), [Cleanup()])
    assert calls(gm) == {"getattr": 1, "getitem": 1, "reshape": 2, "add": 1}
    assert torch.equal(gm(torch.ones(3)), torch.full((3, 1), 2.0))


def test_a_captured_block_is_tidy() -> None:
    assert Cleanup().apply(capture(block_of("flux_single"))) == 0


def test_graph() -> None:
    """Both the block and the plan of its tokens ask how many text tokens there are."""
    before, after = (cluttered(block_of("flux_single")) for _ in range(2))
    assert Cleanup().apply(after) == 2
    expect_change(before, after, "cleanup.flux_single")
