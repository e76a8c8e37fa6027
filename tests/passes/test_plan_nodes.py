"""The nodes that make a plan."""

import re

import pytest
import torch
from torch import fx

from tests.passes.blocks import NAMES, block_of, capture
from toma_fx.errors import CaptureError
from toma_fx.passes.plan_nodes import placeholder, redirect


@pytest.mark.parametrize("name", NAMES)
def test_arguments_are_found_by_name(name: str) -> None:
    graph = capture(block_of(name)).graph
    for argument in ("hidden_states", "encoder_hidden_states"):
        found = placeholder(graph, argument)
        assert found.op == "placeholder"
        assert found.target == argument


def test_an_argument_that_the_block_does_not_have() -> None:
    graph = capture(block_of("flux_single")).graph
    message = (
        "the graph has no argument 'hidden_state'; it has hidden_states, encoder_hidden_states, "
        "temb, image_rotary_emb, joint_attention_kwargs"
    )
    with pytest.raises(CaptureError, match=f"^{re.escape(message)}$"):
        placeholder(graph, "hidden_state")


def test_redirected_uses_go_through_the_new_node_which_keeps_its_own() -> None:
    graph = fx.Graph()
    x = graph.placeholder("x")
    first, second = graph.call_function(torch.neg, (x,)), graph.call_function(torch.exp, (x,))
    graph.output((first, second, x))
    with graph.inserting_after(x):
        through = graph.call_function(torch.add, (x, 1))
    redirect(x, through)
    graph.lint()
    assert first.args == second.args == (through,)
    assert through.args == (x, 1)
    gm = fx.GraphModule(torch.nn.Module(), graph)
    assert gm(torch.tensor(1.0))[0] == -2
    assert gm(torch.tensor(1.0))[2] == 2
