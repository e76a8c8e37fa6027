"""Calls timed in turn in one process, and the memory of a GPU that a call needs at its peak."""

import math
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch

from toma_fx.progress import progress

Clock = Callable[[], float]
WALL: Clock = time.perf_counter
CPU: Clock = time.process_time
"""CPU seconds of this process, of all its threads together. On a machine that others use too, this
leaves out the time in which they had the cores."""
RECOMPILES = 256
"""Recompilations of one code object that dynamo shall allow. Contenders are copies of one model and
plans are calls of one function, so each is a recompilation. By default dynamo refuses the ninth, or
silently runs it eager."""


@dataclass(frozen=True, kw_only=True)
class Contender:
    """A call to be timed beside others."""

    name: str
    run: Callable[[], object]
    ratio: float | None = None
    """Share of tokens merged away; None where nothing is merged."""
    compiled: bool = False
    warm_ups: int = 1
    """Calls that are not counted. A captured CUDA graph is recorded by the second and replayed from
    the third."""
    optional: bool = False
    """Whether a failure is a row that says why, instead of the end of the benchmark."""


@dataclass(frozen=True, kw_only=True)
class Timing:
    """Seconds of a call of one contender."""

    name: str
    calls: tuple[float, ...]
    first_call: float | None = None
    """Seconds of the first call, compiling included; None when it was not timed."""
    failure: str = ""
    """The reason why there are no calls; empty when there are."""

    @property
    def median(self) -> float:
        """Median of the calls."""
        return statistics.median(self.calls)


def interleaved(
    contenders: Sequence[Contender],
    repeats: int,
    *,
    at_least: float = 0.0,
    clock: Clock = WALL,
) -> list[Timing]:
    """Time every contender in turn, again and again, so that a slower minute meets all of them.

    Args:
        contenders: the calls to time.
        repeats: samples of each, after warm-up calls that are not counted.
        at_least: seconds of a sample, which makes as many calls as fit; for calls that are too
            short to be timed alone.
        clock: `WALL` or `CPU`.

    Returns:
        A timing for each contender, in their order; seconds are those of one call.

    Raises:
        Exception: any exception of a contender that is not optional.
    """
    first: dict[int, float] = {}
    failures: dict[int, str] = {}
    counts: dict[int, int] = {}
    samples: dict[int, list[float]] = {number: [] for number in range(len(contenders))}
    total = len(contenders) * (repeats + 1)
    # Whatever is compiled, is compiled in the first calls.
    with torch.inference_mode(), many_compiled(), progress("time", total, "call") as bar:
        for number, each in enumerate(contenders):
            bar.set_description(f"{each.name}, first call")
            try:
                first[number] = seconds = sample(each.run, clock=clock)
                for _ in range(each.warm_ups - (0 if at_least else 1)):
                    seconds = sample(each.run, clock=clock)
            except Exception as error:
                if not each.optional:
                    raise
                failures[number] = reason(error)
                bar.update(repeats)
            else:
                counts[number] = max(1, math.ceil(at_least / max(seconds, 1e-9)))
            bar.update()
        for _ in range(repeats):
            for number, count in counts.items():
                bar.set_description(contenders[number].name)
                samples[number].append(sample(contenders[number].run, count, clock))
                bar.update()
    return [
        Timing(
            name=each.name,
            calls=tuple(samples[number]),
            first_call=first.get(number),
            failure=failures.get(number, ""),
        )
        for number, each in enumerate(contenders)
    ]


def recorded(run: Callable[[], object]) -> Callable[[], object]:
    """A call that replays another from a CUDA graph, recorded after two calls as it is.

    All the time is then the GPU's: the host launches one graph in place of its kernels.
    """
    graphs: list[torch.cuda.CUDAGraph] = []

    def replay() -> None:
        if not graphs:
            aside = torch.cuda.Stream()
            aside.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(aside):
                run()
                run()
            torch.cuda.current_stream().wait_stream(aside)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                run()
            graphs.append(graph)
        graphs[0].replay()

    return replay


def many_compiled() -> AbstractContextManager[None]:
    """Within this context, dynamo compiles as many contenders as there are."""
    limit: AbstractContextManager[None] = torch._dynamo.config.patch(recompile_limit=RECOMPILES)
    return limit


def sample(run: Callable[[], object], count: int = 1, clock: Clock = WALL) -> float:
    """Mean seconds of ``count`` calls in a row, the device's work included."""
    synchronize()
    start = clock()
    for _ in range(count):
        run()
    synchronize()
    return (clock() - start) / count


def notes_on(clock: Clock) -> tuple[str, ...]:
    """The note on the clock under a table."""
    return ("seconds are CPU time, of all threads together",) if clock is CPU else ()


def synchronize() -> None:
    """Wait for the GPU, if there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def reason(error: BaseException) -> str:
    """The type of an error and the first line of its message."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def peak_memory(run: Callable[[], object]) -> int:
    """Bytes that a call on the GPU holds at its peak, beyond what was there before it.

    Args:
        run: the call; it is made once.
    """
    with torch.inference_mode():
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
