"""The first call of a model in a process that has compiled nothing before, with empty caches.

python -m benchmarks.cold_start sdxl --height 512 --repeats 2
"""

import argparse
import multiprocessing
import os
import statistics
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.options import command_options
from toma_fx.bench.cli import add_timing
from toma_fx.bench.command import setting_of, show
from toma_fx.bench.contenders import Setting, merged_configs
from toma_fx.bench.timing import Timing, sample
from toma_fx.checkpoints import load_model
from toma_fx.config import MergeConfig
from toma_fx.inputs import random_inputs
from toma_fx.progress import progress
from toma_fx.tables import Column, Table, seconds, span, times
from toma_fx.transform import transform
from toma_fx.variants import UNTOUCHED


def cold_starts(setting: Setting) -> list[Timing]:
    """Time the first call, compiling included, of the untouched model and each contender, in turn.

    Every call has its own process, and its own folder for torch's compile caches. Loading and
    transforming are not counted.

    Args:
        setting: model, size, ratios, merging variants, and how often each is started.

    Raises:
        ConfigError: when the numbers of blocks do not fit the lists that the model has.
        RuntimeError: when a process dies.
    """
    configs = {f"{name} {ratio:g}": each for name, ratio, each in merged_configs(setting)}
    contenders = {UNTOUCHED: None, **configs}
    found: dict[str, list[float]] = {name: [] for name in contenders}
    weights = {"dtype": setting.dtype, "device": setting.device, **setting.changes}
    total = setting.repeats * len(contenders)
    with progress("start", total, "start") as bar:
        for _ in range(setting.repeats):
            for name, config in contenders.items():
                bar.set_description(name)
                job = (setting.model, weights, config, setting.size)
                found[name].append(_in_fresh_process(*job))
                bar.update()
    return [Timing(name=name, calls=tuple(calls)) for name, calls in found.items()]


def _in_fresh_process(*job: Any) -> float:
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    with tempfile.TemporaryDirectory() as caches:
        process = context.Process(target=_first_call, args=(sender, caches, *job))
        process.start()
        sender.close()
        try:
            taken: float = receiver.recv()
        except EOFError:
            raise RuntimeError("the process of a cold start died; see its output above") from None
        finally:
            process.join()
    return taken


def _first_call(
    sender: Any,
    caches: str,
    name: str,
    weights: dict[str, Any],
    config: MergeConfig | None,
    size: dict[str, Any],
) -> None:
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = caches
    os.environ["TRITON_CACHE_DIR"] = str(Path(caches) / "triton")  # kernels not of Inductor
    model: Any = load_model(name, **weights)
    inputs = random_inputs(model, **size)
    if config is not None:
        model = transform(model, config)
    model.compile_repeated_blocks(fullgraph=True)
    with torch.inference_mode():
        sender.send(sample(lambda: model(**inputs)))


def table(timings: Sequence[Timing]) -> Table:
    """First calls, each beside that of the untouched model, which comes first."""
    rows = []
    for timing in timings:
        ratios = [c / b for b, c in zip(timings[0].calls, timing.calls, strict=True)]
        rows.append(
            {
                "name": timing.name,
                "seconds": timing.median,
                "seconds_spread": [min(timing.calls), max(timing.calls)],
                "times": statistics.median(ratios),
                "times_spread": [min(ratios), max(ratios)],
            }
        )
    columns = (
        Column("name", "model"),
        Column("seconds", "first call", seconds),
        Column("seconds_spread", "spread", span(seconds)),
        Column("times", "times as long", times),
        Column("times_spread", "spread", span(times)),
    )
    return Table(title="first calls, each in a new process", columns=columns, rows=rows)


def main(arguments: Sequence[str] | None = None) -> None:
    """Time first calls."""
    parser = argparse.ArgumentParser(description="Time first calls in new processes.")
    parser.add_argument("model", help="sdxl, flux or another of docs/families.md")
    parser.add_argument("--frames", type=int, help="of a video")
    add_timing(parser)
    parser.set_defaults(variant=["default"])
    options = command_options(parser, "benchmarks.cold_start", arguments)
    setting = setting_of(options, frames=options.frames)
    show([table(cold_starts(setting))], options)


if __name__ == "__main__":
    main()
