"""Rows: modular pipelines and guiders."""

from typing import Any

import pytest
import torch
from diffusers import (
    AdaptiveProjectedGuidance,
    ClassifierFreeGuidance,
)
from diffusers.modular_pipelines import FluxAutoBlocks, StableDiffusionXLAutoBlocks
from torch import Tensor

from tests.matrix.frame import Cell, row
from tests.matrix.pictures import check, pipeline
from tests.pipelines import PROMPT_TOKENS

# diffusers' Euler scheduler hands a tensor to NumPy in a way that NumPy 2 is about to change.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

SECTION = "Pipelines"


def modular(family: str, **changes: Any) -> Any:
    """A modular pipeline over the parts of the plain one."""
    blocks = {"sdxl": StableDiffusionXLAutoBlocks, "flux": FluxAutoBlocks}[family]()
    pipe = blocks.init_pipeline()
    parts = {**pipeline(family).components, **changes}
    names = {spec.name for spec in blocks.expected_components}
    pipe.update_components(
        **{name: part for name, part in parts.items() if name in names and part is not None}
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def draw(pipe: Any, seed: int) -> Tensor:
    options = {} if hasattr(pipe, "unet") else {"max_sequence_length": PROMPT_TOKENS}
    latents: Tensor = pipe(
        prompt=("a cat", "a dog")[seed],
        num_inference_steps=4,
        height=128,
        width=128,
        generator=torch.Generator().manual_seed(seed),
        output_type="latent",
        output="images",
        **options,
    )
    return latents


@row("Modular pipelines", section=SECTION)
def test_modular(cell: Cell) -> None:
    check(cell, modular(cell.family), draw)


LAYERS = {"indices": [0], "fqn": "mid_block.attentions.0.transformer_blocks"}
GUIDERS = {
    "classifier-free": lambda: ClassifierFreeGuidance(guidance_scale=3.0),
    "adaptive projected": lambda: AdaptiveProjectedGuidance(guidance_scale=3.0),
}


@pytest.mark.parametrize("guider", GUIDERS)
@row("Guider: {guider}", section=SECTION, families=("sdxl",))
def test_guiders(cell: Cell, guider: str) -> None:
    check(cell, modular("sdxl", guider=GUIDERS[guider]()), draw)
