"""Rows: modular pipelines and guiders."""

from typing import Any

import pytest
import torch
from diffusers import (
    AdaptiveProjectedGuidance,
    ClassifierFreeGuidance,
    PerturbedAttentionGuidance,
    SkipLayerGuidance,
)
from diffusers.hooks import LayerSkipConfig
from diffusers.modular_pipelines import FluxAutoBlocks, StableDiffusionXLAutoBlocks
from torch import Tensor

from tests.matrix.frame import Cell, difference, row
from tests.matrix.pictures import check, pipeline
from tests.pipelines import PROMPT_TOKENS
from toma_fx import MergeConfig, transform
from toma_fx.errors import InputError

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


GUIDERS = {
    "classifier-free": lambda: ClassifierFreeGuidance(guidance_scale=3.0),
    "adaptive projected": lambda: AdaptiveProjectedGuidance(guidance_scale=3.0),
}


@pytest.mark.parametrize("guider", GUIDERS)
@row("Guider: {guider}", section=SECTION, families=("sdxl",))
def test_guiders(cell: Cell, guider: str) -> None:
    check(cell, modular("sdxl", guider=GUIDERS[guider]()), draw)


def layer(index: int, **parts: bool) -> LayerSkipConfig:
    """One of the two blocks of a group."""
    fqn = "mid_block.attentions.0.transformer_blocks"
    return LayerSkipConfig(indices=[index], fqn=fqn, **parts)


LAYER_GUIDERS = {
    "perturbed attention": lambda index: PerturbedAttentionGuidance(
        guidance_scale=3.0,
        perturbed_guidance_stop=1.0,
        perturbed_guidance_config=layer(
            index, skip_attention=False, skip_ff=False, skip_attention_scores=True
        ),
    ),
    "skip layer": lambda index: SkipLayerGuidance(
        guidance_scale=3.0, skip_layer_guidance_stop=1.0, skip_layer_config=layer(index)
    ),
}


@pytest.mark.parametrize("block", [0, 1])
@pytest.mark.parametrize("guider", LAYER_GUIDERS)
@row(
    "Guider: {guider}, of block {block} of a group",
    section=SECTION,
    families=("sdxl",),
    modes=("eager",),
    note="puts hooks on the blocks and takes them off at every step, for which compiled blocks "
    "compile again, merged or not",
)
def test_layer_guiders(cell: Cell, guider: str, block: int) -> None:
    pipe = modular("sdxl", guider=LAYER_GUIDERS[guider](block))
    check(cell, pipe, draw)
    plain = modular("sdxl", guider=GUIDERS["classifier-free"]())
    assert difference(draw(pipe, 0), draw(plain, 0)) > 1e-2


@row(
    "Guider: skip layer, of a group's first block, with `placement='component'`",
    section=SECTION,
    families=("sdxl",),
    modes=("eager",),
)
def test_skipped_leader(cell: Cell) -> None:
    guider = LAYER_GUIDERS["skip layer"](0)
    pipe = transform(modular("sdxl", guider=guider), placement="component")
    with cell.refuses(InputError, match="transform with share='block'"):
        draw(pipe, 0)
    # The error left the guider's hooks on the model.
    pipe = modular("sdxl", guider=guider)
    check(cell, pipe, draw, MergeConfig(placement="component", share="block"))
