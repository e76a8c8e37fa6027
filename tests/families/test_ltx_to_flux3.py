"""LTX-Video, LTX-2, CogVideoX, Krea 2, Cosmos, FLUX.3: merged as a plain reference merges them."""

import copy
import pickle
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils import _pytree as pytree

import toma_fx
from tests.families.merge_by_hand import merge_by_hand
from tests.more_family_pipelines import MORE_PIPELINES
from tests.tiny import lossless
from tests.tiny_more_families import MORE_FAMILIES
from toma_fx import MergeConfig, Schedule, transform
from toma_fx.errors import InputError
from toma_fx.families import family_of
from toma_fx.families.rows import TokenGrids
from toma_fx.grids import image_sequence

pytestmark = [
    # numpy, of how diffusers hands it a tensor.
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),
    # torch, of norms in float32 in a model of another type.
    pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight:UserWarning"),
]

FRAME = 64
"""Tokens of a frame in a tiny video of three."""
REGION_TOKENS = 16


class Case(NamedTuple):
    """What is said of a call: tokens that stay as they are, and those of the segments."""

    unmerged: int
    segments: tuple[int, ...]
    """In stripes."""


VIDEO = Case(0, (3 * FRAME,))
FROM_IMAGE = Case(FRAME, (2 * FRAME,))
IMAGE = Case(0, (256,))
CASES = {
    "ltx": VIDEO,
    "ltx-i2v": FROM_IMAGE,
    "ltx-keyframe": Case(2 * FRAME, (2 * FRAME,)),
    "ltx-2": VIDEO,
    "ltx-2-i2v": FROM_IMAGE,
    "ltx-2.3": VIDEO,
    "cogvideox": VIDEO,
    "cogvideox-2b": VIDEO,
    "cogvideox-1.5": VIDEO,
    "krea-2": IMAGE,
    "cosmos": IMAGE,
    "cosmos-video": Case(2 * FRAME, (FRAME,)),
    "flux.3": IMAGE,
    "flux.3-edit": Case(0, (256, 128)),
}
CASES = {name: case for name, case in CASES.items() if name in MORE_FAMILIES}
FAMILIES = [name for name in CASES if name not in ("cogvideox-1.5", "ltx-2", "flux.3", "cosmos")]
"""One or two calls of each family, those with the most in them."""
every_case = pytest.mark.parametrize("name", CASES)
every_family = pytest.mark.parametrize("name", FAMILIES)


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def tiny(name: str) -> tuple[Any, dict[str, Any]]:
    make_model, make_inputs = MORE_FAMILIES[name]
    model = make_model(num_layers=2)
    return model, make_inputs(model)


def run(model: Any, call: Mapping[str, Any]) -> Tensor:
    output: Tensor = model(**call, return_dict=False)[0]
    return output


def options(**more: Any) -> dict[str, Any]:
    return {"ratio": 0.5, "skip": (), "region_tokens": REGION_TOKENS, **more}


@every_case
@torch.no_grad()
def test_nothing_merged_is_the_very_same(name: str) -> None:
    model, call = tiny(name)
    assert torch.equal(run(transform(model, ratio=0), call), run(model, call))


@every_case
@pytest.mark.parametrize("region", ["tile", "stripe"])
@pytest.mark.parametrize("placement", ["block", "component"])
@torch.no_grad()
def test_whatever_belongs_to_a_token_moves_with_it(name: str, region: str, placement: str) -> None:
    model, call = tiny(name)
    config = lossless(region=region, placement=placement, region_tokens=REGION_TOKENS, skip=())
    torch.testing.assert_close(
        run(transform(model, config), call), run(model, call), atol=1e-5, rtol=0
    )


@every_family
@torch.no_grad()
def test_kept_plans_hold_nothing_of_a_step(name: str) -> None:
    model, call = tiny(name)
    config = lossless(region_tokens=REGION_TOKENS, skip=(), schedule=Schedule(select_every=9))
    moved = transform(model, config)
    for share in (1.0, 0.5, 0.25):
        step = later(call, share)
        torch.testing.assert_close(run(moved, step), run(model, step), atol=1e-5, rtol=0)


def later(call: Mapping[str, Any], share: float) -> dict[str, Any]:
    """The call at a lower timestep, wherever it is passed."""
    timestep = call["timestep"]
    lower = (timestep * share).to(timestep.dtype)
    return {name: lower if value is timestep else value for name, value in call.items()}


