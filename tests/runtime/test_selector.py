"""Destinations: facility location against its definition, and properties of every selector."""

import itertools
import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tests import reference
from tests.runtime.tokens import cut, random_tokens, regions_of
from toma_fx.errors import InputError
from toma_fx.runtime.regions import layout
from toma_fx.runtime.selector import SELECTORS, facility_location, pseudo_random, select

EVERY_SELECTOR = pytest.mark.parametrize("selector", SELECTORS)


def cosines(tokens_nD: Tensor) -> Tensor:
    unit = F.normalize(tokens_nD.double(), dim=-1)
    return unit @ unit.T


def objective(similarity_nn: Tensor, chosen: list[int] | tuple[int, ...]) -> float:
    """``f(T)`` of Eq. 5, counted from -1, the worst similarity, so that nothing chosen is 0."""
    return (similarity_nn[:, list(chosen)].max(dim=1).values + 1).sum().item()


def exact_greedy(similarity_nn: Tensor, keep: int) -> list[int]:
    """Every pick is the one with which the objective is largest."""
    chosen: list[int] = []
    for _ in range(keep):
        rest = [token for token in range(len(similarity_nn)) if token not in chosen]
        chosen.append(max(rest, key=lambda token: objective(similarity_nn, [*chosen, token])))
    return chosen


def choose(tokens: Tensor, region_tokens: int, ratio: float, selector: str) -> Tensor:
    """Destinations in one grid."""
    return select(tokens, cut(tokens, region_tokens, ratio), selector)


def assert_valid(destinations: Tensor, batch: int, layout: tuple[int, ...]) -> None:
    """As many as asked for, each inside its own region, and distinct where it has enough tokens."""
    regions = regions_of(layout)
    assert destinations.dtype == torch.int64
    assert destinations.shape == (batch, len(regions), layout[0])
    for image in destinations.tolist():
        for chosen, region in zip(image, regions, strict=True):
            assert set(chosen) <= set(region)
            assert len(set(chosen)) == min(len(region), layout[0])


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("keep", [1, 2, 3, 4])
def test_greedy_reaches_its_guaranteed_share_of_the_optimum(keep: int, seed: int) -> None:
    tokens = random_tokens(1, 9, 3, seed=seed)
    similarity = cosines(tokens[0])
    (chosen,) = facility_location(similarity[None].float(), keep).tolist()

    optimum = max(objective(similarity, each) for each in itertools.combinations(range(9), keep))
    reached = objective(similarity, chosen)
    assert (1 - 1 / math.e) * optimum <= reached <= optimum + 1e-6
    if keep == 1:  # One pick is no approximation, but for the steps in which gains are compared.
        assert reached >= optimum - 2**-12


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize(("count", "keep"), [(16, 4), (64, 32), (76, 57)])
def test_picks_are_those_of_a_greedy_search_that_recounts_the_objective(
    count: int, keep: int, seed: int
) -> None:
    similarity = cosines(random_tokens(count, 24, seed=seed))
    (chosen,) = facility_location(similarity[None].float(), keep).tolist()
    exact = exact_greedy(similarity, keep)
    # Gains closer than a step count as equal, so picks may differ, but never what they are worth.
    for picks in range(1, keep + 1):
        worth, best = objective(similarity, chosen[:picks]), objective(similarity, exact[:picks])
        assert worth >= best - picks * 2**-12


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("ratio", [0.25, 0.5, 0.75])
def test_picks_are_those_of_the_reference(ratio: float, seed: int) -> None:
    tokens = random_tokens(2, 96, 8, seed=seed)
    destinations = choose(tokens, 32, ratio, "facility_location")
    for sample, picks_Rm in zip(tokens, destinations.tolist(), strict=True):
        for region, picks in zip(sample.split(32), picks_Rm, strict=True):
            assert [pick % 32 for pick in picks] == reference.select(region, len(picks))


def test_the_first_pick_is_the_token_most_like_all_others() -> None:
    tokens = random_tokens(3, 20, 4)
    picks = choose(tokens, 0, 0.95, "facility_location").flatten()
    expected = torch.stack([cosines(sample).sum(dim=0).argmax() for sample in tokens])
    assert torch.equal(picks, expected)


