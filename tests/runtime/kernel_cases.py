"""The GPU kernels against the loop: run by `test_kernels`, in a process of its own.

On a machine without a GPU that process has ``TRITON_INTERPRET=1``, which triton reads when it is
imported.
"""

import math
import os

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.runtime.tokens import random_tokens, signs
from toma_fx.runtime import kernels
from toma_fx.runtime.selector import GAIN_STEPS, facility_location, facility_location_by_loop

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
FEW = settings(max_examples=50 if INTERPRETED else 500)

pytestmark = [
    # NumPy's of infinite and missing numbers, which are the point of some cases
    pytest.mark.filterwarnings("ignore:(invalid value|overflow|divide by zero):RuntimeWarning"),
    # The interpreter of triton 3.6, which torch 2.11 comes with; it needs a NumPy below 2.4.
    pytest.mark.filterwarnings("ignore:Conversion of an array with ndim > 0:DeprecationWarning"),
]


def picks_of_kernel(
    tokens_BND: Tensor, size: int, keep: int, counts: Tensor | None = None
) -> Tensor:
    counts = counts if counts is None else counts.to(DEVICE)
    tokens = tokens_BND.to(DEVICE)
    if tokens.stride() != tokens_BND.stride():  # moving closes gaps between tokens
        memory = tokens_BND.untyped_storage().to(device=DEVICE)
        tokens = torch.empty(0, dtype=tokens.dtype, device=DEVICE).set_(
            memory, tokens_BND.storage_offset(), tokens_BND.shape, tokens_BND.stride()
        )
    if not INTERPRETED:
        picks: Tensor = torch.ops.toma.facility_location(tokens, size, keep, counts)
        return picks.cpu()
    by_tokens, by_similarity = kernels._pick_by_tokens, kernels._pick_by_similarity
    return kernels._launch(by_tokens, by_similarity, tokens, size, keep, counts)


def assert_greedy(tokens_nD: Tensor, picks: list[int]) -> None:
    """Each pick is worth as much as the best, but for the steps in which gains are compared."""
    unit = F.normalize(tokens_nD.double(), dim=-1)
    similarity = unit @ unit.T
    covered = torch.full((len(unit),), -1.0, dtype=torch.float64)
    free = torch.zeros_like(covered)
    for pick in picks:
        gain = (similarity - covered).relu().sum(dim=-1) + free
        rounding = 1e-6 * len(unit)
        assert gain[pick] >= gain.max() - 1 / GAIN_STEPS - rounding
        covered = torch.maximum(covered, similarity[pick])
        free[pick] = -math.inf


