"""Transformed models compute what the method, written a second time, computes."""

import functools
from collections.abc import Callable, Iterator
from dataclasses import fields
from typing import Any

import pytest
import torch
from torch import Tensor

from tests import reference
from tests.choices import Choices
from tests.reference import ReferenceOptions
from tests.tiny import flux_inputs, tiny_flux, tiny_sd_unet, tiny_sdxl_unet, unet_inputs
from toma_fx import MergeConfig, Schedule, transform

# The similarities are rounded to about 1e-7, and a temperature of 0.001 makes 1e-4 of that in the
# weights of a token midway between two destinations. Few tokens are; merging itself is at 1e-2.
TOLERANCE = 2e-5


@functools.cache
def build(family: str) -> Any:
    """One model for all tests; nothing here may change it."""
    makers: dict[str, Callable[[], Any]] = {
        "sdxl": tiny_sdxl_unet,
        "sd": tiny_sd_unet,
        "flux": functools.partial(tiny_flux, num_layers=2, num_single_layers=2),
    }
    return makers[family]()


def difference(a: Tensor, b: Tensor) -> float:
    """Root mean square of ``a - b``, in standard deviations of ``b``."""
    return float((a - b).square().mean().sqrt() / b.std())


@pytest.fixture(autouse=True)
def _no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


@pytest.fixture
def check(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Compares a transformed model with the reference, at a grid size with whole tiles."""

    def compare(family: str, preset: str, **options: Any) -> None:
        config = MergeConfig.preset(preset, schedule=Schedule(), **options)
        names = {field.name for field in fields(ReferenceOptions)} - {"skip"}
        written_again = ReferenceOptions(
            **{name: getattr(config, name) for name in names}, skip=config.skip or ()
        )
        model = build(family)
        large = config.region_tokens > 16
        if family == "flux":
            inputs = flux_inputs(model, height=8, width=16 if large else 8)
            expected_model = reference.reference_flux(model, written_again)
        else:
            size = {"height": 32, "width": 32} if large else {"height": 16, "width": 32}
            inputs = unet_inputs(model, **size)
            expected_model = reference.reference_unet(model, written_again)
        transformed = transform(model, config)
        with Choices() as choices:
            output = transformed(**inputs).sample
        monkeypatch.setattr(reference, "select", choices.follow)
        expected = expected_model(**inputs).sample
        assert not choices.made
        assert difference(output, expected) < TOLERANCE
        assert difference(expected, model(**inputs).sample) > 1e-2

    return compare


@pytest.mark.parametrize("family", ["sdxl", "sd", "flux"])
@pytest.mark.parametrize("preset", ["default", "toma", "toma_tile", "toma_stripe", "toma_once"])
def test_preset(check: Callable[..., None], family: str, preset: str) -> None:
    check(family, preset)


@pytest.mark.parametrize("family", ["sdxl", "flux"])
@pytest.mark.parametrize("preset", ["default", "toma_tile"])
@pytest.mark.parametrize("ratio", [0.25, 0.75, 0.99])
def test_ratio(check: Callable[..., None], family: str, preset: str, ratio: float) -> None:
    check(family, preset, ratio=ratio, region_tokens=16)


@pytest.mark.parametrize("family", ["sdxl", "flux"])
@pytest.mark.parametrize(
    "components",
    [
        ("self_attention",),
        ("mlp",),
        ("cross_attention", "mlp"),
        ("self_attention", "mlp"),
        ("self_attention", "cross_attention"),
    ],
    ids="+".join,
)
def test_components(check: Callable[..., None], family: str, components: tuple[str, ...]) -> None:
    check(family, "toma_tile", components=components)


@pytest.mark.parametrize("family", ["sdxl", "flux"])
@pytest.mark.parametrize(
    ("preset", "options"),
    [
        ("default", {"unmerge": "pinv"}),
        ("default", {"region": "stripe"}),
        ("default", {"region": "image"}),
        ("default", {"share": "block"}),
        ("default", {"residual": "replace"}),
        ("default", {"merge_over": "image", "temperature": 0.1}),
        ("toma", {"unmerge": "pinv"}),
        ("toma", {"region": "stripe", "region_tokens": 64}),
        ("toma_tile", {"share": "block"}),
        ("toma_tile", {"region": "image"}),
        ("toma_once", {"unmerge": "pinv", "residual": "keep"}),
    ],
    ids=str,
)
def test_option(
    check: Callable[..., None], family: str, preset: str, options: dict[str, Any]
) -> None:
    check(family, preset, **options)


@pytest.mark.parametrize("preset", ["default", "toma_tile"])
@pytest.mark.parametrize(
    ("family", "skip"),
    [
        # The first block of a group, the last, and a whole group.
        ("sdxl", ("mid_block.attentions.0.transformer_blocks.0",)),
        ("sdxl", ("mid_block.attentions.0.transformer_blocks.1",)),
        ("sdxl", tuple(f"mid_block.attentions.0.transformer_blocks.{i}" for i in range(2))),
        ("flux", ("transformer_blocks.0", "single_transformer_blocks.1")),
        ("flux", tuple(f"transformer_blocks.{i}" for i in range(2))),
    ],
)
def test_skip(check: Callable[..., None], family: str, preset: str, skip: tuple[str, ...]) -> None:
    check(family, preset, skip=skip, region_tokens=16)
