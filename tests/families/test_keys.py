"""Keys and values alone merged, in every family: against plain PyTorch, and refusals."""

import copy
import functools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

import toma_fx
from tests.keys_reference import merging_keys
from tests.reference import ReferenceOptions, split_regions
from tests.tiny import flux_inputs, tiny_flux
from tests.tiny_families import FAMILY_MODELS
from tests.tiny_more_families import MORE_FAMILIES
from toma_fx import MergeConfig, transform
from toma_fx.arithmetic import Call, count
from toma_fx.checkpoints import FAMILIES, RANDOM, architecture

pytestmark = [
    pytest.mark.filterwarnings("ignore:.FluxPosEmbed. is deprecated:FutureWarning"),
    # numpy, of how diffusers hands it a tensor.
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),
    # torch, of norms in float32 in a model of another type.
    pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight:UserWarning"),
]

TOLERANCE = 2e-6
REGION = 8
_EDIT = (0, (192, 48, 40))

TOKENS: dict[str, tuple[int, tuple[int, ...]]] = {
    "Flux": (0, (256,)),
    "FLUX.2": (0, (192,)),
    "FLUX.2 edit": _EDIT,
    "FLUX.2 klein": (0, (192,)),
    "Qwen-Image": (0, (192,)),
    "Qwen-Image, texts of two lengths": (0, (192,)),
    "Qwen-Image-Edit 2509": _EDIT,
    "Qwen-Image-Edit 2511": _EDIT,
    "Z-Image": (0, (192,)),
    "Z-Image, captions of two lengths": (0, (192,)),
    "Wan": (0, (480,)),
    "Wan 2.2 TI2V": (96, (384,)),
    "Wan 2.2 TI2V from an image": (96, (384,)),
    "Wan 2.1 I2V": (96, (384,)),
    "Wan 2.2 I2V": (96, (384,)),
    "Wan VACE": (0, (480,)),
    "sd3": (0, (256,)),
    "sd3.5": (0, (256,)),
    "chroma": (0, (256,)),
    "hunyuan-video": (0, (192,)),
    "hunyuan-video-i2v": (64, (128,)),
    "hunyuan-video-1.5": (0, (192,)),
    "hunyuan-image": (0, (256,)),
    "ltx": (0, (192,)),
    "ltx-i2v": (64, (128,)),
    "ltx-2": (0, (192,)),
    "ltx-2-i2v": (64, (128,)),
    "ltx-2.3": (0, (192,)),
    "cogvideox": (0, (192,)),
    "cogvideox-2b": (0, (192,)),
    "cogvideox-1.5": (0, (192,)),
    "krea-2": (0, (256,)),
    "cosmos": (0, (256,)),
    "cosmos-video": (128, (64,)),
    "flux.3": (0, (256,)),
    "flux.3-edit": (0, (256, 128)),
    "pixart": (0, (256,)),
}
"""Image tokens of a call that stay, and those of the segments behind them, in stripes."""
TOKENS = {n: t for n, t in TOKENS.items() if n in {"Flux", *FAMILY_MODELS, *MORE_FAMILIES}}
every_family = pytest.mark.parametrize("name", TOKENS)
FEW = (
    "Flux",
    "Qwen-Image, texts of two lengths",
    "Wan 2.2 TI2V from an image",
    "sd3.5",
    "cogvideox",
)
some_families = pytest.mark.parametrize("name", FEW)
KNOWN = list(dict.fromkeys(FAMILIES[name] for name in RANDOM))
two_families = pytest.mark.parametrize("name", FEW[1:3])


@functools.cache
def built(name: str) -> tuple[Any, dict[str, Any]]:
    """A model and a call of it for all tests; nothing may change them."""
    if name == "Flux":
        return tiny_flux(), flux_inputs(tiny_flux())
    make, inputs = FAMILY_MODELS[name][:2] if name in FAMILY_MODELS else MORE_FAMILIES[name]
    model = make()
    return model, inputs(model)


def run(model: Any, inputs: dict[str, Any]) -> Tensor:
    output = model(**inputs, return_dict=False)[0]
    return torch.stack(list(output)) if isinstance(output, list | tuple) else output


def difference(a: Tensor, b: Tensor) -> float:
    """Root mean square of ``a - b``, in standard deviations of ``b``."""
    return float((a - b).square().mean().sqrt() / b.std())


def keys(name: str, **options: Any) -> Any:
    config = {"region_tokens": REGION, "region": "stripe", "skip": (), **options}
    return transform(built(name)[0], placement="keys", **config)


@pytest.fixture(autouse=True)
def _no_grad() -> Iterator[None]:
    torch._dynamo.reset()
    with torch.no_grad():
        yield
    torch._dynamo.reset()


