"""Frames of a video that are given never merge, wherever they are and however a call says so."""

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from diffusers import WanImageToVideoPipeline
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils import _pytree as pytree

import toma_fx
from tests.families.merge_by_hand import merge_by_hand
from tests.family_cases import CASES, built, difference
from tests.family_pipelines import (
    FAMILY_PIPELINES,
    picture,
    tiny_wan_image_to_video_two_models_pipeline,
)
from tests.more_family_pipelines import MORE_PIPELINES
from tests.tiny import lossless
from tests.tiny_more_families import MORE_FAMILIES
from toma_fx import MergeConfig, Schedule, transform
from toma_fx.grids import sequence_in
from toma_fx.transform import pipeline_models

# numpy, of how diffusers hands it a tensor.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

FRAME = 64
"""Tokens of a frame in a tiny video of LTX, which has three."""
OPTIONS: dict[str, Any] = {"skip": (), "region_tokens": 16}
TOLERANCE = 1e-4


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    torch._dynamo.reset()
    with torch.no_grad():
        yield
    torch._dynamo.reset()


def run(model: Any, call: dict[str, Any]) -> Tensor:
    output: Tensor = model(**call, return_dict=False)[0]
    return output


def given_in_last_call(model: Any) -> tuple[int, ...]:
    """The frames that a transformed model took for given when it was last called."""
    last = model.toma_last_call
    sequence = sequence_in(model, last.arguments, last.given)
    assert sequence is not None
    return sequence.given_frames


# By timesteps of tokens


def ltx(name: str, *given: int) -> tuple[Any, dict[str, Any]]:
    """A small model in float64, and a call of it in which some frames of the video are given."""
    make_model, make_inputs = MORE_FAMILIES[name]
    model, call = make_model(num_layers=2), make_inputs(make_model())
    first = call["timestep"].shape[1] - 3 * FRAME
    for frame in given:
        call["timestep"][:, first + frame * FRAME : first + (frame + 1) * FRAME] = 0
    return model.double(), pytree.tree_map_only(
        Tensor, lambda t: t.double() if t.is_floating_point() else t, call
    )


@pytest.mark.parametrize("name", ["ltx-keyframe", "ltx-i2v"])
def test_frames_at_timestep_0_merge_as_in_a_plain_reference(name: str) -> None:
    model, call = ltx(name, 2)
    call |= {} if "video_coords" in call else coordinates()
    before = call["timestep"].shape[1] - 3 * FRAME
    merged = run(transform(model, region="stripe", share="block", **OPTIONS), call)
    tokens = torch.arange(before + 3 * FRAME)
    first, frames = tokens[:before], tokens[before:].split(FRAME)
    order = torch.cat([first, frames[0], frames[2], frames[1]])
    # Diffusers' model minds no order, where positions go along.
    moved = {
        **call,
        "hidden_states": call["hidden_states"][:, order],
        "timestep": call["timestep"][:, order],
        "video_coords": call["video_coords"][:, :, order],
    }
    untouched = run(model, call)
    merge_by_hand(model, before + 2 * FRAME, (FRAME,), 16)
    expected = run(model, moved)[:, order.argsort()]
    torch.testing.assert_close(merged, expected, atol=1e-5, rtol=1e-5)
    assert difference(merged, untouched) > 1e-3


def coordinates() -> dict[str, Any]:
    """Positions in place of sizes, as `LTXConditionPipeline` gives them."""
    times, rows, columns = torch.arange(3), torch.arange(8), torch.arange(8)
    places = torch.cartesian_prod((8 * times - 7).clamp(min=0), 32 * rows, 32 * columns).double()
    places[:, 0] /= 25
    return {"video_coords": places.T.repeat(2, 1, 1)}


