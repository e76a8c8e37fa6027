"""The main job, shown: images of small trained models, and SDXL and Flux at their real sizes."""

import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

import toma_fx
from toma_fx.bench.compare import compare
from toma_fx.bench.contenders import Setting
from toma_fx.bench.levels import models
from toma_fx.bench.record import machine
from toma_fx.build import block_graphs
from toma_fx.checkpoints import RANDOM, available_memory, load_model
from toma_fx.choices import PROMPT
from toma_fx.config import MergeConfig
from toma_fx.families import family_of
from toma_fx.passes.readable import readable
from toma_fx.progress import progress
from toma_fx.schedule import Memory
from toma_fx.setting import Given
from toma_fx.tables import Column, Table, seconds
from toma_fx.transform import model_of
from toma_fx.variants import Merging, merging

FLUX_BLOCK_BYTES = 1.24 * 2**30
"""One double-stream and two single-stream blocks in bfloat16."""
FLUX_MOST = 3
"""Double-stream blocks that keep the demo within ten minutes on two cores; the model has 19."""
ADVISED = MergeConfig(merge_below=0.8, memory=Memory(every=2, theta=0), skip=())
"""The README's advice for 20 steps and more."""


def demo(
    given: Given,
    *,
    model: str | None = None,
    quick: bool = False,
    prompt: str = PROMPT,
    steps: int = 25,
    out: Path = Path("demo"),
) -> None:
    """Show what toma_fx does to images and to time, on this machine.

    Args:
        given: how tokens merge, as `toma_fx.setting` has it. Images are drawn with it, at half of
            its ratio, and with memory as the README advises; without it, with memory alone where
            merging at every step was measured to ruin them.
        model: only this one: ``"sdxl"``, ``"flux"``, or a folder or hub name of a pipeline. By
            default SDXL's whole UNet, then Flux at full width with as many blocks as memory and ten
            minutes allow; images are drawn by small trained pipelines of the same architectures.
        quick: images of 512 x 512 pixels and one counted call, within two minutes.
        prompt: of the images.
        steps: of denoising.
        out: folder of the pictures; made when missing.
    """
    variant, size = merging(given), 512 if quick else None
    (ratio,) = variant.ratios([MergeConfig().ratio])
    config = variant.config(ratio)
    for name in ("sdxl", "flux") if model is None else (model,):
        _draw(name, config, prompt, steps, out, asked=bool(given))
        _headline(f"{name}: loading")
        start = time.perf_counter()
        changes = _fitting(name)
        with progress(f"load {name}"):
            loaded = load_model(name, device=Setting().device, **changes)
        count = sum(p.numel() for p in loaded.parameters())
        print(f"{type(loaded).__name__}, {count / 1e9:.2f} billion parameters, {_since(start)}")
        _show(loaded, name, variant, config, size, repeats=1 if quick else 3)
        del loaded
    print(f"\nMeasured on {machine()}.")


def _draw(
    name: str, config: MergeConfig, prompt: str, steps: int, out: Path, *, asked: bool
) -> None:
    # The lab's imports take seconds, and only this part of the demo needs them.
    from toma_fx.checkpoints import load_pipeline
    from toma_fx.lab.compare import draw_settings, side_by_side_picture
    from toma_fx.lab.draw import Task
    from toma_fx.lab.prompts import Prompt
    from toma_fx.lab.small_models import FOLDER, own_settings

    small = name in RANDOM
    folder = str(FOLDER / name) if small else name
    _headline(f"{name}: images by {'a small trained pipeline' if small else name}")
    if small and not Path(folder).exists():
        print(f"none: the trained pipelines are in the repository, and {folder} is not there")
        return
    prompts = (Prompt(text=prompt),)
    task = Task(model=folder, prompts=prompts, steps=steps, **own_settings(folder))
    with progress(f"load {folder}"):
        pipeline = load_pipeline(folder)
    ruined = bool(family_of(model_of(pipeline)).regretted)
    alone = ruined and not asked
    settings = _memory(2) | _memory(3) if alone else _ratios(config) | _memory(2)
    drawn = draw_settings(pipeline, task, settings)
    columns = (
        Column("name", "setting"),
        Column("seconds", "an image", seconds),
        Column("psnr", "PSNR, dB", lambda value: f"{value:.1f}"),
    )
    title = f"{prompt!r}, {steps} steps, not compiled"
    print(Table(title=title, columns=columns, rows=[vars(each) for each in drawn]).text())
    out.mkdir(parents=True, exist_ok=True)
    file = out / f"{Path(folder).name}.png"
    side_by_side_picture(drawn, f"{prompt}, {steps} steps").save(file)
    print(f"wrote {file}")


def _memory(every: int) -> dict[str, MergeConfig]:
    """The advice under its name, for another number of steps between full ones."""
    config = replace(ADVISED, memory=Memory(every=every, theta=0))
    return {f"memory every {every}, theta 0, below {config.merge_below:g}": config}


def _ratios(config: MergeConfig) -> dict[str, MergeConfig]:
    half = replace(config, ratio=config.ratio / 2)
    return {f"ratio {half.ratio:g}": half, f"ratio {config.ratio:g}": config}


def _show(
    model: nn.Module,
    name: str,
    variant: Merging,
    config: MergeConfig,
    size: int | None,
    *,
    repeats: int,
) -> None:
    start = time.perf_counter()
    transformed = toma_fx.transform(model, config)
    print(f"transformed in {_since(start)}; the original is untouched and shares every tensor\n")
    print(toma_fx.report(transformed, height=size).text())

    path, before, after = next(block_graphs(model, config))
    _headline(f"{name}: {path} before")
    print(readable(before))
    _headline(f"{name}: {path} after")
    print(readable(after))

    _headline(f"{name}: one forward, both with compiled blocks")
    start = time.perf_counter()
    (ratio,) = variant.ratios([config.ratio])
    setting = Setting(height=size, ratios=(ratio,), variants=(variant,), repeats=repeats)
    (timed,) = models(model, setting)
    compiled = [each for each in timed.contenders if each.compiled]
    print(compare(replace(timed, contenders=compiled), setting, title=name).text())
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
