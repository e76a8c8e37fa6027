"""The flat graph of a whole model that other code captured, accessed by module paths.

Nothing here is rewritten on its own initiative: `toma_fx.passes.merge` asks where the sites are and
lets them run on merged tokens. `FlatGraph.nodes_of` lists the nodes made by each module's forward::

    'mid_block.attentions.0.transformer_blocks.0.attn1': [linear_7, linear_8, linear_9, view, ...]

The tokens of a site are the first three-dimensional value that its layers read from outside. From
there on, example values tell the rest: a value that leaves the site with fewer tokens than before
is unmerged; any other value, such as text, is passed on unchanged.

**Rotary values.** Flux's attention takes a table of cosines and one of sines, ``(P + N, D)``, and
adds a batch dimension of 1 where it uses them: ``unsqueeze(table, 0)`` in ATen,
``table[None, :, None, :]`` in Python. Destinations differ from sample to sample, so the
destinations' rows, ``(B, P + M, D)``, replace the table at exactly that place; their batch is that
dimension.
"""

import copy
import sys
from collections import defaultdict
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from toma_fx.errors import CaptureError
from toma_fx.passes.flat_nodes import innermost, module_stack, operator_name, refused
from toma_fx.passes.flat_values import FlatValues, TokenCounts
from toma_fx.passes.pipeline import FLAT
from toma_fx.passes.plan_nodes import (
    PLAN,
    PlanNodes,
    PlanOptions,
    PlanPart,
    TokenFlow,
    call,
    toma,
)
from toma_fx.passes.sites import FoundSite, Site
from toma_fx.runtime import regions

aten = torch.ops.aten


