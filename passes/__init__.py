"""Passes: graph in, graph out; one pass per file.

A block goes through them in this order:

============= ====================================================================
capture       turn a block's forward into a graph, which the passes rewrite
merge         merge and unmerge around sites of the block, or around the whole block
merge_keys    or merge only the keys and values of its self-attention
guard_inputs  refuse inputs that merged tokens do not support
one_plan      use one plan for all sites of the block
hand_on       share one plan among the blocks of a group, and among several steps
remember      with memory, a full step: run the block on all tokens and keep its update
recall        with memory, a step in between: correct the kept update
cleanup       remove repeated and unused nodes
plan_apart    turn a leader's plan into a graph of its own, for compiling blocks one by one
install       turn graphs into the block's forward
============= ====================================================================

A flat graph is a whole model that other code captured. There ``order_tokens`` brings tokens into
token order; then ``merge``, ``one_plan`` and ``cleanup`` run as on a block.

``pipeline`` defines passes and runs them. ``sites`` names the parts of a block that can merge,
``streams`` the tokens that go through it, and ``plan_nodes`` inserts the nodes that make a plan.
``block_graph`` and ``flat_graph`` present two kinds of graph to the merge pass; ``flat_nodes`` and
``flat_values`` support the second. ``open_attention`` exposes the inside of attention to a graph.
``stand_ins`` replace a block's modules during capture, and ``block_calls`` contains the code that
an installed block runs around its graph. ``readable`` and ``debug`` show graphs, and
``pass_manager`` runs the passes in torch.fx's own pass manager.
"""