@every_case
@torch.no_grad()
def test_merged_blocks_agree_with_a_plain_reference(name: str) -> None:
    model, call = tiny(name)
    # In float64, or rounding decides between destinations that are alike.
    model.double()
    call = pytree.tree_map_only(Tensor, lambda t: t.double() if t.is_floating_point() else t, call)
    merged = run(transform(model, **options(region="stripe", share="block")), call)
    untouched = run(model, call)
    merge_by_hand(model, *CASES[name], REGION_TOKENS)
    torch.testing.assert_close(merged, run(model, call), atol=1e-5, rtol=1e-5)
    assert (merged - untouched).abs().max() > 1e-3


@every_case
@torch.no_grad()
def test_rows_of_a_batch_agree_with_what_each_gets_alone(name: str) -> None:
    model, call = tiny(name)
    call["timestep"] = call["timestep"] * torch.tensor([1.0, 0.5]).reshape(
        2, *[1] * (call["timestep"].ndim - 1)
    ).to(call["timestep"].dtype)
    if "sigma" in call:
        call["sigma"] = call["timestep"] if call["timestep"].ndim == 1 else call["sigma"]
    merged = transform(model, **options())
    together = run(merged, call)
    for index in range(2):

        def mine(value: Any, index: int = index) -> Any:
            batched = isinstance(value, Tensor) and len(value) == 2
            return value[index : index + 1] if batched else value

        alone = run(merged, pytree.tree_map(mine, call))
        torch.testing.assert_close(together[index : index + 1], alone, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", [name for name in CASES if not name.startswith(("krea", "flux"))])
def test_tokens_that_are_given_stay_unmerged(name: str) -> None:
    model, call = tiny(name)
    border = family_of(model).borders[0]
    assert isinstance(border, TokenGrids)
    if border.reading is not None and "video_coords" in call:
        call |= border.reading.makes(call["video_coords"])
    found = image_sequence(border, MergeConfig(region="stripe"), model, call)
    assert (found.unmerged, found.segments) == CASES[name]
    in_tiles = image_sequence(border, MergeConfig(), model, call)
    assert in_tiles.unmerged + sum(in_tiles.segments) == found.unmerged + sum(found.segments)


# Life with a merged model


@every_family
@torch.no_grad()
def test_the_given_model_is_untouched_and_copies_are_alike(name: str) -> None:
    model, call = tiny(name)
    before = run(model, call)
    merged = transform(model, **options())
    output = run(merged, call)
    assert torch.equal(run(model, call), before)
    assert torch.equal(run(copy.deepcopy(merged), call), output)
    assert torch.equal(run(pickle.loads(pickle.dumps(merged)), call), output)


@every_family
@torch.no_grad()
def test_a_model_compiles_to_one_graph(name: str) -> None:
    model, call = tiny(name)
    merged = transform(model, **options())
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(merged, fullgraph=True, backend=counter)
    for step in (call, later(call, 0.5)):
        torch.testing.assert_close(run(compiled, step), run(merged, step), atol=1e-6, rtol=1e-5)
    assert counter.frame_count == 1


@every_family
def test_checkpointing_gives_the_same_gradients(name: str) -> None:
    model, call = tiny(name)
    merged = transform(model, **options())

    def gradient() -> Tensor:
        image: Tensor = call["hidden_states"].clone().requires_grad_()
        run(merged, {**call, "hidden_states": image}).square().sum().backward()
        assert image.grad is not None
        return image.grad

    plain = gradient()
    merged.enable_gradient_checkpointing()
    torch.testing.assert_close(gradient(), plain)


@torch.no_grad()
def test_an_exported_model_computes_the_same() -> None:
    model, call = tiny("ltx-i2v")
    merged = transform(model, **options())
    program = toma_fx.export(merged, call)
    (output,) = program.module()(**call)
    torch.testing.assert_close(output, run(merged, call), atol=1e-6, rtol=1e-5)


PIPELINES = [
    "ltx",
    "ltx-i2v",
    "ltx-keyframe",
    "ltx-2",
    "ltx-2-i2v",
    "cogvideox",
    "krea-2",
    "anima",
    "flux.3",
]


@pytest.mark.parametrize("name", [name for name in PIPELINES if name in MORE_PIPELINES])
@torch.no_grad()
def test_a_pipeline_runs_merged_and_is_restored(name: str) -> None:
    make, arguments = MORE_PIPELINES[name]
    pipeline = make()

    def latents() -> Tensor:
        output = pipeline(**arguments())
        found: Tensor = output[0] if isinstance(output, tuple) else output
        return found

    before = latents()
    transform(pipeline, ratio=0.5)
    merged = latents()
    assert merged.isfinite().all()
    assert not torch.equal(merged, before)
    assert toma_fx.report(pipeline).flops_after < toma_fx.report(pipeline).flops_before
    toma_fx.restore(pipeline)
    assert torch.equal(latents(), before)


# What is refused


@torch.no_grad()
def test_a_call_that_does_not_say_where_tokens_are_is_refused() -> None:
    model, call = tiny("ltx")
    merged = transform(model, **options())
    with pytest.raises(InputError, match="pass all three"):
        run(merged, {**call, "num_frames": None, "height": None, "width": None})
    with pytest.raises(InputError, match="num_frames, height and width"):
        run(merged, {**call, "num_frames": 9})


@torch.no_grad()
def test_residuals_of_a_controlnet_are_refused() -> None:
    model, call = tiny("cosmos")
    merged = transform(model, **options())
    with pytest.raises(InputError, match="block_controlnet_hidden_states"):
        run(merged, {**call, "block_controlnet_hidden_states": [call["hidden_states"]]})


@torch.no_grad()
def test_a_mask_of_single_tokens_is_refused() -> None:
    model, call = tiny("ltx-2")
    merged = transform(model, **options())
    mask = torch.ones(2, 3 * FRAME, 3 * FRAME)
    with pytest.raises(InputError, match="video_self_attention_mask"):
        run(merged, {**call, "video_self_attention_mask": mask})


# What guidance of LTX-2 and its later frames change


@pytest.mark.parametrize("name", ["ltx-2", "ltx-2.3"])
@torch.no_grad()
def test_video_and_sound_apart_and_attention_left_out(name: str) -> None:
    model, call = tiny(name)
    moved = transform(model, lossless(region_tokens=REGION_TOKENS, skip=()))
    changes: list[dict[str, Any]] = [
        {"isolate_modalities": True},
        {},
        {"use_cross_timestep": False},
    ]
    if name == "ltx-2.3":
        half = torch.tensor([0.0, 1.0])
        changes += [
            {"spatio_temporal_guidance_blocks": [1]},
            {"spatio_temporal_guidance_blocks": [0], "perturbation_mask": half},
        ]
    for change in changes:
        step = {**call, **change}
        torch.testing.assert_close(run(moved, step), run(model, step), atol=1e-5, rtol=0)


@torch.no_grad()
def test_given_frames_behind_a_video() -> None:
    model, call = tiny("ltx-2-i2v")
    for argument, dim in (("hidden_states", 1), ("timestep", 1), ("video_coords", 2)):
        value = call[argument]
        call[argument] = torch.cat([value, value.narrow(dim, 0, FRAME)], dim)
    for region in ("tile", "stripe"):
        moved = transform(model, lossless(region=region, region_tokens=REGION_TOKENS, skip=()))
        torch.testing.assert_close(run(moved, call), run(model, call), atol=1e-5, rtol=0)


@torch.no_grad()
def test_positions_that_are_learned() -> None:
    make_model, make_inputs = MORE_FAMILIES["cosmos"]
    model = make_model(num_layers=2, extra_pos_embed_type="learnable")
    call = make_inputs(model)
    moved = transform(model, lossless(region_tokens=REGION_TOKENS, skip=()))
    torch.testing.assert_close(run(moved, call), run(model, call), atol=1e-5, rtol=0)


@torch.no_grad()
def test_references_are_put_in_order_by_number() -> None:
    model, call = tiny("flux.3-edit")
    tokens, ids = call["image_cond_hidden_states"], call["image_cond_ids"]
    call["image_cond_hidden_states"] = torch.cat([tokens, tokens], dim=1)
    call["image_cond_ids"] = torch.cat([ids, ids - torch.tensor([0.0, 0, 0, 1])])
    moved = transform(model, lossless(region_tokens=REGION_TOKENS, skip=()))
    torch.testing.assert_close(run(moved, call), run(model, call), atol=1e-5, rtol=0)
    assert moved.toma_last_call is not None
    assert moved.toma_last_call.grids == (256, 128, 128)
