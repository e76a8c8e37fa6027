"""The first call of a model in a process that has compiled nothing before, with empty caches."""

import multiprocessing
import os
import tempfile
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from toma_fx.bench.contenders import Setting
from toma_fx.bench.timing import Timing, sample
from toma_fx.checkpoints import load_model
from toma_fx.config import MergeConfig
from toma_fx.inputs import random_inputs
from toma_fx.lab.variants import UNTOUCHED, Merging
from toma_fx.transform import transform


def cold_starts(setting: Setting) -> list[Timing]:
    """Time the first call, compiling included, of the untouched model and each contender, in turn.

    Every call has a process and a folder for torch's compile caches of its own. Loading and
    transforming are not counted.

    Args:
        setting: model, size, ratios, merging variants, and how often each is started.

    Raises:
        ConfigError: when the numbers of blocks do not fit the lists that the model has.
        RuntimeError: when a process dies.
    """
    configs = {
        f"{variant.name} {ratio:g}": variant.config(ratio)
        for ratio in setting.ratios
        for variant in setting.variants
        if isinstance(variant, Merging)
    }
    contenders = {UNTOUCHED: None, **configs}
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    weights = {"dtype": setting.dtype, "device": setting.device, **setting.changes}
    total = setting.repeats * len(contenders)
    with tqdm(total=total, unit="start", leave=False, disable=None) as progress:
        for _ in range(setting.repeats):
            for name, config in contenders.items():
                progress.set_description(name)
                job = (setting.model, weights, config, setting.size)
                seconds[name].append(_in_fresh_process(*job))
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
    sender: Any,
    caches: str,
    name: str,
    weights: dict[str, Any],
    config: MergeConfig | None,
    size: dict[str, Any],
) -> None:
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = caches
    os.environ["TRITON_CACHE_DIR"] = str(Path(caches) / "triton")  # kernels that are no inductor's
    model: Any = load_model(name, **weights)
    inputs = random_inputs(model, **size)
    if config is not None:
        model = transform(model, config)
    model.compile_repeated_blocks(fullgraph=True)
    with torch.inference_mode():
        sender.send(sample(lambda: model(**inputs)))
