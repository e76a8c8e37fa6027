"""``toma-fx show``: pictures of what merging does inside a model, while it draws one image.

Hidden states are those of the untouched model, so one run shows what every layer and step has to
offer, and another variant looks at the same tokens.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from torch import Tensor, isin

from toma_fx.config import MergeConfig
from toma_fx.errors import ConfigError
from toma_fx.lab.capture import Grid, layers_of, watching
from toma_fx.lab.clusters import Merged, kmeans, merged
from toma_fx.lab.draw import Task, draw, load_pipeline
from toma_fx.lab.paint import Picture, paint_clusters, paint_merged, scale_of
from toma_fx.lab.tables import write_table
from toma_fx.transform import model_of

CELL_INCHES = 2.0


@dataclass(frozen=True, kw_only=True)
class Look:
    """What is shown.

    Raises:
        ConfigError: when a number is below 1, or nothing is merged.
    """

    config: MergeConfig
    seed: int = 0
    layers: int = 6
    columns: int = 5
    """Denoising steps, from the first to the last."""
    clusters: int = 12
    """Of k-means; the paper does not give its number."""
    interval: int = 10
    """Steps that share the destinations of their first, as in the paper's Figure 4."""

    def __post_init__(self) -> None:
        for name in ("layers", "columns", "clusters", "interval"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}={getattr(self, name)} must be at least 1")
        if self.config.ratio == 0:
            raise ConfigError("ratio=0 merges nothing that could be shown; try 0.5")


@dataclass(frozen=True, kw_only=True)
class Seen:
    """A layer at a step."""

    grid: Grid
    merged: Merged
    labels: Tensor
    """``(N,)`` k-means clusters of the hidden states."""


@dataclass
class Notes:
    """What was seen while an image was drawn."""

    columns: tuple[int, ...]
    destinations: dict[str, list[Tensor]] = field(default_factory=dict)
    """Of each layer, by step."""
    seen: dict[tuple[str, int], Seen] = field(default_factory=dict)
    """By layer and step, at the steps that are columns."""


def show(task: Task, look: Look, out: Path) -> list[Path]:
    """Draw an image and the pictures of what merging would do in it.

    Args:
        task: the pipeline and the first of its prompts.
        look: what is shown.
        out: the folder.

    Returns:
        the files: ``image.png``; ``destinations.png``, destinations and clusters over the image by
        layer and step; ``kmeans.png``, k-means clusters of hidden states in the image's colours
        (the paper's Figures 3 and 9); ``overlap.png`` and ``overlap.csv``, how many destinations
        stay from the first step of an interval (Figure 4).

    Raises:
        TomaError: when the model or an option is not what it must be.
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
        "destinations.png": _figure(
            notes,
            layers,
            lambda seen: paint_merged(image, seen.merged, seen.grid),
            f"destinations (red) and clusters, {look.config.ratio:g} merged away",
        ),
        "kmeans.png": _figure(
            notes,
            layers,
            lambda seen: paint_clusters(image, seen.labels, seen.grid),
            f"{look.clusters} k-means clusters of hidden states, in the mean colours of the image",
            last=np.array(image),
        ),
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
            labels = kmeans(tokens, min(look.clusters, len(tokens)), seed=look.seed)
            notes.seen[layer, step] = Seen(grid=grid, merged=its, labels=labels)

    return see


def _evenly(steps: int, columns: int) -> tuple[int, ...]:
    columns = min(columns, steps)
    return tuple(round(i * (steps - 1) / max(1, columns - 1)) for i in range(columns))


def _figure(
    notes: Notes,
    layers: Sequence[str],
    paint: Callable[[Seen], Picture],
    title: str,
    *,
    last: Picture | None = None,
) -> Figure:
    """A row for each layer, a column for each step, and perhaps a last column with one picture."""
    rows, columns = len(layers), len(notes.columns) + (last is not None)
    grid = next(iter(notes.seen.values())).grid
    cell_height = CELL_INCHES * grid.height / grid.width
    size = (CELL_INCHES * columns + 0.5, cell_height * rows + 0.7)
    figure = Figure(figsize=size, layout="constrained")
    cells = figure.subplots(rows, columns, squeeze=False)
    for row, layer in zip(cells, layers, strict=True):
        pictures = [paint(notes.seen[layer, step]) for step in notes.columns]
        for axes, picture in zip(row, pictures if last is None else [*pictures, last], strict=True):
            axes.imshow(picture, interpolation="nearest")
            axes.set_xticks([])
            axes.set_yticks([])
        row[0].set_ylabel(_short(layer), fontsize=7)
    titles = [f"step {step + 1}" for step in notes.columns] + ["image"] * (last is not None)
    for axes, words in zip(cells[0], titles, strict=True):
        axes.set_title(words, fontsize=8)
    figure.suptitle(title, fontsize=10)
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