class FlatGraph:
    """The nodes of each module in a graph.

    Attributes:
        graph: the graph, which the caller rewrites.
        values: example values of its nodes.
        nodes_of: for each module path, the nodes of its calls, in order.
    """

    add = aten.add.Tensor
    subtract = aten.sub.Tensor

    def __init__(self, gm: fx.GraphModule) -> None:
        self.graph = gm.graph
        self.values = FlatValues(gm)
        self._flow: TokenFlow | None = None
        self.nodes_of: dict[str, list[fx.Node]] = defaultdict(list)
        for node in gm.graph.nodes:
            for path in module_stack(node) if node.op.startswith("call_") else ():
                self.nodes_of[path].append(node)

    @classmethod
    def of(cls, gm: fx.GraphModule, flow: TokenFlow | None = None) -> "FlatGraph":
        """Return the graph with the nodes that modules had before the first pass.

        Args:
            gm: the graph module; it stores the result for the passes that follow.
            flow: position of the tokens in the block to be processed next.
        """
        kept = gm.meta.get(FLAT)
        if kept is None or kept.graph is not gm.graph:
            kept = gm.meta[FLAT] = cls(gm)
        flat = copy.copy(kept)
        flat._flow = flow
        return flat

    @contextmanager
    def inserting_before(self, node: fx.Node, serving: fx.Node | None = None) -> Iterator[None]:
        """Give nodes inserted before ``node`` values, and the metadata of the node they serve."""
        serving = node if serving is None else serving
        last = node.prev
        with self.graph.inserting_before(node):
            yield
        while (last := last.next) is not node:
            kept = ("nn_module_stack", "stack_trace", "example_value")
            last.meta |= {key: serving.meta[key] for key in kept if key in serving.meta}
            self.values.set(last, self.values.compute(last))

    def inserting_after(self, node: fx.Node) -> AbstractContextManager[None]:
        """Give nodes inserted after ``node`` values, and the metadata of ``node``."""
        return self.inserting_before(node.next, serving=node)

    def find(self, sites: tuple[Site, ...], block: str) -> list[FoundSite]:
        """Return a block's sites in the order of the graph, so that all can use the first plan.

        Raises:
            CaptureError: when a site takes no tokens, or its submodules take different ones.
        """
        in_order = {node: i for i, node in enumerate(self.graph.nodes)}
        found = [self._found(site, block) for site in sites]
        return sorted(found, key=lambda each: in_order[each.first])

    def _found(self, site: Site, block: str) -> FoundSite:
        assert self._flow is not None
        tokens = self._token_input(site, block)
        image, text = self._token_counts(block)
        readers = tuple(
            node
            for name in site.enter
            for node in self.nodes_of[_join(block, name)]
            if tokens in node.all_input_nodes
        )
        first = min(readers)
        if innermost(first) != block and self.inputs(innermost(first), 3) != [tokens]:
            raise refused(first, "its layer is called several times in this graph")
        joint = tokens.meta["val"].shape[1] - image
        return FoundSite(
            site, tokens, readers, first, text if joint else None, None, (), block, image, text
        )

    def _token_counts(self, block: str) -> tuple[int, int]:
        """Return the numbers of image tokens and text tokens that go through a block."""
        assert self._flow is not None
        region = self.nodes_of[block]
        image, *others = self.inputs(block, ndim=3)
        if self._flow.text is None:
            text = 0
        elif not others:
            raise refused(region[0], "its block reads no text tokens")
        else:
            text_first = self._flow.text_first
            image, others = (others[0], [image]) if text_first else (image, others)
            text = others[0].meta["val"].shape[1]
        counts = image.meta["val"].shape[1], text
        if not all(isinstance(count, int) for count in counts):
            raise refused(region[0], f"the token counts {counts} are not fixed; export fixed sizes")
        return counts

    def _token_input(self, site: Site, block: str) -> fx.Node:
        assert self._flow is not None
        found = set()
        for name in site.enter:
            inputs = self.inputs(_join(block, name), ndim=3)
            found.add(inputs[1 if self._flow.text_first and not name else 0])
        if len(found) != 1:
            raise CaptureError(
                f"{', '.join(site.enter)} must take the same tokens, but take {found}"
            )
        return found.pop()

    def image_tokens(self, found: FoundSite) -> fx.Node:
        """Slice off the text tokens before the site's tokens, at the insertion point."""
        args = (found.tokens, 1, found.before, sys.maxsize)
        return call(self.graph, aten.slice.Tensor, args, "image_tokens")

    def layout(self, tokens: fx.Node, options: PlanOptions) -> list[int]:
        """Return the layout of the image's regions: plain numbers, because sizes are fixed here."""
        value = (
            self.values.compute(tokens) if tokens.meta.get("val") is None else tokens.meta["val"]
        )
        image = value.shape[1]
        layout = regions.layout((image,), options.region_tokens, options.ratio)
        if regions.kept(layout) == image:
            raise refused(tokens, f"the ratio is too small to merge any of {image} tokens")
        return list(layout)

    def leaves(
        self, found: FoundSite, merged: fx.Node, made: PlanNodes
    ) -> Iterator[tuple[fx.Node, list[fx.Node]]]:
        """Run the site on merged tokens; yield each node that leaves it, with its users.

        Raises:
            CaptureError: when a node cannot run on merged tokens, or when they leave elsewhere.
        """
        tokens = found.tokens.meta["val"]
        kept = regions.kept(made.layout)
        counts = TokenCounts(tokens.shape[0], found.text_tokens, found.image_tokens, kept)
        changed = {merged: tokens}
        tables: dict[fx.Node, fx.Node] = {}
        inside = self.nodes_of[found.block]
        leave = set(self.nodes_of[_join(found.block, found.site.leave)])
        for name in found.site.enter:
            for node in self.nodes_of[_join(found.block, name)]:
                self._use_destinations(node, made, counts, changed, tables)
        left, around = False, set(inside)
        for node in inside:
            if not self.values.rerun(node, changed, counts):
                continue
            outside = [user for user in node.users if user not in leave]
            if node in leave and outside:
                yield node, outside
                left = True
            elif not around.issuperset(node.users):
                raise refused(node, f"its tokens leave {found.block} merged")
        if not left:
            raise refused(merged, f"no tokens like its own leave {found.block}")

    def _use_destinations(
        self,
        node: fx.Node,
        made: PlanNodes,
        counts: "TokenCounts",
        changed: dict[fx.Node, Any],
        tables: dict[fx.Node, fx.Node],
    ) -> None:
        """Use the destinations' rows where ``node`` adds a batch dimension to a rotary table."""
        name, table = operator_name(node), node.args[0] if node.args else None
        if name not in ("unsqueeze", "getitem") or not isinstance(table, fx.Node):
            return
        value, index = table.meta["val"], node.args[1]
        leading = (
            index[0] is None if isinstance(index, tuple) else name == "unsqueeze" and index == 0
        )
        rows = counts.text + counts.image
        is_table = isinstance(value, Tensor) and value.shape[:-1] == (rows,)
        if not counts.text or not leading or not is_table:
            return
        if table not in tables:
            with self.inserting_before(node):
                args = (table, made.destinations, 0, counts.text)
                row = call(self.graph, toma.rows.default, args, "rotary")
                group = made.destinations.meta[PLAN].group
                row.meta[PLAN] = PlanPart(group, f"rotary of {table}")
            tables[table] = row
        at = tables[table]
        changed[at] = value.unsqueeze(0)
        if isinstance(index, tuple):
            node.args = (at, (slice(None), *index[1:]))
        else:
            node.replace_all_uses_with(at)

    def inputs(self, path: str, ndim: int) -> list[fx.Node]:
        """Return the tensors of ``ndim`` dimensions that a module's nodes read, in order.

        Those read by its submodules come first: tokens go to a layer, while a mask may not.

        Raises:
            CaptureError: when there is none.
        """
        region = self.nodes_of[path]
        inside = set(region)
        readers = sorted(region, key=lambda node: innermost(node) == path)
        sources = [
            source
            for node in readers
            if any(isinstance(value, Tensor) for value in pytree.tree_leaves(node.meta["val"]))
            for source in node.all_input_nodes
            if source not in inside and getattr(source.meta["val"], "ndim", None) == ndim
        ]
        if not sources:
            raise CaptureError(f"{path!r} takes no tensor of {ndim} dimensions in this graph")
        return list(dict.fromkeys(sources))


def _join(path: str, name: str) -> str:
    return ".".join(filter(None, (path, name)))
