"""The operators alone, beside tomesd's: seconds, memory, and the share of the roofline reached.

    python -m benchmarks.operators --ratio 0.5 0.25 0.75 --repeats 15
    python -m benchmarks.operators --tokens 4096 1024 --one-by-one --out growth

When a value varies, ``--out`` also gets a plot of time and memory against it.
"""

import argparse
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch._functorch import config as functorch

from benchmarks.growth import plot_growth, varies
from benchmarks.live import peak_memory
from benchmarks.options import command_options
from benchmarks.rivals import TOMESD, TOMESD_MOST
from benchmarks.roofline import (
    Needs,
    Peaks,
    measure_peaks,
    mix_needs,
    reorder_needs,
    select_needs,
    weigh_needs,
)
from toma_fx.bench.command import show
from toma_fx.bench.contenders import Setting
from toma_fx.bench.record import beside
from toma_fx.bench.timing import CPU, WALL, Clock, Contender, interleaved, notes_on
from toma_fx.checkpoints import DTYPES
from toma_fx.choices import DTYPE_NAMES
from toma_fx.runtime.regions import layout, total_regions
from toma_fx.tables import Column, Table, mebibytes, number, percent, seconds, span, times

OPERATORS = ("select", "weigh", "merge", "unmerge", "reorder")
OURS, LOOP = "toma_fx", "loop"
"""Who runs an operator. The loop selects where a GPU has a kernel."""
SAMPLE_SECONDS = 0.02
"""A sample takes at least this long, so that the clock's own time does not matter."""
SHAPES = {"sdxl": ((4096, 640), (1024, 1280)), "flux": ((4096, 3072),)}
"""Tokens and width of the levels that make plans, for an image of 1024 x 1024 pixels. The first two
are also the sizes of the paper's Tables 4 and 5."""


@dataclass(frozen=True, kw_only=True)
class Shape:
    """One setting of the operators."""

    tokens: int
    width: int
    batch: int = 1
    ratio: float = 0.5
    region_tokens: int = 64
    dtype: torch.dtype = torch.bfloat16

    @property
    def layout(self) -> tuple[int, ...]:
        """The regions of one grid with this number of tokens."""
        return layout([self.tokens], self.region_tokens, self.ratio)

    def needs(self, operator: str) -> tuple[Needs, torch.dtype]:
        """The least that an operator needs, and the dtype of its products."""
        keep, size = self.layout[:2]
        regions = total_regions(self.layout)
        given = (self.batch, self.tokens, self.width, regions, size, keep, self.dtype.itemsize)
        if operator == "select":
            return select_needs(*given), torch.float32  # similarities are float32, see `select`
        if operator == "weigh":
            return weigh_needs(*given), torch.float32
        if operator == "reorder":
            return reorder_needs(*given[:3], self.dtype.itemsize), self.dtype
        return mix_needs(*given), self.dtype


COLUMNS = (
    Column("operator", "operator"),
    Column("by", "by"),
    Column("tokens", "tokens", number),
    Column("width", "width", number),
    Column("batch", "batch", number),
    Column("region_tokens", "region", number),
    Column("ratio", "ratio", number),
    Column("seconds", "a call", seconds),
    Column("seconds_spread", "spread", span(seconds)),
    Column("bound_seconds", "roofline", seconds),
    Column("limit", "limit"),
    Column("reached", "reached", percent),
    Column("against_tomesd", "times tomesd's speed", times),
    Column("against_loop", "times the loop's speed", times),
    Column("peak_bytes", "peak memory", mebibytes),
)


