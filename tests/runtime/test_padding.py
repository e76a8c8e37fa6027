"""Padded regions: every region comes out as if it were alone, and padding is worth nothing.

The reference here handles one region after another, from lists of its real tokens.
"""

import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tests.runtime.tokens import random_tokens, regions_of, signs
from toma_fx.runtime.merging import fixed_weights, merge, unmerge, weigh
from toma_fx.runtime.regions import is_padded, kept, layout
from toma_fx.runtime.selector import GAIN_STEPS, SELECTORS, pseudo_random, select

LAYOUTS = [
    pytest.param((4, 8, 30, 4), id="one grid"),
    pytest.param((3, 7, 20, 3, 13, 2, 5, 1), id="three grids"),
    pytest.param((5, 9, 9, 1, 4, 1), id="a grid of fewer tokens than are kept"),
    pytest.param(layout([1100, 1357], 64, 0.5), id="many regions"),
    pytest.param(layout([241, 100], 64, 0.25), id="few regions"),
]
EVERY_LAYOUT = pytest.mark.parametrize("cut", LAYOUTS)
SOME_SEGMENTS = st.lists(st.integers(1, 120), min_size=1, max_size=3)


def greedy(tokens_cD: Tensor, keep: int) -> list[int]:
    """Facility location in one region, each gain counted anew."""
    unit = F.normalize(tokens_cD, dim=-1)
    similarity = (unit @ unit.T).tolist()
    picks: list[int] = []
    for _ in range(min(keep, len(unit))):
        best, most = -1, -1
        for token in range(len(unit)):
            if token in picks:
                continue
            gain = 0.0
            for other in range(len(unit)):
                covered = max([similarity[other][pick] for pick in picks], default=-1.0)
                gain += max(0.0, similarity[other][token] - covered)
            if round(gain * GAIN_STEPS) > most:
                best, most = token, round(gain * GAIN_STEPS)
        picks.append(best)
    return picks


def weigh_alone(
    tokens_cD: Tensor, picks: Sequence[int], temperature: float, back: str
) -> tuple[Tensor, Tensor]:
    """Merge weight ``(m, c)`` and unmerge weight ``(c, m)`` of one region."""
    unit = F.normalize(tokens_cD, dim=-1)
    share = (unit @ unit[list(picks)].T / temperature).softmax(dim=-1)
    merging = (share / share.sum(dim=0)).T
    return merging, torch.linalg.pinv(merging) if back == "pinv" else share


@pytest.mark.parametrize(
    "cut", [(4, 8, 30, 4), (3, 7, 20, 3, 13, 2, 5, 1), (5, 9, 9, 1, 4, 1), (7, 13, 100, 8)]
)
@pytest.mark.parametrize("seed", range(3))
def test_picks_are_those_of_a_search_in_each_region_alone(cut: tuple[int, ...], seed: int) -> None:
    tokens = signs(2, sum(cut[2::2]), 16, seed)
    for image, destinations in zip(tokens, select(tokens, cut, "facility_location"), strict=True):
        for region, chosen in zip(regions_of(cut), destinations.tolist(), strict=True):
            alone = [region[pick] for pick in greedy(image[list(region)], cut[0])]
            assert chosen == alone + [region[-1]] * (cut[0] - len(alone))


@given(segments=SOME_SEGMENTS, region_tokens=st.integers(2, 40), ratio=st.floats(0, 0.9))
def test_padding_changes_no_pick(segments: list[int], region_tokens: int, ratio: float) -> None:
    """Each region again, as a grid of its own with one region and no padding."""
    cut = layout(segments, region_tokens, ratio)
    tokens = signs(1, sum(segments), 16, seed=len(segments))
    for selector in ("facility_location", "grid"):
        (together,) = select(tokens, cut, selector)
        for region, chosen in zip(regions_of(cut), together, strict=True):
            count = len(region)
            if count < cut[0]:
                assert set(chosen.tolist()) == set(region)
                continue
            alone = select(tokens[:, list(region)], (cut[0], count, count, 1), selector)
            assert torch.equal(chosen, region[0] + alone[0, 0])


