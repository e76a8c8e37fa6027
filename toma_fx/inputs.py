"""Example calls of a whole model for reports, traces, exports and benchmarks.

The values of made-up arguments are arbitrary; their shapes are those that diffusers' pipelines pass
to the model.
"""

import inspect
from typing import Any

import torch
from torch import Tensor, nn

from toma_fx.errors import ModelError, TomaError
from toma_fx.families import family_of
from toma_fx.hooks import copied_without_hooks, is_cast


def random_inputs(
    model: nn.Module,
    *,
    height: int | None = None,
    width: int | None = None,
    frames: int | None = None,
    batch: int = 1,
) -> dict[str, Any]:
    """Make up keyword arguments for a call of ``model``, on its device and in its dtype.

    Args:
        model: a model of a known family.
        height: image height in pixels; the model's native size if omitted.
        width: image width in pixels; ``height`` if omitted.
        frames: number of video frames; the model's native number if omitted.
        batch: number of images or videos.

    Raises:
        ModelError: when the size is not a multiple of a token's size, when frames are requested
            from an image model, or when no call can be made up.
    """
    # The dtype of the computation, which is not that of cast or quantised weights.
    from diffusers.models.modeling_utils import get_parameter_dtype

    device = next(model.parameters()).device
    like = torch.empty(0, device=device, dtype=get_parameter_dtype(model))
    width = height if width is None else width
    family = family_of(model)
    video = {} if frames is None else {"frames": frames}
    if video and not draws_videos(model):
        raise ModelError(f"{family.title} draws images; leave frames={frames!r} out")
    try:
        return family.example_call(model, like, batch=batch, height=height, width=width, **video)
    except TomaError:
        raise
    except Exception as error:
        raise unfit(model, error) from error


def draws_videos(model: nn.Module) -> bool:
    """Return whether a model of a known family generates videos."""
    return "frames" in inspect.signature(family_of(model).example_call).parameters


def unfit(model: nn.Module, error: Exception) -> ModelError:
    """Make an error that tells that a made-up call does not fit a model."""
    return ModelError(
        f"the arguments that toma_fx makes up do not fit this {type(model).__name__} "
        f"({type(error).__name__}: {error}); give those of a call of yours: inputs={{...}}, a "
        "dictionary of its keyword arguments"
    )


def weightless(model: nn.Module) -> nn.Module:
    """Return a copy with shapes but no data and no hooks, for counting or tracing a call.

    Weights under layerwise casting have the dtype in which they are computed.
    """
    computed = None
    if is_cast(model):
        from diffusers.models.modeling_utils import get_parameter_dtype

        computed = get_parameter_dtype(model)

    def empty(tensor: Tensor) -> Tensor:
        return tensor.to("meta", computed if tensor.is_floating_point() else None)

    memo: dict[int, Tensor] = {id(buffer): empty(buffer) for buffer in model.buffers()}
    held = (value for module in model.modules() for value in vars(module).values())
    memo |= {id(value): empty(value) for value in held if isinstance(value, Tensor)}
    memo |= {id(p): nn.Parameter(empty(p), requires_grad=False) for p in model.parameters()}
    return copied_without_hooks(model, memo)
