"""Bring the tokens of a captured graph into tile order, as `toma_fx.models` does in a model.

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
from typing import Any

import torch
from torch import fx

from toma_fx.passes.captured import CapturedGraph, innermost, operator_name, refused
from toma_fx.passes.plan_nodes import call, toma

aten = torch.ops.aten


@dataclass(frozen=True, kw_only=True)
class Border:
    """Where image tokens come into the order of tiles, by module paths."""

    enter: str
    """Takes the first tokens in tile order."""
    leave: str
    """Returns the last."""
    grid: str | None = None
    """Takes the image as ``(B, C, H, W)``; or else"""
    ids: str | None = None
    """takes the position ids, those of the text tokens first."""


def order_tokens(captured: CapturedGraph, border: Border) -> None:
    """Bring tokens into tile order where they enter, and back where they leave."""
    graph = captured.graph
    enter, leave = captured.regions[border.enter], set(captured.regions[border.leave])
    tokens = captured.inputs(border.enter, ndim=3)[0]
    first = min(node for node in enter if tokens in node.all_input_nodes)
    joined = None if border.ids is None else _joined_ids(captured, border.ids, first)
    with captured.inserting_before(first, serving=first):
        if joined is None:
            args = (tokens, *_grid(captured, border.grid, tokens))
            order = call(graph, toma.tile_order.default, args, "order")
        else:
            order = call(graph, toma.tile_order_of_ids.default, (joined.args[0][-1],), "order")
        raster = call(graph, aten.argsort.default, (order,), "raster")
        ordered = call(graph, toma.reorder.default, (tokens, order), "ordered")
    for node in enter:
        node.replace_input_with(tokens, ordered)
    if joined is not None:
        ids = joined.args[0][-1]
        with captured.inserting_before(joined, serving=joined):
            placed = call(graph, aten.index_select.default, (ids, 0, order), "ids")
        joined.replace_input_with(ids, placed)
        _order_guests(captured, border.enter.rpartition(".")[0], ordered, order)
    ends = [n for n in leave if not leave.issuperset(n.users) and n.meta["val"].ndim == 3]
    if len(ends) != 1:
        calls = f"{border.leave} returns tokens {len(ends)} times"
        raise refused(first, f"{calls}; is the model called several times in this graph?")
    (end,) = ends
    users = [user for user in end.users if user not in leave]
    with captured.inserting_before(end.next, serving=end):
        back = call(graph, toma.reorder.default, (end, raster), "in_raster_order")
    for user in users:
        user.replace_input_with(end, back)


def _order_guests(captured: CapturedGraph, root: str, ordered: fx.Node, order: fx.Node) -> None:
    """Bring what the model adds to its tokens, such as a ControlNet's residuals, into order."""
    count = ordered.meta["val"].shape[1]
    stream = {ordered}
    for node in list(captured.graph.nodes):
        if stream.isdisjoint(node.all_input_nodes):
            continue
        stream.add(node)
        for guest in [n for n in node.all_input_nodes if n not in stream]:
            value = guest.meta["val"]
            tokens = isinstance(value, torch.Tensor) and value.ndim == 3 and value.shape[1] == count
            if tokens and innermost(node) == root:
                with captured.inserting_before(node, serving=node):
                    args = (guest, order)
                    placed = call(captured.graph, toma.reorder.default, args, "ordered")
                node.replace_input_with(guest, placed)


def _grid(captured: CapturedGraph, stage: str | None, tokens: fx.Node) -> tuple[int, int]:
    height, width = captured.inputs(stage or "", ndim=4)[0].meta["val"].shape[-2:]
    if height * width != tokens.meta["val"].shape[1]:
        raise refused(tokens, f"its tokens are not those of the image that {stage} takes")
    return height, width


def _joined_ids(captured: CapturedGraph, path: str, first: fx.Node) -> Any:
    """The node that joins the position ids of text and image for the module at ``path``."""
    joined: Any = captured.inputs(path, ndim=2)[0]
    if operator_name(joined) != "cat":
        raise refused(joined, f"{path} takes no position ids that join those of text and image")
    if not joined.args[0][-1] < first:
        raise refused(joined, "its image ids are not an input of the model, (N, 3)")
    return joined
