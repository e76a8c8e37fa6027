"""ComfyUI nodes: load a diffusers pipeline, merge its tokens, draw with it.

Put this folder into ``ComfyUI/custom_nodes`` under a name of its own, and ``pip install`` toma_fx
into ComfyUI's Python. Nothing here imports ComfyUI, so the nodes also run without it.

A ``MODEL`` of ComfyUI holds its own implementation of a UNet or of Flux, not a diffusers module,
and toma_fx rewrites diffusers modules. These nodes therefore have a type of their own,
``DIFFUSERS_PIPELINE``, which no ``MODEL`` can be plugged into. Their output is an ordinary
``IMAGE``.
"""

import copy
from typing import Any

import diffusers
import torch
from torch import Tensor

import toma_fx
from toma_fx.checkpoints import DTYPES
from toma_fx.config import PRESETS

PIPELINE = "DIFFUSERS_PIPELINE"
CATEGORY = "toma_fx"

Inputs = dict[str, dict[str, Any]]


class LoadDiffusersPipeline:
    """Load a pipeline from a folder or the hub."""

    CATEGORY = CATEGORY
    FUNCTION = "load"
    RETURN_TYPES = (PIPELINE,)

    @classmethod
    def INPUT_TYPES(cls) -> Inputs:  # noqa: N802, ComfyUI's name
        """The node's inputs."""
        return {
            "required": {
                "name": ("STRING", {"default": "stabilityai/stable-diffusion-xl-base-1.0"}),
                "dtype": (list(DTYPES), {"default": "bfloat16"}),
            }
        }

    def load(self, name: str, dtype: str) -> tuple[Any]:
        """The pipeline, on the GPU when there is one."""
        pipe: Any = diffusers.DiffusionPipeline.from_pretrained(name, torch_dtype=DTYPES[dtype])
        pipe.set_progress_bar_config(disable=True)
        return (pipe.to("cuda" if torch.cuda.is_available() else "cpu"),)


class MergeTokens:
    """`toma_fx.transform` on a pipeline."""

    CATEGORY = CATEGORY
    FUNCTION = "merge"
    RETURN_TYPES = (PIPELINE, "STRING")
    RETURN_NAMES = ("pipeline", "report")

    @classmethod
    def INPUT_TYPES(cls) -> Inputs:  # noqa: N802
        """The node's inputs."""
        share = {"min": 0.0, "max": 0.95, "step": 0.05}
        return {
            "required": {
                "pipeline": (PIPELINE,),
                "ratio": ("FLOAT", {"default": 0.5, **share}),
                "merge_below": ("FLOAT", {"default": 0.8, "min": 0.05, "max": 1.0, "step": 0.05}),
                # Every so many steps are full; 0 keeps nothing, and merges at each step.
                "memory_every": ("INT", {"default": 2, "min": 0, "max": 10}),
                # With 0, steps between full ones extrapolate, and the ratio is not used.
                "theta": ("FLOAT", {"default": 0.0, **share}),
                "preset": (list(PRESETS), {"default": "default"}),
                "compile_blocks": ("BOOLEAN", {"default": False}),
            }
        }

    def merge(
        self,
        pipeline: Any,
        ratio: float,
        merge_below: float,
        memory_every: int,
        theta: float,
        preset: str,
        compile_blocks: bool,
    ) -> tuple[Any, str]:
        """A pipeline that shares all but the denoising model, and the report of the merging.

        The presets of the paper keep plans between steps: give them ``merge_below`` 1 and
        ``memory_every`` 0.
        """
        # ComfyUI keeps a node's outputs, so the loader's pipeline must stay as it was.
        pipe = copy.copy(pipeline)
        options: dict[str, Any] = {"ratio": ratio, "merge_below": merge_below}
        if memory_every:
            options["memory"] = toma_fx.Memory(every=memory_every, theta=theta)
            if theta == 0:  # nothing merges between full steps, so no block has to stay out
                options["skip"] = ()
        toma_fx.transform(pipe, toma_fx.MergeConfig.preset(preset, **options))
        report = str(toma_fx.report(pipe))
        if compile_blocks:
            model = pipe.unet if hasattr(pipe, "unet") else pipe.transformer
            model.compile_repeated_blocks(fullgraph=True)
        return pipe, report


class DrawWithPipeline:
    """Draw images from a prompt."""

    CATEGORY = CATEGORY
    FUNCTION = "draw"
    RETURN_TYPES = ("IMAGE",)

    @classmethod
    def INPUT_TYPES(cls) -> Inputs:  # noqa: N802
        """The node's inputs."""
        size = {"default": 1024, "min": 64, "max": 4096, "step": 16}
        return {
            "required": {
                "pipeline": (PIPELINE,),
                "prompt": ("STRING", {"multiline": True}),
                "seed": ("INT", {"default": 0, "min": 0, "max": 2**63 - 1}),
                "steps": ("INT", {"default": 25, "min": 1, "max": 1000}),
                "guidance": ("FLOAT", {"default": 5.0, "min": 0.0, "max": 30.0, "step": 0.1}),
                "width": ("INT", size),
                "height": ("INT", size),
                "batch_size": ("INT", {"default": 1, "min": 1, "max": 64}),
            }
        }

    def draw(
        self,
        pipeline: Any,
        prompt: str,
        seed: int,
        steps: int,
        guidance: float,
        width: int,
        height: int,
        batch_size: int,
    ) -> tuple[Tensor]:
        """Images ``(batch, height, width, 3)`` in [0, 1], float32, on the CPU."""
        images = pipeline(
            prompt,
            num_inference_steps=steps,
            guidance_scale=guidance,
            width=width,
            height=height,
            num_images_per_prompt=batch_size,
            generator=torch.Generator().manual_seed(seed),
            output_type="pt",
        ).images
        return (images.movedim(1, -1).float().cpu(),)


NODE_CLASS_MAPPINGS: dict[str, type] = {
    "TomaLoadDiffusersPipeline": LoadDiffusersPipeline,
    "TomaMergeTokens": MergeTokens,
    "TomaDrawWithPipeline": DrawWithPipeline,
}
NODE_DISPLAY_NAME_MAPPINGS: dict[str, str] = {
    "TomaLoadDiffusersPipeline": "Load diffusers pipeline",
    "TomaMergeTokens": "Merge tokens (toma_fx)",
    "TomaDrawWithPipeline": "Draw with diffusers pipeline",
}
