"""Pictures of merging inside a model, while it draws one image.

    python -m benchmarks.show MODEL --prompt "a red cube on a table" --out pictures

Hidden states are those of the untouched model. So one run shows every layer and step, and another
variant sees the same tokens.
"""

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from PIL import Image
from torch import Tensor, isin

from benchmarks.capture import layers_of, watching
from benchmarks.options import command_options
from toma_fx.checkpoints import load_pipeline
from toma_fx.config import MergeConfig
from toma_fx.errors import ConfigError
from toma_fx.lab.cli import add_drawing, task_of
from toma_fx.lab.clusters import Grid, Merged, merged
from toma_fx.lab.draw import Task, draw
from toma_fx.lab.paint import paint_merged, scale_of
from toma_fx.lab.prompts import Prompt
from toma_fx.lab.tables import write_table
from toma_fx.setting import add_setting, config_of, given_in
from toma_fx.transform import model_of

CELL_INCHES = 2.0


@dataclass(frozen=True, kw_only=True)
class Look:
    """The layers, steps and ratio to show.

    Raises:
        ConfigError: when a number is below 1, or nothing is merged.
    """

    config: MergeConfig
    seed: int = 0
    layers: int = 6
    columns: int = 5
    """Number of denoising steps to show, from the first to the last."""
    interval: int = 10
    """Steps that share the destinations of their first, as in the paper's Figure 4."""

    def __post_init__(self) -> None:
        for name in ("layers", "columns", "interval"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}={getattr(self, name)} must be at least 1")
        if self.config.ratio == 0:
            raise ConfigError("ratio=0 merges nothing that could be shown; try 0.5")


@dataclass(frozen=True, kw_only=True)
class Seen:
    """A layer at a step."""

    grid: Grid
    merged: Merged


@dataclass
class Notes:
    """The tokens and destinations seen while an image was drawn."""

    columns: tuple[int, ...]
    destinations: dict[str, list[Tensor]] = field(default_factory=dict)
    """Destinations of each layer, by step."""
    seen: dict[tuple[str, int], Seen] = field(default_factory=dict)
    """Layers at the steps that are columns, by layer and step."""


def show(task: Task, look: Look, out: Path) -> list[Path]:
    """Draw an image, and pictures of the merging that it would meet.

    Args:
        task: the pipeline and the first of its prompts.
        look: the layers, steps and ratio to show.
        out: the folder of the pictures.

    Returns:
        the files: ``image.png``; ``destinations.png``, destinations and clusters over the image by
        layer and step; ``overlap.png`` and ``overlap.csv``, how many destinations stay from the
        first step of an interval (the paper's Figure 4).

    Raises:
        TomaError: when the model or an option cannot be used.
    """
    pipeline = load_pipeline(task.model, dtype=task.dtype)
    model = model_of(pipeline)
    layers = layers_of(model, look.config, look.layers)
    notes = Notes(columns=_evenly(task.steps, look.columns))
    with watching(model, layers, _note(notes, look)):
        image, _ = draw(pipeline, task, task.prompts[0], look.seed)
    out.mkdir(parents=True, exist_ok=True)
    image.save(out / "image.png")
    curves = {layer: overlap(notes.destinations[layer], look.interval) for layer in layers}
    write_table(_overlap_rows(curves), out / "overlap.csv")
    figures = {
        "destinations.png": _figure(notes, layers, image, look.config.ratio),
        "overlap.png": _overlap_figure(curves, look),
    }
    grids = [seen.grid for seen in notes.seen.values()]
    widest = max(scale_of(grid) * grid.width for grid in grids)
    for name, figure in figures.items():
        figure.savefig(out / name, dpi=widest / CELL_INCHES)
    return [out / name for name in ("image.png", *figures, "overlap.csv")]


def overlap(destinations: Sequence[Tensor], interval: int) -> list[float]:
    """Share of each step's destinations that the first step of its interval chose too.

    Args:
        destinations: ``(M,)`` token indices at each step.
        interval: in steps.

    >>> import torch
    >>> overlap([torch.tensor([0, 1]), torch.tensor([1, 2]), torch.tensor([2, 3])], 2)
    [1.0, 0.5, 1.0]
    """
    firsts = [destinations[step - step % interval] for step in range(len(destinations))]
    return [
        float(isin(its, first).float().mean())
        for its, first in zip(destinations, firsts, strict=True)
    ]


