"""Extract the plan of a group's first block into a graph of its own.

Before, the leader::

    layout = region_layout(cross_attention_kwargs, hidden_states, 64, 0.5)
    destinations = torch.ops.toma.select(hidden_states, layout, 'facility_location')
    weights = torch.ops.toma.weigh(hidden_states, destinations, layout, 0.001, ...)
    plan = share(cross_attention_kwargs, 'Block', weights[0], weights[1])
    merged = torch.ops.toma.merge(hidden_states, plan[0], layout)
    ...

After, a graph that ends when the plan is made::

    layout = region_layout(cross_attention_kwargs, hidden_states, 64, 0.5)
    destinations = torch.ops.toma.select(hidden_states, layout, 'facility_location')
    weights = torch.ops.toma.weigh(hidden_states, destinations, layout, 0.001, ...)
    plan = share(cross_attention_kwargs, 'Block', weights[0], weights[1])
    return None

The rest of the leader is the same as the graph of the blocks that follow. So if blocks are compiled
one by one, the leader need not be compiled as a whole, which would double the compile time.
"""

from torch import fx

from toma_fx.runtime import plan


def plan_apart(gm: fx.GraphModule) -> fx.Graph | None:
    """Return the part of a leader's graph that makes its plan, with the leader's signature.

    Returns:
        The graph; None if the plan depends on the output of layers in the block.
    """
    graph = fx.Graph()
    graph.output(graph.graph_copy(gm.graph, {}))
    graph.set_codegen(gm.graph._codegen)
    (made,) = graph.find_nodes(op="call_function", target=plan.share)
    needed = {made}
    for node in reversed(graph.nodes):
        if node in needed:
            needed.update(node.all_input_nodes)
    if any(node.op == "call_module" for node in needed):
        return None
    graph.output_node().args = (None,)
    for node in reversed(graph.nodes):
        if node not in needed and node.op not in ("placeholder", "output"):
            graph.erase_node(node)
    graph.lint()
    return graph
