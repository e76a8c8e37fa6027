"""The images that the rows of the matrix draw, and the checks of images with merged tokens."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from diffusers import EulerDiscreteScheduler
from torch import Tensor, nn

from tests.matrix.frame import Cell, difference
from tests.pipelines import PROMPT_TOKENS, tiny_flux_pipeline, tiny_sdxl_pipeline
from toma_fx import MergeConfig, Schedule, transform

STATELESS = MergeConfig()
SCHEDULED = MergeConfig(schedule=Schedule(select_every=3, weigh_every=2))
BELOW = MergeConfig(merge_below=0.6)

Draw = Callable[[Any, int], Tensor]
"""A call of a pipeline, for a seed."""


def pipeline(family: str) -> Any:
    """Text to image."""
    if family == "flux":
        return tiny_flux_pipeline()
    pipe = tiny_sdxl_pipeline()
    # Untrained, a model that predicts noise would leave the latents almost as they began.
    pipe.scheduler = EulerDiscreteScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type="v_prediction",
        timestep_spacing="trailing",
    )
    return pipe


def converted(cls: Any, family: str, **changes: Any) -> Any:
    """Another pipeline class over the parts of the text-to-image one, some of them changed."""
    parts = {**pipeline(family).components, **changes}
    made = cls(**{name: part for name, part in parts.items() if name in _names(cls)})
    made.set_progress_bar_config(disable=True)
    return made


def _names(cls: Any) -> set[str]:
    required, optional = cls._get_signature_keys(cls)
    return set(required) | set(optional)


def part_of(pipe: Any) -> str:
    """The name of the denoising model in a pipeline."""
    return "unet" if getattr(pipe, "unet", None) is not None else "transformer"


def model_of(pipe: Any) -> Any:
    """The denoising model of a pipeline."""
    return getattr(pipe, part_of(pipe))


@contextmanager
def holding(pipe: Any, model: nn.Module) -> Iterator[Any]:
    """The pipeline with another denoising model in it."""
    before = model_of(pipe)
    setattr(pipe, part_of(pipe), model)
    yield pipe
    setattr(pipe, part_of(pipe), before)


def drawing(**options: Any) -> Draw:
    """A call that draws the latents of an image of 8 x 8 tokens in 4 steps, unless told else."""

    def draw(pipe: Any, seed: int) -> Tensor:
        call = {
            "prompt": ("a cat", "a dog")[seed % 2],
            "num_inference_steps": 4,
            "height": 128,
            "width": 128,
            "output_type": "latent",
            "generator": torch.Generator().manual_seed(seed),
            **options,
        }
        if part_of(pipe) == "transformer":
            call.setdefault("max_sequence_length", PROMPT_TOKENS)
        images: Tensor = pipe(**call).images
        return images

    return draw


def picture(height: int = 128, width: int = 128, seed: int = 0) -> Tensor:
    """An image ``(1, 3, H, W)`` in [0, 1] that an image-to-image pipeline may start from."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(1, 3, 4, 4, generator=generator)
    return nn.functional.interpolate(coarse, (height, width), mode="bicubic").clamp(0, 1)


def lossless(config: MergeConfig) -> MergeConfig:
    """The options with which every token is kept and stands for itself alone.

    Merging then only moves tokens about, and whatever belongs to a token has to move with it.
    """
    changed = replace(config, temperature=1e-6)
    object.__setattr__(changed, "ratio", 1e-3)  # which nobody may ask for
    return changed


def check(
    cell: Cell, pipe: Any, draw: Draw, config: MergeConfig = STATELESS, *, keeping: bool = True
) -> None:
    """Assert all that an image with merged tokens promises.

    In eager mode: with every token kept it is the untouched image; otherwise merging is seen in it.
    In every mode a model that drew another image before, with another prompt and seed, draws what a
    fresh model draws, and compiles nothing for it.

    Args:
        cell: family and mode.
        pipe: an untouched pipeline; it is left as it was.
        draw: a call that uses the denoising model of the pipeline at least twice.
        config: how to merge.
        keeping: whether every token can be kept, and it would say something new.
    """
    model = model_of(pipe)
    with holding(pipe, transform(model, config)):
        expected = draw(pipe, 0)
    if cell.mode == "eager":
        untouched = draw(pipe, 0)
        assert difference(expected, untouched) > 1e-2
        if keeping:
            with holding(pipe, transform(model, lossless(config))):
                assert difference(draw(pipe, 0), untouched) < 1e-3
    with holding(pipe, cell.apply(transform(model, config))):
        other = draw(pipe, 1)
        assert difference(other, expected) > 1e-2
        with cell.steady():
            cell.agree(draw(pipe, 0), expected)