@EVERY_LAYOUT
@pytest.mark.parametrize("back", ["transpose", "pinv"])
def test_merge_and_unmerge_are_those_of_each_region_alone(cut: tuple[int, ...], back: str) -> None:
    tokens = random_tokens(2, sum(cut[2::2]), 24)
    destinations = select(tokens, cut, "facility_location")
    merging, spreading = weigh(tokens, destinations, cut, 0.1, "region", back)
    values = random_tokens(2, 3 + tokens.shape[1], 10, seed=1)
    merged = merge(values, merging, cut)
    returned = unmerge(merged, spreading, cut)

    assert merged.shape == (2, 3 + kept(cut), 10)
    assert returned.shape == values.shape
    assert torch.equal(merged[:, :3], values[:, :3])
    assert torch.equal(returned[:, :3], values[:, :3])
    for image in range(2):
        for number, region in enumerate(regions_of(cut)):
            at = list(region)
            picks = (destinations[image, number] - region[0]).tolist()
            there, back_again = weigh_alone(tokens[image, at], picks, 0.1, back)
            alone = there @ values[image, 3:][at]
            together = merged[image, 3:][number * cut[0] : (number + 1) * cut[0]]
            close: dict[str, Any] = {"rtol": 1e-4, "atol": 1e-4}
            torch.testing.assert_close(together, alone, **close)
            torch.testing.assert_close(returned[image, 3:][at], back_again @ alone, **close)


def weights_of(tokens: Tensor, cut: tuple[int, ...], how: str) -> tuple[Tensor, Tensor]:
    destinations = select(tokens, cut, "facility_location")
    if how == "fixed":
        return fixed_weights(tokens, destinations, cut)
    return weigh(tokens, destinations, cut, 0.01, "region", how)


@EVERY_LAYOUT
@pytest.mark.parametrize("how", ["transpose", "pinv", "fixed"])
def test_padding_weighs_exactly_nothing_and_tokens_share_everything(
    cut: tuple[int, ...], how: str
) -> None:
    merging, spreading = weights_of(random_tokens(2, sum(cut[2::2]), 24), cut, how)
    regions = regions_of(cut)
    assert merging.shape == (2, len(regions), cut[0], cut[1])
    assert spreading.shape == (2, len(regions), cut[1], cut[0])
    for number, region in enumerate(regions):
        assert (merging[:, number, :, len(region) :] == 0).all()
        assert (spreading[:, number, len(region) :] == 0).all()
        for shares in (merging[:, number], spreading[:, number, : len(region)]):
            total = shares.sum(dim=-1)
            torch.testing.assert_close(total, torch.ones_like(total))


@EVERY_LAYOUT
def test_weights_over_the_image_know_no_padding(cut: tuple[int, ...]) -> None:
    tokens = random_tokens(2, sum(cut[2::2]), 24)
    destinations = select(tokens, cut, "facility_location")
    merging, spreading = weigh(tokens, destinations, cut, 0.1, "image", "transpose")
    assert merging.shape == (2, 1, kept(cut), tokens.shape[1])
    assert spreading.shape == (2, 1, tokens.shape[1], kept(cut))
    for image in range(2):
        there, back = weigh_alone(tokens[image], destinations[image].flatten().tolist(), 0.1, "")
        torch.testing.assert_close(merging[image, 0], there)
        torch.testing.assert_close(spreading[image, 0], back)
    merged = merge(tokens, merging, cut)
    torch.testing.assert_close(merged, merging[:, 0] @ tokens)
    torch.testing.assert_close(unmerge(merged, spreading, cut), spreading[:, 0] @ merged)


@EVERY_LAYOUT
@pytest.mark.parametrize("back", ["transpose", "pinv"])
def test_a_constant_field_comes_back_unchanged(cut: tuple[int, ...], back: str) -> None:
    merging, spreading = weights_of(random_tokens(2, sum(cut[2::2]), 24), cut, back)
    field = random_tokens(2, 1, 9).expand(-1, sum(cut[2::2]), -1)
    torch.testing.assert_close(unmerge(merge(field, merging, cut), spreading, cut), field)