def test_one_destination_for_each_cluster() -> None:
    """Four well separated directions, sixteen tokens around each."""
    centres = torch.eye(4).repeat_interleave(16, dim=0)
    shuffle = torch.randperm(64, generator=torch.Generator().manual_seed(0))
    tokens = (centres + 0.01 * random_tokens(64, 4))[shuffle]
    destinations = choose(tokens[None], 64, 1 - 4 / 64, "facility_location")
    assert sorted((shuffle[destinations.flatten()] // 16).tolist()) == [0, 1, 2, 3]


def test_length_of_a_token_does_not_matter() -> None:
    tokens = random_tokens(2, 64, 8)
    lengths = 2.0 ** torch.arange(-32, 32)[:, None]  # powers of two, so that rounding is the same
    expected = choose(tokens, 16, 0.5, "facility_location")
    assert torch.equal(choose(tokens * lengths, 16, 0.5, "facility_location"), expected)


def test_a_token_that_is_not_finite_is_picked_last() -> None:
    for poison in (math.nan, math.inf, -math.inf):
        tokens = random_tokens(1, 16, 4)
        tokens[0, 5, 2] = poison
        picks = choose(tokens, 16, 0.0, "facility_location").flatten().tolist()
        assert picks[-1] == 5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_similarity_is_counted_in_float32(dtype: torch.dtype) -> None:
    tokens = random_tokens(2, 128, 64).to(dtype)
    destinations = choose(tokens, 32, 0.5, "facility_location")
    assert torch.equal(destinations, choose(tokens.float(), 32, 0.5, "facility_location"))


def test_tokens_that_need_gradients() -> None:
    tokens = random_tokens(1, 32, 4).requires_grad_()
    destinations = choose(tokens, 16, 0.5, "facility_location")
    assert torch.equal(destinations, choose(tokens.detach(), 16, 0.5, "facility_location"))


DEGENERATE: dict[str, Callable[[], Tensor]] = {
    "flat": lambda: torch.ones(2, 48, 4),
    "zero": lambda: torch.zeros(2, 48, 4),
    "duplicates": lambda: random_tokens(2, 3, 4).repeat(1, 16, 1),
    "opposites": lambda: torch.tensor([1.0, -1.0]).repeat(2, 24)[..., None],
    "some NaN": lambda: random_tokens(2, 48, 4).where(random_tokens(2, 48, 4) < 1, math.nan),
    "all NaN": lambda: torch.full((2, 48, 4), math.nan),
    "some inf": lambda: random_tokens(2, 48, 4).where(random_tokens(2, 48, 4) < 1, math.inf),
    "all inf": lambda: torch.full((2, 48, 4), -math.inf),
    "huge": lambda: 1e38 * random_tokens(2, 48, 4),
    "tiny": lambda: 1e-38 * random_tokens(2, 48, 4),
    "float16 at its limit": lambda: torch.full((2, 48, 4), 65504.0, dtype=torch.float16),
    "one token": lambda: random_tokens(2, 1, 4),
    "one channel": lambda: random_tokens(2, 48, 1),
}


@EVERY_SELECTOR
@pytest.mark.parametrize("ratio", [0.0, 0.5, 0.99])
@pytest.mark.parametrize("tokens", DEGENERATE.values(), ids=DEGENERATE)
def test_degenerate_tokens_give_valid_destinations(
    tokens: Callable[[], Tensor], ratio: float, selector: str
) -> None:
    given = tokens()
    assert_valid(choose(given, 16, ratio, selector), len(given), cut(given, 16, ratio))


@EVERY_SELECTOR
@given(
    batch=st.integers(1, 3),
    segments=st.lists(st.integers(1, 80), min_size=1, max_size=3),
    region_tokens=st.integers(0, 90),
    ratio=st.floats(0, 1, exclude_max=True),
    levels=st.integers(1, 4),
)
def test_destinations_are_valid_for_any_size_and_any_number_of_ties(
    selector: str,
    batch: int,
    segments: list[int],
    region_tokens: int,
    ratio: float,
    levels: int,
) -> None:
    tokens = (random_tokens(batch, sum(segments), 2) * levels / 2).round()
    cut = layout(segments, region_tokens, ratio)
    assert_valid(select(tokens, cut, selector), batch, cut)


@EVERY_SELECTOR
def test_images_do_not_influence_each_other(selector: str) -> None:
    tokens = random_tokens(3, 64, 8)
    together = choose(tokens, 16, 0.5, selector)
    alone = torch.cat([choose(image[None], 16, 0.5, selector) for image in tokens])
    assert torch.equal(together, alone)


@EVERY_SELECTOR
def test_regions_do_not_influence_each_other(selector: str) -> None:
    tokens = random_tokens(1, 64, 8)
    changed = tokens.clone()
    changed[:, 32:] = random_tokens(1, 32, 8, seed=1)
    before, after = (choose(each, 16, 0.5, selector) for each in (tokens, changed))
    assert torch.equal(before[:, :2], after[:, :2])


@EVERY_SELECTOR
def test_the_global_random_state_is_not_touched(selector: str) -> None:
    torch.manual_seed(0)
    before = torch.get_rng_state()
    first = choose(random_tokens(1, 64, 8), 16, 0.5, selector)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(1)
    assert torch.equal(choose(random_tokens(1, 64, 8), 16, 0.5, selector), first)


@pytest.mark.parametrize("selector", ["random", "grid", "fixed"])
def test_plain_selectors_do_not_look_at_the_tokens(selector: str) -> None:
    first, second = random_tokens(2, 64, 8), random_tokens(2, 64, 8, seed=1)
    assert torch.equal(choose(first, 16, 0.5, selector), choose(second, 16, 0.5, selector))


@given(count=st.integers(1, 200), ratio=st.floats(0, 1, exclude_max=True))
def test_grid_is_evenly_spaced(count: int, ratio: float) -> None:
    (picks,) = choose(torch.zeros(1, count, 1), 0, ratio, "grid")[0]
    gaps = picks.diff()
    # The space before the first and after the last is half of that between two.
    margins = torch.stack([2 * picks[0] + 1, 2 * (count - 1 - picks[-1]) + 1])
    spacing = count / len(picks)
    for space in (gaps, margins):
        assert ((space - spacing).abs() <= 1).all()


def test_random_picks_differ_between_regions_and_favour_no_place() -> None:
    (picks,) = choose(torch.zeros(1, 256 * 16, 1), 16, 0.5, "random") % 16
    assert len(picks.sort(dim=-1).values.unique(dim=0)) > 240  # of 256, from 12 870 possible ones
    shares = picks.flatten().bincount(minlength=16) / 256
    # Each is a mean of 256 fair coins, whose standard deviation is 1/32.
    assert ((shares - 0.5).abs() < 4 / 32).all()


def test_pseudo_random_numbers_are_spread_evenly() -> None:
    numbers = pseudo_random(torch.empty(0), (100, 100))
    assert numbers.dtype == torch.float32
    assert numbers.min() >= 0
    assert numbers.max() < 1
    histogram = numbers.histc(10, 0, 1)
    # 10 000 numbers in 10 bins: 1000 each, with a standard deviation of 30.
    assert ((histogram - 1000).abs() < 4 * 30).all()
    first, second = (numbers.flatten() - 0.5).unfold(0, 2, 1).unbind(-1)
    # A sum of 10 000 products, of which each has a standard deviation of 1/12.
    assert (first @ second).abs() < 4 * 100 / 12


def test_tokens_that_are_not_three_dimensional() -> None:
    with pytest.raises(InputError, match=r"select: tokens of shape \(64, 8\) must be \(B, N, D\)"):
        select(torch.zeros(64, 8), (8, 16, 64, 4), "grid")


def test_tokens_of_another_layout() -> None:
    with pytest.raises(InputError, match=r"do not fit a layout of grids of \[32, 16\] tokens"):
        select(torch.zeros(1, 64, 8), (8, 16, 32, 2, 16, 1), "grid")


def test_an_unknown_selector() -> None:
    message = r"selector='greedy' must be one of facility_location, random, grid, fixed"
    with pytest.raises(InputError, match=message):
        select(torch.zeros(1, 64, 8), (8, 16, 64, 4), "greedy")


def test_only_fixed_destinations_have_fixed_weights() -> None:
    assert [name for name, row in SELECTORS.items() if row.fixed_weights] == ["fixed"]
    tokens = random_tokens(1, 64, 8)
    assert torch.equal(choose(tokens, 16, 0.5, "fixed"), choose(tokens, 16, 0.5, "grid"))