def operators(
    shapes: Sequence[Shape],
    *,
    device: str,
    repeats: int = 5,
    compiled: bool = True,
    rivals: bool = True,
    small: bool = False,
    clock: Clock = WALL,
) -> Table:
    """Time every one of `OPERATORS` at every shape.

    Args:
        shapes: the settings to time.
        device: ``"cuda"`` or ``"cpu"``.
        repeats: samples of each.
        compiled: compile ``select`` and ``weigh``.
        rivals: time tomesd's merge and unmerge too, where its ratio and token grid allow.
        small: measure the machine's peaks at sizes for a test.
        clock: as in `toma_fx.bench.timing.interleaved`.
    """
    dtypes = (torch.float32, *(shape.dtype for shape in shapes))
    peaks = measure_peaks(device, dtypes, small=small, clock=clock)
    rows: list[dict[str, Any]] = []
    notes = [*_notes(peaks), *notes_on(clock)]
    for shape in shapes:
        missing = _why_not(shape) if rivals else ""
        if missing and (note := f"no tomesd at ratio {shape.ratio:g}: {missing}") not in notes:
            notes.append(note)
        calls = [(OURS, call) for call in _ours(shape, device, compiled)]
        if rivals and not missing:
            calls += [(TOMESD, call) for call in _tomesd(shape, device)]
        if device == "cuda":
            calls.append((LOOP, _loop(shape, device, compiled)))
        timings = interleaved(
            [call for _, call in calls], repeats, at_least=SAMPLE_SECONDS, clock=clock
        )
        medians = {
            (by, call.name): timing.median
            for (by, call), timing in zip(calls, timings, strict=True)
        }
        for (by, call), timing in zip(calls, timings, strict=True):
            row = _row(shape, by, call.name, timing.median)
            row["seconds_spread"] = [min(timing.calls), max(timing.calls)]
            row["first_call"] = timing.first_call
            row["peak_bytes"] = peak_memory(call.run)
            if by == OURS:
                row |= _roofline(shape, call.name, timing.median, peaks)
                for rival in (TOMESD, LOOP):
                    if (rival, call.name) in medians:
                        row[f"against_{rival}"] = medians[rival, call.name] / timing.median
            rows.append(row)
        torch._dynamo.reset()  # a compiled function for each shape would reach dynamo's limit
    return Table(title=f"operators on {device}", columns=COLUMNS, rows=rows, notes=tuple(notes))


def _row(shape: Shape, by: str, operator: str, median: float) -> dict[str, Any]:
    return {
        "operator": operator,
        "by": by,
        "tokens": shape.tokens,
        "width": shape.width,
        "batch": shape.batch,
        "region_tokens": shape.layout[1],
        "ratio": shape.ratio,
        "dtype": str(shape.dtype).removeprefix("torch."),
        "seconds": median,
    }


def _roofline(shape: Shape, operator: str, median: float, peaks: Peaks) -> dict[str, Any]:
    needs, dtype = shape.needs(operator)
    bound = peaks.bound(needs, dtype)
    return {
        "bytes": needs.bytes,
        "operations": needs.matmul + needs.other,
        "bound_seconds": bound,
        "limit": peaks.limit(needs, dtype),
        "reached": bound / median,
    }


def _notes(peaks: Peaks) -> Iterator[str]:
    rates = ", ".join(
        f"{rate / 1e12:.3g} TFLOP/s in a large {str(dtype).removeprefix('torch.')} product"
        for dtype, rate in peaks.flops.items()
    )
    yield f"this machine, in this run: {peaks.bytes / 1e9:.3g} GB/s in a large copy, {rates}"
    yield (
        "roofline: the time for the bytes and operations that the shapes need at least, at those "
        "rates; select and weigh compute in float32; tokens that stay in a cache can be faster"
    )
    if torch.cuda.is_available():
        yield "calls are issued one by one, so none is shorter than the CPU takes to launch it"


def _ours(shape: Shape, device: str, compiled: bool) -> list[Contender]:
    toma = torch.ops.toma
    tokens = _tokens(shape, device)

    def select(tokens: Tensor) -> Any:
        return toma.select(tokens, shape.layout, "facility_location")

    def weigh(tokens: Tensor, destinations: Tensor) -> Any:
        return toma.weigh(tokens, destinations, shape.layout, 0.001, "region", "transpose")

    def merge(tokens: Tensor, weight: Tensor) -> Any:
        return toma.merge(tokens, weight, shape.layout)

    def unmerge(tokens: Tensor, weight: Tensor) -> Any:
        return toma.unmerge(tokens, weight, shape.layout)

    def reorder(tokens: Tensor, order: Tensor) -> Any:
        return toma.reorder(tokens, order)

    destinations = select(tokens)
    merge_weight, unmerge_weight = weigh(tokens, destinations)
    arguments: dict[Callable[..., Any], tuple[Tensor, ...]] = {
        select: (tokens,),
        weigh: (tokens, destinations),
        merge: (tokens, merge_weight),
        unmerge: (merge(tokens, merge_weight), unmerge_weight),
        reorder: (tokens, toma.tile_order(tokens, *_grid(shape.tokens))),
    }
    # Each of the others is one operator, which compiling does not change. Called alone, they would
    # mostly time the guards of their compiled function.
    return [
        Contender(
            name=function.__name__,
            run=_bound(function, given, compiled and function in (select, weigh)),
        )
        for function, given in arguments.items()
    ]


def _loop(shape: Shape, device: str, compiled: bool) -> Contender:
    """``select`` as it runs where no kernel does."""

    def select(tokens: Tensor) -> Any:
        return torch.ops.toma.select(tokens, shape.layout, "facility_location")

    run = _bound(select, (_tokens(shape, device),), compiled)
    no_kernel = functorch.patch(decompose_custom_triton_ops=False)  # see `selector._has_kernel`

    def without_kernel() -> object:
        with no_kernel:
            return run()

    return Contender(name="select", run=without_kernel)


