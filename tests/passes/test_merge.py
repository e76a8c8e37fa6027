"""Merge and unmerge around components and once around the block, against the reference."""

import itertools
from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import fx, nn

from tests.passes.blocks import (
    COMPONENTS,
    NAMES,
    OPTIONS,
    assert_close,
    block_of,
    calls,
    capture,
    expect_change,
    inputs_of,
    is_equal,
    merge_pass,
    reference_components,
    reference_group,
    reference_once,
    rewrite,
    row_of,
    run,
)
from toma_fx.errors import CaptureError
from toma_fx.passes.capture import capture_block
from toma_fx.passes.merge import Merge
from toma_fx.passes.plan_nodes import PlanOptions, TokenFlow
from toma_fx.passes.sites import Site
from toma_fx.runtime.regions import WHOLE_IMAGE

EVERY_BLOCK = pytest.mark.parametrize("name", NAMES)
EVERY_PLACEMENT = pytest.mark.parametrize("placement", ["component", "block"])
EVERY_RESIDUAL = pytest.mark.parametrize("residual", ["keep", "replace"])
OTHER_OPTIONS: dict[str, dict[str, Any]] = {
    "0.5": {},
    "0.25": {"ratio": 0.25},
    "0.75 of 32": {"ratio": 0.75, "region_tokens": 32},
    "one region": {"region_tokens": WHOLE_IMAGE},
    "over the image": {"merge_over": "image"},
    "pinv": {"unmerge": "pinv", "temperature": 0.01},
}
EVERY_OPTION = pytest.mark.parametrize("changes", OTHER_OPTIONS.values(), ids=OTHER_OPTIONS)
SIZES: list[Any] = [{"batch": 1, "height": 4}, {"batch": 3, "text_tokens": 1}, {"width": 13}]


def merge(block: nn.Module, placement: str = "component", **options: Any) -> fx.GraphModule:
    return rewrite(block, merge_pass(block, placement, **options))


def once(block: nn.Module, **options: Any) -> fx.GraphModule:
    return merge(block, "block", **{"residual": "keep", **options})


@EVERY_BLOCK
@pytest.mark.parametrize(
    "components",
    [
        chosen
        for count in (1, 2, 3)
        for chosen in itertools.combinations(COMPONENTS, count)
        if chosen != ("cross_attention",)  # which Flux has not, so that nothing would be merged
    ],
    ids=", ".join,
)
def test_every_choice_of_components(name: str, components: tuple[str, ...]) -> None:
    block, inputs = block_of(name), inputs_of(name)
    merged = run(merge(block, components=components), inputs)
    group = reference_group(components=components)
    assert_close(merged, reference_components(name, block, group, inputs))
    assert not is_equal(merged, run(block, inputs))


@EVERY_BLOCK
@EVERY_OPTION
def test_every_option_around_components(name: str, changes: dict[str, Any]) -> None:
    block, inputs = block_of(name), inputs_of(name)
    options = replace(OPTIONS, **changes)
    merged = run(merge(block, options=options), inputs)
    expected = reference_components(name, block, reference_group(options), inputs)
    assert_like(merged, expected, options)


@EVERY_BLOCK
@EVERY_RESIDUAL
@EVERY_OPTION
def test_every_option_around_the_block(name: str, residual: str, changes: dict[str, Any]) -> None:
    block, inputs = block_of(name), inputs_of(name)
    options = replace(OPTIONS, **changes)
    merged = run(once(block, residual=residual, options=options), inputs)
    group = reference_group(options, residual=residual, placement="block")
    assert_like(merged, reference_once(name, block, group, inputs), options)
    assert not is_equal(merged, run(block, inputs))


def assert_like(
    results: tuple[torch.Tensor, ...], expected: tuple[torch.Tensor, ...], options: PlanOptions
) -> None:
    # A logit is a cosine over the temperature, and so is its rounding error.
    close = 1e-6 / options.temperature
    for result, like in zip(results, expected, strict=True):
        torch.testing.assert_close(result, like, rtol=close, atol=close)


@EVERY_BLOCK
@EVERY_PLACEMENT
@EVERY_RESIDUAL
def test_with_every_token_kept_one_graph_is_the_block_at_every_size(
    name: str, placement: str, residual: str
) -> None:
    block = block_of(name)
    kept = replace(OPTIONS, ratio=0.0, temperature=1e-7)
    gm = merge(block, placement, residual=residual, options=kept)
    assert_close(run(gm, inputs_of(name)), run(capture(block), inputs_of(name)))
    for sizes in SIZES:
        inputs = inputs_of(name, **sizes)
        assert_close(run(gm, inputs), run(block, inputs))


def test_a_kept_residual_keeps_the_detail_of_the_tokens() -> None:
    """With one destination per region, a replaced residual makes all tokens of it alike."""
    block, inputs = block_of("unet"), inputs_of("unet")
    options = replace(OPTIONS, ratio=0.99)
    (kept,) = run(once(block, residual="keep", options=options), inputs)
    (replaced,) = run(once(block, residual="replace", options=options), inputs)

    def detail(tokens: torch.Tensor) -> torch.Tensor:
        regions = tokens.reshape(2, 4, 16, -1)
        return regions - regions.mean(dim=2, keepdim=True)

    torch.testing.assert_close(detail(kept), detail(inputs["hidden_states"]))
    torch.testing.assert_close(detail(replaced), torch.zeros_like(detail(replaced)))


