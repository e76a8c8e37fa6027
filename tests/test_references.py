"""Edit models whose references alone merge, beside diffusers' own models on sequences cut by hand.

Merging by hand shares no code with toma_fx. It takes greedy facility location and weights from
`tests.reference`, one reference at a time, rows of the batch in loops.
"""

import copy
import pickle
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from diffusers import ContextParallelConfig, FluxKontextPipeline, FluxTransformer2DModel
from peft import LoraConfig
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import toma_fx
from tests.family_pipelines import FAMILY_PIPELINES, picture
from tests.pipelines import tiny_flux_pipeline
from tests.reference import cosine_similarity, select
from tests.tiny import flux_inputs, tiny_flux, tiny_sdxl_unet
from tests.tiny_families import flux2_inputs, qwen_image_inputs, tiny_flux2, tiny_qwen_image
from toma_fx import MergeConfig, restore, transform
from toma_fx.cli import main
from toma_fx.errors import ConfigError, InputError, ModelError
from toma_fx.families import all_families
from toma_fx.report import report

Size = tuple[int, int]
Inputs = Callable[..., dict[str, Any]]
DRAWN, FIRST, SECOND = (12, 8), (8, 10), (4, 9)
RATIO = 0.75
# What a sum in another order changes; merging itself changes the output by more than 1e-2.
TOLERANCE = 1e-5


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    torch._dynamo.reset()
    with torch.no_grad():
        yield
    torch._dynamo.reset()


def kontext_inputs(
    model: FluxTransformer2DModel,
    batch: int = 2,
    height: int = DRAWN[0],
    width: int = DRAWN[1],
    references: tuple[Size, ...] = (),
    seed: int = 0,
) -> dict[str, Any]:
    """A call of Kontext, whose references have image numbers 1, 2 and so on."""
    sizes = [(height, width), *references]
    calls = [flux_inputs(model, batch, *size, seed=seed + i) for i, size in enumerate(sizes)]
    for number, call in enumerate(calls):
        call["img_ids"][:, 0] = number
    tokens = torch.cat([call["hidden_states"] for call in calls], 1)
    ids = torch.cat([call["img_ids"] for call in calls])
    return {**calls[0], "hidden_states": tokens, "img_ids": ids}


MODELS: dict[str, tuple[Callable[[], Any], Inputs]] = {
    "kontext": (tiny_flux, kontext_inputs),
    "flux2": (partial(tiny_flux2, num_single_layers=2), flux2_inputs),
    "qwen": (partial(tiny_qwen_image, num_layers=2), qwen_image_inputs),
    "qwen 2511": (partial(tiny_qwen_image, num_layers=2, zero_cond_t=True), qwen_image_inputs),
}
EACH = pytest.mark.parametrize("name", MODELS)


def made(
    name: str, references: tuple[Size, ...] = (FIRST,), **changes: Any
) -> tuple[Any, dict[str, Any]]:
    """A model, and a call of it with references of these sizes."""
    build, inputs = MODELS[name]
    model = build()
    size = {"height": DRAWN[0], "width": DRAWN[1], "references": references}
    return model, inputs(model, **{**size, **changes})


def drawn(output: Tensor) -> Tensor:
    return output[:, : DRAWN[0] * DRAWN[1]]


def run(model: Any, call: dict[str, Any]) -> Tensor:
    sample: Tensor = model(**call).sample
    return sample


def difference(a: Tensor, b: Tensor) -> float:
    """Root mean square of ``a - b``, in standard deviations of ``b``."""
    return float((a - b).square().mean().sqrt() / b.std())


def counted(model: Any, call: dict[str, Any]) -> int:
    """Operations of a call; the CPU's fused attention is one that the counter does not know."""
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        run(model, call)
    return int(counter.get_total_flops())


# By hand


def merged_by_hand(x_BNC: Tensor, ratio: float) -> tuple[Tensor, list[int]]:
    """A reference's merged tokens, and which of its tokens they were."""
    count = max(1, int(x_BNC.shape[1] * (1 - ratio) + 0.5))
    rows = [F.normalize(x_NC.float(), dim=-1) for x_NC in x_BNC]
    chosen = sorted(select(torch.cat(rows, dim=-1), count))
    merged = []
    for x_NC in x_BNC:
        weight_nN = (cosine_similarity(x_NC[chosen], x_NC) / 0.001).softmax(dim=0)
        merged.append(weight_nN / weight_nN.sum(dim=1, keepdim=True) @ x_NC)
    return torch.stack(merged), chosen


