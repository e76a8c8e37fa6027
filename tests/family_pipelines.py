"""Tiny complete pipelines of FLUX.2, Qwen-Image, Z-Image and Wan, built without a download.

Their tokens are patches of 2x2 latents, and a latent is 8x8 pixels, so 16x16 pixels make a token.
What reads images for a text encoder needs torchvision, and is left out: FLUX.2 has a tokenizer
where the large one has a processor, and Qwen-Image's editors are given embeddings for a prompt.
So are Wan's that take an image or a video, which clean a prompt by ftfy.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import torch
from diffusers import (
    AutoencoderKLFlux2,
    AutoencoderKLQwenImage,
    AutoencoderKLWan,
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinPipeline,
    Flux2Pipeline,
    QwenImageEditPipeline,
    QwenImageEditPlusPipeline,
    QwenImagePipeline,
    UniPCMultistepScheduler,
    WanImageToVideoPipeline,
    WanPipeline,
    WanVACEPipeline,
    ZImageImg2ImgPipeline,
    ZImagePipeline,
)
from PIL import Image
from tokenizers.pre_tokenizers import ByteLevel
from transformers import (
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    CLIPVisionModel,
    Mistral3Config,
    Mistral3ForConditionalGeneration,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2Tokenizer,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3Model,
    UMT5Config,
    UMT5EncoderModel,
)

from tests.pipelines import LETTERS, seeded, t5_tokenizer, tiny_vae
from tests.tiny import TEXT_TOKENS, TEXT_WIDTH, smooth_images
from tests.tiny_families import (
    IMAGE_WIDTH,
    LATENT_CHANNELS,
    WAN_TEXT_TOKENS,
    tiny_flux2,
    tiny_qwen_image,
    tiny_wan,
    tiny_wan_image_to_video,
    tiny_wan_vace,
    tiny_z_image,
)

PROMPT = "a red fox in deep snow"
NEGATIVE_PROMPT = "blurry"
PROMPT_TOKENS = 64
HEIGHT, WIDTH = 128, 96
VIDEO_FRAMES, VIDEO_HEIGHT, VIDEO_WIDTH = 9, 64, 96
TEXT_LAYERS = (1, 2)

END, START_OF_TURN, END_OF_TURN = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
# The system's turn is left out, since it would fill a prompt of letters by itself.
CHAT_TEMPLATE = (
    "{% for message in messages if message.role == 'user' %}"
    "<|im_start|>user\n"
    "{{ message.content if message.content is string else message.content[0].text }}"
    "<|im_end|>\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

Pipeline = TypeVar("Pipeline")


def picture(width: int = WIDTH, height: int = HEIGHT, seed: int = 0) -> Image.Image:
    """A smooth picture of this size in pixels."""
    generator = torch.Generator().manual_seed(seed)
    image_CHW = smooth_images((1, 3, height, width), generator)[0]
    image_HWC = (127.5 + 32 * image_CHW).clamp(0, 255).byte().permute(1, 2, 0)
    return Image.fromarray(image_HWC.numpy())


def chat_tokenizer() -> Qwen2Tokenizer:
    """Knows single bytes, and where a turn of a chat starts and ends."""
    tokens = [END, START_OF_TURN, END_OF_TURN, *sorted(ByteLevel.alphabet())]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    return Qwen2Tokenizer(
        vocab=vocabulary,
        merges=[],
        additional_special_tokens=[START_OF_TURN, END_OF_TURN],
        chat_template=CHAT_TEMPLATE,
    )


def _text_config(tokenizer: Qwen2Tokenizer, width: int, **options: Any) -> dict[str, Any]:
    """What the language models' configurations agree in."""
    return {
        "vocab_size": len(tokenizer),
        "hidden_size": width,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "bos_token_id": None,
        "eos_token_id": 0,
        "pad_token_id": 0,
        **options,
    }


