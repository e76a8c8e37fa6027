"""FLUX.2, Qwen-Image, Z-Image and Wan compute what the method, written a second time, computes."""

from collections.abc import Callable, Iterator
from dataclasses import fields, replace
from functools import partial
from typing import Any

import pytest
import torch

from tests import reference
from tests.choices import Choices
from tests.family_cases import (
    ALL,
    CASES,
    SOME,
    TOLERANCE,
    WORST,
    Case,
    built,
    cut_off,
    difference,
    merging,
    run,
    sized,
)
from tests.family_reference import Grid, reference_model
from tests.reference import ReferenceOptions
from tests.tiny_families import (
    tiny_flux2,
    tiny_qwen_image,
    tiny_wan,
    tiny_wan_vace,
    tiny_z_image,
)
from toma_fx import MergeConfig, Schedule


@pytest.fixture(autouse=True)
def _no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


@pytest.fixture
def check(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Compares a transformed model with the reference."""

    def compare(
        case: Case,
        batch: int = 2,
        skipped: tuple[str, ...] = (),
        region_frames: int = 4,
        later: dict[str, Any] | None = None,
        **options: Any,
    ) -> None:
        settings = {"skip": (), "region_tokens": 16, "region_frames": region_frames, **options}
        config = MergeConfig(**settings)
        names = {each.name for each in fields(ReferenceOptions)} - {"skip"}
        written_again = ReferenceOptions(
            **{name: getattr(config, name) for name in names}, skip=skipped
        )
        model, inputs = built(case.model), case.inputs_of(batch)
        transformed = merging(case.model, **settings)
        with Choices() as choices:
            output = run(transformed, inputs)
        monkeypatch.setattr(reference, "select", choices.follow)
        second = reference_model(
            model, case.family, case.picture, written_again, region_frames, later is not None
        )
        expected = run(second, inputs)
        assert not choices.made
        if later is not None:
            inputs = {**inputs, **later}
            with Choices() as choices:
                output, expected = run(transformed, inputs), run(second, inputs)
            assert not choices.made
        assert difference(output, expected) < TOLERANCE
        assert (output - expected).abs().max() < WORST * expected.std()
        assert difference(expected, run(model, inputs)) > 5e-3

    return compare


@ALL
@pytest.mark.parametrize("region", ["tile", "stripe", "image"])
def test_region(check: Callable[..., None], name: str, region: str) -> None:
    check(cut_off(CASES[name]), region=region)


@SOME
@pytest.mark.parametrize("placement", ["block", "component"])
@pytest.mark.parametrize("ratio", [0.25, 0.75])
def test_ratio(check: Callable[..., None], name: str, placement: str, ratio: float) -> None:
    check(cut_off(CASES[name]), placement=placement, ratio=ratio)


@ALL
def test_component(check: Callable[..., None], name: str) -> None:
    check(cut_off(CASES[name]), placement="component")


@SOME
@pytest.mark.parametrize(
    "options",
    [
        {"residual": "replace"},
        {"unmerge": "pinv"},
        {"share": "block"},
        {"merge_over": "image", "temperature": 0.1},
        {"region_tokens": 64},
    ],
    ids=str,
)
def test_option(check: Callable[..., None], name: str, options: dict[str, Any]) -> None:
    check(cut_off(CASES[name]), **options)


@pytest.mark.parametrize(
    ("name", "model", "skipped"),
    [
        (
            "flux2",
            partial(tiny_flux2, num_layers=4, num_single_layers=8),
            [
                "transformer_blocks.0",
                "single_transformer_blocks.0",
                "single_transformer_blocks.1",
            ],
        ),
        ("qwen mask", tiny_qwen_image, ["transformer_blocks.0"]),
        ("z captions", tiny_z_image, ["layers.0"]),
        ("wan ti2v", tiny_wan, ["blocks.0"]),
        ("vace", partial(tiny_wan_vace, vace_layers=range(4)), ["blocks.0", "vace_blocks.0"]),
    ],
)
@pytest.mark.parametrize("residual", ["keep", "replace"])
def test_default_skip(
    check: Callable[..., None],
    name: str,
    model: Callable[[], Any],
    skipped: list[str],
    residual: str,
) -> None:
    """The first quarter of each list stays unmerged, and the plan is that of the next block."""
    case = replace(cut_off(CASES[name]), model=model)
    check(case, skip=None, skipped=tuple(skipped), residual=residual)


@pytest.mark.parametrize("batch", [1, 3])
@SOME
def test_batch(check: Callable[..., None], name: str, batch: int) -> None:
    check(cut_off(CASES[name], batch), batch)


@pytest.mark.parametrize("region", ["tile", "stripe", "image"])
@pytest.mark.parametrize(
    ("name", "grids"),
    [
        ("flux2", [(1, 9, 7)]),
        ("flux2", [(1, 17, 17)]),
        ("flux2 reference", [(1, 9, 7), (1, 5, 3)]),
        ("flux2 reference", [(1, 17, 17), (1, 2, 2)]),
        ("qwen zero_cond_t", [(1, 9, 7), (1, 5, 3), (1, 1, 1)]),
        ("qwen zero_cond_t", [(1, 3, 3), (1, 17, 19)]),
        ("qwen", [(1, 1, 37)]),
        ("qwen", [(1, 1, 5)]),
        ("z captions", [(1, 9, 7)]),
        ("z captions", [(1, 3, 3)]),
        ("z", [(1, 17, 19)]),
    ],
    ids=str,
)
def test_odd_size(check: Callable[..., None], name: str, grids: list[Grid], region: str) -> None:
    """Regions of uneven sizes, tokens fewer than a region, sequences that the model pads."""
    check(sized(name, *grids), region=region)


@pytest.mark.parametrize("region", ["tile", "stripe", "image"])
@pytest.mark.parametrize(
    ("name", "grid"),
    [
        (name, grid)
        for name in ("wan t2v", "wan ti2v", "wan i2v", "vace")
        for grid in ((1, 8, 8), (2, 8, 8), (6, 5, 7), (4, 3, 2))
        if len(CASES[name].given) < grid[0]
    ],
    ids=str,
)
def test_odd_video(check: Callable[..., None], name: str, grid: Grid, region: str) -> None:
    check(sized(name, grid), region=region)


@pytest.mark.parametrize("name", ["wan t2v", "wan ti2v"])
@pytest.mark.parametrize("region_frames", [1, 2, 3, 9])
def test_chunks(check: Callable[..., None], name: str, region_frames: int) -> None:
    check(sized(name, (6, 8, 8)), region_frames=region_frames)


def test_vace_with_references(check: Callable[..., None]) -> None:
    """Reference images are the first frames of a video."""
    call = {"references": 2, "frames": 4}
    check(replace(CASES["vace"], grids=((6, 8, 8),), given=(0, 1), call=call))


@SOME
@pytest.mark.parametrize("placement", ["block", "component"])
def test_schedule(check: Callable[..., None], name: str, placement: str) -> None:
    """A later step merges by the plan of an earlier one, and its timestep is its own."""
    case = cut_off(CASES[name])
    inputs = case.inputs_of(2)
    if case.family == "z_image":
        later = {"t": 1.2 * inputs["t"], "x": [0.5 * image + 0.1 for image in inputs["x"]]}
    else:
        later = {"timestep": inputs["timestep"] * 4 / 5}
    # With rows that are new at each step, weights are too: here those of the same tokens.
    if case.family != "z_image" and (name, placement) != ("wan ti2v", "block"):
        later["hidden_states"] = 0.5 * inputs["hidden_states"] + 0.1
    schedule = Schedule(select_every=10, weigh_every=10)
    check(case, placement=placement, schedule=schedule, later=later)