@pytest.mark.parametrize("region", ["tile", "stripe", "image"])
@pytest.mark.parametrize("name", ["ltx-i2v", "ltx-keyframe", "ltx-2-i2v"])
def test_each_row_gets_what_it_gets_alone(name: str, region: str) -> None:
    model, call = ltx(name, 2)
    merged = transform(model, region=region, **OPTIONS)
    together = run(merged, call)
    assert given_in_last_call(merged) == (0, 2)
    alone = run(merged, pytree.tree_map_only(Tensor, lambda t: t[:1], call))
    torch.testing.assert_close(together[:1], alone)
    assert difference(together, run(model, call)) > 1e-3


@pytest.mark.parametrize("region", ["tile", "stripe"])
@pytest.mark.parametrize("name", ["ltx-i2v", "ltx-keyframe", "ltx-2-i2v"])
def test_whatever_belongs_to_a_token_moves_with_it(name: str, region: str) -> None:
    model, call = ltx(name, 2)
    moved = transform(model, lossless(region=region, region_tokens=16, skip=()))
    torch.testing.assert_close(run(moved, call), run(model, call), atol=1e-5, rtol=0)


def test_one_timestep_for_all_tokens_gives_no_frame() -> None:
    """As `LTXConditionPipeline` hands it over where nothing is given."""
    make_model, make_inputs = MORE_FAMILIES["ltx"]
    model = make_model(num_layers=2)
    call = make_inputs(model)
    call["timestep"] = call["timestep"][:, None]
    moved = transform(model, lossless(region_tokens=16, skip=()))
    torch.testing.assert_close(run(moved, call), run(model, call), atol=1e-5, rtol=0)
    assert given_in_last_call(moved) == ()


@pytest.mark.parametrize(("marked", "given"), [((0, 1, 2, 4), (0, 1, 2)), ((0,), (0, 1))])
def test_frames_that_cosmos_goes_on_from(marked: tuple[int, ...], given: tuple[int, ...]) -> None:
    """As many as its mask marks from the first, and two at least."""
    make_model, make_inputs = MORE_FAMILIES["cosmos-video"]
    model = make_model(num_layers=2)
    call = make_inputs(model, frames=5)
    call["condition_mask"] = torch.zeros_like(call["condition_mask"])
    call["condition_mask"][:, :, list(marked)] = 1
    for region in ("tile", "stripe"):
        moved = transform(model, lossless(region=region, region_tokens=16, skip=()))
        torch.testing.assert_close(run(moved, call), run(model, call), atol=1e-5, rtol=0)
        assert given_in_last_call(moved) == given


# One graph for all steps, whatever is given


@pytest.mark.parametrize(
    ("name", "region"),
    [
        ("wan flf2v", "tile"),
        ("wan given", "tile"),
        ("wan given", "stripe"),
        ("wan ti2v", "tile"),
        ("vace references", "tile"),
    ],
)
def test_compiled_once_for_all_steps(name: str, region: str) -> None:
    case = CASES[name]
    plain = transform(built(case.model), region=region, **OPTIONS)
    compiled = copy.deepcopy(plain)
    counter = CompileCounterWithBackend("eager")
    compiled.compile(fullgraph=True, backend=counter)
    call = case.inputs_of(2)
    for share in (1.0, 0.8, 0.2):
        step = {**call, "timestep": call["timestep"] * share}
        assert difference(run(compiled, step), run(plain, step)) < TOLERANCE
    assert counter.frame_count == 1
    assert given_in_last_call(compiled) == case.given


@pytest.mark.parametrize("name", ["wan given", "vace references"])
def test_exported(name: str) -> None:
    case = CASES[name]
    model = transform(built(case.model), **OPTIONS)
    call = {key: value for key, value in case.inputs_of(1).items() if value is not None}
    program = toma_fx.export(model, call).module()
    other = {**call, **{key: v for key, v in case.inputs_of(1, seed=1).items() if key in call}}
    assert difference(program(**other)[0], run(model, other)) < TOLERANCE


def test_a_call_with_other_given_frames_is_another_run() -> None:
    """Its plan is of other tokens, so that of the step before is of no use."""
    case = CASES["wan given"]
    config = MergeConfig(schedule=Schedule(select_every=9, weigh_every=9), **OPTIONS)
    model = transform(built(case.model), config)
    run(model, case.inputs_of(2))
    later = case.inputs_of(2, given=(0, 1))
    later["timestep"] = later["timestep"] // 2
    alone = run(transform(built(case.model), config), later)
    assert torch.equal(run(model, later), alone)


