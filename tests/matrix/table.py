"""The table that the matrix makes: Markdown from the outcomes of its tests."""

import datetime
import importlib.metadata
import platform
import re
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import torch

import toma_fx
from tests.matrix.frame import FAMILIES, MODES, SECTIONS

README = Path(__file__).parents[2] / "README.md"
START, END = "<!-- matrix: written by `make matrix` -->", "<!-- end of matrix -->"
# The worst of its tests is what a cell is.
OUTCOMES = ("works", "refused", "not run", "fails")
LIBRARIES = ("torch", "diffusers", "transformers", "peft", "accelerate")
CELLS = [(family, mode) for family in FAMILIES for mode in MODES]


@dataclass(frozen=True, kw_only=True)
class Result:
    """What came of one test.

    Attributes:
        order: its place among the tests.
        section, title: of its row.
        cell: family and mode.
        outcome: one of `OUTCOMES`.
        note: what holds for the row.
        said: what this test has to say: of a refusal or a failure, the message.
    """

    order: int
    section: str
    title: str
    cell: tuple[str, str]
    outcome: str
    note: str
    said: tuple[str, ...]


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
    for result in sorted(results, key=lambda each: (SECTIONS.index(each.section), each.order)):
        rows = matrix.setdefault(result.section, {})
        rows.setdefault(result.title, Row()).add(result)
    return matrix


INTRODUCTION = """\
# What works with merged tokens

Each line is something that users of diffusers do, run with real pipeline classes and small models with random weights: as it is, with `model.compile(fullgraph=True)`
and with `model.compile_repeated_blocks(fullgraph=True)`. *Works*: what comes out is what should, compiled or not, on a used model as on a fresh one. *Refused*: a clear error, quoted
here, says what to do. A dash: there is no such thing. `make matrix` runs all and writes this page; `make test` runs a part.
"""  # noqa: E501


def page(matrix: Matrix, backend: str) -> str:
    """The whole page."""
    sections = (_section(title, rows) for title, rows in matrix.items())
    return "\n".join([INTRODUCTION, summary(matrix, backend), *sections])


def summary(matrix: Matrix, backend: str) -> str:
    """A line for each section, as README has it."""
    versions = [f"{name} {importlib.metadata.version(name)}" for name in LIBRARIES]
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    today = datetime.datetime.now(datetime.UTC).date().isoformat()
    lines = [_line(["what users do", "works", "refused", "fails or not run"]), _line(["---"] * 4)]
    for section, rows in matrix.items():
        count = Counter(max(row.outcomes.values(), key=OUTCOMES.index) for row in rows.values())
        bad = count["fails"] + count["not run"]
        lines.append(_line([section, str(count["works"]), str(count["refused"]), str(bad)]))
    return "\n".join(
        [
            START,
            *lines,
            "",
            f"Lines of the matrix, each by the worst of its cells. Last run on {today}: toma_fx",
            f"{toma_fx.__version__}, {', '.join(versions)}, Python {platform.python_version()},",
            f"compiled by {backend}, on {device}.",
            END,
        ]
    )


def write(matrix: Matrix, backend: str, file: Path, readme: Path = README) -> None:
    """Write the page, and the summary into the README, between its markers."""
    file.write_text(page(matrix, backend))
    between = re.escape(START) + ".*?" + re.escape(END)
    text = re.sub(between, lambda _: summary(matrix, backend), readme.read_text(), flags=re.S)
    readme.write_text(text)


def _section(title: str, rows: dict[str, Row]) -> str:
    heads = ["", *(f"{FAMILIES[family]}, {MODES[mode]}" for family, mode in CELLS), "note"]
    lines = ["", f"## {title}", "", _line(heads), _line(["---"] * len(heads))]
    for name, row in rows.items():
        found = [row.outcomes.get(cell, "-") for cell in CELLS]
        shown = [f"**{each}**" if each in ("fails", "not run") else each for each in found]
        lines.append(_line([name, *shown, row.note()]))
    return "\n".join([*lines, ""])


def _line(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"
