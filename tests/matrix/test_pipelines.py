"""Rows: the pipelines that diffusers has for the two families."""

from typing import Any

import pytest
import torch
from diffusers import (
    EDMEulerScheduler,
    EulerAncestralDiscreteScheduler,
    FluxControlPipeline,
    FluxFillPipeline,
    FluxImg2ImgPipeline,
    FluxInpaintPipeline,
    FluxKontextPipeline,
    FluxPriorReduxPipeline,
    StableDiffusionXLImg2ImgPipeline,
    StableDiffusionXLInpaintPipeline,
)
from diffusers.image_processor import VaeImageProcessor
from diffusers.pipelines.flux.modeling_flux import ReduxImageEncoder
from torch import Tensor
from transformers import SiglipImageProcessorPil, SiglipVisionConfig, SiglipVisionModel

from tests.matrix.frame import Cell, difference, row
from tests.matrix.pictures import (
    BELOW,
    SCHEDULED,
    check,
    converted,
    drawing,
    holding,
    model_of,
    picture,
    pipeline,
)
from tests.pipelines import seeded
from tests.tiny import TEXT_WIDTH, tiny_flux, tiny_sdxl_unet
from toma_fx import report, restore, transform
from toma_fx.errors import InputError

# diffusers' Euler scheduler hands a tensor to NumPy in a way that NumPy 2 is about to change.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

SECTION = "Pipelines"


def hole() -> Tensor:
    """A mask ``(1, 1, H, W)`` of what is to be painted anew."""
    mask = torch.zeros(1, 1, 128, 128)
    mask[..., 32:96, 16:80] = 1
    return mask


@row("Text-to-image", section=SECTION)
def test_text_to_image(cell: Cell) -> None:
    pipe, draw = pipeline(cell.family), drawing(output_type="pt")
    check(cell, pipe, draw)
    if cell.mode == "eager":
        untouched = draw(pipe, 0)
        assert torch.equal(draw(transform(pipe, ratio=0), 0), untouched)
        assert torch.equal(draw(restore(pipe), 0), untouched)


POLICIES = {"`merge_below`": BELOW, "a schedule": SCHEDULED}


@pytest.mark.parametrize("what", POLICIES)
@row("Text-to-image with {what}", section=SECTION)
def test_policies(cell: Cell, what: str) -> None:
    pipe, draw, config = pipeline(cell.family), drawing(), POLICIES[what]
    check(cell, pipe, draw, config)
    if cell.mode == "eager":
        drawn = draw(transform(pipe, config), 0)
        assert difference(drawn, draw(transform(restore(pipe)), 0)) > 1e-3


@row("EDM schedulers with `merge_below`", section=SECTION, families=("sdxl",))
def test_edm(cell: Cell) -> None:
    draw, images = drawing(), []
    for options in ({"ratio": 0}, {}, {"merge_below": 0.6}):
        pipe = pipeline("sdxl")
        pipe.scheduler = EDMEulerScheduler()  # whose timesteps are logarithms of sigma
        original = pipe.unet
        cell.apply(model_of(transform(pipe, **options)))
        images.append(draw(pipe, 0))
        with cell.steady():
            cell.agree(draw(pipe, 0), images[-1])
    assert report(pipe, steps=4).shares == {"merged": 0.5, "untouched": 0.5}
    assert difference(images[2], images[0]) > 1e-3
    assert difference(images[1], images[0]) > difference(images[2], images[0])
    # A UNet that was transformed by itself knows no scheduler.
    alone = transform(original, merge_below=0.6)
    with holding(pipe, alone), pytest.raises(InputError, match="transform the pipeline"):
        draw(pipe, 0)


@row("Image-to-image", section=SECTION)
def test_image_to_image(cell: Cell) -> None:
    cls = {"sdxl": StableDiffusionXLImg2ImgPipeline, "flux": FluxImg2ImgPipeline}[cell.family]
    check(cell, converted(cls, cell.family), drawing(image=picture(), strength=0.7))


@row("Inpainting", section=SECTION)
def test_inpainting(cell: Cell) -> None:
    cls = {"sdxl": StableDiffusionXLInpaintPipeline, "flux": FluxInpaintPipeline}[cell.family]
    draw = drawing(image=picture(), mask_image=hole(), strength=0.9)
    check(cell, converted(cls, cell.family), draw)


@row(
    "SDXL base, then refiner (`denoising_end`, `denoising_start`)",
    section=SECTION,
    families=("sdxl",),
)
def test_base_and_refiner(cell: Cell) -> None:
    base = pipeline("sdxl")
    refiner = converted(
        StableDiffusionXLImg2ImgPipeline,
        "sdxl",
        text_encoder=None,
        tokenizer=None,
        unet=tiny_sdxl_unet(
            seed=1,
            cross_attention_dim=TEXT_WIDTH // 2,
            projection_class_embeddings_input_dim=TEXT_WIDTH + 5 * 8,
        ),
        requires_aesthetics_score=True,
    )
    begin = drawing(num_inference_steps=6, denoising_end=0.5)

    def draw(pipe: Any, seed: int) -> Tensor:
        finish: Tensor = pipe(
            prompt=("a cat", "a dog")[seed],
            num_inference_steps=6,
            denoising_start=0.5,
            image=begin(base, seed),
            generator=torch.Generator().manual_seed(seed),
            output_type="latent",
        ).images
        return finish

    untouched = begin(base, 0)
    transform(base)
    merged = begin(base, 0)
    assert difference(merged, untouched) > 1e-2
    cell.apply(base.unet)
    cell.agree(begin(base, 0), merged)
    check(cell, refiner, draw)
    assert difference(begin(restore(base), 0), merged) > 1e-2