# Flux also counts its text tokens and picks rotary values for attention.
FLUX = {"getitem": 3, "getattr": 1, "toma.rows": 2, "rotary_tables": 1}
# Single-stream blocks make the plan from a slice, because text precedes the image in one sequence.
SLICED = {**FLUX, "getitem": 4}


@pytest.mark.parametrize(
    ("name", "placement", "sites", "others"),
    [
        ("unet", "component", 3, {}),
        ("flux_double", "component", 2, FLUX),
        ("flux_single", "component", 1, SLICED),
        ("unet", "block", 1, {}),
        ("flux_double", "block", 1, FLUX),
        ("flux_single", "block", 1, FLUX),
    ],
)
@EVERY_RESIDUAL
def test_what_is_inserted(
    name: str, placement: str, sites: int, others: dict[str, int], residual: str
) -> None:
    block = block_of(name)
    gm = capture(block)
    before = calls(gm)
    assert merge_pass(block, placement, residual=residual).apply(gm) == sites
    gm.graph.lint()
    assert not before - calls(gm)
    operators = ("toma.select", "toma.weigh", "toma.merge", "toma.unmerge", "region_layout")
    inserted = Counter(dict.fromkeys(operators, sites)) + Counter(others)
    inserted += Counter({"getitem": 2 * sites})  # each plan's two weights, out of a pair
    if residual == "keep":
        inserted += Counter({"sub": sites, "add": sites})
    assert calls(gm) - before == inserted


@EVERY_BLOCK
def test_every_layer_runs_on_merged_tokens(name: str) -> None:
    """All but the text's layers of a double-stream block, which have always run on fewer."""
    block, inputs = block_of(name), inputs_of(name)
    lengths: dict[str, int] = {}
    for child, module in block.named_children():

        def note(_: Any, args: Any, kwargs: Any, child: str = child) -> None:
            lengths[child] = kwargs.get("hidden_states", args[0] if args else None).shape[1]

        module.register_forward_pre_hook(note, with_kwargs=True)
    run(once(block), inputs)
    merged, text = 32, 7
    expected = merged + text * (name == "flux_single")
    of_text = {child for child in lengths if child.endswith("context")}
    assert {lengths[child] for child in of_text} <= {text}
    assert {lengths[child] for child in lengths.keys() - of_text} == {expected}


@EVERY_BLOCK
def test_fixed_weights_never_look_at_the_tokens(name: str) -> None:
    gm = merge(block_of(name), options=replace(OPTIONS, selector="fixed"))
    counts = calls(gm)
    assert counts["toma.weigh"] == 0
    assert counts["toma.fixed_weights"] == counts["toma.merge"] > 0
    for select in gm.graph.find_nodes(op="call_function", target=torch.ops.toma.select.default):
        assert select.args[2] == "fixed"


def test_a_site_whose_layers_take_different_tokens() -> None:
    block = block_of("unet")
    site = Site(components=("mlp",), enter=("attn1", "ff"), leave="ff")
    message = r"attn1, ff must take the same tokens, but take \{norm\d, norm\d\}"
    with pytest.raises(CaptureError, match=message):
        rewrite(block, Merge(flow=row_of(block).flow, sites=(site,)))


class CalledTwice(nn.Module):
    """Runs one layer on each half of its tokens, as a chunked MLP does."""

    def __init__(self) -> None:
        super().__init__()
        self.ff = nn.Linear(4, 4)

    def forward(self, hidden_states: Any, attention_kwargs: Any = None) -> Any:
        first, second = hidden_states[:, ::2], hidden_states[:, 1::2]
        return torch.cat([self.ff(first), self.ff(second)], dim=1)


class OtherName(nn.Module):
    """Gives a layer its tokens under a name that is not one of tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.ff = nn.Linear(4, 4)

    def forward(self, hidden_states: Any, attention_kwargs: Any = None) -> Any:
        return self.ff(input=hidden_states)


@pytest.mark.parametrize(
    ("block", "message"),
    [
        # To merge the tokens of one of its calls would be half of what was asked.
        (CalledTwice(), "'ff' is called twice, ff and ff_1; .* leave this block out with skip"),
        (OtherName(), "the call of 'ff' has no token input: %ff"),
    ],
    ids=["called twice", "other name"],
)
def test_a_layer_whose_tokens_are_not_to_be_found(block: nn.Module, message: str) -> None:
    examples = {"hidden_states": torch.empty(2, 64, 4)}
    gm = capture_block(block, examples, "attention_kwargs", lambda m, args, kw: m(*args, **kw))
    site = Site(components=("mlp",), enter=("ff",), leave="ff")
    with pytest.raises(CaptureError, match=message):
        Merge(flow=TokenFlow(attention_kwargs="attention_kwargs"), sites=(site,)).apply(gm)


@EVERY_BLOCK
def test_graph_of_components(name: str) -> None:
    block = block_of(name)
    expect_change(capture(block), merge(block), f"merge.{name}.component")


@EVERY_BLOCK
@EVERY_RESIDUAL
def test_graph_of_a_block(name: str, residual: str) -> None:
    block = block_of(name)
    after = once(block, residual=residual)
    expect_change(capture(block), after, f"merge.{name}.block.{residual}")
