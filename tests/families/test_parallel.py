"""One model of a newer family in two processes: context parallelism, as far as diffusers has it."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.families.lives import LIVES, SPLIT, run
from tests.families.shared_models import Case, joint, restored, split
from tests.matrix.frame import difference
from tests.matrix.ranks import RANKS, on_ranks
from toma_fx import MergeConfig, Schedule, transform
from toma_fx.ranks import Part, parts

SQUARE = {"height": 16, "width": 16, "text": 8}
VIDEO = {"frames": 8, "height": 8, "width": 8}
"""So many tokens that regions divide those of a rank."""
SCHEDULE = MergeConfig(schedule=Schedule(select_every=3, weigh_every=2))
UNEVEN = True
SAME: list[Case] = [
    ("FLUX.2", MergeConfig(), SQUARE, False),
    ("Qwen-Image", MergeConfig(), SQUARE, False),
    ("Qwen-Image", MergeConfig(placement="component"), SQUARE, False),
    ("Qwen-Image", MergeConfig(region="stripe"), SQUARE, False),
    ("Qwen-Image", SCHEDULE, SQUARE, False),
    ("Wan", MergeConfig(), VIDEO, False),
    ("Wan 2.1 I2V", MergeConfig(), VIDEO, UNEVEN),
    ("Wan 2.1 FLF2V", MergeConfig(), VIDEO, UNEVEN),
    ("Wan 2.1 FLF2V", MergeConfig(region="stripe"), VIDEO, UNEVEN),
    ("Wan 2.2 TI2V from an image", MergeConfig(), VIDEO, UNEVEN),
    ("Wan 2.2 TI2V from an image", MergeConfig(region="stripe"), VIDEO, UNEVEN),
]
OTHERS: list[Case] = [
    ("Qwen-Image-Edit 2511", MergeConfig(), SQUARE, UNEVEN),
    ("FLUX.2 edit", MergeConfig(), SQUARE, UNEVEN),
    ("Wan", MergeConfig(), {}, UNEVEN),
]
"""Where a rank's regions are not those of the whole image, whose grids its tokens cut."""
UNEQUAL: list[Case] = [
    ("Qwen-Image-Edit 2511", MergeConfig(), SQUARE, False),
    ("FLUX.2 edit", MergeConfig(), SQUARE, False),
    ("Wan 2.1 I2V", MergeConfig(), VIDEO, False),
    ("Wan 2.2 TI2V from an image", MergeConfig(), VIDEO, False),
]


def alone(case: Case, config: MergeConfig | None = None) -> Tensor:
    """What one process computes."""
    name, given, size, _ = case
    life = SPLIT[name]
    model = life.build()
    call = life.call(model, batch=1, **size)
    return run(transform(model, given if config is None else config), call)


def test_ranks_draw_what_one_process_draws(tmp_path: Path) -> None:
    outputs = on_ranks(split, tmp_path, [*SAME, *OTHERS])
    for case, output in zip([*SAME, *OTHERS], outputs, strict=True):
        assert isinstance(output, Tensor), (case, output)
        untouched, expected = alone(case, MergeConfig(ratio=0)), alone(case)
        assert difference(output, untouched) > 1e-2, case
        if case in SAME:
            assert difference(output, expected) < 1e-5, case
        else:
            bound = 1.5 * difference(expected, untouched)
            assert difference(output, untouched) < bound, case


def test_ranks_that_would_hold_unequal_parts_are_refused(tmp_path: Path) -> None:
    for message in on_ranks(split, tmp_path, UNEQUAL):
        assert message.startswith("InputError: after merging, the ranks hold ")
        assert message.endswith("ContextParallelConfig(ulysses_degree=2, ulysses_anything=True)")


def test_a_sequence_of_image_and_text_is_refused(tmp_path: Path) -> None:
    names = [n for n in ("Z-Image", "chroma", "hunyuan-video") if n in LIVES]
    for message in on_ranks(joint, tmp_path, names):
        assert "hold image and text in one sequence" in message
        assert "TensorParallelConfig" in message


def test_a_restored_model_is_still_split(tmp_path: Path) -> None:
    cases = [("Qwen-Image", SQUARE), ("FLUX.2", SQUARE), ("Wan 2.2 TI2V from an image", VIDEO)]
    outputs = on_ranks(restored, tmp_path, cases)
    for (name, size), output in zip(cases, outputs, strict=True):
        whole = alone((name, MergeConfig(ratio=0), size, False))
        assert difference(output, whole) < 1e-5, name


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["compile", "regional"])
def test_compiled_ranks(mode: str, tmp_path: Path) -> None:
    cases: list[Any] = [SAME[0], SAME[1], SAME[5], SAME[7], SAME[9]]
    for case, output in zip(cases, on_ranks(split, tmp_path, cases, mode), strict=True):
        assert isinstance(output, Tensor), (case, output)
        assert difference(output, alone(case)) < 1e-4, case


@pytest.mark.parametrize("count", [1, RANKS, 3, 5])
def test_parts_are_those_that_torch_splits_into(count: int) -> None:
    for unmerged, segments in [(0, (7,)), (4, (8, 3)), (9, (2,)), (0, (5, 5, 5)), (11, ())]:
        marks = [0] * unmerged
        for number, tokens in enumerate(segments, start=1):
            marks += [number] * tokens
        pieces = torch.tensor(marks).tensor_split(count)
        expected = [
            Part(
                int((piece == 0).sum()),
                tuple(int((piece == n).sum()) for n in piece.unique() if n > 0),
            )
            for piece in pieces
        ]
        assert parts(unmerged, segments, count) == expected