def test_a_report_says_how_many_frames_are_given() -> None:
    case = CASES["wan given"]
    model, call = transform(built(case.model), **OPTIONS), case.inputs_of(2)
    run(model, call)
    for report in (toma_fx.report(model), toma_fx.report(model, inputs=call)):
        assert report.unmerged_frames == 3
        assert "5 latent frames" in str(report)
        assert "3 given" in str(report)
        group = report.groups[0]
        assert group.tokens_after == (3 * group.tokens_before + 2 * group.tokens_before // 2) // 5
    # Where no values are known, shapes tell of the first.
    assert toma_fx.report(model, height=64, width=64, frames=17).unmerged_frames == 1


# Pipelines


def last_image_arguments() -> dict[str, Any]:
    """Of Wan 2.2, which does not tell by its shapes that a last image is given."""
    _, arguments = FAMILY_PIPELINES["Wan 2.2 I2V"]
    return arguments(last_image=picture(96, 64, seed=1))


def keyframe_arguments() -> dict[str, Any]:
    """Two latent frames at the start, and one whose tokens stand before those of the video."""
    _, arguments = MORE_PIPELINES["ltx-keyframe"]
    image = arguments()["image"]
    own = {"image": [None, image], "video": [[image] * 9, None], "frame_index": [0, 16]}
    return {**arguments(), **own, "strength": [1.0, 1.0]}


PIPELINES: dict[str, tuple[Any, Any, tuple[int, ...]]] = {
    "Wan 2.1 FLF2V": (*FAMILY_PIPELINES["Wan 2.1 FLF2V"], (0, 2)),
    "Wan 2.2 with a last image": (
        tiny_wan_image_to_video_two_models_pipeline,
        last_image_arguments,
        (0, 2),
    ),
    "Wan VACE with a reference image": (*FAMILY_PIPELINES["Wan VACE"], (0,)),
    "LTX with two conditions": (MORE_PIPELINES["ltx-keyframe"][0], keyframe_arguments, (0, 1)),
}


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=pytest.mark.slow if "FLF2V" in n else ()) for n in PIPELINES],
)
def test_a_pipeline_gives_frames(name: str) -> None:
    build, arguments, given = PIPELINES[name]
    pipe = build()

    def latents(**changes: Any) -> Tensor:
        drawn: Tensor = pipe(**{**arguments(), **changes, "return_dict": False})[0]
        return drawn

    expected = latents()
    transform(pipe, skip=())
    models = pipeline_models(pipe)
    reads: list[int] = []

    def count(pipe: Any, step: int, timestep: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
        states: list[Any] = [model.toma_state for model in models.values()]
        reads.append(max(len(state._read) for state in states))
        return {}

    plain = latents(num_inference_steps=3, callback_on_step_end=count)
    # Once for each prompt, and LTX's positions.
    assert len(reads) == 3
    assert reads[-1] <= 2
    assert all(given_in_last_call(model) == given for model in models.values())
    counters = [CompileCounterWithBackend("eager") for _ in models]
    for model, counter in zip(models.values(), counters, strict=True):
        model.compile(fullgraph=True, backend=counter)
    for _ in range(2):
        assert difference(latents(num_inference_steps=3), plain) < 1e-3
    assert [counter.frame_count for counter in counters] == [1] * len(models)
    toma_fx.restore(pipe)
    assert torch.equal(latents(), expected)


def test_another_image_of_the_same_prompt_is_read_anew() -> None:
    pipe = tiny_wan_image_to_video_two_models_pipeline()
    assert isinstance(pipe, WanImageToVideoPipeline)
    transform(pipe, skip=())
    arguments = last_image_arguments()
    for last_image, given in ((arguments["last_image"], (0, 2)), (None, (0,))):
        pipe(**{**arguments, "last_image": last_image})
        assert given_in_last_call(pipe.transformer) == given
