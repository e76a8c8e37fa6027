"""Finding the sites of a block: where its tokens can be merged and where they must come back.

Nothing is rewritten. Before and after are the same graph; ``gm.meta["toma_sites"]`` then holds::

    FoundSite(components=('self_attention',), enter=(attn1,), tokens=norm1, leave=(attn1,))
    FoundSite(components=('mlp',), enter=(ff,), tokens=norm3, leave=(ff,))
"""

import operator
from collections.abc import Container, Iterable, Iterator
from dataclasses import dataclass
from typing import ClassVar

from torch import fx

from toma_fx.errors import CaptureError
from toma_fx.passes.pipeline import Pass

SITES = "toma_sites"
"""The key of the found sites in ``gm.meta``."""


@dataclass(frozen=True, kw_only=True)
class Site:
    """A part of a block that can run on merged tokens; a line of the table of block structures."""

    components: tuple[str, ...]
    """Components that the site serves."""
    enter: tuple[str, ...]
    """Submodules whose token input is merged; all take the same tokens."""
    leave: str
    """Submodule whose output is unmerged."""
    outputs: tuple[int, ...] | None = None
    """Which of its outputs are image tokens, when it returns several."""


@dataclass(frozen=True)
class FoundSite:
    """A site in a graph."""

    site: Site
    enter: tuple[fx.Node, ...]
    tokens: fx.Node
    leave: tuple[fx.Node, ...]


def token_input(call: fx.Node) -> fx.Node:
    """The node that gives a submodule its tokens: ``hidden_states``, or the first argument."""
    tokens = call.kwargs.get("hidden_states", call.args[0] if call.args else None)
    if not isinstance(tokens, fx.Node):
        raise CaptureError(f"the call of {call.target!r} has no token input: {call.format_node()}")
    return tokens


@dataclass(frozen=True, kw_only=True)
class FindSites(Pass):
    """Find the sites that serve the wanted components, the most comprehensive ones first.

    Raises:
        CaptureError: when a submodule is called twice, or those of a site take different tokens.
    """

    name: ClassVar[str] = "find_sites"

    sites: tuple[Site, ...]
    components: tuple[str, ...]

    def apply(self, gm: fx.GraphModule) -> int:
        calls: dict[str, fx.Node] = {}
        for node in gm.graph.nodes:
            if node.op == "call_module" and calls.setdefault(str(node.target), node) is not node:
                raise CaptureError(
                    f"{node.target!r} is called twice, {calls[node.target]} and {node}; a site "
                    "needs one call, so leave this block out with skip"
                )
        found = tuple(_found(site, calls) for site in choose(self.sites, self.components, calls))
        gm.meta[SITES] = found
        return len(found)


def choose(
    sites: Iterable[Site], components: Iterable[str], present: Container[str]
) -> Iterator[Site]:
    """The sites that serve the wanted components, each once, the most comprehensive sites first.

    Args:
        sites: of a block's row in the table of block structures.
        components: the wanted ones.
        present: the submodules that the block has.
    """
    wanted = set(components)
    for site in sorted(sites, key=lambda site: -len(site.components)):
        complete = all(name in present for name in (*site.enter, site.leave))
        if complete and wanted.issuperset(site.components):
            wanted -= set(site.components)
            yield site


def _found(site: Site, calls: dict[str, fx.Node]) -> FoundSite:
    enter = tuple(calls[target] for target in site.enter)
    tokens = {token_input(call) for call in enter}
    if len(tokens) != 1:
        raise CaptureError(f"{', '.join(site.enter)} must take the same tokens, but take {tokens}")
    return FoundSite(site, enter, tokens.pop(), _outputs(calls[site.leave], site.outputs))


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
