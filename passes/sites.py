"""Sites: parts of a block whose tokens can merge on entry and must be unmerged on exit."""

from collections.abc import Container, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from torch import fx


@dataclass(frozen=True, kw_only=True)
class Site:
    """A part of a block that can run on merged tokens, given by names of the block's submodules."""

    components: tuple[str, ...]
    """Components that the site covers."""
    enter: tuple[str, ...]
    """Submodules whose token input is merged; all take the same tokens. ``""`` is the block."""
    leave: str
    """Submodule whose output is unmerged."""
    outputs: tuple[int, ...] | None = None
    """Indices of its outputs with image tokens, if it returns several outputs."""


@dataclass(frozen=True, kw_only=True)
class KeysSite(Site):
    """A self-attention whose keys and values can merge, while all else keeps its tokens."""


def keys_sites(sites: Iterable[Site], present: Container[str]) -> Iterator[KeysSite]:
    """Yield the self-attentions of a block that attend to the image.

    Args:
        sites: all sites of a block.
        present: the submodules that the block has.
    """
    for site in sites:
        (attention, *more) = site.enter
        if "self_attention" in site.components and not more and attention in present:
            yield KeysSite(components=("self_attention",), enter=(attention,), leave=attention)


WHOLE_BLOCK = Site(components=("self_attention", "cross_attention", "mlp"), enter=("",), leave="")
"""The block itself: merge before and unmerge after everything in it."""


def choose_sites(
    sites: Iterable[Site], components: Iterable[str], present: Container[str]
) -> Iterator[Site]:
    """Yield the sites that cover the wanted components, sites of more components first.

    Args:
        sites: all sites of a block.
        components: the wanted components.
        present: the submodules that the block has.
    """
    wanted = set(components)
    served: set[tuple[str, ...]] = set()
    for site in sorted(sites, key=lambda site: -len(site.components)):
        complete = all(name in present for name in (*site.enter, site.leave))
        # A block may have a component twice, for example if it attends to the image twice.
        if complete and (wanted.issuperset(site.components) or site.components in served):
            wanted -= set(site.components)
            served.add(site.components)
            yield site


@dataclass(frozen=True)
class FoundSite:
    """A site in a graph."""

    site: Site
    tokens: fx.Node
    """Input of the site: image tokens, after text tokens if both are one sequence."""
    readers: tuple[fx.Node, ...]
    """Nodes of the site that take the tokens."""
    first: fx.Node
    """First of these nodes."""
    before: Any = None
    """Number of unmerged tokens before the merging ones in ``tokens``, if any: a node or number."""
    after: Any = None
    """Number of unmerged tokens after them, if any."""
    leave: tuple[fx.Node, ...] = ()
    """In the graph of a block, the nodes at which tokens leave the site."""
    block: str = ""
    """In a flat graph, the path of the block; the next two are its token counts."""
    image_tokens: int = 0
    text_tokens: int = 0
