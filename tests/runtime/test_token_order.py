"""Tile order: every contiguous run of tokens is a patch of the image."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from toma_fx.runtime.regions import layout, spread
from toma_fx.runtime.token_order import reorder, tile_order, tile_order_of_ids, video_order

# SDXL's resolution buckets at both of its attention levels, then edge cases.
BUCKETS = [(64, 64), (72, 56), (56, 72), (38, 26), (26, 38), (96, 40), (104, 60), (32, 32)]
ODD = [(1, 1), (1, 77), (77, 1), (2, 2), (13, 29), (15, 15), (3, 200), (31, 17)]


def order_of(height: int, width: int) -> Tensor:
    return tile_order(torch.empty(0), height, width)


def cells_of(height: int, width: int) -> Tensor:
    """Row and column of each token in tile order, ``(N, 2)``."""
    order = order_of(height, width)
    return torch.stack([order // width, order % width], dim=1)


def ids_of(height: int, width: int, image: int = 0) -> Tensor:
    """Flux's position ids of an image, in raster order."""
    ids = torch.zeros(height, width, 3)
    ids[..., 0] = image
    ids[..., 1] += torch.arange(height)[:, None]
    ids[..., 2] += torch.arange(width)
    return ids.flatten(0, 1)


@pytest.mark.parametrize(("height", "width"), BUCKETS + ODD)
def test_every_token_has_one_place(height: int, width: int) -> None:
    order = order_of(height, width)
    assert order.dtype == torch.int64
    assert torch.equal(order.sort().values, torch.arange(height * width))


@given(height=st.integers(1, 70), width=st.integers(1, 70))
def test_every_token_has_one_place_at_any_size(height: int, width: int) -> None:
    assert sorted(order_of(height, width).tolist()) == list(range(height * width))


@pytest.mark.parametrize("side", [1, 2, 4, 8, 16, 32, 64, 128])
def test_successors_are_neighbours_on_a_square_of_a_power_of_two(side: int) -> None:
    steps = cells_of(side, side).diff(dim=0).abs().sum(dim=1)
    assert (steps == 1).all()


@pytest.mark.parametrize("k", [1, 2, 3])
@pytest.mark.parametrize(
    ("height", "width"), [(8, 8), (64, 64), (72, 56), (56, 72), (24, 40), (8, 200), (104, 64)]
)
def test_aligned_runs_are_exact_square_tiles(height: int, width: int, k: int) -> None:
    side = 2**k
    tiles = cells_of(height, width).reshape(-1, side * side, 2) // side
    assert torch.equal(tiles, tiles[:, :1].expand_as(tiles))
    # As many different tiles as runs: no tile is visited twice.
    assert len(tiles[:, 0].unique(dim=0)) == height * width // side**2


def mean_squares(cells_RnC: Tensor) -> Tensor:
    """Mean squared distance of the tokens from the centre of their region, ``(R,)``."""
    from_centre = cells_RnC.double() - cells_RnC.double().mean(dim=1, keepdim=True)
    return from_centre.square().sum(dim=-1).mean(dim=-1)


@pytest.mark.parametrize(
    ("height", "width"),
    [(38, 26), (26, 38), (72, 56), (56, 72), (104, 60), (60, 104), (96, 40), (40, 96)],
)
def test_regions_are_compact_where_tiles_do_not_divide_the_grid(height: int, width: int) -> None:
    cut = layout([height * width], 64, 0.5)
    (tiles,) = spread(cells_of(height, width)[None], cut)
    square = (cut[1] - 1) / 6  # the spread of a square of so many cells
    # The curve can leave a tall image and come back far away, in the middle of one region.
    assert mean_squares(tiles).sort().values[:-1].mean() < 2.5 * square  # stripes: 4.5 to 71 times


@pytest.mark.parametrize(("height", "width"), BUCKETS + ODD)
def test_order_of_ids_is_the_order_of_the_grid(height: int, width: int) -> None:
    assert torch.equal(tile_order_of_ids(ids_of(height, width)), order_of(height, width))


def test_order_of_ids_depends_on_the_ids_and_not_on_where_the_tokens_are() -> None:
    ids = ids_of(12, 20)
    shuffled = ids[torch.randperm(len(ids), generator=torch.Generator().manual_seed(0))]
    in_order = ids[tile_order_of_ids(ids)]
    assert torch.equal(shuffled[tile_order_of_ids(shuffled)], in_order)


