"""The arithmetic of a small pipeline's run, with the real model in its place."""

from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch
from torch import nn

import toma_fx
from toma_fx.checkpoints import architecture
from toma_fx.config import MergeConfig
from toma_fx.inputs import random_inputs
from toma_fx.runtime.plan import UNTOUCHED


@dataclass(frozen=True)
class RealSize:
    """A call of a real model, without data.

    Attributes:
        name: of the model, as the command line knows it.
        height: of the image, in pixels; it is square. None for the model's native size, and for its
            native number of frames.
        references: images of the same size that Kontext edits.
    """

    name: str
    height: int | None = 1024
    references: int = 0

    @property
    def model(self) -> nn.Module:
        """The real model, whose tensors have no data."""
        return _architecture(self.name)

    def inputs(self) -> dict[str, Any]:
        """Keyword arguments of the call."""
        inputs = random_inputs(self.model, height=self.height)
        if self.references:
            images = range(1 + self.references)
            inputs["hidden_states"] = torch.cat([inputs["hidden_states"] for _ in images], dim=1)
            inputs["img_ids"] = torch.cat([_places(self.height or 1024, index) for index in images])
        return inputs


def real_share(pipe: Any, real: RealSize, config: MergeConfig, steps: int) -> float:
    """The arithmetic of the real model's run, relative to untouched (lower is cheaper).

    Args:
        pipe: the small pipeline, transformed, whose noise levels say which steps merge.
        real: the real model's call.
        config: the options of the small one.
        steps: steps of the run.
    """
    merged, inputs = toma_fx.transform(real.model, replace(config, merge_below=1)), real.inputs()
    costs: dict[str, float] = {}
    for count in (1, 2):  # the first step of a run makes what the next one may use again
        counted = toma_fx.report(merged, steps=count, inputs=inputs)
        costs[UNTOUCHED] = counted.flops_before
        ran = {variant: share for variant, share in counted.shares.items() if share}
        for variant in ran.keys() - costs.keys():
            known = sum(costs[each] * share for each, share in ran.items() if each in costs)
            costs[variant] = (counted.flops_after - known) / ran[variant]
    shares = toma_fx.report(pipe, steps=steps).shares
    return sum(share * costs[each] for each, share in shares.items() if share) / costs[UNTOUCHED]


def _places(height: int, index: int) -> torch.Tensor:
    """Places of an image's tokens, with data: the index tells what is drawn, 0, from references."""
    side = torch.arange(height // 16.0)
    grid = torch.cartesian_prod(side, side)
    return torch.cat([torch.full_like(grid[:, :1], index), grid], dim=1)


@cache
def _architecture(kind: str) -> nn.Module:
    return architecture(kind)
