"""The main job, shown: SDXL and Flux at their real sizes, merged, reported and timed."""

import time
from typing import Any

from torch import nn

import toma_fx
from toma_fx.bench import machine, side_by_side, table
from toma_fx.checkpoints import available_memory, load_model
from toma_fx.config import MergeConfig
from toma_fx.passes.readable import readable
from toma_fx.transform import block_graphs

FLUX_BLOCK_BYTES = 1.24 * 2**30
"""One double-stream and two single-stream blocks in bfloat16."""
FLUX_MOST = 3
"""Double-stream blocks that keep the demo within ten minutes on two cores; the model has 19."""


def demo(*, model: str | None = None, ratio: float = 0.5, quick: bool = False) -> None:
    """Show what toma_fx does to real architectures, on this machine.

    Args:
        model: only this one, as `toma_fx.checkpoints.load_model` takes it; by default SDXL's whole
            UNet, then Flux at full width with as many blocks as memory and ten minutes allow.
        ratio: share of tokens merged away.
        quick: images of 512 x 512 pixels and one counted call, within two minutes.
    """
    size = 512 if quick else None
    for name in ("sdxl", "flux") if model is None else (model,):
        _headline(f"{name}: loading")
        start = time.perf_counter()
        loaded = load_model(name, **_fitting(name))
        count = sum(p.numel() for p in loaded.parameters())
        print(f"{type(loaded).__name__}, {count / 1e9:.2f} billion parameters, {_since(start)}")
        _show(loaded, name, MergeConfig(ratio=ratio), size, repeats=1 if quick else 3)
        del loaded
    print(f"\nMeasured on {machine()}.")


def _show(
    model: nn.Module, name: str, config: MergeConfig, size: int | None, *, repeats: int
) -> None:
    start = time.perf_counter()
    transformed = toma_fx.transform(model, config)
    print(f"transformed in {_since(start)}; the original is untouched and shares every tensor\n")
    print(toma_fx.report(transformed, height=size))

    path, before, after = next(block_graphs(model, config))
    _headline(f"{name}: {path} before")
    print(readable(before))
    _headline(f"{name}: {path} after")
    print(readable(after))

    _headline(f"{name}: one forward, both with compiled blocks")
    start = time.perf_counter()
    timings = side_by_side(model, {f"ratio {config.ratio:g}": config}, height=size, repeats=repeats)
    print(table(timings))
    print(f"measured in {_since(start)}")


def _fitting(name: str) -> dict[str, Any]:
    """Changes to a configuration that let random weights fit into memory and minutes."""
    if name != "flux":
        return {}
    # Half the memory: activations and the compiler need the rest.
    count = max(1, min(FLUX_MOST, int(available_memory() / 2 / FLUX_BLOCK_BYTES)))
    print(f"full width, {count} of 19 double-stream and {2 * count} of 38 single-stream blocks")
    return {"num_layers": count, "num_single_layers": 2 * count}


def _headline(text: str) -> None:
    print(f"\n== {text} ==", flush=True)


def _since(start: float) -> str:
    return f"{time.perf_counter() - start:.1f} s"