def test_reference_images_stay_apart_and_are_ordered_like_images_of_their_own() -> None:
    """Kontext appends the tokens of a reference image, with image number 1 and rows from 0."""
    image, reference = ids_of(72, 56), ids_of(64, 80, image=1)
    order = tile_order_of_ids(torch.cat([image, reference]))
    assert torch.equal(order[: len(image)], tile_order_of_ids(image))
    assert torch.equal(order[len(image) :] - len(image), tile_order_of_ids(reference))


@pytest.mark.parametrize("image", [127, 128, 255, 1000, 100_000])
def test_images_of_any_number_stay_apart(image: int) -> None:
    first, second = ids_of(5, 300, image), ids_of(300, 5, image + 1)
    order = tile_order_of_ids(torch.cat([second, first]))
    assert torch.equal(order[: len(first)], len(second) + tile_order_of_ids(ids_of(5, 300)))
    assert torch.equal(order[len(first) :], tile_order_of_ids(ids_of(300, 5)))


def test_squares_come_row_by_row_in_the_largest_image() -> None:
    corner = torch.arange(0, 4096, 256.0)
    ids = torch.cartesian_prod(torch.tensor([100_000.0]), corner, corner + 255)
    shuffle = torch.randperm(len(ids), generator=torch.Generator().manual_seed(0))
    assert torch.equal(ids[shuffle][tile_order_of_ids(ids[shuffle])], ids)


def test_columns_behind_the_position_count_for_nothing() -> None:
    """FLUX.2's ids have a fourth, which numbers text tokens."""
    ids = ids_of(12, 20)
    assert torch.equal(
        tile_order_of_ids(torch.cat([ids, torch.rand(240, 1)], dim=1)), tile_order_of_ids(ids)
    )


def test_ids_that_are_not_quite_whole() -> None:
    ids = ids_of(12, 20)
    for error in (-0.01, 0.01):
        assert torch.equal(tile_order_of_ids(ids + error), tile_order_of_ids(ids))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_order_of_ids_in_other_dtypes(dtype: torch.dtype) -> None:
    ids = ids_of(72, 56)
    assert torch.equal(tile_order_of_ids(ids.to(dtype)), tile_order_of_ids(ids))


def test_tokens_with_equal_ids_keep_their_order() -> None:
    """bfloat16 cannot tell columns above 256 apart."""
    order = tile_order_of_ids(ids_of(1, 700).bfloat16())
    assert torch.equal(order.sort().values, torch.arange(700))
    assert torch.equal(tile_order_of_ids(torch.zeros(700, 3)), torch.arange(700))


@pytest.mark.parametrize(("height", "width"), BUCKETS + ODD)
def test_reorder_round_trip(height: int, width: int) -> None:
    tokens = torch.randn(2, height * width, 3, generator=torch.Generator().manual_seed(0))
    order = order_of(height, width)
    ordered = reorder(tokens, order)
    assert torch.equal(ordered[:, 0], tokens[:, order[0]])
    assert torch.equal(reorder(ordered, order.argsort()), tokens)


VIDEOS = [
    (1, 4, 4, 1, 4),
    (5, 8, 8, 1, 4),
    (21, 60, 104, 1, 4),
    (6, 5, 7, 1, 4),
    (7, 3, 5, 2, 3),
    (4, 13, 9, 0, 4),
    (9, 1, 7, 1, 1),
]
"""Frames, rows, columns, frames before the first chunk and frames of a chunk."""


