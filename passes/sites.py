"""Sites: parts of a block whose tokens can be merged where they enter and must come back after."""

from collections.abc import Container, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from torch import fx


@dataclass(frozen=True, kw_only=True)
class Site:
    """A part of a block that can run on merged tokens, by the names of the block's submodules."""

    components: tuple[str, ...]
    """Components that the site serves."""
    enter: tuple[str, ...]
    """Submodules whose token input is merged; all take the same tokens. ``""`` is the block."""
    leave: str
    """Submodule whose output is unmerged."""
    outputs: tuple[int, ...] | None = None
    """Which of its outputs are image tokens, when it returns several."""


@dataclass(frozen=True, kw_only=True)
class KeysSite(Site):
    """A self-attention of which the keys and values can merge, and all else keeps its tokens."""


def keys_sites(sites: Iterable[Site], present: Container[str]) -> Iterator[KeysSite]:
    """The self-attentions of a block that attend to the image.

    Args:
        sites: all sites of a block.
        present: the submodules that the block has.
    """
    for site in sites:
        (attention, *more) = site.enter
        if "self_attention" in site.components and not more and attention in present:
            yield KeysSite(components=("self_attention",), enter=(attention,), leave=attention)


WHOLE_BLOCK = Site(components=("self_attention", "cross_attention", "mlp"), enter=("",), leave="")
"""The block itself, merged once around everything in it."""


def choose_sites(
    sites: Iterable[Site], components: Iterable[str], present: Container[str]
) -> Iterator[Site]:
    """The sites that serve the wanted components, the most comprehensive sites first.

    Args:
        sites: all sites of a block.
        components: the wanted ones.
        present: the submodules that the block has.
    """
    wanted = set(components)
    served: set[tuple[str, ...]] = set()
    for site in sorted(sites, key=lambda site: -len(site.components)):
        complete = all(name in present for name in (*site.enter, site.leave))
        # A block may have a component twice, as where it attends twice to the image.
        if complete and (wanted.issuperset(site.components) or site.components in served):
            wanted -= set(site.components)
            served.add(site.components)
            yield site


@dataclass(frozen=True)
class FoundSite:
    """A site in a graph."""

    site: Site
    tokens: fx.Node
    """What goes in: image tokens, after text tokens where both are one sequence."""
    readers: tuple[fx.Node, ...]
    """Nodes of the site that take them."""
    first: fx.Node
    """The first of the site's nodes that take them."""
    before: Any = None
    """Number of tokens before those that merge in ``tokens``, if any: a node or a number."""
    after: Any = None
    """Number of tokens behind them, if any."""
    leave: tuple[fx.Node, ...] = ()
    """In the graph of a block, nodes at which tokens leave the site."""
    block: str = ""
    """In a flat graph, the path of the block, and the tokens that go through it:"""
    image_tokens: int = 0
    text_tokens: int = 0
