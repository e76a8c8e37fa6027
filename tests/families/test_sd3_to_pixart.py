"""SD3, Chroma, HunyuanVideo, HunyuanVideo 1.5, HunyuanImage and PixArt merge as the method says."""

import copy
import functools
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

import toma_fx
from tests import reference
from tests.choices import Choices
from tests.families.block_reference import merge_model, regions_of
from tests.families.sd3_to_pixart import CASES, KINDS
from tests.more_family_pipelines import MORE_PIPELINES
from tests.reference import ReferenceOptions
from tests.tiny import lossless
from toma_fx import MergeConfig, transform
from toma_fx.arithmetic import Call, count
from toma_fx.build import recipe_of
from toma_fx.errors import InputError

# diffusers, of its own import in Chroma.
pytestmark = pytest.mark.filterwarnings("ignore:.FluxPosEmbed. is deprecated:FutureWarning")

TOLERANCE = 1e-5
REFERENCE_TOLERANCE = 2e-5
"""As in `tests.test_reference`."""


@functools.cache
def build(name: str) -> Any:
    """One model for all tests; nothing here may change it."""
    return CASES[name].model()


def run(model: Any, inputs: dict[str, Any]) -> Tensor:
    output: Tensor = model(**inputs, return_dict=False)[0]
    return output


def difference(a: Tensor, b: Tensor) -> float:
    """Root mean square of ``a - b``, in standard deviations of ``b``."""
    return float((a - b).square().mean().sqrt() / b.std())


@pytest.fixture(autouse=True)
def _no_grad() -> Iterator[None]:
    torch._dynamo.reset()
    with torch.no_grad():
        yield
    torch._dynamo.reset()


@pytest.fixture(params=CASES)
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def test_ratio_0_is_bit_identical_and_the_model_is_left_alone(name: str) -> None:
    model = build(name)
    inputs = CASES[name].inputs(model)
    expected = run(model, inputs)
    assert torch.equal(run(transform(model, ratio=0.0), inputs), expected)
    merged = transform(model, ratio=0.5)
    assert difference(run(merged, inputs), expected) > 1e-3
    assert torch.equal(run(model, inputs), expected)
    toma_fx.restore(merged)
    assert torch.equal(run(merged, inputs), expected)


@pytest.mark.parametrize("region", ["tile", "stripe"])
@pytest.mark.parametrize("placement", ["block", "component"])
def test_every_row_moves_with_its_token(name: str, region: str, placement: str) -> None:
    model = build(name)
    inputs = CASES[name].inputs(model)
    config = lossless(region=region, region_tokens=16, skip=(), placement=placement)
    merged = transform(model, config)
    torch.testing.assert_close(
        run(merged, inputs), run(model, inputs), rtol=TOLERANCE, atol=TOLERANCE
    )


@pytest.mark.parametrize("region", ["tile", "stripe"])
def test_merges_as_the_reference(name: str, region: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, grid = build(name), CASES[name].grid
    inputs = CASES[name].inputs(model)
    options = ReferenceOptions(ratio=0.5, region=region, region_tokens=16)
    merged = transform(model, ratio=0.5, region=region, region_tokens=16)
    with Choices() as choices:
        output = run(merged, inputs)
    monkeypatch.setattr(reference, "select", choices.follow)
    regions = regions_of(grid, region, 16, merged.toma_recipe.config.region_frames)
    expected = run(merge_model(model, KINDS, grid, regions, options), inputs)
    assert not choices.made
    assert difference(output, expected) < REFERENCE_TOLERANCE
    assert difference(expected, run(model, inputs)) > 1e-3


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.grid.given])
def test_first_frames_that_are_given_never_merge(name: str) -> None:
    merged = transform(build(name), ratio=0.5, skip=())
    seen: list[int] = []
    merged.transformer_blocks[0].ff.register_forward_pre_hook(
        lambda module, args: seen.append(args[0].shape[1])
    )
    run(merged, CASES[name].inputs(merged))
    assert seen == [64 + 128 // 2]


def test_blocks_of_the_text_are_left_alone() -> None:
    for name in CASES:
        paths = [block.path for block in recipe_of(build(name), MergeConfig(skip=())).blocks]
        assert {path.rpartition(".")[0] for path in paths} <= {
            "transformer_blocks",
            "single_transformer_blocks",
        }, name


def test_token_replace_blocks_know_their_prefix_on_their_own() -> None:
    model = build("hunyuan-video, token replace")
    merged = transform(model, lossless(region_tokens=16, skip=(), share="block", region="stripe"))
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    tokens, text, embedding = normal(2, 80, 32), normal(2, 7, 32), normal(2, 32)
    rotary, replaced = (normal(80, 16), normal(80, 16)), normal(2, 32)
    call: list[Any] = [tokens, text, embedding, None, rotary, replaced, 16]
    for blocks in ("transformer_blocks", "single_transformer_blocks"):
        expected = getattr(model, blocks)[0](*call)
        torch.testing.assert_close(getattr(merged, blocks)[0](*call), expected)


def test_samples_are_as_they_would_be_alone(name: str) -> None:
    model = build(name)
    inputs = CASES[name].inputs(model)
    inputs["timestep"] = inputs["timestep"] * torch.tensor([1, 0.5]).to(inputs["timestep"].dtype)
    if inputs["timestep"].dtype == torch.int64:
        inputs["timestep"] = torch.tensor([500, 250])
    merged = transform(model, ratio=0.5, region_tokens=16)
    together = run(merged, inputs)
    for b in range(2):
        one = {
            key: value[b : b + 1]
            if isinstance(value, Tensor) and not key.endswith("_ids")
            else value
            for key, value in inputs.items()
        }
        assert difference(run(merged, one), together[b : b + 1]) < 1e-4


def test_copies_and_pickles_merge_alike(name: str) -> None:
    merged = transform(build(name), ratio=0.5)
    inputs = CASES[name].inputs(merged)
    expected = run(merged, inputs)
    assert torch.equal(run(copy.deepcopy(merged), inputs), expected)
    loaded = pickle.loads(pickle.dumps(merged))
    assert torch.equal(run(loaded, inputs), expected)
    rows = [block.row for block in loaded.toma_recipe.blocks]
    assert set(rows) <= set(loaded.toma_recipe.family.blocks)


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.whole])
def test_whole_model_is_one_graph(name: str) -> None:
    merged = transform(build(name), ratio=0.5)
    frames = CompileCounterWithBackend("aot_eager")
    compiled: Any = torch.compile(
        copy.deepcopy(merged), backend=frames, fullgraph=True, dynamic=False
    )
    inputs = CASES[name].inputs(merged)
    for step in range(2):
        inputs["timestep"] = inputs["timestep"] - step * inputs["timestep"] // 4
        with torch._dynamo.config.patch(error_on_recompile=step > 0):
            assert difference(run(compiled, inputs), run(merged, inputs)) < TOLERANCE
    assert frames.frame_count == 1


