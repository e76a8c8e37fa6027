"""The parts of a block that serve the wanted components, and their places in its graph."""

from typing import Any

import pytest

from tests.passes.blocks import COMPONENTS, block_of, capture, merge_pass, row_of
from toma_fx.passes.block_graph import BlockGraph
from toma_fx.passes.sites import FoundSite, Site, choose_sites


def site(components: str, enter: str, leave: str) -> Site:
    return Site(components=tuple(components.split()), enter=tuple(enter.split()), leave=leave)


ATTENTION, MLP = site("attention", "attn", "attn"), site("mlp", "ff_in", "ff_out")
BOTH = site("attention mlp", "attn ff_in", "out")
PRESENT = {"attn", "ff_in", "ff_out", "out"}


@pytest.mark.parametrize(
    ("wanted", "present", "chosen"),
    [
        ("attention mlp", PRESENT, [BOTH]),
        ("mlp attention cross_attention", PRESENT, [BOTH]),
        ("attention", PRESENT, [ATTENTION]),
        ("mlp", PRESENT, [MLP]),
        ("cross_attention", PRESENT, []),
        ("", PRESENT, []),
        ("attention mlp", PRESENT - {"out"}, [ATTENTION, MLP]),
        ("attention mlp", PRESENT - {"ff_in"}, [ATTENTION]),
        ("attention mlp", PRESENT - {"attn"}, [MLP]),
        ("attention mlp", set(), []),
    ],
)
def test_the_most_comprehensive_sites_come_first(
    wanted: str, present: set[str], chosen: list[Site]
) -> None:
    for given in ([ATTENTION, MLP, BOTH], [BOTH, ATTENTION, MLP]):
        assert list(choose_sites(given, wanted.split(), present)) == chosen


def find(name: str, components: tuple[str, ...]) -> list[FoundSite]:
    block = block_of(name)
    sites = merge_pass(block, components=components).sites
    return BlockGraph(capture(block), row_of(block).flow).find(sites, "")


def summary(found: FoundSite) -> tuple[Any, ...]:
    """Components, where tokens enter and leave, and the layer that made them."""
    leave = {node.target if node.op == "call_module" else node.args[1] for node in found.leave}
    return found.site.components, {n.target for n in found.readers}, leave


@pytest.mark.parametrize(
    ("name", "components", "expected"),
    [
        (
            "unet",
            COMPONENTS,
            [
                (("self_attention",), {"attn1"}, {"attn1"}),
                (("cross_attention",), {"attn2"}, {"attn2"}),
                (("mlp",), {"ff"}, {"ff"}),
            ],
        ),
        ("unet", ("mlp",), [(("mlp",), {"ff"}, {"ff"})]),
        ("unet", ("cross_attention",), [(("cross_attention",), {"attn2"}, {"attn2"})]),
        (
            "flux_double",
            COMPONENTS,
            # Of two outputs of attention, the first is the image's.
            [(("self_attention",), {"attn"}, {0}), (("mlp",), {"ff"}, {"ff"})],
        ),
        ("flux_double", ("cross_attention",), []),
        (
            "flux_single",
            COMPONENTS,
            [(("self_attention", "mlp"), {"attn", "proj_mlp"}, {"proj_out"})],
        ),
        ("flux_single", ("self_attention",), [(("self_attention",), {"attn"}, {"attn"})]),
        ("flux_single", ("mlp",), [(("mlp",), {"proj_mlp"}, {"act_mlp"})]),
    ],
)
def test_sites_in_the_graph_of_a_block(
    name: str, components: tuple[str, ...], expected: list[Any]
) -> None:
    found = find(name, components)
    assert [summary(each) for each in found] == expected
    for each in found:
        assert all(each.tokens in node.all_input_nodes for node in each.readers)
        assert each.first == min(each.readers)


def test_a_block_without_cross_attention() -> None:
    """diffusers leaves the layer out, and so its site is none."""
    block = block_of("unet")
    block.attn2 = None
    sites = merge_pass(block).sites
    assert [site.components for site in sites] == [("self_attention",), ("mlp",)]
    assert merge_pass(block).apply(capture(block)) == 2
