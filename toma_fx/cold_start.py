"""The first call of a model in a process that has compiled nothing before, with empty caches."""

import multiprocessing
import os
import tempfile
import time
from typing import Any

import torch
from tqdm import tqdm

from toma_fx.bench.timing import Timing
from toma_fx.checkpoints import load_model
from toma_fx.config import MergeConfig
from toma_fx.inputs import random_inputs
from toma_fx.transform import transform


def cold_starts(
    model: str,
    configs: dict[str, MergeConfig],
    *,
    dtype: torch.dtype = torch.bfloat16,
    height: int | None = None,
    width: int | None = None,
    batch: int = 1,
    repeats: int = 2,
) -> list[Timing]:
    """Time the first call, compiling included, of the untouched model and each contender, in turn.

    Every call has a process and a folder for torch's compile caches of its own. Loading and
    transforming are not counted.

    Args:
        model: as `load_model` takes it.
        configs: name and configuration of each contender.
        dtype: of the weights.
        height: of the image, in pixels; the model's native size when left out.
        width: of the image, in pixels; like ``height`` when left out.
        batch: images.
        repeats: first calls of each contender.
    """
    contenders = {"untouched": None, **configs}
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    size = {"height": height, "width": width, "batch": batch}
    with tqdm(total=repeats * len(contenders), unit="start", leave=False, disable=None) as progress:
        for _ in range(repeats):
            for name, config in contenders.items():
                progress.set_description(name)
                seconds[name].append(_in_fresh_process(model, dtype, config, size))
                progress.update()
    return [Timing(name=name, calls=tuple(calls)) for name, calls in seconds.items()]


def _in_fresh_process(*job: Any) -> float:
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    with tempfile.TemporaryDirectory() as caches:
        process = context.Process(target=_first_call, args=(sender, caches, *job))
        process.start()
        sender.close()
        try:
            seconds: float = receiver.recv()
        except EOFError:
            raise RuntimeError("the process of a cold start died; see its output above") from None
        finally:
            process.join()
    return seconds


def _first_call(
    sender: Any, caches: str, name: str, dtype: torch.dtype, config: MergeConfig | None, size: Any
) -> None:
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = caches
    model: Any = load_model(name, dtype=dtype)
    inputs = random_inputs(model, **size)
    if config is not None:
        model = transform(model, config)
    model.compile_repeated_blocks(fullgraph=True)
    with torch.inference_mode():
        start = time.perf_counter()
        model(**inputs)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        sender.send(time.perf_counter() - start)
