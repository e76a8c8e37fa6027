"""Streams: the image, text or sound tokens that go through a block, and the block's updates.

`toma_fx.passes.remember` and `toma_fx.passes.recall` treat all streams alike.
"""

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, fx

from toma_fx.passes.plan_nodes import UPDATE, TokenFlow, call, placeholder, toma


@dataclass(frozen=True)
class Stream:
    """One output of a block that consists of tokens."""

    returned: fx.Node
    """Output of the stream."""
    tokens: fx.Node | None
    """Input of the stream, to which the block adds its update; None if unknown."""
    merged: fx.Node | None = None
    """Update of merged tokens; None if no tokens of the stream merge."""
    merging: tuple[Any, ...] = ()
    """Arguments of the merge after the tokens."""
    unmerging: tuple[Any, ...] = ()
    """Arguments of the unmerge after the tokens."""

    def update(self, graph: fx.Graph) -> fx.Node:
        """Insert the block's update; return the whole output if the input is unknown."""
        if self.tokens is None:
            return self.returned
        return call(graph, operator.sub, (self.returned, self.tokens), name="update")

    def update_of_merged(self, graph: fx.Graph) -> fx.Node:
        """Return the update of merged tokens if the stream merges, else the update."""
        return self.update(graph) if self.merged is None else self.merged

    def merge(self, graph: fx.Graph, tokens: fx.Node) -> fx.Node:
        """Merge tokens like the stream; return them unchanged if it does not merge."""
        if self.merged is None:
            return tokens
        return call(graph, toma.merge.default, (tokens, *self.merging), name="merged")

    def unmerge(self, graph: fx.Graph, tokens: fx.Node) -> fx.Node:
        """Unmerge tokens like the stream; return them unchanged if it does not merge."""
        if self.merged is None:
            return tokens
        return call(graph, toma.unmerge.default, (tokens, *self.unmerging), name="unmerged")


def streams(graph: fx.Graph, flow: TokenFlow) -> list[Stream]:
    """Return the streams of a block in the order of its outputs."""
    outputs: Any = graph.output_node().args[0]
    if isinstance(outputs, fx.Node):
        return [_image(graph, outputs, flow)]
    return [
        _stream(graph, index, node, flow)
        for index, node in enumerate(outputs)
        if isinstance(node, fx.Node)
    ]


def _stream(graph: fx.Graph, index: int, returned: fx.Node, flow: TokenFlow) -> Stream:
    if index == flow.output:
        return _image(graph, returned, flow)
    if index in flow.also_returned:
        return _also(graph, returned)
    return _other(graph, returned, flow)


def return_instead(graph: fx.Graph, made: Sequence[fx.Node]) -> None:
    """Replace the outputs of the block's streams by ``made``."""
    output = graph.output_node()
    before: Any = output.args[0]
    if isinstance(before, fx.Node):
        output.args = (made[0],)
        return
    left = iter(made)
    output.args = (tuple(next(left) if isinstance(n, fx.Node) else n for n in before),)


def _image(graph: fx.Graph, returned: fx.Node, flow: TokenFlow) -> Stream:
    tokens, update = placeholder(graph, flow.tokens), _update(graph)
    if update is None:
        return Stream(returned, tokens)
    unmerge = next(user for user in update.users if user.target is toma.unmerge.default)
    return Stream(returned, tokens, update, _merging(update), unmerge.args[1:])


def _also(graph: fx.Graph, returned: fx.Node) -> Stream:
    """Return the stream of further image tokens, which the block computes anew."""
    update = _update(graph)
    if update is None or returned.target is not toma.unmerge.default:
        return Stream(returned, None)
    merged: Any = returned.args[0]
    return Stream(returned, None, merged, _merging(update), returned.args[1:])


def _update(graph: fx.Graph) -> fx.Node | None:
    """Return the block's update of merged image tokens; None if they do not merge."""
    return next((node for node in graph.nodes if UPDATE in node.meta), None)


def _merging(update: fx.Node) -> tuple[Any, ...]:
    merge: Any = update.args[1]
    return tuple(merge.args[1:])


def _other(graph: fx.Graph, returned: fx.Node, flow: TokenFlow) -> Stream:
    """Return a non-image stream; its shape identifies its input, as example sizes all differ."""
    like = [
        node
        for node in graph.find_nodes(op="placeholder")
        if node.target not in (flow.tokens, *flow.also_merged)
        and isinstance(node.meta["val"], Tensor)
        and node.meta["val"].shape == returned.meta["val"].shape
    ]
    return Stream(returned, like[0] if len(like) == 1 else None)
