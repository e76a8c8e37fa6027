"""The tokens that go through a block, image, text or sound, and what it adds to them.

`toma_fx.passes.remember` and `toma_fx.passes.recall` treat them alike.
"""

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, fx

from toma_fx.passes.plan_nodes import UPDATE, TokenFlow, call, placeholder, toma


@dataclass(frozen=True)
class Stream:
    """One output of a block with tokens."""

    returned: fx.Node
    """What comes out."""
    tokens: fx.Node | None
    """What comes in, to which the block adds; None where it is not known."""
    merged: fx.Node | None
    """What the block adds to merged tokens; None where no tokens of the stream merge."""

    def update(self, graph: fx.Graph) -> fx.Node:
        """What the block adds, or all that comes out where it is not known what came in."""
        if self.tokens is None:
            return self.returned
        return call(graph, operator.sub, (self.returned, self.tokens), name="update")

    def update_of_merged(self, graph: fx.Graph) -> fx.Node:
        """The same of merged tokens, where the stream merges."""
        return self.update(graph) if self.merged is None else self.merged

    def merge(self, graph: fx.Graph, tokens: fx.Node) -> fx.Node:
        """Tokens merged as the stream is; as they are where it does not merge."""
        if self.merged is None:
            return tokens
        merge: Any = self.merged.args[1]
        return call(graph, toma.merge.default, (tokens, *merge.args[1:]), name="merged")

    def unmerge(self, graph: fx.Graph, tokens: fx.Node) -> fx.Node:
        """Merged tokens spread as the stream is; as they are where it does not merge."""
        if self.merged is None:
            return tokens
        unmerge = next(u for u in self.merged.users if u.target is toma.unmerge.default)
        return call(graph, toma.unmerge.default, (tokens, *unmerge.args[1:]), name="unmerged")


def streams(graph: fx.Graph, flow: TokenFlow) -> list[Stream]:
    """The streams of a block, in the order of its outputs."""
    outputs: Any = graph.output_node().args[0]
    if isinstance(outputs, fx.Node):
        return [_image(graph, outputs, flow)]
    return [
        _image(graph, node, flow) if index == flow.output else _other(graph, node, flow)
        for index, node in enumerate(outputs)
        if isinstance(node, fx.Node)
    ]


def return_instead(graph: fx.Graph, made: Sequence[fx.Node]) -> None:
    """Let the streams of a block come out as ``made``."""
    output = graph.output_node()
    before: Any = output.args[0]
    if isinstance(before, fx.Node):
        output.args = (made[0],)
        return
    left = iter(made)
    output.args = (tuple(next(left) if isinstance(n, fx.Node) else n for n in before),)


def _image(graph: fx.Graph, returned: fx.Node, flow: TokenFlow) -> Stream:
    merged = next((node for node in graph.nodes if UPDATE in node.meta), None)
    return Stream(returned, placeholder(graph, flow.tokens), merged)


def _other(graph: fx.Graph, returned: fx.Node, flow: TokenFlow) -> Stream:
    """Another stream than the image: in examples all sizes differ, so its shape names its input."""
    like = [
        node
        for node in graph.find_nodes(op="placeholder")
        if node.target not in (flow.tokens, *flow.also_merged)
        and isinstance(node.meta["val"], Tensor)
        and node.meta["val"].shape == returned.meta["val"].shape
    ]
    return Stream(returned, like[0] if len(like) == 1 else None, None)
