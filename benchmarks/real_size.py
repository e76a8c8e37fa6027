"""The arithmetic of a small pipeline's run, with the real model in its place."""

from dataclasses import replace
from functools import cache
from typing import Any

from torch import nn

import toma_fx
from toma_fx.checkpoints import architecture
from toma_fx.config import MergeConfig
from toma_fx.runtime.plan import MERGED, RECALL, REMEMBER, UNTOUCHED


def real_share(
    pipe: Any, kind: str, config: MergeConfig, steps: int, side: int | None = None
) -> float:
    """The arithmetic of the real model's run, relative to untouched (lower is cheaper).

    Args:
        pipe: the small pipeline, transformed, whose noise levels say which steps merge.
        kind: the real model, ``"sdxl"`` or ``"flux"``.
        config: the options of the small one.
        steps: steps of the run.
        side: side of the real model's image in pixels; its native size when left out.
    """
    merged = toma_fx.transform(_architecture(kind), replace(config, merge_below=1))
    first = toma_fx.report(merged, steps=1, height=side)
    costs = {UNTOUCHED: first.flops_before}
    if config.memory is None:
        costs[MERGED] = first.flops_after
    else:
        both = 2 * toma_fx.report(merged, steps=2, height=side).flops_after
        costs[REMEMBER], costs[RECALL] = first.flops_after, both - first.flops_after
    shares = toma_fx.report(pipe, steps=steps).shares
    return sum(share * costs[each] for each, share in shares.items()) / costs[UNTOUCHED]


@cache
def _architecture(kind: str) -> nn.Module:
    return architecture(kind)
