"""Whole denoising runs through diffusers' pipeline, from text to pixels, and their distances."""

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import diffusers
import torch
from PIL.Image import Image
from torch import nn

from toma_fx.bench.contenders import Setting, entrants, load
from toma_fx.bench.levels import Timed
from toma_fx.checkpoints import DTYPES, RANDOM, load_pipeline, random_weights
from toma_fx.choices import PROMPT
from toma_fx.errors import ConfigError
from toma_fx.images import pixels, psnr
from toma_fx.inputs import draws_videos, random_inputs
from toma_fx.transform import model_of, pipeline_models

VAES: dict[str, dict[str, Any]] = {
    "sdxl": {"latent_channels": 4, "scaling_factor": 0.13025},
    "flux": {
        "latent_channels": 16,
        "scaling_factor": 0.3611,
        "shift_factor": 0.1159,
        "use_quant_conv": False,
        "use_post_quant_conv": False,
    },
}
VAE: dict[str, Any] = {
    "block_out_channels": (128, 256, 512, 512),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 2,
    "force_upcast": False,
}


@dataclass(kw_only=True)
class Studio:
    """A pipeline and the arguments of its call; it draws with any denoising model."""

    pipeline: Any
    call: dict[str, Any]
    images: dict[int, Image] = field(default_factory=dict)
    """The last image of each model, by its identity."""

    def draw(self, model: nn.Module) -> Image:
        """An image by the pipeline with another denoising model, always from the same noise."""
        part = next(iter(pipeline_models(self.pipeline)))
        setattr(self.pipeline, part, model)
        generator = torch.Generator().manual_seed(0)
        image: Image = self.pipeline(generator=generator, **self.call).images[0]
        self.images[id(model)] = image
        return image


def studio(setting: Setting) -> Studio:
    """The pipeline of a checkpoint; or of random weights, with its VAE but without text encoders.

    Args:
        setting: model, size, dtype and steps. With random weights the embeddings of the text are
            random too, so the time of the text encoders is not counted.

    Raises:
        ConfigError: when no VAE is known for random weights, or the pipeline draws videos.
    """
    if setting.model in RANDOM and setting.model not in VAES:
        raise ConfigError(
            f"images of random weights are drawn by {' and '.join(VAES)}, not by {setting.model}; "
            "time one forward, toma-fx bench model, or give a folder or hub name of a pipeline"
        )
    if setting.frames is not None:
        raise ConfigError(
            f"frames={setting.frames} is for videos, and this draws images; leave it out"
        )
    size = {"num_inference_steps": setting.steps, "num_images_per_prompt": setting.batch}
    size |= {k: v for k in ("height", "width") if (v := getattr(setting, k)) is not None}
    if "height" in size:
        size.setdefault("width", size["height"])
    if setting.model not in RANDOM:
        dtype = next(name for name, dtype in DTYPES.items() if dtype == setting.dtype)
        pipeline = load_pipeline(setting.model, dtype=dtype, device=setting.device)
        if draws_videos(model_of(pipeline)):
            raise ConfigError(f"{setting.model} draws videos; time one forward, bench model")
        return Studio(pipeline=pipeline, call={"prompt": PROMPT, **size})
    model = load(setting)
    vae: Any = random_weights(
        diffusers.AutoencoderKL,
        {**VAE, **VAES[setting.model]},
        setting.dtype,
        setting.device,
    )
    inputs = random_inputs(model)
    nothing = dict.fromkeys(("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2"))
    text = {"prompt_embeds": inputs["encoder_hidden_states"]}
    if setting.model == "flux":
        pipeline = diffusers.FluxPipeline(
            scheduler=diffusers.FlowMatchEulerDiscreteScheduler(
                use_dynamic_shifting=True, shift=3.0
            ),
            vae=vae,
            transformer=model,
            **nothing,
        )
        text["pooled_prompt_embeds"] = inputs["pooled_projections"]
    else:
        pipeline = diffusers.StableDiffusionXLPipeline(
            scheduler=diffusers.EulerDiscreteScheduler(
                beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012
            ),
            vae=vae,
            unet=model,
            add_watermarker=False,
            **nothing,
        )
        text["pooled_prompt_embeds"] = inputs["added_cond_kwargs"]["text_embeds"]
        text |= {f"negative_{name}": torch.zeros_like(value) for name, value in text.items()}
    pipeline.set_progress_bar_config(disable=True)
    return Studio(pipeline=pipeline, call={**text, **size})


def images(setting: Setting) -> tuple[Timed, Callable[[], dict[tuple[str, float | None], float]]]:
    """A whole image by each contender, and a function to call afterwards for their PSNR in dB.

    Args:
        setting: what to draw. Schedules are kept here, since the steps are a denoising run.
    """
    room = studio(setting)
    model = model_of(room.pipeline)
    drawers: dict[tuple[str, float | None], nn.Module] = {}
    contenders = []
    for each in entrants(model, setting, scheduled=True):
        drawers[each.name, each.ratio] = each.model
        contenders.append(each.contender(functools.partial(room.draw, each.model)))

    def distances() -> dict[tuple[str, float | None], float]:
        return {
            key: psnr(pixels(room.images[id(drawer)]), pixels(room.images[id(model)]))
            for key, drawer in drawers.items()
            if drawer is not model and id(drawer) in room.images
        }

    title = f"an image in {setting.steps} steps, to pixels"
    if setting.model in RANDOM:
        note = "without text encoders; PSNR of noise means nothing, so there is none"
        return Timed(title=title, contenders=contenders, notes=(note,)), dict
    note = "PSNR: with the image of the untouched, eager model"
    return Timed(title=title, contenders=contenders, notes=(note,)), distances
