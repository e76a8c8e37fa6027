"""``toma-fx bench``: the code behind its options."""

import argparse
import itertools
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch

from toma_fx.bench.compare import compare
from toma_fx.bench.contenders import Setting, fitted, load
from toma_fx.bench.image import images
from toma_fx.bench.levels import blocks, models
from toma_fx.bench.record import Record, machine
from toma_fx.bench.timing import CPU, WALL
from toma_fx.checkpoints import DTYPES
from toma_fx.early import check_counts
from toma_fx.errors import ConfigError
from toma_fx.progress import progress
from toma_fx.quiet import hush_libraries
from toma_fx.tables import Table, wrapped
from toma_fx.variants import Merging, check_ratios, configs, parse_variant


def run(options: argparse.Namespace) -> None:
    """Time the models that the options of `toma_fx.bench.cli` name, print the tables, keep them.

    Raises:
        ConfigError: when options contradict one another.
    """
    hush_libraries()
    show(_tables(options), options)


def show(tables: Iterable[Table], options: argparse.Namespace) -> Record:
    """Print tables as they come, or one JSON object at the end; keep them in ``options.out``."""
    record = Record(command=options.command, folder=options.out)
    for each in tables:
        record.add(each)
        if not options.json:
            print(f"{each.text()}\n", flush=True)
    if options.json:
        print(json.dumps(record.content()))
        return record
    print(wrapped(machine()))
    for file in record.files:
        print(f"wrote {file}")
    return record


def setting_of(options: argparse.Namespace, **changes: Any) -> Setting:
    """The setting that the options of `toma_fx.bench.cli.add_timing` describe.

    Args:
        options: parsed options; of several batch sizes, the first one counts.
        **changes: other fields of `Setting`.

    Raises:
        ConfigError: when an option holds a value that it cannot take.
    """
    check_counts(options, "repeats", "batch", "frames", "steps")
    if options.cpu_time and torch.cuda.is_available():
        raise ConfigError("--cpu-time sees nothing of a GPU; leave it out where there is one")
    variants = _variants(options)
    check_ratios(variants, options.ratio)
    graphs = getattr(options, "cuda_graphs", False)
    if graphs:
        _check_recordable(variants, options.ratio)
        if not torch.cuda.is_available():
            raise ConfigError("--cuda-graphs needs a GPU of NVIDIA; leave it out here")
    given = {
        "model": options.model,
        "blocks": None if options.blocks is None else tuple(options.blocks),
        "height": options.height,
        "width": options.width,
        "batch": options.batch[0],
        "dtype": DTYPES[options.dtype],
        "ratios": tuple(options.ratio),
        "variants": variants,
        "repeats": options.repeats,
        "compiled": not options.eager,
        "clock": CPU if options.cpu_time else WALL,
        "steps": getattr(options, "steps", 1),
        "cuda_graphs": graphs,
    }
    return fitted(Setting(**{**given, **changes}))


def _check_recordable(variants: Sequence[Merging], ratios: Sequence[float]) -> None:
    """Refuse settings that read a timestep, which waits for the GPU and cannot be recorded.

    Raises:
        ConfigError: when there is such a setting.
    """
    for variant, _, config in configs(variants, ratios):
        if config.merge_below < 1 or config.memory is not None:
            raise ConfigError(
                f"variant={variant.name!r} decides by the timestep, and a CUDA graph holds one "
                "decision; leave out merge_below and memory, or --cuda-graphs"
            )


def _variants(options: argparse.Namespace) -> tuple[Merging, ...]:
    found = []
    for text in options.variant:
        variant = parse_variant(text)
        if not isinstance(variant, Merging):
            raise ConfigError(
                f"variant={text!r} takes fewer steps, and a call is one; leave it out"
            )
        found.append(variant)
    return tuple(found)


def _tables(options: argparse.Namespace) -> Iterator[Table]:
    setting = setting_of(options)
    for frames, batch in itertools.product(getattr(options, "frames", [None]), options.batch):
        each = replace(setting, frames=frames, batch=batch)
        if options.kind == "image":
            with progress(f"load {each.model}"):
                timed, distances = images(each)
            # Distances are known once every contender drew, while the table is made.
            yield compare(timed, each, title=each.label, extra={"psnr": distances})
            continue
        level = {"block": blocks, "model": models}[options.kind]
        with progress(f"load {each.model}"):
            model = load(each)
        for timed in level(model, each):
            yield compare(timed, each, title=each.label)
