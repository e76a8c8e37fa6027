"""Grids cut into regions: their counts, their destinations, and the places of their tokens."""

import itertools
import random
from fractions import Fraction

import pytest
import torch
from diffusers.pipelines.flux.pipeline_flux_kontext import PREFERRED_KONTEXT_RESOLUTIONS
from hypothesis import given
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

from tests.runtime.tokens import random_tokens, regions_of
from toma_fx.errors import InputError
from toma_fx.runtime.regions import (
    WHOLE_IMAGE,
    expect_tokens,
    gathered,
    is_padded,
    kept,
    kept_tokens,
    layout,
    places_of,
    real_places,
    spread,
)

SDXL_BUCKETS = [
    *[(512, 2048), (512, 1984), (512, 1920), (512, 1856), (576, 1792), (576, 1728), (576, 1664)],
    *[(640, 1600), (640, 1536), (704, 1472), (704, 1408), (704, 1344), (768, 1344), (768, 1280)],
    *[(832, 1216), (832, 1152), (896, 1152), (896, 1088), (960, 1088), (960, 1024), (1024, 1024)],
]
KONTEXT = [height // 16 * (width // 16) for height, width in PREFERRED_KONTEXT_RESOLUTIONS]
SDXL = [height // side * (width // side) for height, width in SDXL_BUCKETS for side in (16, 32)]
_RANDOM = random.Random(0)
ANY = [_RANDOM.randint(16, 160) * _RANDOM.randint(16, 160) for _ in range(500)]

SEGMENTS = st.lists(st.integers(1, 3000), min_size=1, max_size=3)


def assert_near_what_was_asked(segments: list[int], ratio: float) -> None:
    cut = layout(segments, 64, ratio)
    assert abs(kept(cut) / sum(segments) - (1 - ratio)) < 0.03, cut
    counts = [len(region) for region in regions_of(cut)]
    assert 32 <= min(counts) <= max(counts) <= min(128, cut[1]), cut


@pytest.mark.parametrize("ratio", [0.25, 0.5, 0.75])
@pytest.mark.parametrize("sizes", [KONTEXT, SDXL, ANY], ids=["kontext", "sdxl", "any"])
def test_every_size_keeps_the_share_asked_for_in_regions_near_the_size_asked_for(
    sizes: list[int], ratio: float
) -> None:
    for tokens in sizes:
        assert_near_what_was_asked([tokens], ratio)


@pytest.mark.parametrize("ratio", [0.25, 0.5, 0.75])
def test_so_does_every_pair_of_an_image_and_its_reference(ratio: float) -> None:
    for pair in [*itertools.product(KONTEXT, KONTEXT), *itertools.pairwise(ANY)]:
        assert_near_what_was_asked(list(pair), ratio)


@given(segments=SEGMENTS, region_tokens=st.integers(0, 200), percent=st.integers(0, 99))
def test_what_holds_for_every_layout(segments: list[int], region_tokens: int, percent: int) -> None:
    cut = layout(segments, region_tokens, percent / 100)
    assert all(type(number) is int for number in cut)
    keep, places, *grids = cut
    if region_tokens == WHOLE_IMAGE:
        assert grids == [sum(segments), 1]
    else:
        assert grids[::2] == segments
    assert 1 <= keep <= places
    counts = [len(region) for region in regions_of(cut)]
    assert 1 <= min(counts) <= max(counts) <= places
    assert is_padded(cut) == (min(counts) < places)


@given(
    segments=st.lists(st.integers(1100, 20000), min_size=1, max_size=3),
    region_tokens=st.integers(2, 64),
    percent=st.integers(0, 99),
)
def test_padding_costs_less_than_three_percent_of_the_tokens(
    segments: list[int], region_tokens: int, percent: int
) -> None:
    cut = layout(segments, region_tokens, percent / 100)
    rounding = 0.5 / min(cut[1], region_tokens)
    wanted = max(1 - percent / 100, 1 / region_tokens)
    assert abs(kept(cut) / sum(segments) - wanted) <= 0.03 + rounding


@pytest.mark.parametrize(
    ("segments", "wanted", "expected"),
    [
        pytest.param([4096], 64, (32, 64, 4096, 64), id="divides"),
        pytest.param([72 * 56], 64, (32, 64, 4032, 63), id="divides, though the grid is odd"),
        pytest.param([128], 64, (32, 64, 128, 2), id="divides a small grid"),
        pytest.param([1100], 64, (32, 64, 1100, 18), id="does not divide"),
        pytest.param([4096, 1357], 64, (32, 64, 4096, 64, 1357, 22), id="does not divide one"),
        pytest.param([38 * 26], 64, (38, 76, 988, 13), id="a larger divisor"),
        pytest.param([31 * 17], 64, (33, 66, 527, 8), id="a divisor that is too small"),
        pytest.param([997], 64, (31, 63, 997, 16), id="prime"),
        pytest.param([988, 64], 64, (33, 66, 988, 15, 64, 1), id="two grids have no divisor"),
        pytest.param([4096, 500], 64, (32, 64, 4096, 64, 500, 8), id="one grid is small"),
        pytest.param([10], 64, (5, 10, 10, 1), id="fewer tokens than wanted"),
        pytest.param([988], WHOLE_IMAGE, (494, 988, 988, 1), id="whole image"),
        pytest.param([988, 12], WHOLE_IMAGE, (500, 1000, 1000, 1), id="whole sequence"),
        pytest.param([1], 64, (1, 1, 1, 1), id="one token"),
        pytest.param([], 64, (1, 1), id="no tokens"),
        pytest.param([], WHOLE_IMAGE, (1, 1), id="no image"),
    ],
)
def test_layouts(segments: list[int], wanted: int, expected: tuple[int, ...]) -> None:
    assert layout(segments, wanted, 0.5) == expected


@pytest.mark.parametrize(("ratio", "regions"), [(0.25, 25), (0.5, 17), (0.75, 17)])
def test_many_regions_have_the_places_asked_for_whatever_the_size(
    ratio: float, regions: int
) -> None:
    for tokens in range(64 * regions, 64 * regions + 200):
        keep = kept_tokens(64, ratio)
        assert layout([tokens], 64, ratio) == (keep, 64, tokens, -(-tokens // 64))


def test_a_region_that_keeps_nearly_all_its_tokens_has_them() -> None:
    """At ratio 0 in padded regions of 64, some would be asked for more tokens than they hold."""
    for percent in range(20):
        for tokens in range(1100, 4100, 50):
            cut = layout([tokens], 64, percent / 100)
            if cut[1] == 64:
                assert min(len(region) for region in regions_of(cut)) >= cut[0]


@given(tokens=st.integers(1, 5000), percent=st.integers(0, 99))
def test_kept_tokens_is_the_nearest_number_and_never_none(tokens: int, percent: int) -> None:
    kept = kept_tokens(tokens, percent / 100)

    assert 1 <= kept <= tokens
    exact = Fraction(tokens * (100 - percent), 100)
    assert kept == 1 or abs(kept - exact) <= Fraction(1, 2)


def test_nothing_is_merged_away_at_ratio_zero() -> None:
    assert [kept_tokens(tokens, 0.0) for tokens in range(1, 100)] == list(range(1, 100))


@given(segments=SEGMENTS, region_tokens=st.integers(0, 200))
def test_places_hold_each_token_once_and_padding_repeats_the_last_of_its_region(
    segments: list[int], region_tokens: int
) -> None:
    cut = layout(segments, region_tokens, 0.5)
    tokens = torch.arange(sum(segments)).reshape(1, -1, 1)
    places = spread(tokens, cut)
    real = real_places(cut, tokens)
    counts = places_of(cut, tokens).counts
    for region, places_n, real_n, count in zip(
        regions_of(cut), places[0, ..., 0].tolist(), real.tolist(), counts.tolist(), strict=True
    ):
        padding = cut[1] - len(region)
        assert places_n == [*region, *[region[-1]] * padding]
        assert real_n == [True] * len(region) + [False] * padding
        assert count == len(region)
    assert torch.equal(gathered(places, cut), tokens)


def test_without_padding_nothing_is_copied() -> None:
    cut = layout([96, 32], 16, 0.5)
    tokens = random_tokens(2, 128, 4)
    places = spread(tokens, cut)
    assert places.data_ptr() == tokens.data_ptr()
    assert gathered(places, cut).data_ptr() == tokens.data_ptr()


def test_gradients_of_padding_are_added_to_the_token_that_it_repeats() -> None:
    cut = (1, 4, 7, 2)
    tokens = random_tokens(1, 7, 2).requires_grad_()
    spread(tokens, cut).sum().backward()
    assert tokens.grad is not None
    assert tokens.grad[0, :, 0].tolist() == [1, 1, 2, 1, 1, 1, 1]


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((7, 4), r"merge: tokens of shape \(7, 4\) must be \(B, N, D\)"),
        ((1, 9, 4), r"merge: tokens of shape \(1, 9, 4\) \(B, N, D\) do not fit a layout of grids"),
    ],
)
def test_tokens_of_another_layout(shape: tuple[int, ...], message: str) -> None:
    with pytest.raises(InputError, match=message):
        expect_tokens("merge", torch.zeros(shape), (1, 4, 7, 2))


# Places are kept between calls. Each of the following uses a size of its own, so that its first
# call is the first of all.
def test_places_first_found_in_inference_mode_serve_a_call_with_gradients() -> None:
    cut = layout([1201], 64, 0.5)
    with torch.inference_mode():
        spread(torch.zeros(1, 1201, 1), cut)
    tokens = torch.zeros(1, 1201, 1, requires_grad=True)
    gathered(spread(tokens.detach(), cut).requires_grad_(), cut).sum().backward()
    spread(tokens * 1, cut).sum().backward()
    assert tokens.grad is not None


def test_places_first_found_under_tracing_are_not_kept() -> None:
    cut = layout([1203], 64, 0.5)
    with FakeTensorMode():
        spread(torch.zeros(1, 1203, 1), cut)
    assert type(spread(torch.zeros(1, 1203, 1), cut)) is torch.Tensor


def test_places_are_found_once() -> None:
    cut = layout([1213], 64, 0.5)
    like = torch.empty(0)
    assert places_of(cut, like).counts is places_of(cut, like).counts
