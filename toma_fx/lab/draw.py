"""A task, which says what to draw, and the drawing of one of its images."""

import inspect
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from toma_fx.checkpoints import DTYPES
from toma_fx.errors import ConfigError
from toma_fx.lab.prompts import Prompt


@dataclass(frozen=True, kw_only=True)
class Task:
    """Prompts and settings that all contenders share. Images of different tasks are never mixed.

    Raises:
        ConfigError: when there is no prompt, seed or step.
    """

    model: str
    """Hub name or folder of a diffusers pipeline."""
    prompts: tuple[Prompt, ...]
    seeds: int = 1
    """Images of each prompt, with the seeds 0, 1, ... More can be added later."""
    steps: int = 25
    guidance: float | None = None
    """Guidance scale. ``None`` takes the pipeline's own, here and for the sizes."""
    height: int | None = None
    width: int | None = None
    dtype: str = "float32"
    arguments: Mapping[str, Any] = field(default_factory=dict)
    """Other arguments of the pipeline, such as ``true_cfg_scale`` and ``max_sequence_length``."""

    def __post_init__(self) -> None:
        for name in ("seeds", "steps"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}={getattr(self, name)} must be at least 1")
        if not self.prompts:
            raise ConfigError("prompts=() must hold at least one prompt")
        if self.dtype not in DTYPES:
            raise ConfigError(f"dtype={self.dtype!r} must be one of {', '.join(DTYPES)}")

    def settings(self) -> dict[str, Any]:
        """The settings that images must share to be mixed: all but the number of seeds."""
        fields = asdict(self)
        del fields["seeds"]
        if not self.arguments:
            del fields["arguments"]
        return {**fields, "prompts": [asdict(prompt) for prompt in self.prompts]}


def default_dtype() -> str:
    """bfloat16 on a GPU, float32 without one."""
    return "bfloat16" if torch.cuda.is_available() else "float32"


def takes_negative(pipeline: Any, task: Task) -> bool:
    """Whether a negative prompt has an effect; Flux also needs a ``true_cfg_scale`` above 1."""
    parameters = inspect.signature(type(pipeline).__call__).parameters
    true_guidance = task.arguments.get("true_cfg_scale", 1)
    return "negative_prompt" in parameters and (
        "true_cfg_scale" not in parameters or true_guidance > 1
    )


def _check_arguments(pipeline: Any, task: Task) -> None:
    """Refuse arguments that the pipeline does not take or that the lab itself gives.

    Raises:
        ConfigError: when there is one; the message lists those that can be given.
    """
    own = {"self", "prompt", "negative_prompt", "num_inference_steps", "guidance_scale"}
    own |= {"height", "width", "generator", "output_type", "return_dict", "num_images_per_prompt"}
    free = [n for n in inspect.signature(type(pipeline).__call__).parameters if n not in own]
    for name, value in task.arguments.items():
        if name not in free:
            raise ConfigError(
                f"argument {name}={value!r} cannot be given to {type(pipeline).__name__}; it takes "
                f"{', '.join(free)}; steps, sizes, guidance and prompts have options of their own"
            )


@torch.no_grad()
def draw(
    pipeline: Any,
    task: Task,
    prompt: Prompt,
    seed: int,
    *,
    steps: int | None = None,
    output: str = "pil",
) -> tuple[Any, float]:
    """One image, and the seconds that it took from prompt to pixels.

    Args:
        pipeline: one that `toma_fx.checkpoints.load_pipeline` loaded, changed or not.
        task: sizes, guidance and other arguments.
        prompt: one of the task's.
        seed: seed of the starting noise. The CPU makes it, so that every device starts alike.
        steps: denoising steps; the task's when left out.
        output: the pipeline's ``output_type``: ``"pil"``, or ``"np"`` for floats ``(H, W, 3)``.

    Raises:
        ConfigError: when the task has an argument that the pipeline does not take.
    """
    _check_arguments(pipeline, task)
    # Flux guides only when it is given a negative prompt, which may be empty. The UNet's is zeros.
    negative = prompt.negative if "true_cfg_scale" in task.arguments else prompt.negative or None
    options = {
        "guidance_scale": task.guidance,
        "height": task.height,
        "width": task.width,
        "negative_prompt": negative if takes_negative(pipeline, task) else None,
    }
    given = {name: value for name, value in options.items() if value is not None}
    generator = torch.Generator().manual_seed(seed)
    _synchronize()
    start = time.perf_counter()
    image = pipeline(
        prompt.text,
        num_inference_steps=task.steps if steps is None else steps,
        generator=generator,
        output_type=output,
        **given,
        **task.arguments,
    ).images[0]
    _synchronize()
    return image, time.perf_counter() - start


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
