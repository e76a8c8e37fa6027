"""Merge the keys and values of self-attention; queries and all other layers keep all tokens.

Before, in a block whose attention is opened::

    attention = dispatch_attention_fn(query, key, value, attn_mask = None, backend = backend)

After::

    layout = region_layout(attention_kwargs, hidden_states, 64, 0.5)
    destinations = torch.ops.toma.select(hidden_states, layout, 'facility_location')
    weights = torch.ops.toma.weigh(hidden_states, destinations, layout, 0.001, ...)
    log_sizes = torch.ops.toma.log_sizes(weights[1])
    ...
    merged_key = torch.ops.toma.merge_heads(key, weights[0], layout, 1)
    merged_value = torch.ops.toma.merge_heads(value, weights[0], layout, 1)
    scale = query.shape[-1] ** -0.5
    sized = torch.ops.toma.with_sizes(query, merged_key, merged_value, log_sizes, scale, 1)
    attention = dispatch_attention_fn(sized[0], sized[1], sized[2], ..., scale = scale)
    attended = attention[..., :value.shape[-1]]

Keys are merged in the form that attention takes, after norm and rotation. Text in one sequence with
the image keeps its keys and values.
"""

import operator
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import fx

from toma_fx.errors import CaptureError
from toma_fx.passes.block_graph import BlockGraph
from toma_fx.passes.open_attention import TOKEN_DIM, WAY_OUT
from toma_fx.passes.pipeline import Pass
from toma_fx.passes.plan_nodes import (
    PLAN,
    PlanNodes,
    PlanOptions,
    PlanPart,
    TokenFlow,
    call,
    insert_plan,
    item,
    placeholder,
    toma,
)
from toma_fx.passes.sites import WHOLE_BLOCK, FoundSite
from toma_fx.runtime import arguments


@dataclass(frozen=True, kw_only=True)
class MergeKeys(Pass):
    """Let self-attention attend to merged tokens.

    Raises:
        CaptureError: when an attention module does not attend to the image's tokens with one of the
            known functions.
    """

    name: ClassVar[str] = "merge_keys"

    flow: TokenFlow
    attentions: tuple[str, ...]
    """Paths of the attention modules in the block, whose layers are nodes."""
    options: PlanOptions = field(default_factory=PlanOptions)

    def apply(self, gm: fx.GraphModule) -> int:
        graph = BlockGraph(gm, self.flow)
        found = [node for path in self.attentions for node in self._attentions_in(gm, path)]
        (block,) = graph.find((WHOLE_BLOCK,), "")
        with graph.inserting_before(block.first):
            tokens = block.tokens
            if block.before is not None or block.after is not None:
                tokens = graph.image_tokens(block)
            layout = graph.layout(tokens, self.options)
            plan = insert_plan(graph.graph, tokens, layout, self.options)
            log_sizes = call(
                graph.graph, toma.log_sizes.default, (plan.unmerge_weight,), "log_sizes"
            )
            log_sizes.meta[PLAN] = PlanPart("", "log_sizes")
        for node in found:
            self._merge(graph, block, node, plan, log_sizes)
        return len(found)

    def _attentions_in(self, gm: fx.GraphModule, path: str) -> list[fx.Node]:
        """Return the nodes of a module that attend to the image."""
        tokens = placeholder(gm.graph, self.flow.tokens)
        inside = [node for node in gm.graph.nodes if _is_inside(node, path)]
        found = [n for n in inside if n.target in TOKEN_DIM and tokens in _sources(n.args[1])]
        if not found:
            raise CaptureError(
                f"{path} does not attend to the tokens of the image by scaled_dot_product_attention"
                f" or dispatch_attention_fn, so its keys and values cannot merge; {WAY_OUT}"
            )
        return found

    def _merge(
        self,
        graph: BlockGraph,
        block: FoundSite,
        node: fx.Node,
        plan: PlanNodes,
        log_sizes: fx.Node,
    ) -> None:
        query, key, value = node.args[:3]
        assert isinstance(query, fx.Node)
        assert isinstance(key, fx.Node)
        assert isinstance(value, fx.Node)
        dim = TOKEN_DIM[node.target]
        options = dict(node.kwargs)
        with graph.inserting_before(node):
            after = self._after(graph, block, key, dim)
            args = (plan.merge_weight, plan.layout, dim, *after)
            merged = [
                call(graph.graph, toma.merge_heads.default, (each, *args), f"merged_{name}")
                for name, each in (("key", key), ("value", value))
            ]
            scale: Any = options.get("scale")
            if scale is None:
                width = _size(graph.graph, query, -1)
                scale = call(graph.graph, operator.pow, (width, -0.5), "scale")
            args = (query, *merged, log_sizes, scale, dim, *after)
            sized = call(graph.graph, toma.with_sizes.default, args, "sized")
            parts = [item(graph.graph, sized, index) for index in range(3)]
            mask = options.get("attn_mask")
            if isinstance(mask, fx.Node):
                args = (mask, plan.destinations, plan.layout, *after)
                options["attn_mask"] = call(
                    graph.graph, arguments.mask_of_keys, args, "mask_of_keys"
                )
            width = _size(graph.graph, value, -1)
        with graph.inserting_after(node):
            index = (..., slice(None, width, None))
            narrow = call(graph.graph, operator.getitem, (node, index), "attended")
        node.replace_all_uses_with(narrow, delete_user_cb=lambda user: user is not narrow)
        node.args = (*parts, *node.args[3:])
        node.kwargs = {**options, "scale": scale}

    def _after(
        self, graph: BlockGraph, block: FoundSite, key: fx.Node, dim: int
    ) -> tuple[Any, ...]:
        """Return the number of keys after those of the image, a node; empty if there are none."""
        image = block.tokens.meta["val"].shape[1]
        if self.flow.joint or key.meta["val"].shape[dim] == image:
            return () if block.after is None else (block.after,)
        for node in _sources(key):
            if node.target is not torch.cat:
                continue
            parts: Any = node.args[0]
            places = [i for i, part in enumerate(parts) if block.tokens in _sources(part)]
            if len(places) == 1:
                joined: Any = node.kwargs.get("dim", node.args[1] if len(node.args) > 1 else 0)
                behind = [_size(graph.graph, part, joined) for part in parts[places[0] + 1 :]]
                assert len(behind) < 2, "the text is in one piece"
                return tuple(behind)
        # If image and text pass through a layer together, they have the order of the block.
        return (graph.text_tokens(),) if self.flow.image_first else ()


def _is_inside(node: fx.Node, path: str) -> bool:
    stack = node.meta.get("nn_module_stack", {})
    return any(module == path for module, _ in stack.values())


def _sources(node: Any) -> list[fx.Node]:
    """Return a node and all nodes whose values it depends on, not just sizes, nearest first."""
    found, seen = [node], {node}
    for each in found:  # the list grows meanwhile
        taken = [] if each.target is getattr else each.all_input_nodes
        new = [source for source in taken if source not in seen]
        found += new
        seen.update(new)
    return found


def _size(graph: fx.Graph, node: fx.Node, dim: int) -> fx.Node:
    return item(graph, call(graph, getattr, (node, "shape")), dim)
