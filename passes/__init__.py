"""Graph in, graph out: one pass per file.

In the order in which a block goes through them:

============= ====================================================================
capture       a block's forward becomes a graph; makes what the passes rewrite
merge         merge and unmerge around sites of the block, or around all of it
merge_keys    or merge the keys and values of its self-attention alone
guard_inputs  refuse inputs that merged tokens cannot carry
one_plan      one plan for all sites of the block
hand_on       one plan for the blocks of a group, and for several steps
remember      with memory, a full step: the block on all tokens, and what it adds is kept
recall        with memory, a step between: what is kept, and how it has changed
cleanup       remove what is repeated or unused
plan_apart    a leader's plan as a graph of its own, for compiling blocks one by one
install       graphs become the block's forward; uses what the passes rewrote
============= ====================================================================

A flat graph is a whole model that others captured. There ``order_tokens`` brings tokens into token
order, and then ``merge``, ``one_plan`` and ``cleanup`` run as on a block.

``pipeline`` says what a pass is and runs them. ``sites`` names the parts of a block that can merge,
``streams`` the tokens that go through it, and ``plan_nodes`` inserts the nodes that make a plan.
``block_graph`` and ``flat_graph`` are two kinds of graph as the merge pass sees them, and
``flat_nodes`` and ``flat_values`` help with the second. ``open_attention`` shows a graph the inside
of attention. ``stand_ins`` are what a capture traces through in place of a block's modules, and
``block_calls`` is what an installed block does around its graph. ``readable`` and ``debug`` show
graphs, and ``pass_manager`` runs the passes among torch.fx's own.
"""
