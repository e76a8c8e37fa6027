"""Tiny complete pipelines of more families, built without a download, and calls of them.

Every letter is a token here. Templates around a prompt are therefore empty: those of the real
pipelines would be cut off before the prompt begins.
"""

from collections.abc import Callable
from typing import Any

import diffusers
import torch
from diffusers import (
    AutoencoderKLCogVideoX,
    AutoencoderKLHunyuanVideo,
    AutoencoderKLLTXVideo,
    ChromaPipeline,
    CogVideoXDDIMScheduler,
    CogVideoXPipeline,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    HunyuanVideoImageToVideoPipeline,
    HunyuanVideoPipeline,
    LTXConditionPipeline,
    LTXImageToVideoPipeline,
    LTXPipeline,
    PixArtSigmaPipeline,
    StableDiffusion3Pipeline,
)
from PIL import Image
from tokenizers.pre_tokenizers import ByteLevel
from transformers import (
    ByT5Tokenizer,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    GemmaTokenizer,
    LlamaConfig,
    LlamaModel,
    LlamaTokenizer,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLTextConfig,
    Qwen2_5_VLTextModel,
    Qwen2Tokenizer,
    Qwen3Config,
    Qwen3Model,
    Qwen3VLConfig,
    Qwen3VLModel,
    T5Config,
    T5EncoderModel,
)

from tests.pipelines import (
    LETTERS,
    PROMPT_TOKENS,
    _clip,
    _clip_tokenizer,
    _t5,
    seeded,
    t5_tokenizer,
    tiny_vae,
)
from tests.tiny import TEXT_WIDTH
from tests.tiny_more_families import (
    LATENTS,
    tiny_chroma,
    tiny_cogvideox,
    tiny_cosmos,
    tiny_flux3,
    tiny_hunyuan_image,
    tiny_hunyuan_video,
    tiny_hunyuan_video15,
    tiny_hunyuan_video_i2v,
    tiny_krea2,
    tiny_ltx,
    tiny_ltx2,
    tiny_pixart,
    tiny_sd3,
)

WORD_START = "\N{LOWER ONE EIGHTH BLOCK}"
SIZE: dict[str, Any] = {"hidden_size": TEXT_WIDTH, "intermediate_size": 32}
HEADS: dict[str, Any] = {"num_attention_heads": 2, "num_key_value_heads": 1}
TURNS: dict[str, Any] = {
    "rope_parameters": {
        "rope_type": "default",
        "rope_theta": 10000.0,
        "mrope_section": [4, 2, 2],
    }
}
"""Of the texts that share their positions with images: halves of 16 channels, by axis."""

EYES: dict[str, Any] = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2}
"""Of the part of a text encoder that looks at images, which no text reaches."""


def _quiet(pipeline: Any) -> Any:
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def _qwen_tokenizer() -> Qwen2Tokenizer:
    """Knows single bytes and the marks of a chat, of which a template keeps the words only."""
    marks = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    tokens = [*marks, *sorted(ByteLevel.alphabet())]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    return Qwen2Tokenizer(
        vocab=vocabulary,
        merges=[],
        additional_special_tokens=marks[1:],
        chat_template="{% for message in messages %}{{ message['content'] }}{% endfor %}",
    )


def _sentence_vocabulary(*marks: str) -> dict[str, int]:
    return {token: index for index, token in enumerate([*marks, WORD_START, *LETTERS])}


def _llama_tokenizer() -> LlamaTokenizer:
    vocabulary = _sentence_vocabulary("<unk>", "<s>", "</s>", "<pad>")
    return LlamaTokenizer(vocab=vocabulary, merges=[], pad_token="<pad>", padding_side="right")


def _gemma_tokenizer() -> GemmaTokenizer:
    vocabulary = _sentence_vocabulary("<pad>", "<eos>", "<bos>", "<unk>", "<mask>")
    return GemmaTokenizer(vocab=vocabulary, merges=[], model_max_length=PROMPT_TOKENS)