@every_family
def test_attention_to_merged_keys_is_that_of_a_plain_reference(name: str) -> None:
    model, inputs = built(name)
    untouched = run(model, inputs)
    unmerged, segments = TOKENS[name]
    options = ReferenceOptions(ratio=0.5, region="stripe", region_tokens=REGION)
    regions = [split_regions(1, segment, options) for segment in segments]
    with merging_keys(model, unmerged, regions, options):
        expected = run(model, inputs)
    merged = run(keys(name), inputs)
    assert difference(expected, untouched) > 200 * TOLERANCE, "nothing merged"
    assert difference(merged, expected) < TOLERANCE


@some_families
def test_in_tiles_rows_of_a_batch_alone_give_the_same(name: str) -> None:
    inputs = built(name)[1]
    merged = keys(name, region="tile", region_tokens=16)
    together = run(merged, inputs)
    make = flux_inputs if name == "Flux" else _maker(name)
    alone = run(merged, _first_row(make(built(name)[0])))
    assert difference(alone, together[:1]) < TOLERANCE


def _maker(name: str) -> Any:
    return (FAMILY_MODELS[name][:2] if name in FAMILY_MODELS else MORE_FAMILIES[name])[1]


def _first_row(inputs: dict[str, Any]) -> dict[str, Any]:
    shared = ("img_ids", "txt_ids")
    return {
        key: value[:1] if isinstance(value, Tensor | list) and key not in shared else value
        for key, value in inputs.items()
    }


@two_families
def test_compiled_whole_or_block_by_block_it_computes_the_same(name: str) -> None:
    inputs = built(name)[1]
    merged = keys(name, region="tile")
    expected = run(merged, inputs)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(merged, fullgraph=True, backend=counter)
    for _ in range(3):
        assert difference(run(compiled, inputs), expected) < TOLERANCE
    assert counter.frame_count == 1
    torch._dynamo.reset()
    merged.compile_repeated_blocks(fullgraph=True, backend="aot_eager")
    assert difference(run(merged, inputs), expected) < TOLERANCE


@some_families
def test_ratio_0_is_the_model_itself_and_restore_gives_it_back(name: str) -> None:
    model, inputs = built(name)
    expected = run(model, inputs)
    assert torch.equal(run(keys(name, ratio=0), inputs), expected)
    merged = keys(name)
    assert not torch.equal(run(merged, inputs), expected)
    assert torch.equal(run(toma_fx.restore(merged), inputs), expected)


@two_families
def test_exported_it_computes_the_same(name: str) -> None:
    inputs = built(name)[1]
    merged = keys(name, region="tile")
    program = toma_fx.export(merged, inputs)
    tensors = {k: v for k, v in inputs.items() if k != "return_dict"}
    assert difference(program.module()(**tensors)[0], run(merged, inputs)) < TOLERANCE


@some_families
def test_the_report_counts_what_is_computed(name: str) -> None:
    model, inputs = built(name)
    merged = keys(name)
    said = toma_fx.report(merged, inputs=inputs)
    counted = [count(each, Call((), inputs)) for each in (model, merged)]
    assert [said.flops_before, said.flops_after] == pytest.approx(counted, rel=0.01)
    group = next(each for each in said.groups if each.merged)
    assert group.merged == ("keys and values",)
    assert group.tokens_after < group.tokens_before
    assert "keys and values" in str(said)


@two_families
@pytest.mark.parametrize(
    "options",
    [
        {"share": "block"},
        {"merge_over": "image"},
        {"region": "image"},
        {"selector": "random"},
        {"selector": "fixed"},
        {"merge_below": 0.6},
        {"schedule": toma_fx.Schedule(select_every=4, weigh_every=2)},
    ],
    ids=str,
)
def test_it_goes_with_the_other_options(name: str, options: dict[str, Any]) -> None:
    inputs = built(name)[1]
    merged = keys(name, **options)
    outputs = [run(merged, inputs) for _ in range(3)]
    assert outputs[0].isfinite().all()
    assert difference(outputs[2], outputs[0]) < TOLERANCE


@some_families
def test_it_runs_in_bfloat16(name: str) -> None:
    model, inputs = built(name)
    expected = run(keys(name), inputs)
    half = {
        k: v.bfloat16() if isinstance(v, Tensor) and v.dtype == torch.float32 else v
        for k, v in inputs.items()
    }
    config = MergeConfig(placement="keys", region_tokens=REGION, region="stripe", skip=())
    merged = transform(copy.deepcopy(model).bfloat16(), config)
    assert difference(run(merged, half).float(), expected) < 0.1


@pytest.mark.parametrize("name", [next(n for n in RANDOM if FAMILIES[n] is f) for f in KNOWN])
def test_published_models_have_the_layers_that_examples_speak_of(name: str) -> None:
    """Heads of other widths than those of tiny models, say."""
    merged: Any = transform(architecture(name), placement="keys", skip=())
    assert {block.components for block in merged.toma_recipe.merged} == {("keys and values",)}
