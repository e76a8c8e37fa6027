"""The plans that a call makes, and their share of its time."""

from typing import Any

import pytest
import torch

from benchmarks.planning import planned, planning_seconds, with_planning
from benchmarks.tiny import tiny
from tests.tiny import tiny_flux, tiny_sdxl_unet
from toma_fx.bench.compare import compare
from toma_fx.bench.contenders import Setting, load
from toma_fx.bench.levels import models
from toma_fx.config import MergeConfig
from toma_fx.runtime.regions import layout
from toma_fx.transform import transform
from toma_fx.variants import merging

VARIANTS = tuple(merging({"preset": name}) for name in ("lower_bound", "default"))


@pytest.mark.parametrize("build", [tiny_sdxl_unet, tiny_flux])
def test_a_row_has_the_share_of_its_plans(build: Any) -> None:
    how: dict[str, Any] = {"height": 128, "dtype": torch.float32, "repeats": 1, "compiled": False}
    setting = Setting(variants=VARIANTS, **how)
    model = build()
    (timed,) = models(model, setting)
    planning = planning_seconds(model, setting, repeats=1)
    table = with_planning(compare(timed, setting, title="tiny"), planning)
    untouched, bound, ours = table.rows
    assert untouched["planning"] is None and bound["planning"] is None  # which looks at no token
    assert ours["planning_seconds"] == planning["default", 0.5] > 0
    assert ours["planning"] == ours["planning_seconds"] / ours["seconds"]
    assert "planning" in table.text()


def test_plans_are_counted_once_for_each_group() -> None:
    unet = tiny_sdxl_unet()
    config = VARIANTS[1].config(0.5)
    setting = Setting(height=256, batch=2, dtype=torch.float32)
    plans = planned(transform(unet, config), setting)
    # 256 pixels are 32 latents; two levels of the UNet halve that once and twice.
    assert set(plans) == {
        ((2, tokens, 32), layout([tokens], config.region_tokens, 0.5)) for tokens in (256, 64)
    }
    groups = [m for m in unet.modules() if type(m).__name__ == "Transformer2DModel"]
    assert plans.total() == len(groups)


def test_plans_of_blocks_with_their_own_ratio_are_timed_at_it() -> None:
    config = MergeConfig(ratio=0, block_ratios={"mid_block.*": 0.75})  # type: ignore[arg-type]
    setting = Setting(height=256, dtype=torch.float32)
    plans = planned(transform(tiny_sdxl_unet(), config), setting)
    assert plans == {((1, 64, 32), layout([64], config.region_tokens, 0.75)): 1}


def test_plans_are_those_of_image_tokens_alone() -> None:
    config = MergeConfig()
    for model, frames, shapes in (
        ("flux2-klein-4b", None, {64: 2}),  # text behind the image, and before it
        ("z-image", None, {64: 2}),
        ("wan2.1-vace-1.3b", 5, {2 * 64: 2}),
        ("wan2.2-5b", 9, {2 * 16: 1}),  # without the first frame, which may be given
    ):
        how: dict[str, Any] = {"height": 128, "frames": frames, "dtype": torch.float32}
        setting = Setting(model=model, overrides=tiny(model), **how)
        plans = planned(transform(load(setting), config), setting)
        assert {shape[1]: count for (shape, _), count in plans.items()} == shapes
        assert all(cut[2::2] == (shape[1],) for shape, cut in plans if len(cut) == 4), model