def _note(notes: Notes, look: Look) -> Callable[[str, int, Tensor, Grid], None]:
    def see(layer: str, step: int, tokens: Tensor, grid: Grid) -> None:
        its = merged(tokens, grid.tile_order, look.config)
        notes.destinations.setdefault(layer, []).append(its.destinations.cpu())
        if step in notes.columns:
            notes.seen[layer, step] = Seen(grid=grid, merged=its)

    return see


def _evenly(steps: int, columns: int) -> tuple[int, ...]:
    columns = min(columns, steps)
    return tuple(round(i * (steps - 1) / max(1, columns - 1)) for i in range(columns))


def _figure(notes: Notes, layers: Sequence[str], image: Image.Image, ratio: float) -> Figure:
    """A row for each layer, a column for each step."""
    grid = next(iter(notes.seen.values())).grid
    cell_height = CELL_INCHES * grid.height / grid.width
    size = (CELL_INCHES * len(notes.columns) + 0.5, cell_height * len(layers) + 0.7)
    figure = Figure(figsize=size, layout="constrained")
    cells = figure.subplots(len(layers), len(notes.columns), squeeze=False)
    for row, layer in zip(cells, layers, strict=True):
        for axes, step in zip(row, notes.columns, strict=True):
            seen = notes.seen[layer, step]
            axes.imshow(paint_merged(image, seen.merged, seen.grid), interpolation="nearest")
            axes.set_xticks([])
            axes.set_yticks([])
        row[0].set_ylabel(_short(layer), fontsize=7)
    for axes, step in zip(cells[0], notes.columns, strict=True):
        axes.set_title(f"step {step + 1}", fontsize=8)
    figure.suptitle(f"destinations (red) and clusters, {ratio:g} merged away", fontsize=10)
    return figure


def _overlap_figure(curves: dict[str, list[float]], look: Look) -> Figure:
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for layer, shares in curves.items():
        percent = [100 * share for share in shares]
        axes.plot(range(1, len(shares) + 1), percent, marker=".", label=_short(layer, parted=" "))
    chance = 100 * (1 - look.config.ratio)
    axes.axhline(chance, color="grey", linewidth=1, linestyle=":", label="chance")
    axes.set_xlabel("denoising step")
    axes.set_ylabel(f"destinations kept from the first step of {look.interval} (%)")
    axes.set_ylim(0, 102)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside right upper", fontsize=7, frameon=False)
    return figure


def _overlap_rows(curves: dict[str, list[float]]) -> list[dict[str, object]]:
    return [
        {"layer": layer, "step": step, "overlap": share}
        for layer, shares in curves.items()
        for step, share in enumerate(shares, 1)
    ]


def _short(layer: str, *, parted: str = "\n") -> str:
    """A block's path as people say it: stage, then block."""
    stage, _, block = layer.replace("transformer_blocks.", "block ").rpartition(".")
    return f"{stage}{parted}{block}" if stage else block


def main(arguments: Sequence[str] | None = None) -> None:
    """Draw an image and its pictures, and print their files."""
    parser = argparse.ArgumentParser(description="Draw pictures of merging inside a model.")
    add = parser.add_argument
    add("model", help="folder or hub name of a diffusers pipeline")
    add("--prompt", required=True)
    add("--seed", type=int, default=0)
    add("--layers", type=int, default=6, help="layers in the pictures (6)")
    add("--columns", type=int, default=5, help="steps in the pictures (5)")
    add("--interval", type=int, default=10, help="steps of the overlap (10)")
    add("--out", type=Path, required=True, metavar="DIR")
    add_drawing(parser)
    add_setting(parser)
    options = command_options(parser, "benchmarks.show", arguments)
    look = Look(
        config=config_of(given_in(options)),
        seed=options.seed,
        layers=options.layers,
        columns=options.columns,
        interval=options.interval,
    )
    for file in show(task_of(options, (Prompt(text=options.prompt),)), look, options.out):
        print(file)


if __name__ == "__main__":
    main()