def _long_clip() -> CLIPTextModel:
    """For pipelines that ask for the 77 tokens of the real one."""
    config = CLIPTextConfig(
        vocab_size=2 + 2 * len(LETTERS),
        **SIZE,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=77,
        bos_token_id=0,
        eos_token_id=1,
    )
    return seeded(lambda: CLIPTextModel(config))


def _llama() -> LlamaModel:
    config = LlamaConfig(vocab_size=64, **SIZE, **HEADS, num_hidden_layers=3, pad_token_id=3)
    return seeded(lambda: LlamaModel(config))


def _byt5() -> T5EncoderModel:
    config = T5Config(
        vocab_size=384, d_model=TEXT_WIDTH, d_ff=32, d_kv=16, num_layers=1, num_heads=2
    )
    return seeded(lambda: T5EncoderModel(config))


def _normal(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def tiny_sd3_pipeline() -> Any:
    """Stable Diffusion 3, whose two CLIPs give half of the text's width each."""
    return _quiet(
        StableDiffusion3Pipeline(
            transformer=tiny_sd3(),
            scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
            vae=tiny_vae(),
            text_encoder=_clip(CLIPTextModelWithProjection, TEXT_WIDTH // 2),
            tokenizer=_clip_tokenizer(),
            text_encoder_2=_clip(CLIPTextModelWithProjection, TEXT_WIDTH // 2),
            tokenizer_2=_clip_tokenizer(),
            text_encoder_3=_t5(),
            tokenizer_3=t5_tokenizer(),
        )
    )


def tiny_chroma_pipeline() -> Any:
    """Chroma, whose tokens are patches of 2x2 latents of 4 channels."""
    return _quiet(
        ChromaPipeline(
            transformer=tiny_chroma(),
            scheduler=FlowMatchEulerDiscreteScheduler(),
            vae=tiny_vae(),
            text_encoder=_t5(),
            tokenizer=t5_tokenizer(),
        )
    )


def _hunyuan_video_vae() -> AutoencoderKLHunyuanVideo:
    return seeded(
        lambda: AutoencoderKLHunyuanVideo(
            latent_channels=LATENTS,
            block_out_channels=(4, 4, 8, 8),
            layers_per_block=1,
            norm_num_groups=2,
        )
    )


def tiny_hunyuan_video_pipeline() -> Any:
    """HunyuanVideo from text."""
    return _quiet(
        HunyuanVideoPipeline(
            transformer=tiny_hunyuan_video(),
            scheduler=FlowMatchEulerDiscreteScheduler(shift=7.0),
            vae=_hunyuan_video_vae(),
            text_encoder=_llama(),
            tokenizer=_llama_tokenizer(),
            text_encoder_2=_long_clip(),
            tokenizer_2=_clip_tokenizer(),
        )
    )


def tiny_hunyuan_video_i2v_pipeline() -> Any:
    """HunyuanVideo from an image. It has no text encoder, since that looks at images too."""
    return _quiet(
        HunyuanVideoImageToVideoPipeline(
            transformer=tiny_hunyuan_video_i2v(),
            scheduler=FlowMatchEulerDiscreteScheduler(shift=7.0),
            vae=_hunyuan_video_vae(),
            text_encoder=None,
            tokenizer=None,
            text_encoder_2=None,
            tokenizer_2=None,
            image_processor=None,
        )
    )


def tiny_hunyuan_video15_pipeline() -> Any:
    """HunyuanVideo 1.5 from text, with the guidance that its repository configures."""
    text = Qwen2_5_VLTextConfig(vocab_size=300, **SIZE, **HEADS, **TURNS, num_hidden_layers=3)
    pipeline = _quiet(
        diffusers.HunyuanVideo15Pipeline(
            transformer=tiny_hunyuan_video15(),
            scheduler=FlowMatchEulerDiscreteScheduler(shift=5.0),
            vae=seeded(
                lambda: diffusers.AutoencoderKLHunyuanVideo15(
                    latent_channels=LATENTS, block_out_channels=(8,) * 5, layers_per_block=1
                )
            ),
            text_encoder=seeded(lambda: Qwen2_5_VLTextModel(text)),
            tokenizer=_qwen_tokenizer(),
            text_encoder_2=_byt5(),
            tokenizer_2=ByT5Tokenizer(),
            guider=diffusers.ClassifierFreeGuidance(guidance_scale=6.0),
        )
    )
    pipeline.system_message = ""
    pipeline.prompt_template_encode_start_idx = 0
    pipeline.tokenizer_max_length = pipeline.tokenizer_2_max_length = PROMPT_TOKENS
    pipeline.vision_num_semantic_tokens = 3
    return pipeline


def tiny_hunyuan_image_pipeline() -> Any:
    """HunyuanImage 2.1, with the guidance that its repository configures."""
    text = {"vocab_size": 300, **SIZE, **HEADS, **TURNS, "num_hidden_layers": 3}
    config = Qwen2_5_VLConfig(text_config=text, vision_config=EYES)
    guidance = diffusers.AdaptiveProjectedMixGuidance(guidance_scale=3.5)
    pipeline = _quiet(
        diffusers.HunyuanImagePipeline(
            transformer=tiny_hunyuan_image(),
            scheduler=FlowMatchEulerDiscreteScheduler(shift=5.0),
            vae=seeded(
                lambda: diffusers.AutoencoderKLHunyuanImage(
                    in_channels=3,
                    out_channels=3,
                    latent_channels=LATENTS,
                    block_out_channels=(32,) * 6,
                    layers_per_block=1,
                    spatial_compression_ratio=32,
                    sample_size=128,
                    scaling_factor=0.75,
                )
            ),
            text_encoder=seeded(lambda: Qwen2_5_VLForConditionalGeneration(config)),
            tokenizer=_qwen_tokenizer(),
            text_encoder_2=_byt5(),
            tokenizer_2=ByT5Tokenizer(),
            guider=guidance,
            ocr_guider=guidance,
        )
    )
    pipeline.prompt_template_encode = "{}<|im_end|>"
    pipeline.prompt_template_encode_start_idx = 0
    pipeline.tokenizer_max_length = pipeline.tokenizer_2_max_length = PROMPT_TOKENS
    return pipeline


def _ltx_scheduler() -> FlowMatchEulerDiscreteScheduler:
    return FlowMatchEulerDiscreteScheduler(
        use_dynamic_shifting=True,
        base_shift=0.95,
        max_shift=2.05,
        base_image_seq_len=1024,
        max_image_seq_len=4096,
        shift_terminal=0.1,
    )


def _ltx_components() -> dict[str, Any]:
    return {
        "transformer": tiny_ltx(),
        "scheduler": _ltx_scheduler(),
        "vae": seeded(
            lambda: AutoencoderKLLTXVideo(
                latent_channels=LATENTS,
                block_out_channels=(8,) * 4,
                decoder_block_out_channels=(8,) * 4,
                layers_per_block=(1,) * 5,
                decoder_layers_per_block=(1,) * 5,
            )
        ),
        "text_encoder": _t5(),
        "tokenizer": t5_tokenizer(),
    }


def tiny_ltx_pipeline() -> Any:
    """LTX-Video from text."""
    return _quiet(LTXPipeline(**_ltx_components()))


def tiny_ltx_i2v_pipeline() -> Any:
    """LTX-Video from an image."""
    return _quiet(LTXImageToVideoPipeline(**_ltx_components()))


def tiny_ltx_keyframe_pipeline() -> Any:
    """LTX-Video from frames anywhere, of later releases, which shift no timesteps."""
    components = {**_ltx_components(), "scheduler": FlowMatchEulerDiscreteScheduler()}
    return _quiet(LTXConditionPipeline(**components))


def tiny_ltx2_pipeline() -> Any:
    """LTX-2 from text."""
    return _quiet(diffusers.LTX2Pipeline(**_ltx2_components()))


def tiny_ltx2_i2v_pipeline() -> Any:
    """LTX-2 from an image."""
    return _quiet(diffusers.LTX2ImageToVideoPipeline(**_ltx2_components()))


def _ltx2_components() -> dict[str, Any]:
    """Its sound has 8 channels: 4 of each of 2 bands."""
    layers = 2
    text = {
        "vocab_size": 64,
        **SIZE,
        **HEADS,
        "num_hidden_layers": layers,
        "head_dim": 16,
        "query_pre_attn_scalar": 16,
    }
    eyes = {
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 16,
        "patch_size": 8,
    }
    config = Gemma3Config(text_config=text, vision_config=eyes, mm_tokens_per_image=4)
    heads = {
        f"{stream}_connector_{name}": number
        for stream in ("video", "audio")
        for name, number in [
            ("num_attention_heads", 2),
            ("attention_head_dim", TEXT_WIDTH // 2),
            ("num_layers", 1),
            ("num_learnable_registers", 4),
        ]
    }
    return {
        "transformer": tiny_ltx2(),
        "scheduler": _ltx_scheduler(),
        "vae": seeded(
            lambda: diffusers.AutoencoderKLLTX2Video(
                latent_channels=LATENTS,
                block_out_channels=(8,) * 4,
                decoder_block_out_channels=(8,) * 3,
                layers_per_block=(1,) * 5,
                decoder_layers_per_block=(1,) * 4,
                spatial_compression_ratio=32,
                temporal_compression_ratio=8,
            )
        ),
        "audio_vae": seeded(
            lambda: diffusers.AutoencoderKLLTX2Audio(
                base_channels=8,
                ch_mult=(1, 1, 1),
                num_res_blocks=1,
                latent_channels=4,
                mel_bins=8,
            )
        ),
        "text_encoder": seeded(lambda: Gemma3ForConditionalGeneration(config)),
        "tokenizer": _gemma_tokenizer(),
        "connectors": seeded(
            lambda: diffusers.pipelines.ltx2.LTX2TextConnectors(
                caption_channels=TEXT_WIDTH,
                text_proj_in_factor=layers + 1,
                connector_rope_base_seq_len=PROMPT_TOKENS,
                **heads,
            )
        ),
        "vocoder": seeded(
            lambda: diffusers.pipelines.ltx2.LTX2Vocoder(
                in_channels=16,
                hidden_channels=8,
                upsample_kernel_sizes=[4, 4],
                upsample_factors=[2, 2],
                resnet_kernel_sizes=[3],
                resnet_dilations=[[1]],
            )
        ),
    }


def tiny_cogvideox_pipeline() -> Any:
    """CogVideoX 5B."""
    return _quiet(
        CogVideoXPipeline(
            transformer=tiny_cogvideox(),
            scheduler=CogVideoXDDIMScheduler(
                snr_shift_scale=1.0,
                prediction_type="v_prediction",
                rescale_betas_zero_snr=True,
                timestep_spacing="trailing",
            ),
            vae=seeded(
                lambda: AutoencoderKLCogVideoX(
                    latent_channels=LATENTS,
                    block_out_channels=(8,) * 4,
                    layers_per_block=1,
                    norm_num_groups=2,
                )
            ),
            text_encoder=_t5(),
            tokenizer=t5_tokenizer(),
        )
    )


def _qwen_image_vae() -> Any:
    return seeded(
        lambda: diffusers.AutoencoderKLQwenImage(
            base_dim=8,
            z_dim=LATENTS,
            dim_mult=[1, 1, 1, 1],
            num_res_blocks=1,
            latents_mean=[0.0] * LATENTS,
            latents_std=[1.0] * LATENTS,
        )
    )


def tiny_krea2_pipeline() -> Any:
    """Krea 2, of whose text encoder two layers are used."""
    text = {"vocab_size": 300, **SIZE, **HEADS, **TURNS, "num_hidden_layers": 3, "head_dim": 16}
    eyes = {**EYES, "out_hidden_size": TEXT_WIDTH, "deepstack_visual_indexes": [0]}
    config = Qwen3VLConfig(text_config=text, vision_config=eyes)
    pipeline = _quiet(
        diffusers.Krea2Pipeline(
            transformer=tiny_krea2(),
            scheduler=FlowMatchEulerDiscreteScheduler(
                use_dynamic_shifting=True, max_shift=1.15, max_image_seq_len=6400
            ),
            vae=_qwen_image_vae(),
            text_encoder=seeded(lambda: Qwen3VLModel(config)),
            tokenizer=_qwen_tokenizer(),
            text_encoder_select_layers=(1, 3),
        )
    )
    pipeline.prompt_template_encode_prefix = ""
    pipeline.prompt_template_encode_start_idx = 0
    pipeline.prompt_template_encode_suffix = "<|im_end|>"
    pipeline.prompt_template_encode_num_suffix_tokens = 1
    return pipeline


def tiny_anima_pipeline() -> Any:
    """Anima: Cosmos Predict 2 with another text, in a modular pipeline."""
    text = Qwen3Config(vocab_size=300, **SIZE, **HEADS, num_hidden_layers=2, head_dim=16)
    pipeline = _quiet(diffusers.AnimaModularPipeline(blocks=diffusers.AnimaAutoBlocks()))
    pipeline.update_components(
        transformer=tiny_cosmos(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=_qwen_image_vae(),
        text_encoder=seeded(lambda: Qwen3Model(text)),
        tokenizer=_qwen_tokenizer(),
        t5_tokenizer=t5_tokenizer(),
        text_conditioner=seeded(
            lambda: diffusers.AnimaTextConditioner(
                source_dim=TEXT_WIDTH,
                target_dim=TEXT_WIDTH,
                model_dim=TEXT_WIDTH,
                num_layers=1,
                num_attention_heads=2,
                target_vocab_size=64,
                min_sequence_length=PROMPT_TOKENS,
            )
        ),
    )
    return pipeline


def tiny_flux3_pipeline() -> Any:
    """FLUX.3 in a modular pipeline, which begins with the text's embeddings."""
    blocks = diffusers.Flux3AutoBlocks()
    blocks.sub_blocks.pop("prompt_upsampler")
    blocks.sub_blocks.pop("text_encoder")
    pipeline = _quiet(diffusers.Flux3ModularPipeline(blocks=blocks))
    pipeline.update_components(
        transformer=tiny_flux3(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=6.93),
        vae=seeded(
            lambda: diffusers.AutoencoderKLFlux2(
                block_out_channels=(4, 4, 8, 8),
                layers_per_block=1,
                latent_channels=LATENTS,
                norm_num_groups=2,
            )
        ),
    )
    return pipeline


def tiny_pixart_pipeline() -> Any:
    """PixArt-Sigma."""
    return _quiet(
        PixArtSigmaPipeline(
            transformer=tiny_pixart(),
            scheduler=DPMSolverMultistepScheduler(),
            vae=tiny_vae(),
            text_encoder=_t5(),
            tokenizer=t5_tokenizer(),
        )
    )


Arguments = Callable[[], dict[str, Any]]


def _call(**own: Any) -> Arguments:
    """Arguments of a call of two steps that returns a tuple, and begins with latents."""
    return lambda: {
        "num_inference_steps": 2,
        "generator": torch.Generator().manual_seed(0),
        "output_type": "latent",
        "return_dict": False,
        **own,
    }


def _modular_call(**own: Any) -> Arguments:
    """Arguments of a call of two steps that returns latents."""
    return lambda: {
        "num_inference_steps": 2,
        "generator": torch.Generator().manual_seed(0),
        "output": "latents",
        **own,
    }


def _picture(side: int) -> Image.Image:
    return Image.linear_gradient("L").resize((side, side)).convert("RGB")


IMAGE: dict[str, Any] = {"height": 256, "width": 256}
VIDEO: dict[str, Any] = {"height": 128, "width": 128, "num_frames": 9}
LTX_VIDEO: dict[str, Any] = {"height": 256, "width": 256, "num_frames": 17}
WORDS: dict[str, Any] = {"prompt": "a cat", "max_sequence_length": PROMPT_TOKENS}

PLAIN: dict[str, Any] = {
    "stg_scale": 0.0,
    "audio_stg_scale": 0.0,
    "modality_scale": 1.0,
    "audio_modality_scale": 1.0,
}
"""Guidance of LTX-2 by the text alone, in one call of the model per step in place of three."""

_ROWS: list[tuple[str, str, Callable[[], Any], Arguments]] = [
    ("sd3", "StableDiffusion3Pipeline", tiny_sd3_pipeline, _call(**IMAGE, **WORDS)),
    ("chroma", "ChromaPipeline", tiny_chroma_pipeline, _call(**IMAGE, **WORDS)),
    (
        "hunyuan-video",
        "HunyuanVideoPipeline",
        tiny_hunyuan_video_pipeline,
        _call(
            **VIDEO,
            **WORDS,
            prompt_template={"template": "{}", "crop_start": 0},
        ),
    ),
    (
        "hunyuan-video-i2v",
        "HunyuanVideoImageToVideoPipeline",
        tiny_hunyuan_video_i2v_pipeline,
        _call(
            **VIDEO,
            image=_picture(128),
            prompt_embeds=_normal(1, 7, TEXT_WIDTH),
            pooled_prompt_embeds=_normal(1, TEXT_WIDTH),
            prompt_attention_mask=(torch.arange(7) < 6).long()[None],
        ),
    ),
    (
        "hunyuan-video-1.5",
        "HunyuanVideo15Pipeline",
        tiny_hunyuan_video15_pipeline,
        _call(**VIDEO, prompt='a cat says "hi"'),
    ),
    (
        "hunyuan-image",
        "HunyuanImagePipeline",
        tiny_hunyuan_image_pipeline,
        _call(height=512, width=512, prompt='a cat says "hi"'),
    ),
    (
        "ltx",
        "LTXPipeline",
        tiny_ltx_pipeline,
        _call(**LTX_VIDEO, **WORDS),
    ),
    (
        "ltx-i2v",
        "LTXImageToVideoPipeline",
        tiny_ltx_i2v_pipeline,
        _call(**LTX_VIDEO, **WORDS, image=_picture(256)),
    ),
    (
        "ltx-keyframe",
        "LTXConditionPipeline",
        tiny_ltx_keyframe_pipeline,
        _call(**LTX_VIDEO, **WORDS, image=_picture(256), frame_index=16),
    ),
    ("ltx-2", "LTX2Pipeline", tiny_ltx2_pipeline, _call(**LTX_VIDEO, **WORDS, **PLAIN)),
    (
        "ltx-2-i2v",
        "LTX2ImageToVideoPipeline",
        tiny_ltx2_i2v_pipeline,
        _call(**LTX_VIDEO, **WORDS, **PLAIN, image=_picture(256), image_crf=0),
    ),
    (
        "cogvideox",
        "CogVideoXPipeline",
        tiny_cogvideox_pipeline,
        _call(**VIDEO, **WORDS),
    ),
    ("krea-2", "Krea2Pipeline", tiny_krea2_pipeline, _call(**IMAGE, **WORDS)),
    ("anima", "AnimaModularPipeline", tiny_anima_pipeline, _modular_call(**IMAGE, **WORDS)),
    (
        "flux.3",
        "Flux3ModularPipeline",
        tiny_flux3_pipeline,
        _modular_call(
            **IMAGE,
            prompt_embeds=_normal(1, 7, TEXT_WIDTH),
            negative_prompt_embeds=torch.zeros(1, 5, TEXT_WIDTH),
        ),
    ),
    (
        "pixart",
        "PixArtSigmaPipeline",
        tiny_pixart_pipeline,
        _call(**IMAGE, **WORDS, use_resolution_binning=False, clean_caption=False),
    ),
]

MORE_PIPELINES: dict[str, tuple[Callable[[], Any], Arguments]] = {
    name: (pipeline, arguments)
    for name, class_name, pipeline, arguments in _ROWS
    if class_name in dir(diffusers)
}
"""What makes a tiny pipeline and the arguments of a call, of the classes that diffusers has."""
