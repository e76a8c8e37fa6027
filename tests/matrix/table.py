"""The table that the matrix makes: Markdown from the outcomes of its tests.

Parts whose tests did not run stay as the page has them.
"""

import datetime
import importlib.metadata
import json
import platform
import re
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch

import toma_fx
from tests.matrix.frame import FAMILIES, SECTIONS

LIMITS = Path(__file__).parents[2] / "docs" / "limits.md"
START, END = "<!-- matrix: written by `make matrix` -->", "<!-- end of matrix -->"
# The worst of its tests is what a cell is.
OUTCOMES = ("works", "refused", "not run", "fails")
LIBRARIES = ("torch", "diffusers", "transformers", "peft", "accelerate")
HEADS = ["what users do", "works", "refused", "fails or not run", "cells", "run on"]


@dataclass(frozen=True, kw_only=True)
class Result:
    """What came of one test.

    Attributes:
        test: its name for pytest.
        order: its place among the tests.
        section, title: of its row.
        cell: family and mode.
        outcome: one of `OUTCOMES`.
        note: what holds for the row.
        said: what this test has to say: of a refusal or a failure, the message.
        date: when it ran.
        setting: what it ran with: versions, backend, device.
    """

    test: str
    order: int
    section: str
    title: str
    cell: tuple[str, str]
    outcome: str
    note: str
    said: tuple[str, ...]
    date: str
    setting: str


class Store:
    """Results in a file, a line of JSON each.

    Attributes:
        known: by the name of the test, those of tests that need not run again: that did not fail.
    """

    def __init__(self, file: Path) -> None:
        self.file = file
        self.known: dict[str, list[Result]] = {}
        for line in file.read_text().splitlines() if file.exists() else ():
            read = json.loads(line)
            read.update(cell=tuple(read["cell"]), said=tuple(read["said"]))
            self.known.setdefault(read["test"], []).append(Result(**read))
        for test, results in [*self.known.items()]:
            if any(each.outcome not in ("works", "refused") for each in results):
                del self.known[test]

    def begin(self, kept: dict[str, list[Result]]) -> None:
        """Let the file hold these."""
        self.file.parent.mkdir(parents=True, exist_ok=True)
        self.file.write_text("")
        for results in kept.values():
            for each in results:
                self.add(each)

    def add(self, result: Result) -> None:
        """Add one."""
        with self.file.open("a") as out:
            out.write(json.dumps(asdict(result)) + "\n")


@dataclass
class Row:
    """The outcome of each family and mode that a row has, and its notes."""

    outcomes: dict[tuple[str, str], str] = field(default_factory=dict)
    notes: dict[str, set[str]] = field(default_factory=dict)
    """With the families that each was said about; none for what holds for all."""

    def add(self, result: Result) -> None:
        """Add what came of one of its tests."""
        before = self.outcomes.get(result.cell, result.outcome)
        self.outcomes[result.cell] = max(result.outcome, before, key=OUTCOMES.index)
        if result.note:
            self.notes.setdefault(result.note, set())
        for said in result.said:
            self.notes.setdefault(said, set()).add(result.cell[0])

    def note(self) -> str:
        """All that is to be said, for one cell of the table."""
        families = {family for family, _ in self.outcomes}
        lines = []
        for text, about in self.notes.items():
            names = ", ".join(name for family, name in FAMILIES.items() if family in about)
            lines.append(f"{names}: {text}" if about and about != families else text)
        return "<br>".join(lines).replace("|", "\\|").replace("\n", " ")


Matrix = dict[str, dict[str, Row]]
"""Section to title to row."""


def gather(results: list[Result]) -> Matrix:
    """The rows, in the order of the sections and of the tests."""
    matrix: Matrix = {}
    sections = list(SECTIONS)
    for result in sorted(results, key=lambda each: (sections.index(each.section), each.order)):
        rows = matrix.setdefault(result.section, {})
        rows.setdefault(result.title, Row()).add(result)
    return matrix


INTRODUCTION = """\
# What works with merged tokens

Each line is something that users of diffusers do, run with real pipeline classes and small models with random weights: as it is, with `model.compile(fullgraph=True)`
and with `model.compile_repeated_blocks(fullgraph=True)`. *Works*: what comes out is what should, compiled or not, on a used model as on a fresh one. *Refused*: a clear error, quoted
here, says what to do. A dash: there is no such thing. `make matrix` runs all and writes this page, `make matrix PYTEST="--matrix-section 'Newer families'"` one part of it; `make test` runs some.
"""  # noqa: E501


