"""The graph of one block, as the merge pass sees it: submodules are nodes, sizes are not written.

Nothing is rewritten by itself; `toma_fx.passes.merge` asks where sites are and lets them run on
merged tokens.
"""

import operator
from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import Any

from torch import fx

from toma_fx.errors import CaptureError
from toma_fx.passes.plan_nodes import (
    PLAN,
    PlanNodes,
    PlanOptions,
    PlanPart,
    TokenFlow,
    call,
    item,
    placeholder,
    toma,
)
from toma_fx.passes.sites import FoundSite, Site
from toma_fx.runtime import plan


class BlockGraph:
    """A block's graph, made by `toma_fx.passes.capture`."""

    add = operator.add
    subtract = operator.sub

    def __init__(self, gm: fx.GraphModule, flow: TokenFlow) -> None:
        self.graph = gm.graph
        self._flow = flow

    def inserting_before(self, node: fx.Node) -> AbstractContextManager[Any]:
        """As of `torch.fx.Graph`."""
        return self.graph.inserting_before(node)

    def inserting_after(self, node: fx.Node) -> AbstractContextManager[Any]:
        """Before what follows ``node``, so that several insertions stay in order."""
        return self.graph.inserting_before(node.next)

    def find(self, sites: tuple[Site, ...], block: str) -> list[FoundSite]:
        """The sites in the order of the graph, so that the first plan is seen by all others.

        Raises:
            CaptureError: when a submodule is called twice, or those of a site take other tokens.
        """
        calls: dict[str, fx.Node] = {}
        for node in self.graph.nodes:
            if node.op == "call_module" and calls.setdefault(str(node.target), node) is not node:
                raise CaptureError(
                    f"{node.target!r} is called twice, {calls[node.target]} and {node}; a site "
                    "needs one call, so leave this block out with skip"
                )
        order = {node: i for i, node in enumerate(self.graph.nodes)}
        found = [self._found(site, calls, order) for site in sites]
        return sorted(found, key=lambda each: order[each.first])

    def _found(self, site: Site, calls: dict[str, fx.Node], order: dict[fx.Node, int]) -> FoundSite:
        if not site.leave:
            return self._whole_block(site, order)
        enter = tuple(calls[target] for target in site.enter)
        tokens = {_token_input(call) for call in enter}
        if len(tokens) != 1:
            raise CaptureError(
                f"{', '.join(site.enter)} must take the same tokens, but take {tokens}"
            )
        first = min(enter, key=order.__getitem__)
        text = None
        if self._flow.text is not None and self._flow.text_first:
            text = self._text_tokens(first)
        leave = _outputs(calls[site.leave], site.outputs)
        return FoundSite(site, tokens.pop(), enter, first, text, leave)

    def _whole_block(self, site: Site, order: dict[fx.Node, int]) -> FoundSite:
        tokens = placeholder(self.graph, self._flow.tokens)
        readers = tuple(tokens.users)
        returned = self.graph.output_node().args[0]
        if self._flow.output is not None:
            returned = returned[self._flow.output]  # type: ignore[index]
        assert isinstance(returned, fx.Node)
        return FoundSite(
            site, tokens, readers, min(readers, key=order.__getitem__), None, (returned,)
        )

    def _text_tokens(self, before: fx.Node) -> fx.Node:
        assert self._flow.text is not None
        with self.graph.inserting_before(before):
            shape = call(self.graph, getattr, (placeholder(self.graph, self._flow.text), "shape"))
            return item(self.graph, shape, 1, name="text_tokens")

    def image_tokens(self, found: FoundSite) -> fx.Node:
        """The site's tokens without the text tokens before them, at the insertion point."""
        after_text = (slice(None), slice(found.text, None))
        return call(self.graph, operator.getitem, (found.tokens, after_text), name="image_tokens")

    def layout(self, tokens: fx.Node, options: PlanOptions) -> fx.Node:
        """How the call's grids are cut into regions, at the insertion point."""
        kwargs = placeholder(self.graph, self._flow.attention_kwargs)
        args = (kwargs, tokens, options.region_tokens, options.ratio)
        return call(self.graph, plan.region_layout, args, name="layout")

    def leaves(
        self, found: FoundSite, merged: fx.Node, made: PlanNodes
    ) -> Iterator[tuple[fx.Node, list[fx.Node]]]:
        """Let the site's layers run on merged tokens; where tokens leave it, and who takes them."""
        if self._flow.rotary is not None:
            self._merge_rotary(found, merged, made)
        for node in found.leave:
            users = [self.graph.output_node()] if not found.site.leave else list(node.users)
            yield node, users

    def _merge_rotary(self, found: FoundSite, merged: fx.Node, made: PlanNodes) -> None:
        """Give attention the rotary values of the destinations."""
        rotary = self._flow.rotary
        layers = found.readers
        if not found.site.leave:
            layers = tuple(n for n in self.graph.nodes if n.op == "call_module")
        takers = [layer for layer in layers if rotary in layer.kwargs]
        if not takers or rotary is None:
            return
        with self.graph.inserting_before(merged):
            text = self._text_tokens(merged) if found.text is None else found.text
            rows = []
            for index, name in enumerate(("cos", "sin")):
                table = item(self.graph, placeholder(self.graph, rotary), index)
                args = (table, made.destinations, text)
                row = call(self.graph, toma.rotary_rows.default, args, name=name)
                row.meta[PLAN] = PlanPart(made.destinations.meta[PLAN].group, name)
                rows.append(row)
            tables = call(self.graph, plan.rotary_tables, tuple(rows), name="tables")
        for layer in takers:
            layer.update_kwarg(rotary, tables)


def _token_input(call: fx.Node) -> fx.Node:
    """The node that gives a submodule its tokens: ``hidden_states``, or the first argument."""
    tokens = call.kwargs.get("hidden_states", call.args[0] if call.args else None)
    if not isinstance(tokens, fx.Node):
        raise CaptureError(f"the call of {call.target!r} has no token input: {call.format_node()}")
    return tokens


def _outputs(call: fx.Node, outputs: tuple[int, ...] | None) -> tuple[fx.Node, ...]:
    if outputs is None:
        return (call,)
    # The outputs may be taken from a check of the call, which passes them on.
    sources = {call, *call.users}
    return tuple(
        item
        for source in sources
        for item in source.users
        if item.target is operator.getitem and item.args[0] in sources and item.args[1] in outputs
    )
