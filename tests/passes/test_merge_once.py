"""Merge and unmerge once around the block, against the reference."""

from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import fx, nn

from tests.passes.blocks import (
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
    reference_group,
    reference_once,
    rewrite,
    run,
)
from toma_fx.passes.merge_once import MergeOnce
from toma_fx.passes.plan_nodes import PlanOptions
from toma_fx.runtime.regions import WHOLE_IMAGE

EVERY_BLOCK = pytest.mark.parametrize("name", NAMES)
SIZES: list[Any] = [{"batch": 1, "height": 4}, {"batch": 3, "text_tokens": 1}, {"width": 13}]
EVERY_RESIDUAL = pytest.mark.parametrize("residual", ["keep", "replace"])


def merge(
    block: nn.Module, residual: str = "keep", options: PlanOptions = OPTIONS
) -> fx.GraphModule:
    return rewrite(block, MergeOnce(options=options, flow=flow_of(block), residual=residual))


@EVERY_BLOCK
@EVERY_RESIDUAL
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"ratio": 0.25},
        {"ratio": 0.75, "region_tokens": 32},
        {"region_tokens": WHOLE_IMAGE},
        {"merge_over": "image"},
        {"unmerge": "pinv", "temperature": 0.01},
    ],
    ids=["0.5", "0.25", "0.75 of 32", "one region", "over the image", "pinv"],
)
def test_against_the_reference(name: str, residual: str, changes: dict[str, Any]) -> None:
    block, inputs = block_of(name), inputs_of(name)
    options = replace(OPTIONS, **changes)
    merged = run(merge(block, residual, options), inputs)
    group = reference_group(options, residual=residual, placement="block")
    for result, like in zip(merged, reference_once(name, block, group, inputs), strict=True):
        # A logit is a cosine over the temperature, and so is its rounding error.
        close = 1e-6 / options.temperature
        torch.testing.assert_close(result, like, rtol=close, atol=close)
    assert not is_equal(merged, run(block, inputs))


@EVERY_BLOCK
@EVERY_RESIDUAL
def test_with_every_token_kept_the_block_computes_what_it_did(name: str, residual: str) -> None:
    block, inputs = block_of(name), inputs_of(name)
    kept = replace(OPTIONS, ratio=0.0, temperature=1e-7)
    gm = merge(block, residual, kept)
    assert_close(run(gm, inputs), run(capture(block), inputs))
    for sizes in SIZES:
        inputs = inputs_of(name, **sizes)
        assert_close(run(gm, inputs), run(block, inputs))


def test_a_kept_residual_keeps_the_detail_of_the_tokens() -> None:
    """With one destination per region, a replaced residual makes all tokens of it alike."""
    block, inputs = block_of("unet"), inputs_of("unet")
    options = replace(OPTIONS, ratio=0.99)
    (kept,) = run(merge(block, "keep", options), inputs)
    (replaced,) = run(merge(block, "replace", options), inputs)

    def detail(tokens: torch.Tensor) -> torch.Tensor:
        regions = tokens.reshape(2, 4, 16, -1)
        return regions - regions.mean(dim=2, keepdim=True)

    torch.testing.assert_close(detail(kept), detail(inputs["hidden_states"]))
    torch.testing.assert_close(detail(replaced), torch.zeros_like(detail(replaced)))


@EVERY_RESIDUAL
@pytest.mark.parametrize(
    ("name", "others"),
    [
        ("unet", {"getitem": 2}),
        # Flux also counts its text tokens and picks rotary values.
        ("flux_double", {"getitem": 5, "getattr": 1, "rotary_at": 1, "rotary_tables": 1}),
        ("flux_single", {"getitem": 5, "getattr": 1, "rotary_at": 1, "rotary_tables": 1}),
    ],
)
def test_what_is_inserted(name: str, others: dict[str, int], residual: str) -> None:
    block = block_of(name)
    gm = capture(block)
    before = calls(gm)
    assert MergeOnce(options=OPTIONS, flow=flow_of(block), residual=residual).apply(gm) == 1
    gm.graph.lint()
    assert not before - calls(gm)
    operators = ("select", "weigh", "merge", "unmerge")
    inserted = Counter({f"toma.{operator}": 1 for operator in operators}) + Counter(others)
    if residual == "keep":
        inserted += Counter({"sub": 1, "add": 1})
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
    run(merge(block), inputs)
    merged, text = 32, 7
    expected = merged + text * (name == "flux_single")
    of_text = {child for child in lengths if child.endswith("context")}
    assert {lengths[child] for child in of_text} <= {text}
    assert {lengths[child] for child in lengths.keys() - of_text} == {expected}


@EVERY_BLOCK
@EVERY_RESIDUAL
def test_graph(name: str, residual: str) -> None:
    expect_graph(merge(block_of(name), residual), f"merge_once.{name}.{residual}")
