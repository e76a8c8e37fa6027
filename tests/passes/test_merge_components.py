"""Merge and unmerge around each component, against the reference."""

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
    expect_graph,
    flow_of,
    inputs_of,
    is_equal,
    reference_components,
    reference_group,
    rewrite,
    row_of,
    run,
)
from toma_fx.passes.merge_components import MergeComponents
from toma_fx.passes.pipeline import run_passes
from toma_fx.passes.plan_nodes import PlanOptions
from toma_fx.passes.sites import FindSites
from toma_fx.runtime.regions import WHOLE_IMAGE

SIZES: list[Any] = [{"batch": 1, "height": 4}, {"batch": 3, "text_tokens": 1}, {"width": 13}]
EVERY_BLOCK = pytest.mark.parametrize("name", NAMES)


def merge(
    block: nn.Module, components: tuple[str, ...] = COMPONENTS, options: PlanOptions = OPTIONS
) -> fx.GraphModule:
    find = FindSites(sites=row_of(block).sites, components=components)
    return rewrite(block, find, MergeComponents(options=options, flow=flow_of(block)))


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
    merged = run(merge(block, components), inputs)
    group = reference_group(components=components)
    assert_close(merged, reference_components(name, block, group, inputs))
    assert not is_equal(merged, run(block, inputs))


@EVERY_BLOCK
@pytest.mark.parametrize(
    "options",
    [
        replace(OPTIONS, ratio=0.25),
        replace(OPTIONS, ratio=0.75, region_tokens=32),
        replace(OPTIONS, region_tokens=WHOLE_IMAGE),
        replace(OPTIONS, merge_over="image"),
        replace(OPTIONS, unmerge="pinv", temperature=0.01),
    ],
    ids=["0.25", "0.75 of 32", "one region", "over the image", "pinv"],
)
def test_every_option(name: str, options: PlanOptions) -> None:
    block, inputs = block_of(name), inputs_of(name)
    merged = run(merge(block, options=options), inputs)
    expected = reference_components(name, block, reference_group(options), inputs)
    for result, like in zip(merged, expected, strict=True):
        # A logit is a cosine over the temperature, and so is its rounding error.
        close = 1e-6 / options.temperature
        torch.testing.assert_close(result, like, rtol=close, atol=close)


@EVERY_BLOCK
def test_with_every_token_kept_the_block_computes_what_it_did(name: str) -> None:
    block, inputs = block_of(name), inputs_of(name)
    kept = replace(OPTIONS, ratio=0.0, temperature=1e-7)
    assert_close(run(merge(block, options=kept), inputs), run(capture(block), inputs))


@EVERY_BLOCK
def test_one_graph_serves_every_size(name: str) -> None:
    block = block_of(name)
    gm = merge(block, options=replace(OPTIONS, ratio=0.0, temperature=1e-7))
    for sizes in SIZES:
        inputs = inputs_of(name, **sizes)
        assert_close(run(gm, inputs), run(block, inputs))


@pytest.mark.parametrize(
    ("name", "sites", "others"),
    [
        # Each site has a plan of its own, whose two weights are taken out of a pair.
        ("unet", 3, {"getitem": 6}),
        # Flux also counts its text tokens and picks rotary values for attention; single-stream
        # blocks make the plan from a slice, because text precedes the image in one sequence.
        ("flux_double", 2, {"getitem": 7, "getattr": 1, "rotary_at": 1, "rotary_tables": 1}),
        ("flux_single", 1, {"getitem": 6, "getattr": 1, "rotary_at": 1, "rotary_tables": 1}),
    ],
)
def test_what_is_inserted(name: str, sites: int, others: dict[str, int]) -> None:
    block = block_of(name)
    find = FindSites(sites=row_of(block).sites, components=COMPONENTS)
    changes: list[int] = []
    gm = run_passes(
        capture(block),
        [find, MergeComponents(options=OPTIONS, flow=flow_of(block))],
        lambda each, gm, changed: changes.append(changed),
    )
    assert changes == [sites, sites]
    before = calls(capture(block))
    assert not before - calls(gm)
    operators = ("select", "weigh", "merge", "unmerge")
    inserted = Counter({f"toma.{operator}": sites for operator in operators}) + Counter(others)
    assert calls(gm) - before == inserted


@EVERY_BLOCK
def test_fixed_weights_never_look_at_the_tokens(name: str) -> None:
    gm = merge(block_of(name), options=replace(OPTIONS, selector="fixed"))
    counts = calls(gm)
    assert counts["toma.weigh"] == 0
    assert counts["toma.fixed_weights"] == counts["toma.merge"] > 0
    for select in gm.graph.find_nodes(op="call_function", target=torch.ops.toma.select.default):
        assert select.args[3] == "grid"


@EVERY_BLOCK
def test_graph(name: str) -> None:
    expect_graph(merge(block_of(name)), f"merge_components.{name}")