def test_blocks_compile_by_themselves(name: str) -> None:
    merged = transform(build(name), ratio=0.5)
    compiled = copy.deepcopy(merged)
    frames = CompileCounterWithBackend("aot_eager")
    compiled.compile_repeated_blocks(backend=frames, fullgraph=True, dynamic=False)
    blocks = [compiled.get_submodule(each.module) for each in merged.toma_recipe.blocks]
    assert all(block._compiled_call_impl is not None for block in blocks)
    inputs = CASES[name].inputs(merged)
    for step in range(2):
        inputs["timestep"] = inputs["timestep"] - step * inputs["timestep"] // 4
        with torch._dynamo.config.patch(error_on_recompile=step > 0):
            assert difference(run(compiled, inputs), run(merged, inputs)) < TOLERANCE


# Under checkpointing, diffusers leaves the mask out in Chroma's single-stream blocks, and hands
# keyword arguments of HunyuanImage's to what takes none.
UNCHECKED = ("chroma", "chroma, image mask", "hunyuan-image", "hunyuan-image, distilled")


@pytest.mark.parametrize("name", [name for name in CASES if name not in UNCHECKED])
def test_checkpointing_gives_the_same_gradients(name: str) -> None:
    gradients = []
    for checkpointing in (False, True):
        merged = transform(build(name), ratio=0.5).train()
        if checkpointing:
            merged.enable_gradient_checkpointing()
        with torch.enable_grad():
            run(merged, CASES[name].inputs(merged)).square().mean().backward()
        gradients.append({n: p.grad for n, p in merged.named_parameters() if p.grad is not None})
    plain, checkpointed = gradients
    assert plain.keys() == checkpointed.keys()
    for each, gradient in plain.items():
        torch.testing.assert_close(checkpointed[each], gradient, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", ["sd3.5", "hunyuan-video, token replace"])
def test_exported_program_agrees(name: str, tmp_path: Path) -> None:
    merged = transform(build(name), ratio=0.5)
    inputs = CASES[name].inputs(merged)
    toma_fx.export(merged, inputs, path=tmp_path / "model.pt2")
    program = torch.export.load(tmp_path / "model.pt2")
    torch.testing.assert_close(
        program.module()(**inputs)[0], run(merged, inputs), rtol=TOLERANCE, atol=TOLERANCE
    )


@pytest.mark.parametrize("name", ["hunyuan-image", "hunyuan-video-1.5", "hunyuan-video-1.5, image"])
def test_counts_of_models_that_pick_words_are_those_of_a_real_call(name: str) -> None:
    for model in (build(name), transform(build(name), ratio=0.5)):
        call = Call((), CASES[name].inputs(model))
        assert count(model, call) == count(model, call, data=True)


def test_single_image_tokens_cannot_be_masked_in_pixart() -> None:
    merged = transform(build("pixart"), ratio=0.5)
    inputs = CASES["pixart"].inputs(merged)
    with pytest.raises(InputError, match="masks single image tokens"):
        run(merged, {**inputs, "attention_mask": torch.ones(2, 256)})


PIPELINES = (
    "sd3",
    "chroma",
    "hunyuan-video",
    "hunyuan-video-i2v",
    "hunyuan-video-1.5",
    "hunyuan-image",
    "pixart",
)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", PIPELINES)
def test_pipeline_merges_reports_and_is_restored(name: str) -> None:
    make, arguments = MORE_PIPELINES[name]
    pipeline = make()
    expected = torch.as_tensor(pipeline(**arguments())[0])
    transform(pipeline, ratio=0.5)
    merged = torch.as_tensor(pipeline(**arguments())[0])
    assert difference(merged, expected) > 1e-3
    report = toma_fx.report(pipeline)
    assert report.flops_after < report.flops_before
    toma_fx.restore(pipeline)
    assert torch.equal(torch.as_tensor(pipeline(**arguments())[0]), expected)
