"""Graph in, graph out: one pass per file.

In the order in which a block goes through them:

=================== ==================================================================
capture             a block's forward becomes a graph
sites               where can tokens be merged?
merge_components    merge and unmerge around each site, or
merge_once          once around the block
guard_inputs        refuse inputs that merged tokens cannot carry
share_plan          one plan for the block, its group, and several steps
cleanup             remove what is repeated or unused
plan_apart          a leader's plan as a graph of its own, for compiling blocks one by one
install             the graph becomes the block's forward
=================== ==================================================================

``pipeline`` says what a pass is and runs them; ``plan_nodes`` holds the nodes that make a plan;
``readable`` and ``debug`` show graphs; ``pass_manager`` runs the passes among torch.fx's own.

``merge_captured`` merges in a whole model that others captured as one flat graph; ``captured`` and
``order_captured`` are its helpers.
"""
