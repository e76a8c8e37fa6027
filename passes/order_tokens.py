"""Bring the tokens of a flat graph into tile order, as `toma_fx.install_borders` does for a model.

Before, on the UNet, around the blocks of a stage, and on Flux, around the model::

    norm1 = torch.ops.aten.layer_norm(hidden_states, [32], p_norm1_weight, p_norm1_bias)
    ...
    proj_out = torch.ops.aten.linear(add_2, p_proj_out_weight, p_proj_out_bias)

After::

    order = torch.ops.toma.tile_order(hidden_states, 16, 16)
    raster = torch.ops.aten.argsort(order)
    ordered = torch.ops.toma.reorder(hidden_states, order)
    norm1 = torch.ops.aten.layer_norm(ordered, [32], p_norm1_weight, p_norm1_bias)
    ...
    in_raster_order = torch.ops.toma.reorder(add_2, raster)
    proj_out = torch.ops.aten.linear(in_raster_order, p_proj_out_weight, p_proj_out_bias)
"""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import fx

from toma_fx.passes.flat_graph import FlatGraph
from toma_fx.passes.flat_nodes import innermost, operator_name, refused
from toma_fx.passes.pipeline import Pass
from toma_fx.passes.plan_nodes import call, toma

aten = torch.ops.aten


@dataclass(frozen=True, kw_only=True)
class OrderTokens(Pass):
    """Reorder tokens into tile order where they enter, and back where they leave.

    Raises:
        CaptureError: when the graph does not contain the tokens where it should.
    """

    name: ClassVar[str] = "order_tokens"

    enter: str
    """Path of the module that takes the first tokens in tile order."""
    leave: str
    """Path of the module that returns the last tokens in tile order."""
    grid: str | None = None
    """Path of the module that takes the image as ``(B, C, H, W)``; None if ``ids`` is given."""
    ids: str | None = None
    """Path of the module that takes the position ids, text tokens first."""

    def apply(self, gm: fx.GraphModule) -> int:
        flat = FlatGraph.of(gm)
        graph = flat.graph
        enter, leave = flat.nodes_of[self.enter], set(flat.nodes_of[self.leave])
        tokens = flat.inputs(self.enter, ndim=3)[0]
        first = min(node for node in enter if tokens in node.all_input_nodes)
        joined = None if self.ids is None else _joined_ids(flat, self.ids, first)
        with flat.inserting_before(first):
            if joined is None:
                args: tuple[Any, ...] = (tokens, *_grid(flat, self.grid, tokens))
                order = call(graph, toma.tile_order.default, args, "order")
            else:
                args = (joined.args[0][-1],)
                order = call(graph, toma.tile_order_of_ids.default, args, "order")
            raster = call(graph, aten.argsort.default, (order,), "raster")
            ordered = call(graph, toma.reorder.default, (tokens, order), "ordered")
        for node in enter:
            node.replace_input_with(tokens, ordered)
        if joined is not None:
            ids = joined.args[0][-1]
            with flat.inserting_before(joined):
                placed = call(graph, aten.index_select.default, (ids, 0, order), "ids")
            joined.replace_input_with(ids, placed)
            _order_guests(flat, self.enter.rpartition(".")[0], ordered, order)
        ends = [n for n in leave if not leave.issuperset(n.users) and n.meta["val"].ndim == 3]
        if len(ends) != 1:
            calls = f"{self.leave} returns tokens {len(ends)} times"
            raise refused(first, f"{calls}; is the model called several times in this graph?")
        (end,) = ends
        users = [user for user in end.users if user not in leave]
        with flat.inserting_after(end):
            back = call(graph, toma.reorder.default, (end, raster), "in_raster_order")
        for user in users:
            user.replace_input_with(end, back)
        return 2


def _order_guests(flat: FlatGraph, root: str, ordered: fx.Node, order: fx.Node) -> None:
    """Reorder tensors that the model adds to its tokens, such as a ControlNet's residuals."""
    count = ordered.meta["val"].shape[1]
    stream = {ordered}
    for node in list(flat.graph.nodes):
        if stream.isdisjoint(node.all_input_nodes):
            continue
        stream.add(node)
        for guest in [n for n in node.all_input_nodes if n not in stream]:
            value = guest.meta["val"]
            tokens = isinstance(value, torch.Tensor) and value.ndim == 3 and value.shape[1] == count
            if tokens and innermost(node) == root:
                with flat.inserting_before(node):
                    args = (guest, order)
                    placed = call(flat.graph, toma.reorder.default, args, "ordered")
                node.replace_input_with(guest, placed)


def _grid(flat: FlatGraph, stage: str | None, tokens: fx.Node) -> tuple[int, int]:
    height, width = flat.inputs(stage or "", ndim=4)[0].meta["val"].shape[-2:]
    if height * width != tokens.meta["val"].shape[1]:
        raise refused(tokens, f"its tokens are not those of the image that {stage} takes")
    return height, width


def _joined_ids(flat: FlatGraph, path: str, first: fx.Node) -> Any:
    """Return the node that joins text and image position ids for the module at ``path``."""
    joined: Any = flat.inputs(path, ndim=2)[0]
    if operator_name(joined) != "cat":
        raise refused(joined, f"{path} takes no position ids that join those of text and image")
    if not joined.args[0][-1] < first:
        raise refused(joined, "its image ids are not an input of the model, (N, 3)")
    return joined
