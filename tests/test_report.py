"""The report lists what was rewritten, and its arithmetic is right."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from accelerate import cpu_offload
from accelerate.hooks import CpuOffload, add_hook_to_module
from diffusers import FirstBlockCacheConfig
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import toma_fx
from tests.tiny import (
    flux_inputs,
    smallest_flux,
    smallest_unet,
    tiny_flux,
    tiny_sdxl_unet,
    unet_inputs,
)
from toma_fx import MergeConfig, Schedule
from toma_fx.checkpoints import architecture
from toma_fx.errors import ModelError
from toma_fx.inputs import random_inputs, weightless
from toma_fx.report import tokens_after

MERGE = torch.ops.toma.merge.default


def test_full_size_flux_matches_the_published_arithmetic() -> None:
    report = toma_fx.report(toma_fx.transform(architecture("flux"), ratio=0.5))
    # 74.4 TFLOP a forward at 4096 + 512 tokens, and a third less when blocks 5-18 and 24-56 run
    # on half of the image tokens in attention and MLP; a whole block saves its other layers too.
    assert report.flops_before == pytest.approx(74.4e12, rel=0.01)
    assert [(g.path, g.blocks, bool(g.merged)) for g in report.groups] == [
        ("transformer_blocks", (0, 4), False),
        ("transformer_blocks", (5, 18), True),
        ("single_transformer_blocks", (0, 4), False),
        ("single_transformer_blocks", (5, 37), True),
    ]
    assert report.groups[1].tokens_before == 4096
    assert report.groups[1].tokens_after == 2048
    assert 0.34 < report.saved < 0.42
    assert "spared by default" in str(report)


def test_full_size_sdxl_has_70_blocks_in_11_groups() -> None:
    report = toma_fx.report(toma_fx.transform(architecture("sdxl")))
    assert sum(last - first + 1 for first, last in (g.blocks for g in report.groups)) == 70
    assert len(report.groups) == 11
    assert {(g.tokens_before, g.tokens_after) for g in report.groups} == {(4096, 2048), (1024, 512)}


@pytest.mark.parametrize("options", [{}, {"ratio": 0}])
def test_counts_are_those_of_a_real_call(options: dict[str, Any]) -> None:
    model = toma_fx.transform(tiny_flux(), skip=(), **options)
    report = toma_fx.report(model, height=256)
    skeleton = weightless(model)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        skeleton(**random_inputs(skeleton, height=256))
    assert report.flops_after == counter.get_total_flops() > 0
    assert (report.saved > 0) == (options.get("ratio") != 0)


@pytest.mark.parametrize(
    "options",
    [{"schedule": Schedule(select_every=4, weigh_every=2)}, {"merge_below": 0.5}],
    ids=str,
)
@pytest.mark.parametrize("family", ["unet", "flux"])
def test_counts_of_a_run_are_averages_of_its_calls(family: str, options: dict[str, Any]) -> None:
    steps = 10
    model: Any = smallest_unet() if family == "unet" else smallest_flux()
    model = toma_fx.transform(model, skip=(), **options)
    call = (unet_inputs if family == "unet" else flux_inputs)(model, height=16, width=16)
    counted = 0
    # The CPU's fused attention is an operator that the counter does not know.
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        for level in model.toma_recipe.family.run_levels(None, steps, call):
            call["timestep"] = torch.full((2,), level * (1000 if family == "unet" else 1))
            with FlopCounterMode(display=False) as counter:
                model(**call)
            counted += counter.get_total_flops()
    report = toma_fx.report(model, steps=steps)
    assert report.flops_after == pytest.approx(counted / steps, rel=1e-9, abs=1)
    assert len(report.shares) == (3 if "schedule" in options else 2)
    assert sum(report.shares.values()) == pytest.approx(1)


def test_a_report_speaks_of_the_last_call_unless_told_otherwise() -> None:
    model = toma_fx.transform(smallest_flux())
    assert "1 x 4096 x 16" in str(toma_fx.report(model))
    call = flux_inputs(model, batch=3, height=8, width=24)
    with torch.no_grad():
        model(**call)
    last = toma_fx.report(model)
    assert "3 x 192 x 16" in str(last)
    assert {group.tokens_before for group in last.groups} == {192}
    assert "1 x 256 x 16" in str(toma_fx.report(model, height=256))
    other = toma_fx.report(model, inputs=flux_inputs(model, batch=1, height=8, width=8))
    assert "1 x 64 x 16" in str(other)
    assert "3 x 192 x 16" in str(toma_fx.report(model))
    assert other.flops_before < last.flops_before


def cast(model: Any) -> None:
    model.enable_layerwise_casting(torch.float8_e4m3fn, torch.float32)


def cache(model: Any) -> None:
    model.enable_cache(FirstBlockCacheConfig(threshold=0.1))


def group_offload(model: Any) -> None:
    model.enable_group_offload(torch.device("cpu"), offload_type="leaf_level")


def model_offload(model: Any) -> None:
    add_hook_to_module(model, CpuOffload("cpu"), append=True)  # its pipelines' method needs a GPU


def sequential_offload(model: Any) -> None:
    cpu_offload(model, torch.device("cpu"))


@pytest.mark.parametrize("change", [cast, cache, group_offload, model_offload, sequential_offload])
def test_hooks_neither_run_nor_count(change: Callable[[Any], None]) -> None:
    model = toma_fx.transform(tiny_flux(), skip=())
    before = toma_fx.report(model, height=128)
    change(model)
    report = toma_fx.report(model, height=128)
    assert (report.flops_before, report.flops_after) == (before.flops_before, before.flops_after)
    assert toma_fx.trace(model).graph.find_nodes(op="call_function", target=MERGE)


def test_every_block_is_named_once() -> None:
    model = toma_fx.transform(tiny_sdxl_unet(), skip=("mid_block.*",), placement="component")
    report = toma_fx.report(model)
    text = str(report)
    assert "nothing: skip='mid_block.*'" in text
    assert "self_attention, cross_attention, mlp" in text
    assert f"{report.saved:.1%}" in text
    named = [
        f"{group.path}.{index}"
        for group in report.groups
        for index in range(group.blocks[0], group.blocks[1] + 1)
    ]
    assert named == [block.path for block in model.toma_recipe.blocks]


def test_paths_are_abbreviated_and_never_broken() -> None:
    sdxl, flux = (
        toma_fx.report(toma_fx.transform(architecture(name))).text() for name in ("sdxl", "flux")
    )
    assert "\ndown_blocks.1.*.0.*.0-1 " in sdxl
    assert "\nsingle_transformer_blocks.0-4 " in flux
    for text in (sdxl, flux):
        first = [line.split(" ")[0] for line in text.splitlines()]
        assert not any(word.endswith(".") for word in first)
        assert max(map(len, text.splitlines())) <= 80


def test_impossible_size_and_untransformed_model_are_refused() -> None:
    model = tiny_flux()
    with pytest.raises(ModelError, match="not transformed"):
        toma_fx.report(model)
    with pytest.raises(ModelError, match="100 x 100 pixels must be a multiple of 16"):
        toma_fx.report(toma_fx.transform(model), height=100)


def test_tokens_after_is_what_a_block_gets() -> None:
    model = toma_fx.transform(tiny_flux(), ratio=0.3, region_tokens=10, skip=())
    seen = []
    model.single_transformer_blocks[0].proj_out.register_forward_hook(
        lambda module, args, output: seen.append(output.shape[1])
    )
    inputs = flux_inputs(model, height=13, width=9, text=6)
    with torch.no_grad():
        model(**inputs)
    assert seen == [6 + tokens_after(13 * 9, MergeConfig(region_tokens=10), ratio=0.3)]