@FEW
@given(
    batch=st.integers(1, 2),
    regions=st.integers(1, 5),
    size=st.integers(1, 40),
    share=st.floats(0, 1),
    width=st.sampled_from([4, 16, 64]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    odd_ones=st.lists(
        st.tuples(st.integers(0, 10_000), st.sampled_from(["zero", "twin", "nan", "inf", "-inf"])),
        max_size=8,
    ),
    seed=st.integers(0, 1000),
)
def test_picks_are_those_of_the_loop(
    batch: int,
    regions: int,
    size: int,
    share: float,
    width: int,
    dtype: torch.dtype,
    odd_ones: list[tuple[int, str]],
    seed: int,
) -> None:
    tokens = signs(batch, regions * size, width, seed).to(dtype)
    rows = tokens.view(-1, width)
    for number, kind in odd_ones:
        row = number % len(rows)
        if kind == "zero":
            rows[row] = 0
        elif kind == "twin":
            rows[row] = rows[0]
        else:
            rows[row, number % width] = float(kind)
    keep = max(1, round(share * size))
    expected = facility_location_by_loop(tokens, size, keep)
    assert torch.equal(picks_of_kernel(tokens, size, keep), expected)


@pytest.mark.parametrize(
    ("size", "keep"),
    [
        *[(16, 16), (17, 4), (31, 31), (32, 1), (33, 8), (63, 5), (64, 64), (65, 6), (76, 57)],
        *[(127, 9), (128, 16), (129, 5), (200, 3), (255, 4), (256, 6)],
    ],
)
@pytest.mark.parametrize("batch", [1, 3])
def test_picks_are_those_of_the_loop_at_every_size(batch: int, size: int, keep: int) -> None:
    tokens = signs(batch, 2 * size, 16, seed=size)
    tokens[0, 3] = math.nan
    tokens[-1, -1] = 0
    expected = facility_location_by_loop(tokens, size, keep)
    assert torch.equal(picks_of_kernel(tokens, size, keep), expected)


@FEW
@given(
    batch=st.integers(1, 2),
    size=st.integers(1, 40),
    counts=st.lists(st.integers(1, 40), min_size=1, max_size=5),
    share=st.floats(0, 1),
    seed=st.integers(0, 1000),
)
def test_padding_is_picked_when_nothing_else_is_left_as_in_the_loop(
    batch: int, size: int, counts: list[int], share: float, seed: int
) -> None:
    real = torch.tensor([min(count, size) for count in counts])
    tokens = signs(batch, len(counts) * size, 16, seed)
    keep = max(1, round(share * size))
    expected = facility_location_by_loop(tokens, size, keep, real)
    assert torch.equal(picks_of_kernel(tokens, size, keep, real), expected)


@pytest.mark.parametrize(
    ("size", "keep"), [(16, 16), (17, 4), (64, 32), (66, 33), (128, 16), (129, 5), (200, 3)]
)
@pytest.mark.parametrize("batch", [1, 3])
def test_padded_picks_are_those_of_the_loop_at_every_size(batch: int, size: int, keep: int) -> None:
    tokens = signs(batch, 3 * size, 16, seed=size)
    tokens[0, 3] = math.nan
    tokens[:, size - 1] = math.nan  # padding
    real = torch.tensor([size - 1, size, size // 2])
    expected = facility_location_by_loop(tokens, size, keep, real)
    assert torch.equal(picks_of_kernel(tokens, size, keep, real), expected)
    assert (expected[:, 0] < size - 1).all() == (keep < size)


def test_with_few_tokens_in_a_large_region_padding_comes_last() -> None:
    tokens = signs(2, 2 * 160, 16, seed=0)
    real = torch.tensor([2, 3])
    expected = facility_location_by_loop(tokens, 160, 6, real)
    assert torch.equal(picks_of_kernel(tokens, 160, 6, real), expected)
    assert expected[:, 0, 2:].tolist() == [[2, 3, 4, 5]] * 2


@pytest.mark.parametrize("seed", range(10))
def test_gains_are_rounded_to_steps_as_in_the_loop(seed: int) -> None:
    """Gains of a few quarters of a step: no sum is rounded, and every second half goes down."""
    random = torch.Generator().manual_seed(seed)
    quarters = torch.randint(0, 4, (3, 20, 20), generator=random).triu()
    similarity = (quarters + quarters.mT) / (4 * GAIN_STEPS) - 1
    picks = torch.zeros(3, 20, dtype=torch.int64, device=DEVICE)
    launch = kernels._pick_by_similarity[(3,)]
    on_device = similarity.to(DEVICE)
    sizes = {"BLOCK": 128, "ROWS": 64, "PADDED": False, "num_warps": 16}
    launch(on_device, on_device, picks, 3, 20, 20, **sizes)
    assert torch.equal(picks.cpu(), facility_location(similarity, 20))


@FEW
@given(
    size=st.sampled_from([9, 16, 24, 64]),
    regions=st.integers(1, 3),
    width=st.integers(1, 130),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float64]),
    length=st.sampled_from([1e-3, 1.0, 1e3]),
    share=st.floats(0.05, 0.6),
    seed=st.integers(0, 1000),
)
def test_every_pick_is_worth_as_much_as_the_best(
    size: int,
    regions: int,
    width: int,
    dtype: torch.dtype,
    length: float,
    share: float,
    seed: int,
) -> None:
    tokens = (length * random_tokens(2, regions * size, width, seed=seed)).to(dtype)
    picks = picks_of_kernel(tokens, size, max(1, round(share * size)))
    regions_of_tokens = tokens.unflatten(1, (regions, size)).flatten(0, 1)
    for region, chosen in zip(regions_of_tokens, picks.flatten(0, 1).tolist(), strict=True):
        assert_greedy(region, chosen)


@pytest.mark.parametrize("size", [128, 192, 256])
def test_every_pick_in_a_large_region_is_worth_as_much_as_the_best(size: int) -> None:
    tokens = random_tokens(1, size, 48, seed=size)
    (picks,) = picks_of_kernel(tokens, size, 12)[0].tolist()
    assert_greedy(tokens[0], picks)


@pytest.mark.parametrize(
    ("name", "tokens"),
    [
        ("flat", torch.ones(1, 48, 4)),
        ("zero", torch.zeros(1, 48, 4)),
        ("all NaN", torch.full((1, 48, 4), math.nan)),
        ("all inf", torch.full((1, 48, 4), -math.inf)),
        ("opposites", torch.tensor([1.0, -1.0]).repeat(1, 24)[..., None]),
        ("zero before opposites", torch.tensor([0.0, 0.0, *[1.0, -1.0] * 7] * 3).view(1, 48, 1)),
        ("tiny", 1e-38 * random_tokens(1, 48, 4)),
        ("float16 at its limit", torch.full((1, 48, 4), 65504.0, dtype=torch.float16)),
    ],
)
@pytest.mark.parametrize("keep", [1, 7, 16])
def test_degenerate_tokens(name: str, tokens: Tensor, keep: int) -> None:
    expected = facility_location_by_loop(tokens, 16, keep)
    assert torch.equal(picks_of_kernel(tokens, 16, keep), expected)


def test_tokens_too_long_to_be_measured_give_valid_picks() -> None:
    picks = picks_of_kernel(3e38 * signs(1, 32, 4, seed=0), 16, 16)
    assert torch.equal(picks.sort(dim=-1).values, torch.arange(16).expand(1, 2, 16))


@pytest.mark.parametrize("size", [16, 160])
def test_tokens_with_gaps_between_them(size: int) -> None:
    dense = signs(2, size, 16, seed=0)
    joint = torch.cat([signs(2, 5, 16, seed=1), dense], dim=1)[:, 5:]  # behind text tokens
    channels_first = dense.transpose(1, 2).contiguous().transpose(1, 2)
    same_image = dense[:1].expand(2, -1, -1)
    expected = facility_location_by_loop(dense, size, 5)
    for tokens in (joint, channels_first):
        assert not tokens.is_contiguous()
        assert torch.equal(picks_of_kernel(tokens, size, 5), expected)
    assert torch.equal(picks_of_kernel(same_image, size, 5), expected[:1].expand(2, -1, -1))