def video_cells(frames: int, height: int, width: int, first: int, chunk: int) -> Tensor:
    """Frame, row and column of each token in the order of a video, ``(N, 3)``."""
    order = video_order(torch.empty(0), frames, height, width, first, chunk)
    area = height * width
    return torch.stack([order // area, order % area // width, order % width], dim=1)


@pytest.mark.parametrize("video", VIDEOS, ids=str)
def test_every_token_of_a_video_has_one_place(video: tuple[int, int, int, int, int]) -> None:
    order = video_order(torch.empty(0), *video)
    assert order.dtype == torch.int64
    assert torch.equal(order.sort().values, torch.arange(video[0] * video[1] * video[2]))


@given(
    frames=st.integers(1, 9),
    height=st.integers(1, 20),
    width=st.integers(1, 20),
    first=st.integers(0, 3),
    chunk=st.integers(1, 5),
)
def test_a_video_of_any_size_is_ordered_chunk_by_chunk(
    frames: int, height: int, width: int, first: int, chunk: int
) -> None:
    order = video_order(torch.empty(0), frames, height, width, first, chunk)
    assert sorted(order.tolist()) == list(range(frames * height * width))
    frame = order // (height * width)
    chunks = torch.where(frame < first, frame, first + (frame - first) // chunk)
    assert (chunks.diff() >= 0).all()


@pytest.mark.parametrize("video", VIDEOS, ids=str)
def test_the_first_frames_are_apart_and_in_tile_order(
    video: tuple[int, int, int, int, int],
) -> None:
    frames, height, width, first, _ = video
    order, area = video_order(torch.empty(0), *video), height * width
    for frame in range(min(first, frames)):
        own = order[frame * area : (frame + 1) * area]
        assert torch.equal(own, frame * area + order_of(height, width))


@pytest.mark.parametrize(
    ("frames", "height", "width", "first"), [(5, 8, 8, 1), (9, 60, 104, 1), (8, 12, 4, 0)]
)
def test_runs_of_64_tokens_are_4_by_4_through_4_frames(
    frames: int, height: int, width: int, first: int
) -> None:
    cells = video_cells(frames, height, width, first, 4)[first * height * width :]
    runs = cells.reshape(-1, 64, 3)
    tiles = (runs - torch.tensor([first, 0, 0])) // 4
    assert torch.equal(tiles, tiles[:, :1].expand_as(tiles))
    # As many different tiles as runs: no tile is visited twice.
    assert len(tiles[:, 0].unique(dim=0)) == len(runs)
    # Along the curve, all frames of a place follow one another.
    places = runs.reshape(-1, 4, 3)[..., 1:]
    assert torch.equal(places, places[:, :1].expand_as(places))


@pytest.mark.parametrize(("height", "width"), [(30, 52), (26, 38), (45, 80), (17, 23)])
def test_regions_of_a_video_are_compact_where_tiles_do_not_divide_it(
    height: int, width: int
) -> None:
    area = height * width
    cells = video_cells(7, height, width, 1, 4)
    for start, frames in ((1, 4), (5, 2)):  # a whole chunk, and what is left for the last
        chunk = cells[start * area : (start + frames) * area]
        assert chunk[:, 0].unique().tolist() == list(range(start, start + frames))
        cut = layout([frames * area], 64, 0.5)
        (regions,) = spread(chunk[None], cut)
        square = (64 / frames - 1) / 6  # the spread of a square of so many cells
        spreads = mean_squares(regions[..., 1:]).sort().values
        assert spreads[:-2].mean() < 2.5 * square


def test_a_video_of_one_frame_is_an_image() -> None:
    order = video_order(torch.empty(0), 1, 13, 29, 1, 4)
    assert torch.equal(order, order_of(13, 29))


# The order of a grid is kept between calls. Each of the following uses a size of its own, so that
# its first call is the first of all.
def test_an_order_first_made_in_inference_mode_serves_a_call_with_gradients() -> None:
    with torch.inference_mode():
        tile_order(torch.empty(0), 5, 37)
    tokens = torch.randn(1, 5 * 37, 2, requires_grad=True)
    reorder(tokens, tile_order(tokens.detach(), 5, 37)).sum().backward()
    assert tokens.grad is not None
    assert torch.equal(tokens.grad, torch.ones_like(tokens))


def test_an_order_first_made_under_tracing_is_not_kept() -> None:
    with FakeTensorMode():
        tile_order(torch.empty(0), 5, 41)
    assert type(order_of(5, 41)) is Tensor


def test_the_order_of_a_grid_is_made_once() -> None:
    assert order_of(5, 43) is order_of(5, 43)


def test_the_order_of_a_video_is_made_once() -> None:
    like = torch.empty(0)
    assert video_order(like, 3, 5, 43, 1, 4) is video_order(like, 3, 5, 43, 1, 4)
    with FakeTensorMode():
        video_order(torch.empty(0), 3, 5, 47, 1, 4)
    assert type(video_order(like, 3, 5, 47, 1, 4)) is Tensor
