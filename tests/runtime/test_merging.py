"""Merge weights, merge and unmerge: their algebra, and the reference implementation."""

import functools
import math
import re
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tests import reference
from tests.runtime.tokens import cut, random_tokens
from toma_fx.errors import InputError
from toma_fx.runtime.merging import fixed_weights, gather, merge, rows, unmerge, weigh
from toma_fx.runtime.regions import layout
from toma_fx.runtime.selector import select

WEIGHINGS = pytest.mark.parametrize(
    ("merge_over", "back", "temperature"),
    [
        pytest.param(over, back, temperature, id=f"{over}, {back}, {temperature}")
        for over in ("region", "image")
        for back, temperatures in (
            ("transpose", (0.001, 0.01, 0.1, 1.0)),
            # At 1.0 all destinations are nearly the same mean, which cannot be undone.
            ("pinv", (0.001, 0.01, 0.1)),
        )
        for temperature in temperatures
    ],
)
LAYOUT = layout([48], 16, 0.5)
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])


def plan_of(
    tokens: Tensor, temperature: float, merge_over: str = "region", back: str = "transpose"
) -> tuple[Tensor, Tensor]:
    """Weights with half of the tokens kept, in regions of 16."""
    destinations = select(tokens, cut(tokens), "facility_location")
    return weigh(tokens, destinations, cut(tokens), temperature, merge_over, back)


@WEIGHINGS
@DTYPES
def test_shapes_and_dtype(
    dtype: torch.dtype, merge_over: str, back: str, temperature: float
) -> None:
    tokens = random_tokens(2, 48, 6).to(dtype)
    merging, spreading = plan_of(tokens, temperature, merge_over, back)
    regions, size, keep = (3, 16, 8) if merge_over == "region" else (1, 48, 24)
    assert merging.shape == (2, regions, keep, size)
    assert spreading.shape == (2, regions, size, keep)
    assert merging.dtype == spreading.dtype == dtype


@pytest.mark.parametrize(
    "how", [lambda f: f, functools.partial(torch.compile, backend="aot_eager")]
)
def test_autocast_leaves_the_plan_alone(how: Any) -> None:
    tokens = random_tokens(2, 48, 6)
    expected = plan_of(tokens, 0.001)
    with torch.autocast("cpu", torch.bfloat16):
        assert (tokens @ tokens.mT).dtype == torch.bfloat16
        made = how(torch.ops.toma.select)(tokens, LAYOUT, "facility_location")
        weights = how(torch.ops.toma.weigh)(tokens, made, LAYOUT, 0.001, "region", "transpose")
    assert torch.equal(made, select(tokens, LAYOUT, "facility_location"))
    for weight, like in zip(weights, expected, strict=True):
        torch.testing.assert_close(weight, like)


@WEIGHINGS
def test_rows_of_both_weights_sum_to_one(merge_over: str, back: str, temperature: float) -> None:
    merging, spreading = plan_of(random_tokens(2, 48, 6), temperature, merge_over, back)
    for weight in (merging, spreading):
        total = weight.sum(dim=-1)
        torch.testing.assert_close(total, torch.ones_like(total))


@pytest.mark.parametrize("merge_over", ["region", "image"])
def test_weights_are_shares(merge_over: str) -> None:
    for weight in plan_of(random_tokens(2, 48, 6), 0.01, merge_over):
        assert (weight >= 0).all()


@WEIGHINGS
@pytest.mark.parametrize("text_tokens", [0, 5])
def test_a_constant_field_comes_back_unchanged(
    text_tokens: int, merge_over: str, back: str, temperature: float
) -> None:
    """This is what forbids to unmerge by the transpose of the normalised weight."""
    weights = plan_of(random_tokens(2, 48, 6), temperature, merge_over, back)
    check_constant_field(weights, text_tokens)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("merge_over", ["region", "image"])
def test_a_constant_field_comes_back_unchanged_in_half_precision(
    merge_over: str, dtype: torch.dtype
) -> None:
    weights = plan_of(random_tokens(2, 48, 6).to(dtype), 0.001, merge_over)
    check_constant_field(weights, text_tokens=5)