class Picked(nn.Module):
    """Rotary tables of Qwen-Image, for some of the tokens of the shapes that it was made for."""

    def __init__(self, rope: nn.Module, shapes: Any, tokens: list[int]) -> None:
        super().__init__()
        self.rope, self.shapes, self.tokens = rope, shapes, tokens

    def forward(self, video_fhw: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        image, text = self.rope(self.shapes, **kwargs)
        return image[self.tokens], text


def by_hand(model: Any, call: dict[str, Any], sizes: tuple[Size, ...], ratio: float) -> Tensor:
    """The image's part of the output of diffusers' model on references that are merged by hand."""
    tokens, start = call["hidden_states"], DRAWN[0] * DRAWN[1]
    parts, left = [tokens[:, :start]], list(range(start))
    for rows, columns in sizes:
        merged, chosen = merged_by_hand(tokens[:, start : start + rows * columns], ratio)
        parts.append(merged)
        left += [start + token for token in chosen]
        start += rows * columns
    call = {**call, "hidden_states": torch.cat(parts, dim=1)}
    if "img_ids" in call:
        call["img_ids"] = call["img_ids"][..., left, :]
    else:
        model = copy.deepcopy(model)
        model.pos_embed = Picked(model.pos_embed, call["img_shapes"], left)
        shapes = [(1, *DRAWN), *((1, 1, part.shape[1]) for part in parts[1:])]
        call["img_shapes"] = [shapes] * tokens.shape[0]
    return drawn(run(model, call))


@EACH
@pytest.mark.parametrize("sizes", [(FIRST,), (FIRST, SECOND)])
def test_output_is_that_of_a_sequence_cut_by_hand(name: str, sizes: tuple[Size, ...]) -> None:
    model, call = made(name, sizes)
    merging = transform(model, ratio=RATIO, tokens="references")
    output = run(merging, call)
    assert difference(drawn(output), by_hand(model, call, sizes, RATIO)) < TOLERANCE
    assert difference(drawn(output), drawn(run(model, call))) > 1e-3
    assert output.shape == run(model, call).shape
    assert not output[:, DRAWN[0] * DRAWN[1] :].any()
    (as_tuple,) = merging(**call, return_dict=False)
    assert torch.equal(as_tuple, output)


@EACH
def test_nothing_changes_at_ratio_0_and_without_references(name: str) -> None:
    model, call = made(name)
    none = transform(model, ratio=0, tokens="references")
    assert torch.equal(run(none, call), run(model, call))
    _, alone = made(name, ())
    merging = transform(model, ratio=RATIO, tokens="references")
    assert torch.equal(run(merging, alone), run(model, alone))
    assert "references: none in this call" in str(report(merging))
    assert report(merging).saved == 0


@EACH
def test_tokens_that_repeat_merge_exactly(name: str) -> None:
    """Of a reference of four colours a quarter is left, and what is left was there before."""
    model, call = made(name, ((8, 8),))
    tokens, start = call["hidden_states"], DRAWN[0] * DRAWN[1]
    colours = torch.randn(1, 16, tokens.shape[2], generator=torch.Generator().manual_seed(1))
    call["hidden_states"] = torch.cat([tokens[:, :start], colours.repeat(2, 4, 1)], dim=1)
    seen: list[Tensor] = []
    merging = transform(model, ratio=0.75, tokens="references")
    first = merging.x_embedder if hasattr(merging, "x_embedder") else merging.img_in
    first.register_forward_hook(lambda module, args, output: seen.append(args[0]))
    run(merging, call)
    for row in seen[0][:, start:]:
        assert row.shape[0] == 16
        nearest = torch.cdist(row, colours[0]).argmin(dim=1)
        assert sorted(nearest.tolist()) == list(range(16))
        torch.testing.assert_close(row, colours[0][nearest])


@EACH
def test_rows_of_one_reference_are_what_they_are_alone(name: str) -> None:
    model, call = made(name)
    start = DRAWN[0] * DRAWN[1]
    tokens = call["hidden_states"]
    call["hidden_states"] = torch.cat([tokens[:, :start], tokens[:1, start:].repeat(2, 1, 1)], 1)
    merging = transform(model, ratio=RATIO, tokens="references")
    both = run(merging, call)
    for row in range(2):
        alone = {
            key: value[row : row + 1] if isinstance(value, Tensor) and len(value) == 2 else value
            for key, value in call.items()
        }
        if "img_shapes" in call:
            alone["img_shapes"] = call["img_shapes"][:1]
        assert difference(run(merging, alone), both[row : row + 1]) < TOLERANCE


def test_each_reference_is_a_region() -> None:
    """What one reference keeps does not hang on another, even of the same look."""
    model, call = made("kontext", (FIRST, FIRST))
    start, count = DRAWN[0] * DRAWN[1], FIRST[0] * FIRST[1]
    call["hidden_states"][:, start + count :] = call["hidden_states"][:, start : start + count]
    merging = transform(model, ratio=RATIO, tokens="references")
    seen: list[Tensor] = []
    merging.pos_embed.register_forward_hook(lambda module, args, output: seen.append(args[0]))
    run(merging, call)
    ids = seen[0][-2 * 20 :]
    assert torch.equal(ids[:20, 1:], ids[20:, 1:])
    assert ids[:, 0].tolist() == [1] * 20 + [2] * 20


# Over the steps of a run


def steps_of(call: dict[str, Any], count: int = 3) -> Iterator[dict[str, Any]]:
    """Calls of a run: the image and the timestep change, the references are copied anew."""
    start = DRAWN[0] * DRAWN[1]
    for step in range(count):
        tokens = call["hidden_states"].clone()
        tokens[:, :start] *= 1 - 0.2 * step
        yield {**call, "hidden_states": tokens, "timestep": call["timestep"] * (1 - 0.2 * step)}


def test_a_plan_is_made_once_for_an_image(monkeypatch: pytest.MonkeyPatch) -> None:
    model, call = made("kontext")
    merging = transform(model, ratio=RATIO, tokens="references")
    made_plans = []
    plan = toma_fx.references.plan_references

    def counting(*args: Any) -> Any:
        made_plans.append(args)
        return plan(*args)

    monkeypatch.setattr("toma_fx.references.plan_references", counting)
    for each in steps_of(call):
        run(merging, each)
    assert len(made_plans) == 1
    _, other = made("kontext", seed=7)
    first = run(merging, other)
    assert len(made_plans) == 2
    assert torch.equal(run(transform(model, ratio=RATIO, tokens="references"), other), first)
    merging._reset_stateful_cache()
    assert merging.toma_state.nbytes() == 0


def test_references_that_are_written_over_are_new_ones() -> None:
    model, call = made("kontext")
    merging = transform(model, ratio=RATIO, tokens="references")
    with torch.inference_mode():
        run(merging, call)
    start = DRAWN[0] * DRAWN[1]
    call["hidden_states"][:, start:] = call["hidden_states"][:, start:].flip(1)
    fresh = transform(model, ratio=RATIO, tokens="references")
    assert torch.equal(run(merging, call), run(fresh, call))


def test_gradients_reach_a_reference() -> None:
    model, call = made("kontext")
    merging = transform(model, ratio=RATIO, tokens="references")
    with torch.enable_grad():
        call["hidden_states"].requires_grad_()
        drawn(run(merging, call)).square().mean().backward()
    gradient = call["hidden_states"].grad
    assert gradient is not None
    assert (gradient[:, DRAWN[0] * DRAWN[1] :].abs().sum(-1) > 0).all()


@EACH
@pytest.mark.parametrize("whole", [True, False])
def test_compiled_it_is_one_graph_for_all_steps(name: str, whole: bool) -> None:
    model, call = made(name)
    uncompiled = transform(model, ratio=RATIO, tokens="references")
    frames = CompileCounterWithBackend("aot_eager")
    compiled = copy.deepcopy(uncompiled)
    if whole:
        compiled.compile(backend=frames, fullgraph=True)
    else:
        compiled.compile_repeated_blocks(backend=frames, fullgraph=True)
    for index, each in enumerate(steps_of(call)):
        with torch._dynamo.config.patch(error_on_recompile=index > 0):
            assert difference(run(compiled, each), run(uncompiled, each)) < TOLERANCE
    assert frames.frame_count == 1 or not whole


def test_inside_something_compiled() -> None:
    """Shapes tell Qwen's references, and values Kontext's, which a graph of all does not know."""
    model, call = made("qwen 2511")
    merging = transform(model, ratio=RATIO, tokens="references")
    outer = torch.compile(
        lambda **call: merging(**call).sample * 1, fullgraph=True, backend="eager"
    )
    assert difference(outer(**call), run(merging, call)) < TOLERANCE
    model, call = made("kontext")
    merging = transform(model, ratio=RATIO, tokens="references")
    with pytest.raises(ModelError, match=r"values of img_ids.*toma_fx\.export"):
        torch.export.export(merging, (), call, strict=False)


@EACH
def test_export(name: str) -> None:
    model, call = made(name)
    merging = transform(model, ratio=RATIO, tokens="references")
    program = toma_fx.export(merging, call)
    for each in steps_of(call):
        (output,) = program.module()(**each)
        assert difference(output, run(merging, each)) < TOLERANCE


# Life


@EACH
def test_restore_copy_and_pickle(name: str) -> None:
    model, call = made(name)
    merging = transform(model, ratio=RATIO, tokens="references")
    expected = run(merging, call)
    for other in (copy.deepcopy(merging), pickle.loads(pickle.dumps(merging))):
        assert torch.equal(run(other, call), expected)
    restored = restore(merging)
    assert restored is merging
    assert type(restored) is type(model)
    assert torch.equal(run(restored, call), run(model, call))
    assert all(type(a) is type(b) for a, b in zip(restored.modules(), model.modules(), strict=True))
    assert torch.equal(run(transform(restored, ratio=RATIO, tokens="references"), call), expected)


def test_an_adapter_that_is_loaded_later_works() -> None:
    model, call = made("kontext")
    merging = transform(model, ratio=RATIO, tokens="references")
    lora = LoraConfig(r=4, target_modules=["to_q", "to_v"], init_lora_weights=False)
    for each in (merging, model):
        with torch.random.fork_rng():
            torch.manual_seed(0)
            each.add_adapter(lora)
    assert difference(drawn(run(merging, call)), by_hand(model, call, (FIRST,), RATIO)) < TOLERANCE


def test_gradient_checkpointing() -> None:
    model, call = made("qwen 2511")
    merging = transform(model, ratio=RATIO, tokens="references")
    expected = run(merging, call)
    merging.enable_gradient_checkpointing()
    with torch.enable_grad():
        output = run(merging.train(), call)
        output.square().mean().backward()
    assert difference(output, expected) < TOLERANCE


def test_half_precision() -> None:
    model, call = made("kontext")
    model = model.to(torch.bfloat16)
    call = {k: v.bfloat16() if v.is_floating_point() else v for k, v in call.items()}
    merging = transform(model, ratio=RATIO, tokens="references")
    assert run(merging, call).dtype == torch.bfloat16


# Pipelines


def kontext_pipeline() -> Any:
    parts = tiny_flux_pipeline().components
    pipe = FluxKontextPipeline(**parts)
    pipe.set_progress_bar_config(disable=True)
    return pipe


PIPELINES: dict[str, tuple[Callable[[], Any], Callable[[], dict[str, Any]]]] = {
    "Flux Kontext": (
        kontext_pipeline,
        lambda: {
            "prompt": "a red fox",
            "image": picture(112, 176),
            "max_area": 128 * 128,
            "_auto_resize": False,
            "negative_prompt": "blurry",
            "true_cfg_scale": 2.0,
            "num_inference_steps": 2,
            "max_sequence_length": 16,
            "output_type": "latent",
            "generator": torch.Generator().manual_seed(0),
        },
    ),
    **{
        name: (FAMILY_PIPELINES[name].build, FAMILY_PIPELINES[name].arguments)
        for name in (
            "FLUX.2 edit",
            "FLUX.2 klein edit",
            "Qwen-Image-Edit",
            "Qwen-Image-Edit 2509",
            "Qwen-Image-Edit 2511",
        )
    },
}


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
@pytest.mark.parametrize("name", PIPELINES)
def test_pipelines(name: str) -> None:
    build, arguments = PIPELINES[name]
    pipe = build()
    untouched = pipe(**arguments()).images
    transform(pipe, ratio=RATIO, tokens="references")
    merged = pipe(**arguments()).images
    assert merged.shape == untouched.shape
    assert 1e-4 < difference(merged, untouched) < 1
    assert pipe.transformer.toma_state.nbytes() == 0
    told = report(pipe)
    assert told.references
    assert all(after == round(before / 4 + 1e-9) for before, after in told.references)
    restore(pipe)
    assert torch.equal(pipe(**arguments()).images, untouched)


# The report, and the options


@EACH
def test_report_is_what_a_call_computes(name: str) -> None:
    model, call = made(name, (FIRST, SECOND))
    merging = transform(model, ratio=0.5, tokens="references")
    run(merging, call)
    told = report(merging)
    assert told.references == ((80, 40), (36, 18))
    assert told.flops_before == counted(model, call)
    # A call with its plan at hand; the report adds the plan's share of a run.
    assert told.flops_after == pytest.approx(counted(merging, call), rel=0.01)
    assert {(g.tokens_before, g.tokens_after) for g in told.groups} == {(212, 154)}
    assert "references: 80 -> 40, 36 -> 18 tokens" in str(told)
    assert report(transform(model, ratio=0.5, tokens="references"), inputs=call) == told
    assert "references merge once" in str(merging.toma_recipe)


def test_report_of_the_native_size_makes_a_reference_up() -> None:
    told = report(transform(tiny_flux(), ratio=RATIO, tokens="references"), height=256)
    assert told.references == ((256, 64),)
    assert told.saved > 0.3


def test_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", "flux", "--tokens", "references", "--ratio", "0.75"]) == 0
    printed = capsys.readouterr().out
    assert "references: 4096 -> 1024 tokens" in printed
    assert "8192 -> 5120" in printed


@pytest.mark.parametrize(
    "options",
    [
        {"placement": "component"},
        {"residual": "replace"},
        {"region": "image"},
        {"region_tokens": 16},
        {"merge_over": "image"},
        {"unmerge": "pinv"},
        {"share": "block"},
        {"schedule": {"select_every": 10, "weigh_every": 5}},
        {"merge_below": 0.6},
        {"skip": ()},
        {"block_ratios": {"transformer_blocks.*": 0.5}},
        {"selector": "fixed"},
    ],
)
def test_options_of_blocks_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="tokens='references'"):
        MergeConfig(tokens="references", **options)
    with pytest.raises(ConfigError, match="choose one of 'all', 'references'"):
        MergeConfig(tokens="some")  # type: ignore[arg-type]


