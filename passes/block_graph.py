"""The graph of one block as the merge pass sees it: submodules are nodes, sizes are not literal.

Nothing here is rewritten on its own initiative: `toma_fx.passes.merge` asks where the sites are and
lets them run on merged tokens.
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
    Rows,
    TokenFlow,
    call,
    carrier,
    item,
    placeholder,
    toma,
)
from toma_fx.passes.sites import FoundSite, Site
from toma_fx.runtime import arguments, plan


class BlockGraph:
    """A block's graph, made by `toma_fx.passes.capture`."""

    add = operator.add
    subtract = operator.sub

    def __init__(self, gm: fx.GraphModule, flow: TokenFlow) -> None:
        self.graph = gm.graph
        self._flow = flow

    def inserting_before(self, node: fx.Node) -> AbstractContextManager[Any]:
        """Same as `torch.fx.Graph.inserting_before`."""
        return self.graph.inserting_before(node)

    def inserting_after(self, node: fx.Node) -> AbstractContextManager[Any]:
        """Insert before the node after ``node``, so that several insertions stay in order."""
        return self.graph.inserting_before(node.next)

    def find(self, sites: tuple[Site, ...], block: str) -> list[FoundSite]:
        """Return the sites in the order of the graph, so that all can use the first plan.

        Raises:
            CaptureError: when a submodule of a site is called twice, or when the submodules of one
                site take different tokens.
        """
        calls: dict[str, fx.Node] = {}
        needed = {name for site in sites for name in (*site.enter, site.leave)}
        for node in self.graph.nodes:
            if node.op != "call_module" or node.target not in needed:
                continue
            if calls.setdefault(str(node.target), node) is not node:
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
        with self.graph.inserting_before(first):
            before, after = self._around(self._is_joint(site))
        leave = _outputs(calls[site.leave], site.outputs)
        return FoundSite(site, tokens.pop(), enter, first, before, after, leave)

    def _whole_block(self, site: Site, order: dict[fx.Node, int]) -> FoundSite:
        tokens = placeholder(self.graph, self._flow.tokens)
        readers = tuple(tokens.users)
        returned = self.graph.output_node().args[0]
        if self._flow.output is not None:
            returned = returned[self._flow.output]  # type: ignore[index]
        assert isinstance(returned, fx.Node)
        # The plan comes before every node that uses a part of it.
        named = (*(rows.argument for rows in self._flow.rows), *self._flow.also_merged)
        takers = {user for name in named for user in placeholder(self.graph, name).users}
        checks = {node for node in takers if _is_planned(node)}
        first = min((*readers, *(takers - checks)), key=order.__getitem__)
        with self.graph.inserting_before(first):
            before, after = self._around(self._is_joint(site))
        return FoundSite(site, tokens, readers, first, before, after, (returned,))

    def _is_joint(self, site: Site) -> bool:
        """Return whether a site's tokens are text and image tokens in one sequence."""
        inside = bool(site.leave) and self._flow.text is not None and self._flow.text_first
        return self._flow.joint or inside

    def _around(self, joint: bool) -> tuple[Any, Any]:
        """Return the number of unmerged tokens before and after those that merge, as nodes.

        Args:
            joint: whether the sequence also holds text tokens.
        """
        unmerged = text = None
        if self._flow.prefix_tokens is not None:
            unmerged = placeholder(self.graph, self._flow.prefix_tokens)
        elif self._flow.prefix:
            unmerged = call(self.graph, plan.unmerged_tokens, (self._kwargs(),), "unmerged_tokens")
        if joint:
            text = self.text_tokens()
        if self._flow.image_first:
            return unmerged, text
        if unmerged is not None and text is not None:
            return call(self.graph, operator.add, (unmerged, text)), None
        return (text if unmerged is None else unmerged), None

    def _kwargs(self) -> fx.Node | None:
        return carrier(self.graph, self._flow.attention_kwargs)

    def text_tokens(self) -> fx.Node:
        if self._flow.text is None:
            tokens = placeholder(self.graph, self._flow.tokens)
            return call(self.graph, plan.text_tokens, (self._kwargs(), tokens), "text_tokens")
        shape = call(self.graph, getattr, (placeholder(self.graph, self._flow.text), "shape"))
        return item(self.graph, shape, 1, name="text_tokens")

    def image_tokens(self, found: FoundSite) -> fx.Node:
        """Slice the tokens that merge out of the site's tokens, at the insertion point."""
        if found.after is None:
            index = (slice(None), slice(found.before, None))
            return call(self.graph, operator.getitem, (found.tokens, index), name="image_tokens")
        args = (found.tokens, found.before or 0, found.after)
        return call(self.graph, arguments.between, args, name="image_tokens")

    def layout(self, tokens: fx.Node, options: PlanOptions) -> fx.Node:
        """Insert the node that cuts the call's grids into regions, at the insertion point."""
        args = (self._kwargs(), tokens, options.region_tokens, options.ratio)
        return call(self.graph, plan.region_layout, args, name="layout")

    def leaves(
        self, found: FoundSite, merged: fx.Node, made: PlanNodes
    ) -> Iterator[tuple[fx.Node, list[fx.Node]]]:
        """Run the site on merged tokens; yield each node that leaves it, with its users."""
        inside = set(found.readers)
        if not found.site.leave:
            inside = {node for node in self.graph.nodes if not _is_planned(node)}
            self._merge_also(merged, inside)
            self._unmerge_also(merged, made)
        else:
            inside |= self._made_of_rows(inside, merged)
        # Take all rows before anything computed from them, so that they can be shared as one plan.
        taken = [
            (rows, self._take_rows(rows, found, merged, made, inside)) for rows in self._flow.rows
        ]
        for rows, parts in taken:
            self._use_rows(rows, parts, merged, inside)
        for node in found.leave:
            users = [self.graph.output_node()] if not found.site.leave else list(node.users)
            yield node, users

    def _made_of_rows(self, readers: set[fx.Node], merged: fx.Node) -> set[fx.Node]:
        """Move nodes computed from rows, for the readers only, behind the merge; return them."""
        made = {placeholder(self.graph, rows.argument) for rows in self._flow.rows}
        for node in self.graph.nodes:
            called = node.op in ("call_function", "call_method") and not _is_planned(node)
            if called and not made.isdisjoint(node.all_input_nodes):
                made.add(node)
        alone: set[fx.Node] = set()
        for node in reversed(self.graph.nodes):
            users = set(node.users)
            if node in made and node.op != "placeholder" and users and users <= readers | alone:
                alone.add(node)
        last, nodes = merged, list(self.graph.nodes)
        for node in nodes[: nodes.index(merged)]:
            if node in alone:
                last.append(node)
                last = node
        return alone

    def _merge_also(self, merged: fx.Node, inside: set[fx.Node]) -> None:
        """Merge the block's further tokens in the same way."""
        for name in self._flow.also_merged:
            tokens = placeholder(self.graph, name)
            with self.graph.inserting_after(merged):
                args = (tokens, *merged.args[1:])
                also = call(self.graph, toma.merge.default, args, name=f"merged_{name}")
            for user in [user for user in tokens.users if user in inside]:
                user.replace_input_with(tokens, also)

    def _unmerge_also(self, merged: fx.Node, made: PlanNodes) -> None:
        """Unmerge the further tokens that the block returns."""
        output = self.graph.output_node()
        for index in self._flow.also_returned:
            tokens = output.args[0][index]  # type: ignore[index]
            if not isinstance(tokens, fx.Node):  # None if the block got none
                continue
            with self.inserting_after(tokens):
                args = (tokens, made.unmerge_weight, *merged.args[2:])
                spread = call(self.graph, toma.unmerge.default, args, name=f"unmerged_{tokens}")
            output.replace_input_with(tokens, spread)

    def _take_rows(
        self,
        rows: Rows,
        found: FoundSite,
        merged: fx.Node,
        made: PlanNodes,
        inside: set[fx.Node],
    ) -> list[fx.Node]:
        """Take the destinations' rows of an argument or its items; empty if the site uses none."""
        argument = placeholder(self.graph, rows.argument)
        if inside.isdisjoint(argument.users):
            return []
        value = argument.meta["val"]
        one = value[rows.items[0]] if rows.items else value
        if rows.ndim is not None and one.ndim != rows.ndim:
            return []
        with self.graph.inserting_before(merged):
            before, after = found.before, found.after
            if rows.joint != self._is_joint(found.site):
                before, after = self._around(rows.joint)
            where: tuple[Any, ...] = (made.destinations, rows.dim, before or 0)
            if rows.optional:
                args = (argument, *where, after or 0)
                name = f"rows_of_{rows.argument}"
                return [call(self.graph, arguments.rows_if_given, args, name)]
            where = where if after is None else (*where, after)
            if not rows.items:
                return [self._rows(argument, where, made, rows.argument, rows.changes)]
            return [
                self._rows(
                    item(self.graph, argument, index), where, made, f"{rows.argument}_{index}"
                )
                for index in rows.items
            ]

    def _rows(
        self,
        values: Any,
        where: tuple[Any, ...],
        made: PlanNodes,
        name: str,
        changes: bool = False,
    ) -> fx.Node:
        taken = call(self.graph, toma.rows.default, (values, *where), name=f"rows_of_{name}")
        group = made.destinations.meta[PLAN].group
        taken.meta[PLAN] = PlanPart(group, f"rows of {name}", changes)
        return taken

    def _use_rows(
        self, rows: Rows, parts: list[fx.Node], merged: fx.Node, inside: set[fx.Node]
    ) -> None:
        """Replace an argument by the destinations' rows for the nodes inside a site."""
        if not parts:
            return
        argument = placeholder(self.graph, rows.argument)
        takers = [user for user in argument.users if user in inside]
        with self.graph.inserting_before(merged):
            used = self._packed(rows, argument, parts)
        for node in takers:
            node.replace_input_with(argument, used)

    def _packed(self, rows: Rows, argument: fx.Node, parts: list[fx.Node]) -> fx.Node:
        """Pack the rows into the form that attention takes."""
        count = len(argument.meta["val"]) if rows.items else 1
        if rows.dim == 0:
            tables = call(self.graph, arguments.rotary_tables, tuple(parts), name="tables")
            if count == len(parts) and rows.items:
                return tables
            parts = [item(self.graph, tables, place) for place in range(len(parts))]
        if not rows.items:
            return parts[0]
        given = dict(zip(rows.items, parts, strict=True))
        every = (given.get(i) or item(self.graph, argument, i) for i in range(count))
        return call(self.graph, arguments.several, tuple(every), name=rows.argument)


def _is_planned(node: fx.Node) -> bool:
    """Return whether a node belongs to a plan, which is made from the unmerged tokens."""
    return node.target in _PLANNING


_PLANNING = (
    plan.region_layout,
    plan.text_tokens,
    plan.unmerged_tokens,
    arguments.between,
    arguments.expect_value,
    toma.select.default,
    toma.weigh.default,
    toma.fixed_weights.default,
    toma.merge.default,
)


def _token_input(call: fx.Node) -> fx.Node:
    """Return the node with a submodule's tokens: ``hidden_states``, or the first argument."""
    tokens = call.kwargs.get("hidden_states", call.args[0] if call.args else None)
    if not isinstance(tokens, fx.Node):
        raise CaptureError(f"the call of {call.target!r} has no token input: {call.format_node()}")
    return tokens


def _outputs(call: fx.Node, outputs: tuple[int, ...] | None) -> tuple[fx.Node, ...]:
    if outputs is None:
        return (call,)
    # The outputs may be taken from a node that checks the call's outputs and passes them on.
    sources = {call, *call.users}
    return tuple(
        item
        for source in sources
        for item in source.users
        if item.target is operator.getitem and item.args[0] in sources and item.args[1] in outputs
    )
