"""A ratio for each block: how much each merges, and which blocks share a plan."""

import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter

import toma_fx
from tests.tiny import flux_inputs, tiny_flux, tiny_sdxl_unet, unet_inputs
from toma_fx.config import MergeConfig
from toma_fx.errors import ConfigError, ModelError
from toma_fx.recipe import Recipe
from toma_fx.schedule import Schedule

MIXED = {
    "sdxl": {"down_blocks.1.*": 0.25, "mid_block.*.1": 0.25, "up_blocks.1.*": 0},
    "flux": {"transformer_blocks.*": 0.25, "single_transformer_blocks.1": 0.75},
}
"""Two groups that differ, and two ratios in one list of blocks."""


def build(family: str) -> tuple[Any, dict[str, Any]]:
    if family == "sdxl":
        unet = tiny_sdxl_unet()
        return unet, unet_inputs(unet)
    flux = tiny_flux(num_single_layers=3)
    return flux, flux_inputs(flux)


def merged(family: str, model: nn.Module, **options: Any) -> Any:
    return toma_fx.transform(model, **{"skip": (), "block_ratios": MIXED[family], **options})


@torch.no_grad()
def outputs(model: nn.Module, inputs: dict[str, Any], paths: list[str]) -> dict[str, Any]:
    """What enters and leaves modules in a call, and as ``""`` the sample."""
    seen: dict[str, Any] = {}

    def note(path: str) -> Any:
        return lambda module, args, kwargs, output: seen.update({path: (args, kwargs, output)})

    hooks = [
        model.get_submodule(path).register_forward_hook(note(path), with_kwargs=True)
        for path in paths
    ]
    seen[""] = model(**inputs).sample
    for hook in hooks:
        hook.remove()
    return seen


def sample(model: nn.Module, inputs: dict[str, Any]) -> Tensor:
    return outputs(model, inputs, [])[""]  # type: ignore[no-any-return]


@pytest.mark.parametrize("family", ["sdxl", "flux"])
def test_one_ratio_for_all_blocks_is_the_uniform_ratio(family: str) -> None:
    model, inputs = build(family)
    given = merged(family, model, ratio=0, block_ratios={"*": 0.5})
    assert torch.equal(
        sample(given, inputs), sample(merged(family, model, block_ratios={}), inputs)
    )


def test_each_stage_does_as_with_its_ratio_alone() -> None:
    unet, inputs = build("sdxl")
    stages = {"down_blocks.1": 0.25, "up_blocks.0": 0.5, "up_blocks.1": 0.0}
    paths = [f"{path}.attentions.0" for path in stages]
    mixed = merged("sdxl", unet, block_ratios={"up_blocks.1.*": 0, "down_blocks.1.*": 0.25})
    seen = outputs(mixed, inputs, paths)
    for path, ratio in zip(paths, stages.values(), strict=True):
        args, kwargs, (output,) = seen[path]
        uniform = toma_fx.transform(unet, ratio=ratio).get_submodule(path)
        with torch.no_grad():
            torch.testing.assert_close(uniform(*args, **kwargs)[0], output)


def test_the_first_pattern_that_fits_counts() -> None:
    config = MergeConfig(block_ratios={"up_blocks.1.*": 0.25, "up_blocks.*": 0.75})  # type: ignore[arg-type]
    paths = ("up_blocks.1.attentions.0", "up_blocks.0.attentions.0", "mid_block")
    assert [config.ratio_of(path) for path in paths] == [0.25, 0.75, 0.5]


def test_blocks_of_one_list_and_ratio_share_a_plan() -> None:
    flux, inputs = build("flux")
    model = merged("flux", flux)
    plans = toma_fx.trace(model).graph.find_nodes(
        op="call_function", target=torch.ops.toma.select.default
    )
    kept = [plan.args[1][0] / plan.args[1][1] for plan in plans]
    assert sorted(kept) == [0.25, 0.5, 0.75]
    roles = {each.path: each.role for each in model.toma_recipe.merged}
    assert [roles[f"single_transformer_blocks.{i}"] for i in range(3)] == ["lead", "lead", "follow"]
    seen = outputs(model, inputs, ["single_transformer_blocks.2.proj_mlp"])
    text, image = inputs["encoder_hidden_states"].shape[1], inputs["hidden_states"].shape[1]
    assert seen["single_transformer_blocks.2.proj_mlp"][2].shape[1] == text + image // 2


@pytest.mark.parametrize("options", [{}, {"placement": "component"}, {"share": "block"}])
@pytest.mark.parametrize("family", ["sdxl", "flux"])
def test_compiled_and_captured_models_agree(family: str, options: dict[str, Any]) -> None:
    model, inputs = build(family)
    transformed = merged(family, model, **options)
    expected = sample(transformed, inputs)
    frames = CompileCounter()
    compiled: Any = torch.compile(transformed, backend=frames, fullgraph=True)
    for _ in range(2):
        torch.testing.assert_close(sample(compiled, inputs), expected, atol=1e-5, rtol=1e-5)
    assert frames.frame_count == 1
    with torch.no_grad():
        program = torch.export.export(model, (), inputs)
    after = merged(family, program, **options).module()  # type: ignore[arg-type]
    torch.testing.assert_close(sample(after, inputs), expected, atol=1e-4, rtol=1e-4)