@pytest.mark.parametrize("selector", ["random", "grid"])
def test_other_selectors(selector: str) -> None:
    model, call = made("kontext")
    merging = transform(model, ratio=RATIO, tokens="references", selector=selector)
    assert 1e-3 < difference(drawn(run(merging, call)), drawn(run(model, call))) < 1


def test_what_is_refused() -> None:
    with pytest.raises(ModelError, match=r"Stable Diffusion.*Kontext.*FLUX\.2.*Qwen.*do\."):
        transform(tiny_sdxl_unet(), tokens="references")
    assert sum(family.references is not None for family in all_families()) == 3
    with pytest.raises(ConfigError, match=r"speedup=1\.3 goes by a call without references"):
        transform(tiny_flux(), speedup=1.3, tokens="references")
    with pytest.raises(ConfigError, match="calibrate measures"):
        toma_fx.calibrate(object(), lambda pipe: [], MergeConfig(tokens="references"))
    with pytest.raises(ModelError, match="this is a graph"):
        transform(torch.fx.symbolic_trace(nn.ReLU()), tokens="references")
    model, call = made("kontext")
    merging = transform(model, ratio=RATIO, tokens="references")
    with pytest.raises(InputError, match="'ip_adapter_masks' refers to the full grid"):
        run(merging, {**call, "joint_attention_kwargs": {"ip_adapter_masks": [torch.ones(1)]}})
    with pytest.raises(ModelError, match="context parallelism split the tokens"):
        merging.enable_parallelism(config=ContextParallelConfig(ulysses_degree=2))
    ids = call["img_ids"].clone()
    ids[-1, 0] = 0
    with pytest.raises(InputError, match="come after those of a reference"):
        run(merging, {**call, "img_ids": ids})
    model, call = made("flux2")
    merging = transform(model, ratio=RATIO, tokens="references")
    with pytest.raises(InputError, match="kv_cache_mode='extract' refers to"):
        run(merging, {**call, "kv_cache_mode": "extract", "num_ref_tokens": 80})
