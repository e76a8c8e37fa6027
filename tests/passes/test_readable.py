"""Graphs for people."""

import operator

import torch
from torch import fx, nn

from toma_fx.passes.readable import readable
from toma_fx.runtime import plan

toma = torch.ops.toma


def test_only_what_the_graph_computes_is_left() -> None:
    graph = fx.Graph()
    x = graph.placeholder("hidden_states")
    kwargs = graph.placeholder("attention_kwargs")
    shared = graph.call_function(plan.shared, (kwargs,))
    weight = graph.create_node("call_function", operator.getitem, (shared, 0), name="weight")
    args = (x, weight)
    merged = graph.create_node("call_function", toma.merge.default, args, name="merged")
    graph.output(graph.call_method("flatten", (merged, 1)))
    gm = fx.GraphModule(nn.Module(), graph)
    assert readable(gm) == (
        "shared = shared(attention_kwargs)\n"
        "weight = shared[0]\n"
        "merged = torch.ops.toma.merge(hidden_states, weight)\n"
        "flatten = merged.flatten(1)\n"
        "return flatten"
    )