@dataclass(frozen=True)
class Part:
    """A section of the page, and its line in the summary."""

    text: str
    line: str


def parts_of(page: str) -> dict[str, Part]:
    """The sections of a page, by their titles."""
    between = page.partition(START)[2].partition(END)[0]
    lines = {line.split(" | ")[0].removeprefix("| "): line for line in between.splitlines()}
    texts = re.split(r"^## ", page, flags=re.M)[1:]
    named = {text.partition("\n")[0]: f"## {text.strip()}\n" for text in texts}
    return {title: Part(text, lines[title]) for title, text in named.items()}


def parts_from(results: list[Result]) -> dict[str, Part]:
    """The sections that results make."""
    made = {}
    for section, rows in gather(results).items():
        mine = [each for each in results if each.section == section]
        count = Counter(max(row.outcomes.values(), key=OUTCOMES.index) for row in rows.values())
        bad = count["fails"] + count["not run"]
        cells = sum(len(row.outcomes) for row in rows.values())
        days = sorted({each.date for each in mine})
        when = days[0] if len(days) == 1 else f"{days[0]} to {days[-1]}"
        numbers = (count["works"], count["refused"], bad, cells)
        line = _line([section, *map(str, numbers), when])
        made[section] = Part(_section(section, rows, mine), line)
    return made


def page(parts: dict[str, Part]) -> str:
    """The whole page."""
    texts = (parts[title].text for title in SECTIONS if title in parts)
    return "\n".join([INTRODUCTION, summary(parts), "", *texts])


def summary(parts: dict[str, Part]) -> str:
    """A line for each section, as docs/limits.md has it."""
    lines = [parts[title].line for title in SECTIONS if title in parts]
    said = (
        "A cell is one feature in one mode, such as a LoRA on Flux under `torch.compile`. "
        "A feature works only if all of its cells do."
    )
    return "\n".join([START, _line(HEADS), _line(["---"] * len(HEADS)), *lines, "", said, END])


def _runs(results: list[Result]) -> str:
    """When they ran, and with what."""
    dates: dict[str, list[str]] = {}
    for each in sorted(results, key=lambda each: each.date):
        dates.setdefault(each.setting, []).append(each.date)
    runs = []
    for setting, days in dates.items():
        when = f"on {days[0]}" if days[0] == days[-1] else f"from {days[0]} to {days[-1]}"
        runs.append(f"Run {when}: {setting}.")
    return " ".join(runs)


def setting(backend: str) -> str:
    """What tests run with now."""
    versions = [f"{name} {importlib.metadata.version(name)}" for name in LIBRARIES]
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    return (
        f"toma_fx {toma_fx.__version__}, {', '.join(versions)}, Python "
        f"{platform.python_version()}, compiled by {backend}, on {device}"
    )


def today() -> str:
    """As results are dated."""
    return datetime.datetime.now(datetime.UTC).date().isoformat()


def write(results: list[Result], file: Path, limits: Path = LIMITS) -> None:
    """Write the page, and the summary into docs/limits.md, between its markers.

    Sections without results stay as they are.
    """
    before = parts_of(file.read_text()) if file.exists() else {}
    parts = {**before, **parts_from(results)}
    file.write_text(page(parts))
    between = re.escape(START) + ".*?" + re.escape(END)
    text = re.sub(between, lambda _: summary(parts), limits.read_text(), flags=re.S)
    limits.write_text(text)


def _section(title: str, rows: dict[str, Row], results: list[Result]) -> str:
    cells = SECTIONS[title]
    heads = ["", *cells.values(), "note"]
    lines = [f"## {title}", "", _line(heads), _line(["---"] * len(heads))]
    for name, row in rows.items():
        found = [row.outcomes.get(cell, "-") for cell in cells]
        shown = [f"**{each}**" if each in ("fails", "not run") else each for each in found]
        lines.append(_line([name, *shown, row.note()]))
    return "\n".join([*lines, "", _runs(results), ""])


def _line(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"
