"""Times of the steps of a run with memory, beside untouched and merged steps.

A full step runs a block on all tokens and on merged ones; a step between runs it on merged tokens,
and reads and adds what is remembered. With theta 0, nothing runs on merged tokens. All are calls of
the whole model with compiled blocks, in turn in one process.

    python -m benchmarks.memory_speed sdxl --size 512
    python -m benchmarks.memory_speed sdxl --size 512 --theta 0 --out benchmarks/results/NAME.csv
"""

import argparse
import csv
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate

import toma_fx
from toma_fx import Memory
from toma_fx.checkpoints import load_model
from toma_fx.inputs import random_inputs


def main() -> None:
    """Time each kind of step."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("model", help="a published architecture, with random weights")
    parser.add_argument("--size", type=int, default=512)
    parser.add_argument("--ratio", type=float, default=0.9)
    parser.add_argument("--theta", type=float, help="of the memory (the family's own)")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, help="a file for the seconds of each call")
    options = parser.parse_args()
    model: Any = load_model(options.model, dtype=torch.bfloat16)
    call = random_inputs(model, height=options.size, width=options.size)
    merged = toma_fx.transform(model, ratio=options.ratio, skip=())
    memory = Memory(every=2, theta=options.theta)
    remembering = toma_fx.transform(model, ratio=options.ratio, skip=(), memory=memory)
    first, second = (
        {**call, "timestep": torch.full_like(call["timestep"], level * call["timestep"].max())}
        for level in (1.0, 0.9)
    )
    for each in (model, merged, remembering):
        each.compile_repeated_blocks(fullgraph=True)
    steps: dict[str, Callable[[], Any]] = {
        "untouched": lambda: model(**first),
        f"merged, {options.ratio}": lambda: merged(**first),
        "full, and remembered": lambda: remembering(**first),
        "between": lambda: remembering(**second),
    }
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    with torch.no_grad():
        for round_ in range(options.rounds + 1):
            for name, step in steps.items():
                start = time.perf_counter()
                step()
                if round_:  # the first compiles
                    seconds[name].append(time.perf_counter() - start)
    untouched = statistics.median(seconds["untouched"])
    rows = [
        (
            name,
            f"{statistics.median(each):.2f} ({min(each):.2f} to {max(each):.2f})",
            f"{statistics.median(each) / untouched:.2f}",
        )
        for name, each in seconds.items()
    ]
    print(tabulate(rows, ("step", "seconds", "of untouched"), tablefmt="github"))
    kept = remembering.toma_state.nbytes() / 2**20
    print(f"\n{options.rounds} rounds; a run keeps {kept:.0f} MiB")
    if options.out is not None:
        with options.out.open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(("step", "seconds"))
            writer.writerows(
                (name, " ".join(f"{s:.4f}" for s in each)) for name, each in seconds.items()
            )


if __name__ == "__main__":
    main()