def check_constant_field(weights: tuple[Tensor, Tensor], text_tokens: int) -> None:
    merging, spreading = weights
    text = random_tokens(2, text_tokens, 9, seed=1).to(merging.dtype)
    field = random_tokens(2, 1, 9, seed=2).to(merging.dtype).expand(-1, 48, -1)
    tokens = torch.cat([text, field], dim=1)

    merged = merge(tokens, merging, LAYOUT)
    assert merged.shape == (2, text_tokens + 24, 9)
    assert torch.equal(merged[:, :text_tokens], text)
    returned = unmerge(merged, spreading, LAYOUT)
    assert torch.equal(returned[:, :text_tokens], text)
    torch.testing.assert_close(returned, tokens)


@pytest.mark.parametrize("merge_over", ["region", "image"])
@pytest.mark.parametrize("temperature", [0.001, 0.01, 0.1])
def test_the_pseudo_inverse_undoes_the_merge(temperature: float, merge_over: str) -> None:
    merging, spreading = plan_of(random_tokens(2, 48, 6), temperature, merge_over, "pinv")
    product = merging @ spreading
    torch.testing.assert_close(product, torch.eye(product.shape[-1]).expand_as(product))
    # And of all that do, it is the one of Moore and Penrose: the way there and back is a projection
    # at right angles.
    there_and_back = spreading @ merging
    torch.testing.assert_close(there_and_back, there_and_back.mT)


def test_a_small_temperature_assigns_each_token_to_its_nearest_destination() -> None:
    tokens = random_tokens(2, 48, 6)
    layout = cut(tokens, ratio=0.75)
    destinations = select(tokens, layout, "facility_location")
    merging, spreading = weigh(tokens, destinations, layout, 1e-7, "region", "transpose")

    unit = F.normalize(tokens, dim=-1)
    kept = gather(unit, destinations).unflatten(1, (3, 4))
    nearest = (unit.unflatten(1, (3, 16)) @ kept.mT).argmax(dim=-1)
    assert torch.equal(spreading, F.one_hot(nearest, 4).float())
    # A destination is then the plain mean of its cluster, and every token takes its cluster's mean.
    spread = unmerge(merge(tokens, merging, layout), spreading, layout).unflatten(1, (3, 16))
    for sample in range(2):
        for region in range(3):
            for cluster in range(4):
                members = nearest[sample, region] == cluster
                mean = tokens.unflatten(1, (3, 16))[sample, region, members].mean(dim=0)
                torch.testing.assert_close(
                    spread[sample, region, members], mean.expand(int(members.sum()), -1)
                )


def test_a_large_temperature_gives_every_destination_the_mean_of_its_region() -> None:
    tokens = random_tokens(2, 48, 6)
    merging, _ = plan_of(tokens, 1e7)
    mean = tokens.unflatten(1, (3, 16)).mean(dim=2, keepdim=True).expand(-1, -1, 8, -1)
    torch.testing.assert_close(merge(tokens, merging, LAYOUT).unflatten(1, (3, 8)), mean)


def test_with_every_token_kept_merge_and_unmerge_only_change_the_order() -> None:
    tokens = random_tokens(2, 48, 6)
    layout = cut(tokens, ratio=0.0)
    destinations = select(tokens, layout, "facility_location")
    merging, spreading = weigh(tokens, destinations, layout, 1e-7, "region", "transpose")
    merged = merge(tokens, merging, layout)
    assert torch.equal(merged, gather(tokens, destinations))
    assert torch.equal(unmerge(merged, spreading, layout), tokens)


