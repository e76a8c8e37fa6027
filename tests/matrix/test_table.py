"""The table says what came of the rows, and README says what the table says."""

import re
from pathlib import Path

from tests.matrix import table
from tests.matrix.table import END, README, START, Result

PAGE = README.parent / "docs" / "matrix.md"


def result(cell: tuple[str, str], outcome: str, *said: str, note: str = "") -> Result:
    return Result(
        order=0,
        section="Pipelines",
        title="Something",
        cell=cell,
        outcome=outcome,
        note=note,
        said=said,
    )


def line_of(*results: Result) -> str:
    (line,) = re.findall(r"^\| Something .*$", table.page(table.gather([*results]), "x"), re.M)
    assert isinstance(line, str)
    return line


def test_a_cell_is_what_the_worst_of_its_tests_is() -> None:
    cell = ("sdxl", "eager")
    works, fails = result(cell, "works"), result(cell, "fails", "assert 1 == 2")
    expected = "| Something | **fails** | - | - | - | - | - | assert 1 == 2 |"
    assert line_of(works, fails) == line_of(fails, works) == expected


def test_notes_name_the_family_that_they_are_about() -> None:
    works = result(("sdxl", "eager"), "works", note="slowly")
    refused = result(("flux", "compile"), "refused", "leave it | out")
    note = r"slowly<br>Flux: leave it \| out"
    assert line_of(works, refused) == f"| Something | works | - | - | - | refused | - | {note} |"


def test_summary_goes_between_the_markers_of_the_readme(tmp_path: Path) -> None:
    page, readme = tmp_path / "matrix.md", tmp_path / "README.md"
    readme.write_text(f"before\n{START}\nold\n{END}\nafter\n")
    table.write(table.gather([result(("flux", "eager"), "fails", "why")]), "x", page, readme)
    text = readme.read_text()
    assert text.startswith("before\n<!--") and text.endswith("-->\nafter\n") and "old" not in text
    assert "| Pipelines | 0 | 0 | 1 |" in text
    assert text.partition(START)[2].partition(END)[0] in page.read_text()


def test_readme_shows_the_summary_of_the_page() -> None:
    _, start, rest = README.read_text().partition(START)
    assert start
    assert rest.partition(END)[0] in PAGE.read_text()