@row("1 to 4 steps without guidance (SDXL-Turbo, FLUX.1-schnell)", section=SECTION)
def test_few_steps(cell: Cell) -> None:
    pipe = pipeline(cell.family)
    options: dict[str, Any] = {"guidance_scale": 0.0}
    if cell.family == "sdxl":
        pipe.scheduler = EulerAncestralDiscreteScheduler.from_config(
            pipe.scheduler.config, timestep_spacing="trailing"
        )
    else:
        pipe.transformer = tiny_flux(guidance=False)
        options["max_sequence_length"] = 8
    for steps in (1, 4) if cell.mode == "eager" else (2,):

        def draw(pipe: Any, seed: int, steps: int = steps) -> Tensor:
            count = (steps, 5 - steps)[seed]
            return drawing(num_inference_steps=count, **options)(pipe, seed)

        check(cell, pipe, draw)


@row("Flux Fill", section=SECTION, families=("flux",))
def test_fill(cell: Cell) -> None:
    # The latents, those of the masked image, and a mask of 8 x 8 pixels for each latent.
    channels = 16 + 16 + 4 * 8 * 8
    pipe = converted(
        FluxFillPipeline, "flux", transformer=tiny_flux(in_channels=channels, out_channels=16)
    )
    check(cell, pipe, drawing(image=picture(), mask_image=hole()))


KONTEXT: dict[str, Any] = {"max_area": 128 * 128, "_auto_resize": False}


@row("Flux Kontext", section=SECTION, families=("flux",))
def test_kontext(cell: Cell) -> None:
    pipe = converted(FluxKontextPipeline, "flux")
    # A reference image of another shape, whose tokens are appended to those of the image.
    check(cell, pipe, drawing(image=picture(64, 256), **KONTEXT))


@row("Flux Kontext, with a reference that no tile divides", section=SECTION, families=("flux",))
def test_kontext_with_an_odd_reference(cell: Cell) -> None:
    pipe = converted(FluxKontextPipeline, "flux")
    # 64 tokens and 77: regions are padded, so no ratio keeps them all.
    draw = drawing(image=picture(112, 176), **KONTEXT)
    check(cell, pipe, draw, keeping=False)
    if cell.mode == "eager":
        transform(pipe)
        draw(pipe, 0)
        assert "latents 1 x 141" in report(pipe).image


@row("Flux Control (Canny, Depth)", section=SECTION, families=("flux",))
def test_control(cell: Cell) -> None:
    transformer = tiny_flux(in_channels=32, out_channels=16)
    pipe = converted(FluxControlPipeline, "flux", transformer=transformer)
    check(cell, pipe, drawing(control_image=picture()))


@row("Flux Redux", section=SECTION, families=("flux",))
def test_redux(cell: Cell) -> None:
    vision = SiglipVisionConfig(
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        image_size=32,
        patch_size=8,
    )
    pipe = pipeline("flux")
    prior = FluxPriorReduxPipeline(
        image_encoder=seeded(lambda: SiglipVisionModel(vision)),
        feature_extractor=SiglipImageProcessorPil(size={"height": 32, "width": 32}),
        image_embedder=seeded(lambda: ReduxImageEncoder(32, TEXT_WIDTH)),
        text_encoder=pipe.text_encoder,
        tokenizer=pipe.tokenizer,
        text_encoder_2=pipe.text_encoder_2,
        tokenizer_2=pipe.tokenizer_2,
    )

    def draw(pipe: Any, seed: int) -> Tensor:
        (reference,) = VaeImageProcessor.numpy_to_pil(picture(64, 64, seed).movedim(1, -1).numpy())
        embeds = prior(image=reference, prompt="a cat")
        return drawing(prompt=None, **embeds)(pipe, seed)

    check(cell, pipe, draw)


@row("Negative prompts (true CFG on Flux)", section=SECTION)
def test_negative_prompts(cell: Cell) -> None:
    options: dict[str, Any] = {"negative_prompt": "a blurred dog"}
    if cell.family == "flux":
        options["true_cfg_scale"] = 3.0
    pipe = pipeline(cell.family)
    draw = drawing(**options)
    check(cell, pipe, draw)
    if cell.mode == "eager":
        assert difference(draw(transform(pipe), 0), drawing()(pipe, 0)) > 1e-2


@row("No guidance", section=SECTION)
def test_no_guidance(cell: Cell) -> None:
    check(cell, pipeline(cell.family), drawing(guidance_scale=1.0))


@row("`num_images_per_prompt` and several prompts", section=SECTION)
def test_several_images(cell: Cell) -> None:
    draw = drawing(prompt=["a cat", "a dog"], num_images_per_prompt=2)
    pipe = pipeline(cell.family)
    check(cell, pipe, draw)
    if cell.mode == "eager":
        assert draw(transform(pipe), 0).shape[0] == 4
