"""ToDo as a rival for ``benchmarks.study``: keys and values from a coarser grid of tokens.

*ToDo: Token Downsampling for Efficient Generation of High-Resolution Images* (Smith, Saxena and
Saha, 2024, arXiv 2402.13573). In self-attention every token asks, but only the tokens of a smaller
grid answer, picked by nearest neighbour; nothing has to be unmerged. The rest of a block stays as
it is, so much less can be saved than by merging whole blocks.

A factor of 2 a side, the paper's, is ``ratio`` 0.75; other ratios give factors between. Every
self-attention of the UNet is treated alike here, as the other contenders do, while the paper
spares the coarser levels.
"""

import math
from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from toma_fx.errors import ModelError

NAME = "todo"


class DownsampledKeys:
    """An attention processor that lets another one see only some keys and values.

    Args:
        processor: the one that computes.
        keep: share of the tokens that answer.
        latent_size: height and width of the latents in this call, filled in by the UNet's hook.
    """

    def __init__(self, processor: Any, keep: float, latent_size: list[int]) -> None:
        self.processor = processor
        self.keep = keep
        self.latent_size = latent_size

    def __call__(self, attn: nn.Module, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Call the other processor; self-attention without a mask sees fewer keys and values."""
        kwargs["encoder_hidden_states"] = self._fewer(hidden_states)
        return self.processor(attn, hidden_states, *args, **kwargs)

    def _fewer(self, tokens_BND: Tensor) -> Tensor:
        latent_height, latent_width = self.latent_size
        height = round(math.sqrt(tokens_BND.shape[1] * latent_height / latent_width))
        maps_BDHW = tokens_BND.unflatten(1, (height, -1)).permute(0, 3, 1, 2)
        size = [max(1, round(n * math.sqrt(self.keep))) for n in maps_BDHW.shape[2:]]
        fewer = F.interpolate(maps_BDHW, size=size, mode="nearest-exact")
        return fewer.flatten(2).transpose(1, 2)


def apply(pipeline: Any, ratio: float) -> Callable[[], None]:
    """Make a pipeline's UNet attend to a share ``1 - ratio`` of its tokens; returns the undoing.

    Raises:
        ModelError: when the pipeline has no UNet.
    """
    unet = getattr(pipeline, "unet", None)
    if unet is None:
        raise ModelError(
            f"ToDo changes the self-attention of UNets, and {type(pipeline).__name__} has none; "
            "leave it out"
        )
    before = dict(unet.attn_processors)
    latent_size: list[int] = []

    def note_size(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        sample = args[0] if args else kwargs["sample"]
        latent_size[:] = sample.shape[-2:]

    handle = unet.register_forward_pre_hook(note_size, with_kwargs=True)
    unet.set_attn_processor(
        {
            path: DownsampledKeys(each, 1 - ratio, latent_size) if ".attn1." in path else each
            for path, each in before.items()
        }
    )

    def undo() -> None:
        handle.remove()
        unet.set_attn_processor(dict(before))  # it empties the dictionary that it is given

    return undo
