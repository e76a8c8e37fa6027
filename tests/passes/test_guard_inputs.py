"""Inputs that speak of single image tokens are refused, and all others pass."""

from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

from tests.passes.blocks import (
    COMPONENTS,
    NAMES,
    block_of,
    calls,
    capture,
    expect_change,
    guard_pass,
    inputs_of,
    is_equal,
    kwargs_argument,
    merge_pass,
    rewrite,
    run,
)
from toma_fx.errors import InputError

EVERY_BLOCK = pytest.mark.parametrize("name", NAMES)
TEXT_MASK = torch.linspace(-1, 1, 14).reshape(2, 1, 7)
IMAGE_MASK = torch.linspace(-1, 1, 128).reshape(2, 1, 64)


def guarded(block: nn.Module, components: tuple[str, ...] = COMPONENTS) -> fx.GraphModule:
    merge = merge_pass(block, components=components)
    return rewrite(block, merge, guard_pass(block, components))


def unguarded(block: nn.Module, components: tuple[str, ...] = COMPONENTS) -> fx.GraphModule:
    return rewrite(block, merge_pass(block, components=components))


@EVERY_BLOCK
def test_a_call_without_such_inputs_computes_what_it_did(name: str) -> None:
    block, inputs = block_of(name), inputs_of(name)
    assert is_equal(run(guarded(block), inputs), run(unguarded(block), inputs))


@pytest.mark.parametrize(
    ("name", "components", "masks"),
    [
        ("unet", COMPONENTS, 2),
        ("unet", ("self_attention", "mlp"), 1),
        ("unet", ("cross_attention",), 1),
        ("unet", ("mlp",), 0),
        ("flux_double", COMPONENTS, 0),
        ("flux_single", COMPONENTS, 0),
    ],
)
def test_what_is_changed(name: str, components: tuple[str, ...], masks: int) -> None:
    block = block_of(name)
    gm = capture(block)
    before = calls(gm)
    # The attention kwargs, and the masks of merged components.
    assert guard_pass(block, components).apply(gm) == 1 + masks
    gm.graph.lint()
    assert not before - calls(gm)
    assert (calls(gm) - before).total() == calls(gm)["pass_on_mask"] == masks


@pytest.mark.parametrize("mask", [TEXT_MASK, TEXT_MASK[:, 0]], ids=["bias", "keys"])
def test_a_mask_of_text_tokens_reaches_cross_attention(mask: Tensor) -> None:
    block, inputs = block_of("unet"), inputs_of("unet")
    masked = run(guarded(block), inputs, encoder_attention_mask=mask)
    assert is_equal(masked, run(unguarded(block), inputs, encoder_attention_mask=mask))
    assert not is_equal(masked, run(guarded(block), inputs))


@pytest.mark.parametrize(
    ("name", "components"),
    [("attention_mask", ("cross_attention", "mlp")), ("encoder_attention_mask", ("mlp",))],
)
def test_the_mask_of_a_component_that_is_not_merged(name: str, components: tuple[str, ...]) -> None:
    block, inputs = block_of("unet"), inputs_of("unet")
    mask = {name: IMAGE_MASK if name == "attention_mask" else TEXT_MASK.expand(-1, 64, -1)}
    masked = run(guarded(block, components), inputs, **mask)
    assert is_equal(masked, run(unguarded(block, components), inputs, **mask))
    assert not is_equal(masked, run(guarded(block, components), inputs))


@pytest.mark.parametrize(
    "mask",
    [{"attention_mask": IMAGE_MASK}, {"encoder_attention_mask": TEXT_MASK.expand(-1, 64, -1)}],
    ids=["self-attention", "cross-attention"],
)
def test_a_mask_of_image_tokens_is_refused(mask: dict[str, Tensor]) -> None:
    ((name, tensor),) = mask.items()
    message = rf"^{name} of shape \(2, {tensor.shape[1]}, {tensor.shape[2]}\) masks single image"
    with pytest.raises(InputError, match=message):
        run(guarded(block_of("unet")), inputs_of("unet"), **mask)


@pytest.mark.parametrize(
    ("name", "key"),
    [("unet", "gligen"), *((n, k) for n in NAMES for k in ("ip_adapter_masks", "attention_mask"))],
)
def test_attention_kwargs_about_image_tokens_are_refused(name: str, key: str) -> None:
    block = block_of(name)
    kwargs: dict[str, Any] = {kwargs_argument(block): {key: IMAGE_MASK}}
    with pytest.raises(InputError, match=f"^the attention kwarg '{key}' refers to the full grid"):
        run(guarded(block), inputs_of(name), **kwargs)


def test_attention_that_sees_every_token_takes_them() -> None:
    block, inputs = block_of("flux_double"), inputs_of("flux_double")
    gm = guarded(block, ("mlp",))
    run(gm, inputs, joint_attention_kwargs={"ip_adapter_masks": IMAGE_MASK})
    unet = guarded(block_of("unet"), ("mlp",))
    with pytest.raises(InputError, match="'gligen'"):  # which changes the tokens themselves
        run(unet, inputs_of("unet"), cross_attention_kwargs={"gligen": IMAGE_MASK})


def test_graph() -> None:
    block = block_of("unet")
    expect_change(capture(block), rewrite(block, guard_pass(block)), "guard_inputs.unet")