@WEIGHINGS
@pytest.mark.parametrize("region_tokens", [16, 32])
def test_against_the_reference(
    region_tokens: int, merge_over: str, back: str, temperature: float
) -> None:
    options = reference.ReferenceOptions(
        region="stripe",
        region_tokens=region_tokens,
        merge_over=merge_over,
        unmerge=back,
        temperature=temperature,
    )
    tokens = random_tokens(2, 64, 6)
    plan = reference.make_plan(tokens, reference.split_regions(8, 8, options), options)

    destinations = plan.destinations_BM.unflatten(1, (-1, region_tokens // 2))
    layout = cut(tokens, region_tokens)
    merging, spreading = weigh(tokens, destinations, layout, temperature, merge_over, back)
    # What it is used for: another width, and text tokens in front.
    values = random_tokens(2, 3 + 64, 10, seed=1)
    merged = merge(values, merging, layout)
    # A logit is a cosine over the temperature, and so is its rounding error.
    close: dict[str, Any] = {"rtol": 1e-6 / temperature, "atol": 1e-6 / temperature}
    torch.testing.assert_close(merged, reference.merge(plan, values, text=3), **close)
    torch.testing.assert_close(
        unmerge(merged, spreading, layout), reference.unmerge(plan, merged, text=3), **close
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("back", ["transpose", "pinv"])
def test_weights_are_computed_in_float32(back: str, dtype: torch.dtype) -> None:
    """One bfloat16 step of a cosine near 1 is 4 logits at a temperature of 0.001."""
    tokens = random_tokens(2, 48, 64).to(dtype)
    low = plan_of(tokens, 0.001, back=back)
    high = plan_of(tokens.float(), 0.001, back=back)
    for narrow, wide in zip(low, high, strict=True):
        assert torch.equal(narrow, wide.to(dtype))


def test_no_gradient_reaches_the_tokens_through_the_weights() -> None:
    tokens = random_tokens(1, 48, 6).requires_grad_()
    assert not any(weight.requires_grad for weight in plan_of(tokens, 0.01))


def test_gradients_go_through_merge_and_unmerge() -> None:
    weights = [weight.double() for weight in plan_of(random_tokens(2, 48, 6), 0.1)]
    tokens = random_tokens(2, 2 + 48, 3).double().requires_grad_()
    assert torch.autograd.gradcheck(
        lambda tokens: unmerge(merge(tokens, weights[0], LAYOUT), weights[1], LAYOUT), tokens
    )


@given(
    regions=st.integers(1, 4),
    size=st.integers(1, 12),
    text_tokens=st.integers(0, 3),
    ratio=st.floats(0, 1, exclude_max=True),
    merge_over=st.sampled_from(["region", "image"]),
)
def test_any_size(regions: int, size: int, text_tokens: int, ratio: float, merge_over: str) -> None:
    tokens = random_tokens(2, regions * size, 4)
    layout = cut(tokens, size, ratio)
    destinations = select(tokens, layout, "facility_location")
    merging, spreading = weigh(tokens, destinations, layout, 0.01, merge_over, "transpose")
    with_text = torch.cat([random_tokens(2, text_tokens, 4, seed=1), tokens], dim=1)
    merged = merge(with_text, merging, layout)
    assert merged.shape == (2, text_tokens + destinations[0].numel(), 4)
    assert unmerge(merged, spreading, layout).shape == with_text.shape
    # Merging makes means, and a mean lies between the least and the greatest.
    assert merged.min() >= with_text.min() - 1e-5
    assert merged.max() <= with_text.max() + 1e-5


@pytest.mark.parametrize(
    "tokens",
    [
        torch.ones(1, 32, 4),
        torch.zeros(1, 32, 4),
        torch.tensor([1.0, -1.0]).repeat(1, 16)[..., None],
    ],
    ids=["flat", "zero", "opposites"],
)
@pytest.mark.parametrize("back", ["transpose", "pinv"])
def test_weights_of_degenerate_tokens_are_finite(tokens: Tensor, back: str) -> None:
    merging, spreading = plan_of(tokens, 0.001, back=back)
    for weight in (merging, spreading):
        total = weight.sum(dim=-1)
        torch.testing.assert_close(total, torch.ones_like(total))


def test_a_token_that_is_not_a_number_shows_in_its_own_region_only() -> None:
    tokens = random_tokens(1, 48, 6)
    tokens[0, 20] = math.nan
    merging, spreading = plan_of(tokens, 0.01)
    result = unmerge(merge(tokens, merging, LAYOUT), spreading, LAYOUT)
    assert result[:, 20].isnan().all()
    assert result[:, :16].isfinite().all()
    assert result[:, 32:].isfinite().all()


def test_fixed_weights_depend_on_nothing_but_shapes() -> None:
    destinations = select(torch.zeros(2, 48, 6), LAYOUT, "grid")
    first = fixed_weights(random_tokens(2, 48, 6), destinations, LAYOUT)
    torch.manual_seed(0)
    before = torch.get_rng_state()
    second = fixed_weights(random_tokens(2, 48, 6, seed=1), destinations.flip(1), LAYOUT)
    assert torch.equal(torch.get_rng_state(), before)
    for one, other in zip(first, second, strict=True):
        assert torch.equal(one, other)


@DTYPES
def test_fixed_weights_are_shares_like_those_of_weigh(dtype: torch.dtype) -> None:
    tokens = random_tokens(2, 48, 6).to(dtype)
    destinations = select(tokens, LAYOUT, "grid")
    fixed = fixed_weights(tokens, destinations, LAYOUT)
    looked_up = weigh(tokens, destinations, LAYOUT, 0.1, "region", "transpose")
    for weight, like in zip(fixed, looked_up, strict=True):
        assert weight.shape == like.shape
        assert weight.dtype == dtype
        assert (weight > 0).all()
        total = weight.float().sum(dim=-1)
        # Sixteen roundings of shares that add up to 1.
        torch.testing.assert_close(
            total, torch.ones_like(total), rtol=torch.finfo(dtype).eps, atol=0
        )


def test_gather_takes_each_images_own_rows() -> None:
    tokens = random_tokens(2, 48, 6)
    destinations = select(tokens, LAYOUT, "facility_location")
    own = gather(tokens, destinations)
    table = gather(tokens[0], destinations)
    for image in range(2):
        index = destinations[image].flatten()
        assert torch.equal(own[image], tokens[image, index])
        assert torch.equal(table[image], tokens[0, index])


AROUND = pytest.mark.parametrize(("before", "after"), [(0, 0), (5, 0), (0, 3), (5, 3)])
COMPLEX = [torch.float32, torch.bfloat16, torch.int64, torch.bool, torch.complex64]


def kept_rows(destinations: Tensor, image: int, before: int, after: int) -> Tensor:
    """Indices of the rows that an image keeps, of 48 tokens between others."""
    total = before + 48 + after
    return torch.cat(
        [
            torch.arange(before),
            before + destinations[image].flatten(),
            torch.arange(total - after, total),
        ]
    )


def values_of(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    values = random_tokens(*shape)
    return torch.complex(values, values + 1) if dtype.is_complex else (9 * values).to(dtype)


@AROUND
@pytest.mark.parametrize("dtype", COMPLEX)
@pytest.mark.parametrize("more", [(), (6,), (6, 4)], ids=str)
def test_rows_of_a_table_are_each_images_own(
    more: tuple[int, ...], dtype: torch.dtype, before: int, after: int
) -> None:
    table = values_of(before + 48 + after, *more, dtype=dtype)
    destinations = select(random_tokens(2, 48, 6), LAYOUT, "facility_location")
    taken = rows(table, destinations, 0, before, after)
    assert taken.shape == (2, before + 24 + after, *more)
    for image in range(2):
        assert torch.equal(taken[image], table[kept_rows(destinations, image, before, after)])


@AROUND
@pytest.mark.parametrize("dtype", COMPLEX)
@pytest.mark.parametrize("more", [(), (6,), (1, 6), (6, 4)], ids=str)
@pytest.mark.parametrize("batch", [1, 2])
def test_rows_behind_a_batch(
    batch: int, more: tuple[int, ...], dtype: torch.dtype, before: int, after: int
) -> None:
    """One sample's values serve all."""
    values = values_of(batch, before + 48 + after, *more, dtype=dtype)
    destinations = select(random_tokens(2, 48, 6), LAYOUT, "facility_location")
    taken = rows(values, destinations, 1, before, after)
    assert taken.shape == (2, before + 24 + after, *more)
    for image in range(2):
        kept = kept_rows(destinations, image, before, after)
        assert torch.equal(taken[image], values.expand(2, *values.shape[1:])[image, kept])


@AROUND
@pytest.mark.parametrize("dtype", [torch.float32, torch.bool])
@pytest.mark.parametrize("more", [(), (1, 1), (2, 3)], ids=str)
def test_rows_of_a_mask_of_keys(
    more: tuple[int, ...], dtype: torch.dtype, before: int, after: int
) -> None:
    mask = values_of(2, *more, before + 48 + after, dtype=dtype)
    destinations = select(random_tokens(2, 48, 6), LAYOUT, "facility_location")
    taken = rows(mask, destinations, -1, before, after)
    assert taken.shape == (2, *more, before + 24 + after)
    for image in range(2):
        kept = kept_rows(destinations, image, before, after)
        assert torch.equal(taken[image], mask[image][..., kept])


@pytest.mark.parametrize(("dim", "shape"), [(0, (56, 3)), (1, (2, 56, 3)), (-1, (2, 3, 56))])
@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128])
def test_gradients_go_through_rows(dtype: torch.dtype, dim: int, shape: tuple[int, ...]) -> None:
    destinations = select(random_tokens(2, 48, 6), LAYOUT, "facility_location")
    values = values_of(*shape, dtype=dtype).to(dtype).requires_grad_()
    assert torch.autograd.gradcheck(lambda each: rows(each, destinations, dim, 5, 3), values)


@AROUND
def test_tokens_around_those_that_merge_pass_through(before: int, after: int) -> None:
    """As many as are said to stand behind; the others stand before."""
    image, text = random_tokens(2, 48, 9), random_tokens(2, before + after, 9, seed=1)
    first, last = text[:, :before], text[:, before:]
    merging, spreading = plan_of(random_tokens(2, 48, 6), 0.1)
    merged = merge(torch.cat([first, image, last], dim=1), merging, LAYOUT, after)
    assert torch.equal(merged, torch.cat([first, merge(image, merging, LAYOUT), last], dim=1))
    returned = unmerge(merged, spreading, LAYOUT, after)
    alone = unmerge(merge(image, merging, LAYOUT), spreading, LAYOUT)
    assert torch.equal(returned, torch.cat([first, alone, last], dim=1))


def test_gradients_go_through_merge_and_unmerge_between_other_tokens() -> None:
    weights = [weight.double() for weight in plan_of(random_tokens(2, 48, 6), 0.1)]
    tokens = random_tokens(2, 2 + 48 + 3, 3).double().requires_grad_()
    assert torch.autograd.gradcheck(
        lambda tokens: unmerge(merge(tokens, weights[0], LAYOUT, 3), weights[1], LAYOUT, 3), tokens
    )


@pytest.mark.parametrize(
    ("shape", "batch", "layout"),
    [
        pytest.param((3, 48, 6), 3, (8, 16, 48, 3), id="batch"),
        pytest.param((2, 64, 6), 2, (8, 16, 64, 4), id="tokens"),
        pytest.param((2, 48, 6), 2, (4, 16, 48, 3), id="ratio"),
    ],
)
def test_destinations_of_other_tokens(
    shape: tuple[int, ...], batch: int, layout: tuple[int, ...]
) -> None:
    destinations = select(random_tokens(2, 48, 6), LAYOUT, "grid")
    message = (
        f"destinations of shape (2, 3, 8) do not fit tokens of shape {shape} (B, N, D) and their "
        f"layout, for which (B, R, m) is {(batch, layout[3], layout[0])}; make them with select on "
        "these tokens and this layout"
    )
    with pytest.raises(InputError, match=re.escape(f"weigh: {message}")):
        weigh(random_tokens(*shape), destinations, layout, 0.1, "region", "transpose")
    with pytest.raises(InputError, match=re.escape(f"fixed_weights: {message}")):
        fixed_weights(random_tokens(*shape), destinations, layout)


@pytest.mark.parametrize(
    ("shape", "after"),
    [((3, 48, 6), 0), ((2, 23, 6), 0), ((2, 50, 6), 30)],
    ids=["batch", "tokens", "after"],
)
def test_a_weight_of_other_tokens(shape: tuple[int, ...], after: int) -> None:
    merging, spreading = plan_of(random_tokens(2, 48, 6), 0.1)
    tokens = random_tokens(*shape)
    for operator, name, weight, count in (
        (merge, "merge", merging, 48),
        (unmerge, "unmerge", spreading, 24),
    ):
        message = (
            f"{name}: weight of shape {tuple(weight.shape)} is for batch 2 and {count} tokens, but "
            f"the tokens have shape {shape}; use the plan made from these tokens"
        )
        with pytest.raises(InputError, match=re.escape(message)):
            operator(tokens, weight, LAYOUT, after)


@pytest.mark.parametrize(
    "layout", [(8, 16, 64, 4), (4, 16, 48, 3), (8, 16, 32, 2, 16, 2), (12, 24, 48, 2)]
)
def test_a_weight_of_another_layout(layout: tuple[int, ...]) -> None:
    tokens = random_tokens(2, 48, 6)
    merging, spreading = plan_of(tokens, 0.1)
    for operator, weight in ((merge, merging), (unmerge, spreading)):
        message = (
            f"{operator.__name__}: weight of shape {tuple(weight.shape)} has (R, n, m) = "
            f"(3, 16, 8), but its layout has {(sum(layout[3::2]), layout[1], layout[0])}, or "
        )
        with pytest.raises(InputError, match=re.escape(message)):
            operator(tokens, weight, layout)
