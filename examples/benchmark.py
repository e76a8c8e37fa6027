"""Seconds an image takes in a whole pipeline, untouched and at some ratios, side by side.

    python examples/benchmark.py                             # a small pipeline of this repository
    python examples/benchmark.py --model black-forest-labs/FLUX.1-dev --compile --repeats 5

``toma-fx bench`` times the denoising model alone.
"""

import argparse
import statistics
import time
from pathlib import Path
from typing import Any

import diffusers
import torch
from tabulate import tabulate

import toma_fx
from toma_fx.bench.record import machine

SMALL = Path(__file__).parent / "small_models" / "sdxl"


def main(arguments: list[str] | None = None) -> None:
    """Time images of each model in turn, so that a change of the machine's speed meets all."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--model", default=str(SMALL), help="folder or hub name of a pipeline")
    parser.add_argument("--ratio", type=float, nargs="+", default=[0.25, 0.5])
    parser.add_argument("--prompt", default="a large red circle on a plain green ground")
    parser.add_argument("--steps", type=int, default=25)
    parser.add_argument("--repeats", type=int, default=3, help="counted images of each (3)")
    parser.add_argument("--compile", action="store_true", help="compile the transformer blocks")
    options = parser.parse_args(arguments)

    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    pipe: Any = diffusers.DiffusionPipeline.from_pretrained(options.model, torch_dtype=dtype)
    pipe.to(device)
    pipe.set_progress_bar_config(disable=True)
    part = "unet" if hasattr(pipe, "unet") else "transformer"
    untouched = getattr(pipe, part)
    models: dict[str, Any] = {"untouched": untouched}
    # All share the untouched model's weights, so that they fit into memory at once.
    models |= {f"ratio {r:g}": toma_fx.transform(untouched, ratio=r) for r in options.ratio}
    if options.compile:  # after transform
        for model in models.values():
            model.compile_repeated_blocks(fullgraph=True)

    def seconds(model: Any) -> float:
        setattr(pipe, part, model)
        start = time.perf_counter()
        pipe(options.prompt, num_inference_steps=options.steps, output_type="pt")
        if device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - start

    for model in models.values():  # compiling and first calls are not counted
        seconds(model)
    times: dict[str, list[float]] = {name: [] for name in models}
    for _ in range(options.repeats):
        for name, model in models.items():
            times[name].append(seconds(model))
    median = {name: statistics.median(each) for name, each in times.items()}
    rows = [(name, f"{s:.3g}", f"{median['untouched'] / s:.2f}") for name, s in median.items()]
    print(tabulate(rows, ("model", "seconds an image (median)", "times as fast")))
    print(machine())


if __name__ == "__main__":
    main()