def _mistral(tokenizer: Qwen2Tokenizer) -> Any:
    width = TEXT_WIDTH // len(TEXT_LAYERS)
    config = Mistral3Config(
        text_config={
            "model_type": "mistral",
            **_text_config(tokenizer, width, head_dim=width // 2),
        },
        vision_config={
            "model_type": "pixtral",
            "hidden_size": 16,
            "intermediate_size": 16,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "image_size": 28,
            "patch_size": 14,
        },
        image_token_index=0,
    )
    return seeded(lambda: Mistral3ForConditionalGeneration(config))


def _qwen3(cls: Any, tokenizer: Qwen2Tokenizer, width: int) -> Any:
    config = Qwen3Config(**_text_config(tokenizer, width, head_dim=width // 2))
    return seeded(lambda: cls(config))


def _qwen_vl(tokenizer: Qwen2Tokenizer) -> Any:
    rope = {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 1e6}
    config = Qwen2_5_VLConfig(
        text_config=_text_config(tokenizer, TEXT_WIDTH, rope_parameters=rope),
        vision_config={
            "depth": 1,
            "hidden_size": 16,
            "intermediate_size": 16,
            "num_heads": 2,
            "out_hidden_size": TEXT_WIDTH,
            "fullatt_block_indexes": [0],
        },
        image_token_id=0,
        video_token_id=0,
        vision_start_token_id=0,
        vision_end_token_id=0,
    )
    return seeded(lambda: Qwen2_5_VLForConditionalGeneration(config))


def _umt5() -> Any:
    config = UMT5Config(
        vocab_size=4 + len(LETTERS),
        d_model=TEXT_WIDTH,
        d_ff=32,
        d_kv=16,
        num_layers=2,
        num_heads=2,
    )
    return seeded(lambda: UMT5EncoderModel(config))


def _clip_vision() -> Any:
    """Five tokens for an image: four patches, and one for all of it."""
    config = CLIPVisionConfig(
        hidden_size=IMAGE_WIDTH,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=32,
        patch_size=16,
    )
    return seeded(lambda: CLIPVisionModel(config))


def _flux2_vae() -> AutoencoderKLFlux2:
    return seeded(
        lambda: AutoencoderKLFlux2(
            block_out_channels=(4, 4, 8, 8),
            layers_per_block=1,
            latent_channels=LATENT_CHANNELS,
            norm_num_groups=2,
        )
    )


def _statistics() -> dict[str, list[float]]:
    return {"latents_mean": [0.1] * LATENT_CHANNELS, "latents_std": [1.5] * LATENT_CHANNELS}


def _qwen_image_vae(downsamples: int = 3) -> AutoencoderKLQwenImage:
    return seeded(
        lambda: AutoencoderKLQwenImage(
            base_dim=2,
            z_dim=LATENT_CHANNELS,
            dim_mult=[1] * (downsamples + 1),
            num_res_blocks=1,
            temperal_downsample=[False] * (downsamples - 2) + [True, True],
            **_statistics(),
        )
    )


def _wan_vae() -> AutoencoderKLWan:
    """Four frames and 8x8 pixels per latent, as in Wan 2.1 and the large models of 2.2."""
    return seeded(
        lambda: AutoencoderKLWan(
            base_dim=4,
            z_dim=LATENT_CHANNELS,
            dim_mult=[1, 1, 1, 1],
            num_res_blocks=1,
            **_statistics(),
        )
    )


def _wan_vae_of_patches() -> AutoencoderKLWan:
    """Four frames and 16x16 pixels per latent, as in Wan 2.2's TI2V."""
    return seeded(
        lambda: AutoencoderKLWan(
            base_dim=4,
            decoder_base_dim=4,
            z_dim=LATENT_CHANNELS,
            dim_mult=[1, 1, 1, 1],
            num_res_blocks=1,
            is_residual=True,
            in_channels=12,
            out_channels=12,
            patch_size=2,
            scale_factor_spatial=16,
            **_statistics(),
        )
    )


def _flow_scheduler(**options: Any) -> FlowMatchEulerDiscreteScheduler:
    return FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, **options)


def _wan_scheduler() -> UniPCMultistepScheduler:
    return UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
    )


def _quiet(pipeline: Pipeline) -> Pipeline:
    pipeline.set_progress_bar_config(disable=True)  # type: ignore[attr-defined]
    return pipeline


def tiny_flux2_pipeline() -> Flux2Pipeline:
    """FLUX.2 [dev], which has its guidance embedded."""
    tokenizer = chat_tokenizer()
    return _quiet(
        Flux2Pipeline(
            scheduler=_flow_scheduler(shift=3.0),
            vae=_flux2_vae(),
            text_encoder=_mistral(tokenizer),
            tokenizer=tokenizer,
            transformer=tiny_flux2(),
        )
    )


def tiny_flux2_klein_pipeline(is_distilled: bool = False) -> Flux2KleinPipeline:
    """FLUX.2 [klein], which calls its model twice a step for guidance unless it is distilled."""
    tokenizer = chat_tokenizer()
    return _quiet(
        Flux2KleinPipeline(
            scheduler=_flow_scheduler(shift=3.0),
            vae=_flux2_vae(),
            text_encoder=_qwen3(Qwen3ForCausalLM, tokenizer, TEXT_WIDTH // len(TEXT_LAYERS)),
            tokenizer=tokenizer,
            transformer=tiny_flux2(guidance=False),
            is_distilled=is_distilled,
        )
    )


def _qwen_image_parts(downsamples: int, zero_cond_t: bool) -> dict[str, Any]:
    tokenizer = chat_tokenizer()
    return {
        "scheduler": _flow_scheduler(max_shift=0.9, max_image_seq_len=8192, shift_terminal=0.02),
        "vae": _qwen_image_vae(downsamples),
        "text_encoder": _qwen_vl(tokenizer),
        "tokenizer": tokenizer,
        "transformer": tiny_qwen_image(zero_cond_t=zero_cond_t),
    }


def tiny_qwen_image_pipeline() -> QwenImagePipeline:
    """Qwen-Image, whose prompt is long: the template around it is spelt in single letters.

    It takes two steps at least: its scheduler stretches the steps between the first and the last.
    """
    return _quiet(QwenImagePipeline(**_qwen_image_parts(downsamples=3, zero_cond_t=False)))


def tiny_qwen_image_edit_pipeline() -> QwenImageEditPipeline:
    """Qwen-Image-Edit, with latents of 32x32 pixels.

    The pipeline scales the picture to about 1024x1024 pixels, which makes 16x16 tokens of them.
    """
    parts = _qwen_image_parts(downsamples=5, zero_cond_t=False)
    return _quiet(QwenImageEditPipeline(processor=None, **parts))


def tiny_qwen_image_edit_plus_pipeline(zero_cond_t: bool = False) -> QwenImageEditPlusPipeline:
    """Qwen-Image-Edit 2509, or 2511 with `zero_cond_t`, with latents of 32x32 pixels."""
    parts = _qwen_image_parts(downsamples=5, zero_cond_t=zero_cond_t)
    return _quiet(QwenImageEditPlusPipeline(processor=None, **parts))


def _z_image_parts() -> dict[str, Any]:
    tokenizer = chat_tokenizer()
    return {
        "scheduler": FlowMatchEulerDiscreteScheduler(shift=3.0),
        "vae": tiny_vae(),
        "text_encoder": _qwen3(Qwen3Model, tokenizer, TEXT_WIDTH),
        "tokenizer": tokenizer,
        "transformer": tiny_z_image(),
    }


def tiny_z_image_pipeline() -> ZImagePipeline:
    """Z-Image, whose prompt has more blocks of 32 tokens than its negative prompt."""
    return _quiet(ZImagePipeline(**_z_image_parts()))


def tiny_z_image_img2img_pipeline() -> ZImageImg2ImgPipeline:
    """Z-Image from an image."""
    return _quiet(ZImageImg2ImgPipeline(**_z_image_parts()))


def _wan_parts() -> dict[str, Any]:
    return {
        "tokenizer": t5_tokenizer(),
        "text_encoder": _umt5(),
        "vae": _wan_vae(),
        "scheduler": _wan_scheduler(),
    }


def tiny_wan_pipeline() -> WanPipeline:
    """Wan 2.1, text to video."""
    return _quiet(WanPipeline(transformer=tiny_wan(), **_wan_parts()))


def tiny_wan_two_models_pipeline() -> WanPipeline:
    """Wan 2.2, text to video, with one model for high noise and another for low noise."""
    return _quiet(
        WanPipeline(
            transformer=tiny_wan(),
            transformer_2=tiny_wan(seed=1),
            boundary_ratio=0.875,
            **_wan_parts(),
        )
    )


def tiny_wan_ti2v_pipeline() -> WanPipeline:
    """Wan 2.2's TI2V from text alone, with one timestep per token."""
    parts = {**_wan_parts(), "vae": _wan_vae_of_patches()}
    return _quiet(WanPipeline(transformer=tiny_wan(), expand_timesteps=True, **parts))


def tiny_wan_image_to_video_pipeline(last_image: bool = False) -> WanImageToVideoPipeline:
    """Wan 2.1, image to video, with an encoder for the image, or for the first and last one."""
    return _quiet(
        WanImageToVideoPipeline(
            transformer=tiny_wan_image_to_video(image_embeds=True, last_image=last_image),
            image_encoder=_clip_vision(),
            image_processor=CLIPImageProcessorPil(
                size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}
            ),
            **_wan_parts(),
        )
    )


def tiny_wan_image_to_video_two_models_pipeline() -> WanImageToVideoPipeline:
    """Wan 2.2, image to video, with two models and no encoder for the image."""
    return _quiet(
        WanImageToVideoPipeline(
            transformer=tiny_wan_image_to_video(),
            transformer_2=tiny_wan_image_to_video(seed=1),
            boundary_ratio=0.9,
            **_wan_parts(),
        )
    )


def tiny_wan_ti2v_from_image_pipeline() -> WanImageToVideoPipeline:
    """Wan 2.2's TI2V from an image, whose frame has timestep 0 throughout."""
    parts = {**_wan_parts(), "vae": _wan_vae_of_patches()}
    return _quiet(WanImageToVideoPipeline(transformer=tiny_wan(), expand_timesteps=True, **parts))


def tiny_wan_vace_pipeline() -> WanVACEPipeline:
    """Wan VACE, which fills in parts of a video."""
    return _quiet(WanVACEPipeline(transformer=tiny_wan_vace(), **_wan_parts()))


def _arguments(changes: dict[str, Any], **own: Any) -> dict[str, Any]:
    """What all calls agree in, what is a pipeline's own, and what a test changes of both."""
    common = {
        "prompt": PROMPT,
        "num_inference_steps": 2,
        "output_type": "latent",
        "generator": torch.Generator().manual_seed(0),
    }
    return {**common, **own, **changes}


def _embeddings(length: int, tokens: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Embeddings of a text of this length among so many tokens, the rest 0, and their mask."""
    generator = torch.Generator().manual_seed(seed)
    embeds = torch.randn(1, tokens, TEXT_WIDTH, generator=generator)
    mask = (torch.arange(tokens) < length).long()[None]
    return embeds * mask[..., None], mask


def flux2_arguments(**changes: Any) -> dict[str, Any]:
    """Arguments of a call of either FLUX.2 pipeline, without reference images."""
    return _arguments(
        changes,
        height=HEIGHT,
        width=WIDTH,
        max_sequence_length=PROMPT_TOKENS,
        text_encoder_out_layers=TEXT_LAYERS,
    )


def flux2_edit_arguments(**changes: Any) -> dict[str, Any]:
    """Arguments of a call of either FLUX.2 pipeline, with two reference images."""
    images = [picture(96, 64, seed=1), picture(64, 80, seed=2)]
    return flux2_arguments(**{"image": images, **changes})


def qwen_image_arguments(**changes: Any) -> dict[str, Any]:
    """Arguments of a call of Qwen-Image with guidance."""
    return _arguments(changes, height=HEIGHT, width=WIDTH, negative_prompt=NEGATIVE_PROMPT)


def qwen_image_edit_arguments(**changes: Any) -> dict[str, Any]:
    """Arguments of a call of Qwen-Image-Edit with guidance: embeddings, and a square picture."""
    embeds, mask = _embeddings(TEXT_TOKENS, TEXT_TOKENS, seed=0)
    negative_embeds, negative_mask = _embeddings(TEXT_TOKENS - 2, TEXT_TOKENS, seed=1)
    return _arguments(
        changes,
        image=picture(64, 64),
        prompt=None,
        prompt_embeds=embeds,
        prompt_embeds_mask=mask,
        negative_prompt_embeds=negative_embeds,
        negative_prompt_embeds_mask=negative_mask,
        height=4 * HEIGHT,
        width=4 * WIDTH,
    )


def qwen_image_edit_plus_arguments(**changes: Any) -> dict[str, Any]:
    """Arguments of a call of Qwen-Image-Edit 2509 or 2511, with two pictures of other shapes."""
    images = [picture(64, 64, seed=1), picture(128, 32, seed=2)]
    return qwen_image_edit_arguments(**{"image": images, **changes})


def z_image_arguments(**changes: Any) -> dict[str, Any]:
    """Arguments of a call of Z-Image with guidance, which Z-Image-Turbo has none of."""
    return _arguments(
        changes, height=HEIGHT, width=WIDTH, max_sequence_length=PROMPT_TOKENS, guidance_scale=3.0
    )


def z_image_img2img_arguments(**changes: Any) -> dict[str, Any]:
    """Arguments of a call of Z-Image from an image; of its three steps the last two are run."""
    own = {"image": picture(), "strength": 0.6, "num_inference_steps": 3}
    return z_image_arguments(**{**own, **changes})


def wan_arguments(**changes: Any) -> dict[str, Any]:
    """Arguments of a call of Wan with guidance, whose video has 3x4x6 tokens."""
    return _arguments(
        changes,
        negative_prompt=NEGATIVE_PROMPT,
        height=VIDEO_HEIGHT,
        width=VIDEO_WIDTH,
        num_frames=VIDEO_FRAMES,
        max_sequence_length=PROMPT_TOKENS,
    )


def wan_ti2v_arguments(**changes: Any) -> dict[str, Any]:
    """Arguments of a call of Wan 2.2's TI2V, whose tokens are of four times as many pixels."""
    return wan_arguments(**{"height": 2 * VIDEO_HEIGHT, "width": 2 * VIDEO_WIDTH, **changes})


def _wan_embeddings(tokens: int = PROMPT_TOKENS) -> dict[str, Any]:
    return {
        "prompt": None,
        "prompt_embeds": _embeddings(TEXT_TOKENS, tokens, seed=0)[0],
        "negative_prompt": None,
        "negative_prompt_embeds": _embeddings(TEXT_TOKENS - 2, tokens, seed=1)[0],
    }


def wan_image_to_video_arguments(**changes: Any) -> dict[str, Any]:
    """Arguments of a call of Wan from an image; with its embeddings the text has 512 tokens."""
    own = {"image": picture(VIDEO_WIDTH, VIDEO_HEIGHT), **_wan_embeddings(WAN_TEXT_TOKENS)}
    return wan_arguments(**{**own, **changes})


def wan_first_and_last_image_arguments(**changes: Any) -> dict[str, Any]:
    """Arguments of a call of Wan from the first and the last image."""
    last_image = picture(VIDEO_WIDTH, VIDEO_HEIGHT, seed=1)
    return wan_image_to_video_arguments(**{"last_image": last_image, **changes})


def wan_ti2v_from_image_arguments(**changes: Any) -> dict[str, Any]:
    """Arguments of a call of Wan 2.2's TI2V from an image."""
    own = {"image": picture(2 * VIDEO_WIDTH, 2 * VIDEO_HEIGHT), **_wan_embeddings()}
    return wan_ti2v_arguments(**{**own, **changes})


def wan_vace_arguments(**changes: Any) -> dict[str, Any]:
    """Arguments of a call of Wan VACE: a video, the half of it to make anew, a reference image."""
    half = Image.new("L", (VIDEO_WIDTH, VIDEO_HEIGHT))
    half.paste(255, (VIDEO_WIDTH // 2, 0, VIDEO_WIDTH, VIDEO_HEIGHT))
    own = {
        "video": [picture(VIDEO_WIDTH, VIDEO_HEIGHT, seed=0)] * VIDEO_FRAMES,
        "mask": [half] * VIDEO_FRAMES,
        "reference_images": [picture(VIDEO_WIDTH, VIDEO_HEIGHT, seed=1)],
        **_wan_embeddings(),
    }
    return wan_arguments(**{**own, **changes})


class FamilyPipeline(NamedTuple):
    """How to build a pipeline, and the arguments of a call of it."""

    build: Callable[[], Any]
    arguments: Callable[..., dict[str, Any]]


FAMILY_PIPELINES = {
    "FLUX.2": FamilyPipeline(tiny_flux2_pipeline, flux2_arguments),
    "FLUX.2 edit": FamilyPipeline(tiny_flux2_pipeline, flux2_edit_arguments),
    "FLUX.2 klein": FamilyPipeline(tiny_flux2_klein_pipeline, flux2_arguments),
    "FLUX.2 klein edit": FamilyPipeline(tiny_flux2_klein_pipeline, flux2_edit_arguments),
    "Qwen-Image": FamilyPipeline(tiny_qwen_image_pipeline, qwen_image_arguments),
    "Qwen-Image-Edit": FamilyPipeline(tiny_qwen_image_edit_pipeline, qwen_image_edit_arguments),
    "Qwen-Image-Edit 2509": FamilyPipeline(
        tiny_qwen_image_edit_plus_pipeline, qwen_image_edit_plus_arguments
    ),
    "Qwen-Image-Edit 2511": FamilyPipeline(
        lambda: tiny_qwen_image_edit_plus_pipeline(zero_cond_t=True), qwen_image_edit_plus_arguments
    ),
    "Z-Image": FamilyPipeline(tiny_z_image_pipeline, z_image_arguments),
    "Z-Image img2img": FamilyPipeline(tiny_z_image_img2img_pipeline, z_image_img2img_arguments),
    "Wan 2.1": FamilyPipeline(tiny_wan_pipeline, wan_arguments),
    "Wan 2.2": FamilyPipeline(tiny_wan_two_models_pipeline, wan_arguments),
    "Wan 2.2 TI2V": FamilyPipeline(tiny_wan_ti2v_pipeline, wan_ti2v_arguments),
    "Wan 2.1 I2V": FamilyPipeline(tiny_wan_image_to_video_pipeline, wan_image_to_video_arguments),
    "Wan 2.1 FLF2V": FamilyPipeline(
        lambda: tiny_wan_image_to_video_pipeline(last_image=True),
        wan_first_and_last_image_arguments,
    ),
    "Wan 2.2 I2V": FamilyPipeline(
        tiny_wan_image_to_video_two_models_pipeline, wan_image_to_video_arguments
    ),
    "Wan 2.2 TI2V from an image": FamilyPipeline(
        tiny_wan_ti2v_from_image_pipeline, wan_ti2v_from_image_arguments
    ),
    "Wan VACE": FamilyPipeline(tiny_wan_vace_pipeline, wan_vace_arguments),
}
