"""ToFu as a rival for ``benchmarks.study``: prune in early blocks, merge by norm in later ones.

*Token Fusion: Bridging the Gap between Token Pruning and Token Merging* (Kim et al., 2023,
arXiv 2312.01026). Tokens are matched in two sets, as in ToMe for Stable Diffusion: one token of
every 2 x 2 is a destination, the others are sources, and those that resemble a destination most
are fused with it. Where a layer answers interpolated inputs far from linearly, as early ones do, a
fused source is dropped; elsewhere the destination becomes the mean direction of its members at
the largest of their norms (MLERP), since a plain mean is shorter than what it stands for.
Afterwards a source takes its destination's output.

Two choices are ours: the first half of the UNet's blocks prunes and the second merges, and all
three components of a block run on fused tokens, as `tomesd` does in the lab.
"""

import math
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.attention import BasicTransformerBlock
from torch import Tensor, nn

from toma_fx.errors import ConfigError, ModelError

NAME = "tofu"
MOST = 0.75
"""One token of each 2 x 2 is always kept."""
PRUNING = 0.5
"""Share of the blocks, from the first, that drop sources."""


@dataclass(frozen=True)
class Fusion:
    """The tokens that are kept, and the places of the others among them."""

    kept: Tensor
    """``(B, K)`` tokens that stay."""
    place: Tensor
    """``(B, N)``: for every token, the place among the kept ones that it is fused into."""
    prune: bool

    def fuse(self, tokens_BND: Tensor) -> Tensor:
        """Fuse tokens ``(B, N, D)`` to ``(B, K, D)``."""
        width = tokens_BND.shape[-1]
        kept_BKD = tokens_BND.gather(1, self.kept[:, :, None].expand(-1, -1, width))
        if self.prune:
            return kept_BKD
        place_BND = self.place[:, :, None].expand_as(tokens_BND)
        sums = torch.zeros_like(kept_BKD).scatter_add_(1, place_BND, tokens_BND)
        norms_BN = tokens_BND.norm(dim=-1)
        longest = torch.zeros_like(kept_BKD[..., 0]).scatter_reduce_(
            1, self.place, norms_BN, "amax", include_self=False
        )
        return F.normalize(sums, dim=-1) * longest[..., None]

    def spread(self, fused_BKD: Tensor) -> Tensor:
        """Spread ``(B, K, D)`` to ``(B, N, D)``: a token takes the one that it was fused into."""
        return fused_BKD.gather(1, self.place[:, :, None].expand(-1, -1, fused_BKD.shape[-1]))


def match(tokens_BND: Tensor, height: int, ratio: float, *, prune: bool) -> Fusion:
    """Match tokens with one destination of every 2 x 2.

    Args:
        tokens_BND: in raster order.
        height: rows of the token grid.
        ratio: share of the tokens that is fused away, at most 0.75.
        prune: whether fused sources are dropped.
    """
    batch, count, _ = tokens_BND.shape
    token, width = torch.arange(count), count // height
    first = (token // width % 2 == 0) & (token % width % 2 == 0)
    # Chosen on the CPU, so that their number needs no values of the device, which may be meta.
    targets, sources = (token[each].to(tokens_BND.device) for each in (first, ~first))
    unit = F.normalize(tokens_BND, dim=-1)
    best = (unit[:, sources] @ unit[:, targets].transpose(1, 2)).max(-1)
    ranked = best.values.argsort(dim=-1, descending=True)
    fused = min(int(count * ratio), len(sources))
    away, staying = ranked[:, :fused], ranked[:, fused:]
    kept = torch.cat([targets.expand(batch, -1), sources[staying]], dim=1)
    place = torch.zeros(batch, count, dtype=torch.long, device=tokens_BND.device)
    numbers = torch.arange(kept.shape[1], device=kept.device).expand(batch, -1)
    place.scatter_(1, kept, numbers)
    place.scatter_(1, sources[away], best.indices.gather(1, away))
    return Fusion(kept, place, prune)


def apply(pipeline: Any, ratio: float) -> Callable[[], None]:
    """Fuse a share ``ratio`` of the tokens in a pipeline's UNet; returns the undoing.

    Raises:
        ModelError: when the pipeline has no UNet.
        ConfigError: when the ratio is above 0.75.
    """
    unet = getattr(pipeline, "unet", None)
    if unet is None:
        raise ModelError(
            f"ToFu is written for UNets here, and {type(pipeline).__name__} has none; leave it out"
        )
    if ratio > MOST:
        raise ConfigError(f"ratio={ratio:g} is above {MOST}, the most that ToFu fuses")
    latent_size: list[int] = []

    def note_size(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        latent_size[:] = (args[0] if args else kwargs["sample"]).shape[-2:]

    stack = ExitStack()
    stack.callback(unet.register_forward_pre_hook(note_size, with_kwargs=True).remove)
    found = {p: m for p, m in unet.named_modules() if isinstance(m, BasicTransformerBlock)}
    # In the order of the computation; a UNet lists its middle last.
    blocks = [found[path] for path in sorted(found, key=lambda path: path.startswith("up_blocks."))]
    for number, block in enumerate(blocks):
        prune = number < PRUNING * len(blocks)
        for handle in _fuse_block(block, ratio, latent_size, prune=prune):
            stack.callback(handle.remove)
    return stack.close


def _fuse_block(block: Any, ratio: float, latent_size: list[int], *, prune: bool) -> list[Any]:
    """Hooks that match when the block begins, and fuse and spread around its components."""
    plan: list[Fusion] = []

    def begin(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        tokens = args[0] if args else kwargs["hidden_states"]
        height = round(math.sqrt(tokens.shape[1] * latent_size[0] / latent_size[1]))
        plan[:] = [match(tokens, height, ratio, prune=prune)]

    def fuse(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return plan[0].fuse(args[0]), *args[1:]

    def spread(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        return plan[0].spread(output)

    handles = [block.register_forward_pre_hook(begin, with_kwargs=True)]
    for part in (block.attn1, block.attn2, block.ff):
        handles += [part.register_forward_pre_hook(fuse), part.register_forward_hook(spread)]
    return handles
