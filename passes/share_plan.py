"""Make one plan and use it everywhere (section 4.3.2): in a block, in a group, over several steps.

Before, with a plan for each site::

    select = torch.ops.toma.select(norm1, ...)
    weigh = torch.ops.toma.weigh(norm1, select, ...)
    ...
    select_1 = torch.ops.toma.select(norm2, ...)
    weigh_1 = torch.ops.toma.weigh(norm2, select_1, ...)

After, with ``role="alone"``, the first plan serves the block; with ``"lead"``, others too::

    select = torch.ops.toma.select(norm1, ...)
    weigh = torch.ops.toma.weigh(norm1, select, ...)
    share = toma_fx_runtime_plan_share(cross_attention_kwargs, 'Block', weigh[0], weigh[1])

With ``role="follow"`` the block makes none::

    shared = toma_fx_runtime_plan_shared(cross_attention_kwargs, 'Block')

With a ``memory``, the leader keeps its plan for the steps that follow::

    time_of = toma_fx_runtime_plan_time_of(cross_attention_kwargs)
    toma = self.toma(norm1, time_of[0], time_of[1])
"""

import operator
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import fx

from toma_fx.passes.cleanup import Cleanup
from toma_fx.passes.pipeline import Pass
from toma_fx.passes.plan_nodes import call, item, placeholder, toma
from toma_fx.runtime import plan
from toma_fx.runtime.schedule import PlanMemory

MEMORY = "toma"
"""The name of the `PlanMemory` submodule of a group's first block."""


@dataclass(frozen=True, kw_only=True)
class SharePlan(Pass):
    """Reduce the plans of a block to one, and share that with the blocks that follow."""

    name: ClassVar[str] = "share_plan"

    attention_kwargs: str
    """The argument that carries the plan from block to block."""
    blocks: str
    """Name of the block's class, and of its ratio if others differ; its group finds the plan so."""
    role: Literal["alone", "lead", "follow"] = "alone"
    memory: PlanMemory | None = None
    """Keeps the plan of a leader between steps."""

    def apply(self, gm: fx.GraphModule) -> int:
        changed = self._one_plan(gm.graph)
        changed += Cleanup().apply(gm)  # one plan, and one node for each of its tensors
        self._example_scope(gm.graph)
        if self.memory is not None:
            self._remember(gm, self.memory)
            changed += 1
        if self.role != "alone":
            self._hand_on(gm.graph)
            changed += 1
        return changed

    def _one_plan(self, graph: fx.Graph) -> int:
        changed = 0
        for target in (toma.weigh.default, toma.fixed_weights.default):
            first, *others = graph.find_nodes(op="call_function", target=target) or [None]
            for other in others:
                other.replace_all_uses_with(first)
                changed += 1
        graph.eliminate_dead_code()
        return changed

    def _example_scope(self, graph: fx.Graph) -> None:
        """Give the argument that carries the scope an example value with a plan in it."""
        scope = plan.PlanScope((torch.tensor(0), torch.tensor(0)))
        scope.plans[self.blocks] = tuple(tensor.meta["val"] for tensor in _plan_tensors(graph))
        placeholder(graph, self.attention_kwargs).meta["val"] = {plan.SCOPE: scope}

    def _remember(self, gm: fx.GraphModule, memory: PlanMemory) -> None:
        graph = gm.graph
        (select,) = graph.find_nodes(op="call_function", target=toma.select.default)
        (weigh,) = graph.find_nodes(op="call_function", target=toma.weigh.default)
        gm.add_submodule(MEMORY, memory)
        with graph.inserting_before(select):
            time = graph.call_function(plan.time_of, (placeholder(graph, self.attention_kwargs),))
            now = (item(graph, time, 0), item(graph, time, 1))
            made = graph.call_module(MEMORY, (select.args[0], *now))
            destinations = item(graph, made, 0)
        for use in list(weigh.users):
            use.args = (made, use.args[1] + 1)
        graph.erase_node(weigh)
        select.replace_all_uses_with(destinations)
        graph.erase_node(select)

    def _hand_on(self, graph: fx.Graph) -> None:
        """Let the uses of the plan's tensors go through the scope."""
        kwargs = placeholder(graph, self.attention_kwargs)
        tensors = _plan_tensors(graph)
        last = max(tensors, key=list(graph.nodes).index)
        with graph.inserting_after(last):
            if self.role == "lead":
                through = call(graph, plan.share, (kwargs, self.blocks, *tensors), name="plan")
            else:
                through = call(graph, plan.shared, (kwargs, self.blocks), name="plan")
        at = through
        for index, tensor in enumerate(tensors):
            with graph.inserting_after(at):
                at = item(graph, through, index, name=f"shared_{tensor.name}")
            tensor.replace_all_uses_with(at, delete_user_cb=lambda user: user is not through)


def _plan_tensors(graph: fx.Graph) -> list[fx.Node]:
    """Merge weight, unmerge weight, and the rotary values if there are any."""
    (merge_weight, *_), (unmerge_weight, *_) = (
        [n.args[1] for n in graph.find_nodes(op="call_function", target=target)]
        for target in (toma.merge.default, toma.unmerge.default)
    )
    rotary = [
        part
        for node in graph.find_nodes(op="call_function", target=plan.rotary_at)
        for index in (0, 1)
        for part in node.users
        if part.target is operator.getitem and part.args[1] == index
    ]
    return [merge_weight, unmerge_weight, *rotary]