def test_regional_compile_compiles_each_ratio_once() -> None:
    flux, inputs = build("flux")
    model = merged("flux", flux)
    expected = sample(model, inputs)
    torch._dynamo.reset()
    frames = CompileCounter()
    model.compile_repeated_blocks(backend=frames, fullgraph=True)
    torch.testing.assert_close(sample(model, inputs), expected, atol=1e-5, rtol=1e-5)
    # Three plans, and a body for each class of block and ratio: doubles, and singles at two. One of
    # these twice: the first single block gets its text contiguous, in an untouched model too.
    assert frames.frame_count == 3 + 3 + 1
    sample(model, inputs)
    assert frames.frame_count == 3 + 3 + 1


def test_gradient_checkpointing_finds_the_plan_of_each_ratio() -> None:
    flux, inputs = build("flux")
    gradients = []
    for checkpointing in (False, True):
        model = merged("flux", flux).train()
        if checkpointing:
            model.enable_gradient_checkpointing()
        model.zero_grad()
        model(**inputs).sample.square().mean().backward()
        gradients.append(
            {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        )
    assert gradients[0].keys() == gradients[1].keys() != set()
    for name, gradient in gradients[0].items():
        assert torch.allclose(gradients[1][name], gradient, atol=1e-5), name


@pytest.mark.parametrize("options", [{"schedule": Schedule(select_every=2)}, {"merge_below": 0.5}])
@pytest.mark.parametrize("family", ["sdxl", "flux"])
def test_with_what_changes_over_steps(family: str, options: dict[str, Any]) -> None:
    model, inputs = build(family)
    one = {"sdxl": 1000, "flux": 1}[family]
    transformed, plain = merged(family, model, **options), merged(family, model)
    late = {**inputs, "timestep": torch.full_like(inputs["timestep"], 0.4 * one)}
    torch.testing.assert_close(sample(transformed, late), sample(plain, late))


def test_a_pickle_keeps_the_ratios() -> None:
    flux, inputs = build("flux")
    model = merged("flux", flux)
    again = pickle.loads(pickle.dumps(model))
    assert again.toma_recipe.config == model.toma_recipe.config
    assert torch.equal(sample(again, inputs), sample(model, inputs))


def test_report_has_a_line_for_each_ratio() -> None:
    model, _ = build("flux")
    report = toma_fx.report(merged("flux", model))
    assert [(group.path, group.tokens_after / group.tokens_before) for group in report.groups] == [
        ("transformer_blocks", 0.75),
        ("single_transformer_blocks", 0.5),
        ("single_transformer_blocks", 0.25),
        ("single_transformer_blocks", 0.5),
    ]
    assert "ratio 0.5, and 2 blocks or groups with their own" in str(report)


def test_a_ratio_of_0_leaves_a_block_alone() -> None:
    unet, inputs = build("sdxl")
    nothing = merged("sdxl", unet, block_ratios={"*": 0})
    assert torch.equal(sample(nothing, inputs), sample(unet, inputs))
    some = merged("sdxl", unet)
    unmerged = {block.path: block.unmerged_because for block in some.toma_recipe.unmerged}
    assert unmerged["up_blocks.1.attentions.0.transformer_blocks.0"] == "ratio is 0"


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (0.5, r"block_ratios=0.5 must be a dictionary .* such as"),
        ({"up_blocks.*": 1}, r"block_ratios\['up_blocks.\*'\]=1 must be a number in \[0, 1\)"),
        ({"up_blocks.*": "half"}, r"='half' must be a number"),
    ],
)
def test_bad_ratios_are_named(given: object, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        MergeConfig(block_ratios=given)  # type: ignore[arg-type]


def test_a_pattern_that_fits_nothing_is_named() -> None:
    unet, _ = build("sdxl")
    with pytest.raises(
        ModelError, match=r"block_ratios=\['transformer_blocks.\*'\] matches no block"
    ):
        merged("sdxl", unet, block_ratios={"transformer_blocks.*": 0.5})


def test_a_hidden_pattern_is_named() -> None:
    unet, _ = build("sdxl")
    with pytest.raises(
        ModelError, match=r"\['up_blocks.1.\*'\] match only .* put them before those patterns"
    ):
        merged("sdxl", unet, block_ratios={"*": 0.5, "up_blocks.1.*": 0.25})


def test_a_block_with_its_own_ratio_is_not_spared_by_default() -> None:
    def ratios(**options: Any) -> dict[str, float | None]:
        recipe: Recipe = toma_fx.transform(flux, **options).toma_recipe
        return {block.path: block.ratio if block.role else None for block in recipe.blocks}

    flux: Any = tiny_flux(num_layers=4, num_single_layers=8)
    assert ratios()["transformer_blocks.0"] is None
    named = ratios(block_ratios={"transformer_blocks.0": 0.25})
    assert named["transformer_blocks.0"] == 0.25
    assert named["single_transformer_blocks.0"] is None
    skipped = ratios(block_ratios={"*": 0.25}, skip=("transformer_blocks.0",))
    assert [path for path, ratio in skipped.items() if ratio is None] == ["transformer_blocks.0"]


def test_a_speed_up_has_one_ratio() -> None:
    unet, _ = build("sdxl")
    with pytest.raises(ConfigError, match=r"speedup=1.2 chooses one ratio for all blocks"):
        toma_fx.transform(unet, speedup=1.2, block_ratios={"*": 0.25})
