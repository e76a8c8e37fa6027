"""Where tokens can be merged."""

from typing import Any

import pytest
import torch
from torch import fx, nn

from tests.passes.blocks import COMPONENTS, block_of, calls, capture, row_of
from toma_fx.errors import CaptureError
from toma_fx.families import leaf_value
from toma_fx.passes.capture import capture_block
from toma_fx.passes.pipeline import run_passes
from toma_fx.passes.sites import SITES, FindSites, FoundSite, Site, token_input


def find(block: nn.Module, components: tuple[str, ...], *sites: Site) -> fx.GraphModule:
    every = sites or row_of(block).sites
    return run_passes(capture(block), [FindSites(sites=every, components=components)])


def summary(found: FoundSite) -> tuple[Any, ...]:
    """Components, where tokens enter and leave, and the layer that made them."""
    leave = {node.target if node.op == "call_module" else node.args[1] for node in found.leave}
    return found.site.components, tuple(n.target for n in found.enter), leave


@pytest.mark.parametrize(
    ("name", "components", "expected"),
    [
        (
            "unet",
            COMPONENTS,
            [
                (("self_attention",), ("attn1",), {"attn1"}),
                (("cross_attention",), ("attn2",), {"attn2"}),
                (("mlp",), ("ff",), {"ff"}),
            ],
        ),
        ("unet", ("mlp",), [(("mlp",), ("ff",), {"ff"})]),
        ("unet", ("cross_attention",), [(("cross_attention",), ("attn2",), {"attn2"})]),
        (
            "flux_double",
            COMPONENTS,
            # Of two outputs of attention, the first is the image's.
            [(("self_attention",), ("attn",), {0}), (("mlp",), ("ff",), {"ff"})],
        ),
        ("flux_double", ("cross_attention",), []),
        (
            "flux_single",
            COMPONENTS,
            [(("self_attention", "mlp"), ("attn", "proj_mlp"), {"proj_out"})],
        ),
        ("flux_single", ("self_attention",), [(("self_attention",), ("attn",), {"attn"})]),
        ("flux_single", ("mlp",), [(("mlp",), ("proj_mlp",), {"act_mlp"})]),
    ],
)
def test_sites_that_serve_the_wanted_components(
    name: str, components: tuple[str, ...], expected: list[Any]
) -> None:
    gm = find(block_of(name), components)
    assert [summary(found) for found in gm.meta[SITES]] == expected
    for found in gm.meta[SITES]:
        assert all(token_input(node) is found.tokens for node in found.enter)


def test_nothing_is_rewritten() -> None:
    block = block_of("flux_single")
    before, after = capture(block), find(block, COMPONENTS)
    assert str(after.graph) == str(before.graph)
    assert calls(after) == calls(before)


def test_a_block_without_cross_attention() -> None:
    """diffusers leaves the layer out, and so its site is none."""
    block = block_of("unet")
    block.attn2 = None
    gm = find(block, COMPONENTS)
    assert [found.site.components for found in gm.meta[SITES]] == [("self_attention",), ("mlp",)]


def test_a_site_whose_layers_take_different_tokens() -> None:
    site = Site(components=("mlp",), enter=("attn1", "ff"), leave="ff")
    message = r"attn1, ff must take the same tokens, but take \{norm\d, norm\d\}"
    with pytest.raises(CaptureError, match=message):
        find(block_of("unet"), ("mlp",), site)


class CalledTwice(nn.Module):
    """Runs one layer on each half of its tokens, as a chunked MLP does."""

    def __init__(self) -> None:
        super().__init__()
        self.ff = nn.Linear(4, 4)

    def forward(self, hidden_states: Any, attention_kwargs: Any = None) -> Any:
        first, second = hidden_states[:, ::2], hidden_states[:, 1::2]
        return torch.cat([self.ff(first), self.ff(second)], dim=1)


def test_a_layer_that_is_called_twice() -> None:
    """To merge the tokens of one of its calls would be half of what was asked."""
    examples = {"hidden_states": torch.empty(2, 64, 4, device="meta")}
    gm = capture_block(CalledTwice(), examples, "attention_kwargs", leaf_value)
    site = Site(components=("mlp",), enter=("ff",), leave="ff")
    with pytest.raises(CaptureError):
        FindSites(sites=(site,), components=("mlp",)).apply(gm)


@pytest.mark.parametrize("arguments", [(), (1.0,)])
def test_a_layer_without_token_input(arguments: tuple[Any, ...]) -> None:
    node = fx.Graph().call_module("ff", arguments)
    with pytest.raises(CaptureError, match="the call of 'ff' has no token input: %ff"):
        token_input(node)
