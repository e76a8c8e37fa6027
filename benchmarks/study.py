"""One table of the paper, or one of our own questions, on a model at hand.

    python -m benchmarks.study variants --seeds 2 --out tables/sdxl
    python -m benchmarks.study rivals MODEL --prompts prompts.txt --out tables

Contenders draw the same prompts and seeds, and images that are hard for one are hard for the other.
So the difference of two contenders is known better than the measure of either. Each row therefore
also has its difference from the first row of its group, image by image.
"""

import argparse
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.options import command_options
from benchmarks.rivals import named_variant
from benchmarks.studies import NO_BODY, STUDIES, Paper, Study
from toma_fx.lab import small_models
from toma_fx.lab.cli import add_measuring, networks_of, plan_of, prompts_of, task_of
from toma_fx.lab.draw import Task
from toma_fx.lab.evaluate import Plan, draw_and_measure
from toma_fx.lab.gallery import write_whole
from toma_fx.lab.intervals import mean_interval
from toma_fx.lab.measures import MEASURES
from toma_fx.lab.tables import Outcome, as_table, image_rows, summary_rows, write_table
from toma_fx.tables import Column


def run_study(name: str, task: Task, plan: Plan, out: Path) -> str:
    """Draw what is missing, measure, and write ``NAME.md``, ``NAME.csv`` and ``NAME_images.csv``.

    Studies of one model, with the same task, share their images in one folder.

    Args:
        name: one of `STUDIES`.
        task: prompts and settings to draw.
        plan: the measures and networks. Its ratios, if any, replace the study's own. Its variants
            are not used.
        out: a new folder, or that of an earlier run with the same task.

    Returns:
        the Markdown; nothing in processes other than the first.

    Raises:
        TomaError: when the model or a variant cannot be used, or the folder holds images of another
            task.
    """
    study = STUDIES[name]
    groups = study.variants(task.steps)
    variants = dict.fromkeys(variant for group in groups for variant in group)
    plan = replace(
        plan,
        variants=tuple(named_variant(variant) for variant in variants),
        ratios=plan.ratios or study.ratios,
    )
    results = draw_and_measure(task, plan, out)
    if results is None:
        return ""
    outcomes, chosen = results.outcomes, plan.measures
    write_table(image_rows(outcomes, task.prompts, task.seeds, chosen), out / f"{name}_images.csv")
    rows = study_rows(groups, outcomes, task.seeds, chosen)
    table = [{**row, **paper_cells(study.paper, row, groups[0])} for row in rows]
    write_table(table, out / f"{name}.csv")
    text = as_markdown(name, study, task, table, chosen, results.notes)
    write_whole(out / f"{name}.md", lambda part: part.write_text(text, encoding="utf-8"))
    return text


def study_rows(
    groups: Sequence[Sequence[str]], outcomes: Sequence[Outcome], seeds: int, chosen: Sequence[str]
) -> list[dict[str, Any]]:
    """The rows of `summary_rows` by group, each with its differences from the group's first.

    Args:
        groups: variants.
        outcomes: one for each contender, the untouched model's first.
        seeds: number of seeds of each prompt.
        chosen: names of the measures.
    """
    untouched, *others = zip(outcomes, summary_rows(outcomes, seeds, chosen), strict=True)
    rows = [{"group": "", **untouched[1], **_differences(untouched[0], None, seeds, chosen)}]
    for number, group in enumerate(groups, 1):
        firsts = {o.contender.ratio: o for o, _ in others if o.contender.variant == group[0]}
        firsts.pop(None, None)  # numbers of steps have nothing in common
        for variant in group:
            for outcome, row in others:
                if outcome.contender.variant == variant:
                    first = None if variant == group[0] else firsts.get(outcome.contender.ratio)
                    differences = _differences(outcome, first, seeds, chosen)
                    rows.append({"group": number, **row, **differences})
    return rows


def as_markdown(
    name: str,
    study: Study,
    task: Task,
    rows: Sequence[dict[str, Any]],
    chosen: Sequence[str],
    notes: Sequence[str] = (),
) -> str:
    """The study as a page.

    Args:
        name: one of `STUDIES`.
        study: the study of that name.
        task: the task that was drawn.
        rows: rows of `study_rows`, with the paper's figures.
        chosen: names of the measures.
        notes: further notes for readers.
    """
    compared = next((n for n in ("psnr", *chosen) if n in chosen and MEASURES[n].kind != "set"), "")
    summary = as_table(rows, chosen)
    more = [Column(c, _heading(c, study.paper)) for c in rows[0] if c.startswith("paper")]
    if compared:
        more.insert(0, Column("difference", f"{MEASURES[compared].label}, difference"))
    shown = [
        {
            **row,
            "variant": f"`{row['variant']}`",
            "difference": _difference(whole, compared) if compared else "",
        }
        for row, whole in zip(summary.rows, rows, strict=True)
    ]
    legend = (
        "Differences are of the same prompts and seeds, from the first variant of a group "
        f"({', '.join(f'`{first}`' for first in _firsts(rows))}) at the same ratio."
    )
    about = f"`python -m benchmarks.study {name}`: {_drawing(task)}."
    table = replace(
        summary,
        title=f"# {study.title}\n\n{about}",
        columns=(*summary.columns, *more),
        rows=shown,
        notes=(
            *summary.notes,
            legend,
            *((_about(study.paper),) if study.paper else ()),
            *((study.note,) if study.note else ()),
            *notes,
        ),
    )
    return table.text("pipe") + "\n"


