"""Times of an untouched and a transformed model, measured side by side in one process."""

import platform
import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import diffusers
import torch
from tabulate import tabulate
from torch import nn
from tqdm import tqdm

from toma_fx.config import MergeConfig
from toma_fx.inputs import random_inputs
from toma_fx.transform import transform


@dataclass(frozen=True, kw_only=True)
class Timing:
    """Seconds of one forward of one model."""

    name: str
    calls: tuple[float, ...]
    first_call: float | None = None
    """A call before the others, which includes compiling; None when there was none."""

    @property
    def median(self) -> float:
        """Median of the calls."""
        return statistics.median(self.calls)


def side_by_side(
    model: nn.Module,
    configs: dict[str, MergeConfig],
    *,
    height: int | None = None,
    width: int | None = None,
    batch: int = 1,
    repeats: int = 3,
    compiled: bool = True,
) -> list[Timing]:
    """Time one forward of a model, untouched and with each configuration, in turn.

    Args:
        model: an untouched model.
        configs: name and configuration of each contender.
        height: of the image, in pixels; the model's native size when left out.
        width: of the image, in pixels; like ``height`` when left out.
        batch: images.
        repeats: calls of each model that are counted, interleaved, after a first one that is not.
        compiled: compile the transformer blocks of every contender, the untouched model included.

    Returns:
        The timing of the untouched model, then of each contender.
    """
    inputs = random_inputs(model, height=height, width=width, batch=batch)
    # Every contender is a transform, so that compiling one leaves the given model alone: a ratio of
    # 0 is the untouched model, bit for bit.
    contenders = {"untouched": MergeConfig(ratio=0), **configs}
    models = {name: transform(model, config) for name, config in contenders.items()}
    if compiled:
        for each in models.values():
            each.compile_repeated_blocks(fullgraph=True)  # type: ignore[operator]
    seconds: dict[str, list[float]] = {name: [] for name in models}
    progress = tqdm(total=len(models) * (repeats + 1), unit="call", leave=False, disable=None)
    with torch.inference_mode(), progress:
        for _ in range(repeats + 1):
            for name, each in models.items():
                progress.set_description(name)
                seconds[name].append(_time(each, inputs))
                progress.update()
    return [
        Timing(name=name, first_call=first, calls=tuple(rest))
        for name, (first, *rest) in seconds.items()
    ]


def _time(model: nn.Module, inputs: dict[str, Any]) -> float:
    _synchronize()
    start = time.perf_counter()
    model(**inputs)
    _synchronize()
    return time.perf_counter() - start


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def table(timings: list[Timing]) -> str:
    """The timings as a table, each beside the first one's."""
    baseline = timings[0]

    def rows() -> Iterator[tuple[str, ...]]:
        for timing in timings:
            ratios = [b / c for b, c in zip(baseline.calls, timing.calls, strict=True)]
            yield (
                timing.name,
                f"{timing.median:.3g}",
                f"{min(timing.calls):.3g} to {max(timing.calls):.3g}",
                f"{statistics.median(ratios):.2f}",
                f"{min(ratios):.2f} to {max(ratios):.2f}",
                *([] if timing.first_call is None else [f"{timing.first_call:.3g}"]),
            )

    headers = ["model", "s a call", "spread", "times as fast", "spread", "first call, s"]
    width = len(headers) - (baseline.first_call is None)
    return str(tabulate(list(rows()), headers[:width], disable_numparse=True))


def machine() -> str:
    """Hardware and versions, for the line under a table."""
    device = (
        torch.cuda.get_device_name()
        if torch.cuda.is_available()
        else platform.processor() or platform.machine()
    )
    return (
        f"{device}, {torch.get_num_threads()} CPU threads, Python {platform.python_version()}, "
        f"torch {torch.__version__}, diffusers {diffusers.__version__}"
    )
