"""``toma-fx eval``: draw with every contender, measure against the untouched model, write tables.

A run can be stopped at any time, and the same command continues it. Several processes can share the
drawing (``accelerate launch -m toma_fx eval ...``). The first process measures the files.
"""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from toma_fx.arithmetic import first_call
from toma_fx.checkpoints import load_pipeline
from toma_fx.errors import ConfigError
from toma_fx.lab.contenders import Contender, Variant, contend
from toma_fx.lab.draw import Task, draw, takes_negative
from toma_fx.lab.gallery import Gallery, save_image, seconds_of
from toma_fx.lab.networks import Networks
from toma_fx.lab.score import load_instruments, look_at_reference, score
from toma_fx.lab.tables import (
    IMAGES,
    SUMMARY,
    Outcome,
    as_table,
    image_rows,
    summary_rows,
    write_table,
)
from toma_fx.progress import progress
from toma_fx.transform import model_of

PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The variants to compare, and the measures."""

    variants: tuple[Variant, ...]
    ratios: tuple[float, ...]
    measures: tuple[str, ...]
    networks: Networks = field(default_factory=Networks)
    reference: Path | None = None
    """Folder of real images for FID; the untouched model's images when left out."""


@dataclass(frozen=True, kw_only=True)
class Results:
    """The figures, those of the untouched model first, and notes for their readers."""

    outcomes: tuple[Outcome, ...]
    notes: tuple[str, ...]


def evaluate(task: Task, plan: Plan, out: Path) -> str:
    """Draw what is missing, measure everything, and write ``images.csv`` and ``summary.csv``.

    Args:
        task: prompts and settings to draw.
        plan: the variants, and the measures.
        out: a new folder, or that of an earlier run with the same task.

    Returns:
        the summary as text; nothing in processes other than the first.

    Raises:
        TomaError: when the model, a variant, a ratio or the folder cannot be used.
    """
    results = draw_and_measure(task, plan, out)
    if results is None:
        return ""
    outcomes = results.outcomes
    write_table(image_rows(outcomes, task.prompts, task.seeds, plan.measures), out / IMAGES)
    rows = summary_rows(outcomes, task.seeds, plan.measures)
    write_table(rows, out / SUMMARY)
    return "\n".join([as_table(rows, plan.measures).text(), *results.notes])


def draw_and_measure(task: Task, plan: Plan, out: Path) -> Results | None:
    """Draw what is missing and measure everything; ``None`` in processes other than the first.

    Args:
        task: prompts and settings to draw.
        plan: the variants, and the measures.
        out: a new folder for the images, or that of an earlier run with the same task.

    Raises:
        TomaError: as `evaluate`.
    """
    real = () if plan.reference is None else pictures(plan.reference)
    processes = processes_of_launch()
    with progress(f"load {task.model}"):
        pipeline = load_pipeline(task.model, dtype=task.dtype, device=processes.device)
    prompt = task.prompts[0]
    with progress("count arithmetic"):
        call = first_call(model_of(pipeline), lambda: draw(pipeline, task, prompt, 0))
        contenders = contend(pipeline, plan.variants, plan.ratios, task.steps, call)
    gallery = Gallery(out)
    if processes.first:
        gallery.open(task, contenders)
    processes.wait()
    draw_missing(pipeline, task, contenders, gallery, processes)
    processes.wait()
    if not processes.first:
        return None
    outcomes = measure(task, plan, contenders, gallery, real)
    return Results(outcomes=tuple(outcomes), notes=tuple(_notes(pipeline, task)))


def pictures(folder: Path) -> tuple[Path, ...]:
    """The image files of a folder, its subfolders included, in order.

    Raises:
        ConfigError: when it holds fewer than two.
    """
    files = tuple(sorted(f for f in folder.rglob("*") if f.suffix.lower() in PICTURES))
    if len(files) < 2:
        raise ConfigError(
            f"reference={str(folder)!r} holds {len(files)} images; give a folder with at least 2 "
            f"files that end in {', '.join(PICTURES)}"
        )
    return files


@dataclass(frozen=True, kw_only=True)
class Processes:
    """This process among those that draw together."""

    device: Any = None
    """``None``: the GPU when there is one."""
    first: bool = True
    wait: Callable[[], None] = lambda: None
    """Returns as soon as all processes have called it."""
    share: Callable[[list[Any]], list[Any]] = lambda units: units
    """This process's part of a list that is the same in all."""


def processes_of_launch() -> Processes:
    """The processes of ``accelerate launch``, or this one alone.

    Raises:
        ConfigError: when there are several and accelerate is not installed.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return Processes()
    if find_spec("accelerate") is None:
        raise ConfigError("several processes need accelerate: pip install accelerate")
    # A process may wait for others for as long as their images take.
    state: Any = import_module("accelerate").PartialState(timeout=timedelta(days=7))
    return Processes(
        device=state.device,
        first=state.is_main_process,
        wait=state.wait_for_everyone,
        # Dealt in turn, so that each has some images of every contender: they differ in speed.
        share=lambda units: units[state.process_index :: state.num_processes],
    )


def draw_missing(
    pipeline: Any,
    task: Task,
    contenders: Sequence[Contender],
    gallery: Gallery,
    processes: Processes,
) -> None:
    """Draw and save every image that is not there yet, one at a time."""
    # Keyed by file, because two contenders with equally few steps have the same images.
    units = {
        gallery.file(contender, prompt, seed): (contender, prompt, seed)
        for contender in contenders
        for prompt in range(len(task.prompts))
        for seed in range(task.seeds)
    }
    mine = processes.share([unit for file, unit in units.items() if not file.exists()])
    processes.wait()  # nobody draws before all have seen what is missing
    with progress("draw", len(mine), "image") as bar:
        for contender, prompt, seed in mine:
            bar.set_description(contender.folder)
            with contender.changed():
                image, seconds = draw(
                    pipeline, task, task.prompts[prompt], seed, steps=contender.steps
                )
            save_image(image, gallery.file(contender, prompt, seed), seconds=seconds)
            bar.update()


def measure(
    task: Task,
    plan: Plan,
    contenders: Sequence[Contender],
    gallery: Gallery,
    real: Sequence[Path] = (),
) -> list[Outcome]:
    """The measures of all images, those of the untouched model first. All images must be drawn."""
    with progress("load the networks of the measures"):
        instruments = load_instruments(plan.measures, plan.networks)
    texts = [prompt.text for prompt in task.prompts for _ in range(task.seeds)]
    files = [
        tuple(
            gallery.file(contender, prompt, seed)
            for prompt in range(len(task.prompts))
            for seed in range(task.seeds)
        )
        for contender in contenders
    ]
    reference = look_at_reference(instruments, files[0], real)
    outcomes = []
    with progress("measure", len(files), "set") as bar:
        for contender, its in zip(contenders, files, strict=True):
            bar.set_description(f"measure {contender.folder}")
            scores = score(instruments, its, texts, reference, paired=its is not files[0])
            seconds = tuple(map(seconds_of, its))
            outcomes.append(Outcome(contender=contender, files=its, seconds=seconds, scores=scores))
            bar.update()
    return outcomes


def _notes(pipeline: Any, task: Task) -> list[str]:
    negative = sum(bool(prompt.negative) for prompt in task.prompts)
    if not negative or takes_negative(pipeline, task):
        return []
    name = type(pipeline).__name__
    return [f"{negative} prompts have a negative prompt, which {name} does not use"]