def _bound(function: Any, given: tuple[Tensor, ...], compiled: bool) -> Callable[[], object]:
    call = torch.compile(function, fullgraph=True, dynamic=False) if compiled else function
    return lambda: call(*given)


def _tokens(shape: Shape, device: str) -> Tensor:
    values = torch.randn(
        shape.batch, shape.tokens, shape.width, generator=torch.Generator().manual_seed(0)
    )
    return values.to(device, shape.dtype)


def _grid(tokens: int) -> tuple[int, int]:
    """Rows and columns of an image with this number of tokens, as near to a square as can be."""
    rows = next(rows for rows in range(math.isqrt(tokens), 0, -1) if tokens % rows == 0)
    return rows, tokens // rows


def _why_not(shape: Shape) -> str:
    if find_spec(TOMESD) is None:
        return f"not installed (pip install {TOMESD})"
    if shape.ratio > TOMESD_MOST:
        return f"it merges at most {TOMESD_MOST}"
    side = round(shape.tokens**0.5)
    return "" if side * side == shape.tokens else f"{shape.tokens} tokens are no square"


def _tomesd(shape: Shape, device: str) -> list[Contender]:
    """Merge and unmerge of tomesd, with its own defaults: one destination in each 2 x 2 tokens."""
    package: Any = import_module(f"{TOMESD}.merge")
    tokens, side = _tokens(shape, device), round(shape.tokens**0.5)
    merge, unmerge = package.bipartite_soft_matching_random2d(
        tokens,
        side,
        side,
        2,
        2,
        int(shape.tokens * shape.ratio),
        generator=torch.Generator(device).manual_seed(0),
    )
    merged = merge(tokens)
    return [
        Contender(name="merge", run=lambda: merge(tokens)),
        Contender(name="unmerge", run=lambda: unmerge(merged)),
    ]


def combined(axes: Sequence[Sequence[Any]], *, one_by_one: bool) -> Iterator[tuple[Any, ...]]:
    """Every combination of values; or those in which at most one is not the first of its axis."""
    for values in itertools.product(*axes):
        changed = sum(value != axis[0] for value, axis in zip(values, axes, strict=True))
        if changed < 2 or not one_by_one:
            yield values


def main(arguments: Sequence[str] | None = None) -> None:
    """Time the operators, print their table, and plot what varies."""
    parser = argparse.ArgumentParser(description="Time the operators beside tomesd's.")
    add = parser.add_argument
    add("model", nargs="?", default="sdxl", choices=tuple(SHAPES), help="whose sizes (sdxl)")
    add("--tokens", type=int, nargs="+", help="(those of 1024 x 1024 pixels)")
    add("--channels", type=int, help="width of the tokens, with --tokens (the model's)")
    add("--ratio", type=float, nargs="+", default=[0.5], help="(0.5)")
    add("--batch", type=int, nargs="+", default=[1], help="(1)")
    add("--region-tokens", type=int, nargs="+", default=[64], help="(64)")
    add("--one-by-one", action="store_true", help="vary one thing at a time, from the first")
    add("--dtype", choices=DTYPE_NAMES, default="bfloat16")
    add("--repeats", type=int, default=3, help="samples of each (3)")
    add("--eager", action="store_true", help="do not compile")
    add("--cpu-time", action="store_true", help="count CPU time")
    add("--out", type=Path, metavar="DIR", help="folder for CSV, JSON, Markdown and the plot")
    add("--json", action="store_true", help="print one JSON object")
    options = command_options(parser, "benchmarks.operators", arguments)
    sizes: Sequence[tuple[int, int]] = SHAPES[options.model]
    if options.tokens is not None:
        width = options.channels or sizes[0][1]
        sizes = [(tokens, width) for tokens in options.tokens]
    axes = (sizes, options.ratio, options.batch, options.region_tokens)
    shapes = [
        Shape(
            tokens=tokens,
            width=width,
            batch=batch,
            ratio=ratio,
            region_tokens=region,
            dtype=DTYPES[options.dtype],
        )
        for (tokens, width), ratio, batch, region in combined(axes, one_by_one=options.one_by_one)
    ]
    table = operators(
        shapes,
        device=Setting().device,
        repeats=options.repeats,
        compiled=not options.eager,
        clock=CPU if options.cpu_time else WALL,
    )
    record = show([table], options)
    if record.stem is not None and varies(table.rows):
        print(f"wrote {plot_growth(table.rows, beside(record.stem, '.png'))}")


if __name__ == "__main__":
    main()