def _differences(
    outcome: Outcome, first: Outcome | None, seeds: int, chosen: Sequence[str]
) -> dict[str, Any]:
    """The mean difference of each measure of single images, and the ends of its interval."""
    cells: dict[str, Any] = {}
    for name in (name for name in chosen if MEASURES[name].kind != "set"):
        keys = (f"{name}_difference", f"{name}_difference_low", f"{name}_difference_high")
        ours = outcome.scores.get(name)
        theirs = None if first is None else first.scores.get(name)
        known = isinstance(ours, list) and isinstance(theirs, list)
        values = _paired(np.array(ours), np.array(theirs), seeds) if known else [""] * 3
        cells |= dict(zip(keys, values, strict=True))
    return cells


def _paired(ours: Any, theirs: Any, seeds: int) -> list[Any]:
    with np.errstate(invalid="ignore"):
        # Equal values differ by nothing, two infinite ones (the PSNR of equal images) included.
        gaps = np.where(ours == theirs, 0.0, ours - theirs).reshape(-1, seeds)
        values = [float(gaps.mean()), *mean_interval(gaps)]
    return ["" if value != value else value for value in values]


def _difference(row: dict[str, Any], name: str) -> str:
    mean, low, high = (row[f"{name}_difference{end}"] for end in ("", "_low", "_high"))
    if mean == "":
        return ""
    return f"{mean:+.3g}" if low == "" else f"{mean:+.3g} ({low:+.3g} to {high:+.3g})"


def paper_cells(
    paper: Paper | None, row: dict[str, Any], first_group: Sequence[str]
) -> dict[str, str]:
    """The paper's figures for a row; a table without a body says so where they would stand."""
    if paper is None:
        return {}
    if not paper.columns:
        return {"paper": NO_BODY if row["variant"] in first_group else ""}
    ratio = None if row["ratio"] == "" else row["ratio"]
    figures = paper.figures.get((row["variant"], ratio), ("",) * len(paper.columns))
    return {
        f"paper_{column.lower()}": figure
        for column, figure in zip(paper.columns, figures, strict=True)
    }


def _heading(column: str, paper: Paper | None) -> str:
    assert paper is not None
    names = {f"paper_{name.lower()}": name for name in paper.columns}
    return f"{paper.table}: {names[column]}" if column in names else paper.table


def _about(paper: Paper) -> str:
    missing = "" if paper.columns else f" Its figures are {NO_BODY}, a draft and its appendix."
    return f"The paper's {paper.table}: {paper.setting}.{missing} It shows: {paper.says}."


def _firsts(rows: Sequence[dict[str, Any]]) -> list[str]:
    firsts: dict[Any, str] = {}
    for row in rows[1:]:
        if row["ratio"] != "":
            firsts.setdefault(row["group"], row["variant"])
    return list(firsts.values())


def _drawing(task: Task) -> str:
    settings = {
        "guidance": task.guidance,
        "size": f"{task.height} x {task.width}" if task.height and task.width else None,
        **task.arguments,
        "dtype": task.dtype,
    }
    words = [f"{key} {value}" for key, value in settings.items() if value is not None]
    model = Path(task.model).name
    return ", ".join([f"`{model}`", f"{task.steps} steps", *words])


def main(arguments: Sequence[str] | None = None) -> None:
    """Draw, measure and print a study."""
    parser = argparse.ArgumentParser(
        description="Make a table of the paper, or one of ours.",
        epilog="\n".join(f"{name:13} {_titled(study)}" for name, study in STUDIES.items()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("name", choices=tuple(STUDIES), metavar="NAME", help=f"one of {', '.join(STUDIES)}")
    add("model", nargs="?", help="folder or hub name of a pipeline (the study's small one)")
    add("--ratio", type=float, nargs="+", default=[], help="(the study's own)")
    add_measuring(parser, default="mse psnr ssim, and those whose network is named")
    options = command_options(parser, "benchmarks.study", arguments)
    if options.model is None:
        options.model = str(small_models.FOLDER / STUDIES[options.name].model)
    default = {"mse", "psnr", "ssim", *networks_of(options)}
    default |= {"clip_image"} if options.clip else set()
    plan = plan_of(options, (), tuple(name for name in MEASURES if name in default))
    text = run_study(options.name, task_of(options, prompts_of(options)), plan, options.out)
    if text:  # the first of several processes alone has one
        print(text)


def _titled(study: Study) -> str:
    return f"{study.title} ({study.paper.table})" if study.paper else study.title


if __name__ == "__main__":
    main()
