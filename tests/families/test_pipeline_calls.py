"""Made-up calls have the names, shapes and types of those that diffusers' pipelines make."""

import inspect
from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any

import diffusers
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from torch import Tensor
from torch.utils._pytree import tree_map

from tests.families.image_models import IMAGES
from tests.families.video_models import VIDEOS

pytestmark = [
    # numpy, of how diffusers hands it a tensor.
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),
    # diffusers, of its own import in Chroma.
    pytest.mark.filterwarnings("ignore:.FluxPosEmbed. is deprecated:FutureWarning"),
]

DTYPE = torch.bfloat16
NOT_OURS = {"return_dict", "attention_kwargs", "joint_attention_kwargs", "cross_attention_kwargs"}
STEPS = 3
TINY = {**IMAGES, **VIDEOS}


class _CalledError(Exception):
    """Ends a pipeline's run where it calls the transformer."""


def first_call(pipe: Any, model: Any, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of the first call that a pipeline makes of its transformer."""
    called: dict[str, Any] = {}
    names = list(inspect.signature(type(model).forward).parameters)[1:]

    def stop(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        called.update(zip(names, args, strict=False))
        called.update(kwargs)
        raise _CalledError

    model.register_forward_pre_hook(stop, with_kwargs=True)
    pipe.set_progress_bar_config(disable=True)
    with pytest.raises(_CalledError):
        pipe(**arguments, num_inference_steps=STEPS, output_type="latent")
    return {
        name: value for name, value in called.items() if value is not None and name not in NOT_OURS
    }


def facts(call: Mapping[str, Any]) -> Any:
    def of(leaf: Any) -> Any:
        return (leaf.shape, leaf.dtype) if isinstance(leaf, Tensor) else leaf

    return tree_map(of, dict(call))


def text(*shape: int, dtype: torch.dtype = DTYPE) -> Tensor:
    return torch.zeros(shape, dtype=dtype)


def mask(tokens: int, dtype: torch.dtype = torch.int64) -> Tensor:
    return torch.ones(1, tokens, dtype=dtype)


def flow(**config: Any) -> Any:
    return FlowMatchEulerDiscreteScheduler(**config)


def shifted_by_size() -> Any:
    return flow(use_dynamic_shifting=True)


def unipc() -> Any:
    return diffusers.UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
    )


def flux2_vae() -> Any:
    return diffusers.AutoencoderKLFlux2(
        block_out_channels=(4, 4, 4, 4), latent_channels=4, norm_num_groups=2
    )


def wan_vae(**config: Any) -> Any:
    return diffusers.AutoencoderKLWan(
        base_dim=4,
        z_dim=4,
        dim_mult=[1, 1, 1, 1],
        num_res_blocks=1,
        latents_mean=[0.0] * 4,
        latents_std=[1.0] * 4,
        **config,
    )


def hunyuan_vae() -> Any:
    return diffusers.AutoencoderKLHunyuanVideo15(
        latent_channels=4, block_out_channels=(8,) * 5, layers_per_block=1
    )


def pipeline(cls: str, model: Any, scheduler: Any, **parts: Any) -> Any:
    """A pipeline with some parts; the others are None."""
    made = getattr(diffusers, cls)
    parameters = list(inspect.signature(made.__init__).parameters.values())[1:]
    others = {each.name: None for each in parameters if each.default is each.empty}
    return made(**{**others, "transformer": model, "scheduler": scheduler, **parts})


def both(**given: Tensor) -> dict[str, Tensor]:
    """Of the prompt and of the negative prompt."""
    return given | {f"negative_{name}": value for name, value in given.items()}


Row = tuple[str, Callable[[], Any], Callable[[], dict[str, Any]], Callable[[], dict[str, Any]]]
CALLS: dict[str, Row] = {
    "FLUX.2 dev": (
        "Flux2Pipeline",
        shifted_by_size,
        lambda: {"vae": flux2_vae()},
        lambda: {"prompt_embeds": text(1, 512, 24)},
    ),
    "FLUX.2 klein": (
        "Flux2KleinPipeline",
        shifted_by_size,
        lambda: {"vae": flux2_vae(), "is_distilled": True},
        lambda: {"prompt_embeds": text(1, 512, 24)},
    ),
    "Qwen-Image": (
        "QwenImagePipeline",
        shifted_by_size,
        dict,
        lambda: {"prompt_embeds": text(1, 256, 24), "prompt_embeds_mask": mask(256)},
    ),
    "Z-Image": (
        "ZImagePipeline",
        lambda: flow(shift=3.0),
        dict,
        lambda: {"prompt_embeds": [text(128, 24)], "guidance_scale": 0},
    ),
    "Wan": (
        "WanPipeline",
        unipc,
        dict,
        lambda: {"prompt_embeds": text(1, 512, 20), "guidance_scale": 1},
    ),
    "Wan 2.2, image to video": (
        "WanImageToVideoPipeline",
        unipc,
        lambda: {"vae": wan_vae()},
        lambda: {
            "image": text(1, 3, 32, 64),
            "prompt_embeds": text(1, 512, 20),
            "guidance_scale": 1,
        },
    ),
    "Wan 2.2 5B": (
        "WanPipeline",
        unipc,
        lambda: {"vae": wan_vae(scale_factor_spatial=16), "expand_timesteps": True},
        lambda: {"prompt_embeds": text(1, 512, 20), "guidance_scale": 1},
    ),
    "Wan VACE": (
        "WanVACEPipeline",
        unipc,
        lambda: {"vae": wan_vae()},
        lambda: {"prompt_embeds": text(1, 512, 20), "guidance_scale": 1},
    ),
    "SD3": (
        "StableDiffusion3Pipeline",
        lambda: flow(shift=3.0),
        dict,
        lambda: {
            "prompt_embeds": text(1, 333, 16),
            "pooled_prompt_embeds": text(1, 12),
            "guidance_scale": 1,
        },
    ),
    "Chroma": (
        "ChromaPipeline",
        lambda: flow(shift=3.0),
        dict,
        lambda: {
            "prompt_embeds": text(1, 512, 16),
            "prompt_attention_mask": mask(512, DTYPE),
            "guidance_scale": 1,
        },
    ),
    "HunyuanVideo": (
        "HunyuanVideoPipeline",
        lambda: flow(shift=7.0),
        dict,
        lambda: {
            "prompt_embeds": text(1, 256, 16),
            "pooled_prompt_embeds": text(1, 12),
            "prompt_attention_mask": mask(256),
        },
    ),
    "HunyuanVideo 1.5": (
        "HunyuanVideo15Pipeline",
        lambda: flow(shift=5.0),
        lambda: {"vae": hunyuan_vae(), "guider": diffusers.ClassifierFreeGuidance()},
        lambda: both(
            prompt_embeds=text(1, 1000, 16),
            prompt_embeds_mask=mask(1000),
            prompt_embeds_2=text(1, 256, 12),
            prompt_embeds_mask_2=mask(256),
        ),
    ),
    "HunyuanImage, distilled": (
        "HunyuanImagePipeline",
        lambda: flow(shift=4.0),
        dict,
        lambda: both(
            prompt_embeds=text(1, 1000, 16),
            prompt_embeds_mask=mask(1000),
            prompt_embeds_2=text(1, 128, 12),
            prompt_embeds_mask_2=mask(128),
        ),
    ),
    "LTX-Video": (
        "LTXPipeline",
        shifted_by_size,
        dict,
        lambda: {
            "prompt_embeds": text(1, 128, 12),
            "prompt_attention_mask": mask(128, torch.bool),
            "guidance_scale": 1,
        },
    ),
    "CogVideoX": (
        "CogVideoXPipeline",
        lambda: diffusers.CogVideoXDDIMScheduler(timestep_spacing="trailing"),
        dict,
        lambda: {"prompt_embeds": text(1, 226, 12), "guidance_scale": 1},
    ),
    "Krea 2": (
        "Krea2Pipeline",
        shifted_by_size,
        lambda: {"text_encoder_select_layers": (1, 2)},
        lambda: {
            "prompt_embeds": text(1, 512, 2, 16),
            "prompt_embeds_mask": mask(512, torch.bool),
            "guidance_scale": 0,
        },
    ),
    "PixArt-alpha": (
        "PixArtAlphaPipeline",
        diffusers.DPMSolverMultistepScheduler,
        dict,
        lambda: {
            "prompt_embeds": text(1, 120, 12),
            "prompt_attention_mask": mask(120),
            "negative_prompt": None,
            "guidance_scale": 1,
            "use_resolution_binning": False,
        },
    ),
    "PixArt-Sigma": (
        "PixArtSigmaPipeline",
        diffusers.DPMSolverMultistepScheduler,
        dict,
        lambda: {
            "prompt_embeds": text(1, 300, 12),
            "prompt_attention_mask": mask(300),
            "negative_prompt": None,
            "guidance_scale": 1,
            "use_resolution_binning": False,
        },
    ),
}
"""By model: the pipeline, its scheduler, its other parts, and the arguments of its call."""


@pytest.mark.parametrize("name", CALLS)
def test_a_pipeline_makes_the_made_up_call(name: str) -> None:
    cls, scheduler, parts, arguments = CALLS[name]
    tiny = TINY[name]
    module = import_module(f"toma_fx.families.{tiny.file}")
    model = getattr(diffusers, tiny.cls)(**tiny.config).to(DTYPE)
    pipe = pipeline(cls, model, scheduler(), **parts())
    given = dict(arguments())
    given |= {"height": tiny.size["height"], "width": tiny.size["width"]}
    if "frames" in tiny.size:
        given["num_frames"] = tiny.size["frames"]
    made = first_call(pipe, model, given)
    like = torch.empty(0, dtype=DTYPE)
    assert facts(module.example_call(model, like, batch=1, **tiny.size)) == facts(made)

    levels = module._run_levels(scheduler(), STEPS, made)
    assert levels == pytest.approx([float(t) / 1000 for t in pipe.scheduler.timesteps])
    timestep = module.FAMILY.timestep(made)
    assert [module._noise_level(float(t), scheduler()) for t in timestep] == pytest.approx(
        levels[:1], abs=4e-3
    )
