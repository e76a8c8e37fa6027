"""Token counts of regions and of destinations."""

from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from toma_fx.runtime.regions import WHOLE_IMAGE, kept_tokens, region_size


@given(tokens=st.integers(1, 3000), wanted=st.integers(1, 4000))
def test_a_region_is_the_divisor_nearest_in_ratio(tokens: int, wanted: int) -> None:
    def distance(size: int) -> Fraction:
        return max(Fraction(size, wanted), Fraction(wanted, size))

    divisors = [size for size in range(1, tokens + 1) if tokens % size == 0]
    assert region_size(tokens, wanted) == min(divisors, key=distance)


@pytest.mark.parametrize(
    ("tokens", "wanted", "size"),
    [
        pytest.param(4096, 64, 64, id="divides"),
        pytest.param(72 * 56, 64, 64, id="divides, though the grid is odd"),
        pytest.param(38 * 26, 64, 76, id="nearest is larger"),
        pytest.param(31 * 17, 64, 31, id="nearest is smaller"),
        pytest.param(97, 8, 1, id="prime, wanted is small"),
        pytest.param(97, 64, 97, id="prime, wanted is large"),
        pytest.param(10, 64, 10, id="fewer tokens than wanted"),
        pytest.param(988, WHOLE_IMAGE, 988, id="whole image"),
        pytest.param(1, 64, 1, id="one token"),
    ],
)
def test_region_sizes(tokens: int, wanted: int, size: int) -> None:
    assert region_size(tokens, wanted) == size


@given(tokens=st.integers(1, 5000), percent=st.integers(0, 99))
def test_kept_tokens_is_the_nearest_number_and_never_none(tokens: int, percent: int) -> None:
    kept = kept_tokens(tokens, percent / 100)

    assert 1 <= kept <= tokens
    exact = Fraction(tokens * (100 - percent), 100)
    assert kept == 1 or abs(kept - exact) <= Fraction(1, 2)


def test_nothing_is_merged_away_at_ratio_zero() -> None:
    assert [kept_tokens(tokens, 0.0) for tokens in range(1, 100)] == list(range(1, 100))