@pytest.mark.parametrize("selector", SELECTORS)
@pytest.mark.parametrize("segments", [[1100, 1357], [100, 241], [96, 64]])
def test_grids_do_not_influence_each_other(segments: list[int], selector: str) -> None:
    """Nothing of the first grid's changes with the second, and no token crosses over."""
    cut = layout(segments, 64, 0.5)
    border, regions = segments[0], cut[3]
    tokens = random_tokens(1, sum(segments), 16)
    changed = tokens.clone()
    changed[:, border:] = random_tokens(1, segments[1], 16, seed=1)

    results = []
    for each in (tokens, changed):
        destinations = select(each, cut, selector)
        assert (destinations[:, :regions] < border).all()
        assert (destinations[:, regions:] >= border).all()
        merging, spreading = weigh(each, destinations, cut, 0.1, "region", "transpose")
        merged = merge(each, merging, cut)
        by_region = [part[:, :regions] for part in (destinations, merging, spreading)]
        returned = unmerge(merged, spreading, cut)
        results.append([*by_region, merged[:, : regions * cut[0]], returned[:, :border]])
    for before, after in zip(*results, strict=True):
        assert torch.equal(before, after)
    # Where a token goes: a mark on one grid is seen nowhere in the other.
    marked = torch.zeros_like(tokens)
    marked[:, :border] = 1
    merged = merge(marked, merging, cut)
    assert (merged[:, regions * cut[0] :] == 0).all()
    assert (unmerge(merged, spreading, cut)[:, border:] == 0).all()


@EVERY_LAYOUT
def test_a_token_that_is_not_a_number_shows_in_its_own_region_only(cut: tuple[int, ...]) -> None:
    for region in regions_of(cut)[:4]:
        for token in (region[0], region[-1]):  # the last is what padding repeats
            tokens = random_tokens(1, sum(cut[2::2]), 16)
            tokens[0, token] = math.nan
            merging, spreading = weights_of(tokens, cut, "transpose")
            result = unmerge(merge(tokens, merging, cut), spreading, cut)
            bad = result.isnan().any(dim=-1)[0]
            assert bad[token]
            assert set(bad.nonzero().flatten().tolist()) <= set(region)


def test_random_picks_come_last_from_padding() -> None:
    cut = (4, 9, 26, 3)
    number = pseudo_random(torch.empty(0), (3, 9))
    (picks,) = select(torch.zeros(1, 26, 1), cut, "random")
    for region, chosen, drawn in zip(regions_of(cut), picks.tolist(), number, strict=True):
        order = drawn[: len(region)].argsort().tolist()
        assert chosen == [region[place] for place in order[:4]]


@given(
    segments=SOME_SEGMENTS,
    region_tokens=st.integers(1, 40),
    ratio=st.floats(0, 0.95),
    text_tokens=st.integers(0, 3),
    merge_over=st.sampled_from(["region", "image"]),
    selector=st.sampled_from(list(SELECTORS)),
)
def test_any_grids(
    segments: list[int],
    region_tokens: int,
    ratio: float,
    text_tokens: int,
    merge_over: str,
    selector: str,
) -> None:
    tokens = random_tokens(2, sum(segments), 4)
    cut = layout(segments, region_tokens, ratio)
    destinations = select(tokens, cut, selector)
    merging, spreading = weigh(tokens, destinations, cut, 0.01, merge_over, "transpose")
    with_text = torch.cat([random_tokens(2, text_tokens, 4, seed=1), tokens], dim=1)
    merged = merge(with_text, merging, cut)
    assert merged.shape == (2, text_tokens + kept(cut), 4)
    returned = unmerge(merged, spreading, cut)
    assert returned.shape == with_text.shape
    # Merging makes means, and a mean lies between the least and the greatest.
    for result in (merged, returned):
        assert result.min() >= with_text.min() - 1e-5
        assert result.max() <= with_text.max() + 1e-5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_padded_weights_are_computed_in_float32(dtype: torch.dtype) -> None:
    cut = layout([241, 100], 64, 0.5)
    assert is_padded(cut)
    tokens = random_tokens(2, 341, 64).to(dtype)
    low, high = (weights_of(each, cut, "transpose") for each in (tokens, tokens.float()))
    for narrow, wide in zip(low, high, strict=True):
        assert torch.equal(narrow, wide.to(dtype))


def test_gradients_go_through_padded_merge_and_unmerge() -> None:
    cut = (3, 7, 13, 2, 5, 1)
    merging, spreading = (w.double() for w in weights_of(random_tokens(2, 18, 6), cut, "transpose"))
    tokens = random_tokens(2, 2 + 18, 3).double().requires_grad_()
    assert torch.autograd.gradcheck(
        lambda tokens: unmerge(merge(tokens, merging, cut), spreading, cut), tokens
    )
