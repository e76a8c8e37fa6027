"""The table agrees with the rows' outcomes, and docs/limits.md with the table."""

import re
from pathlib import Path

from tests.matrix import table
from tests.matrix.frame import SECTIONS
from tests.matrix.table import END, LIMITS, START, Result

PAGE = LIMITS.parent / "matrix.md"


def result(
    cell: tuple[str, str],
    outcome: str,
    *said: str,
    note: str = "",
    test: str = "",
    date: str = "2026-01-01",
    setting: str = "torch 2",
    section: str = "Pipelines",
) -> Result:
    return Result(
        test=test,
        order=0,
        section=section,
        title="Something",
        cell=cell,
        outcome=outcome,
        note=note,
        said=said,
        date=date,
        setting=setting,
    )


def line_of(*results: Result) -> str:
    page = table.page(table.parts_from([*results]))
    (line,) = re.findall(r"^\| Something .*$", page, re.M)
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


def test_summary_goes_between_the_markers_of_the_page_on_limits(tmp_path: Path) -> None:
    page, limits = tmp_path / "matrix.md", tmp_path / "limits.md"
    limits.write_text(f"before\n{START}\nold\n{END}\nafter\n")
    table.write([result(("flux", "eager"), "fails", "why")], page, limits)
    text = limits.read_text()
    assert text.startswith("before\n<!--") and text.endswith("-->\nafter\n") and "old" not in text
    assert "| Pipelines | 0 | 0 | 1 | 1 | 2026-01-01 |" in text
    assert text.partition(START)[2].partition(END)[0] in page.read_text()


def test_a_part_says_when_and_with_what_results_came() -> None:
    cell = ("sdxl", "eager")
    part = table.parts_from([result(cell, "works")])["Pipelines"]
    assert "Run on 2026-01-01: torch 2." in part.text
    assert part.line == "| Pipelines | 1 | 0 | 0 | 1 | 2026-01-01 |"
    several = [
        result(cell, "works", date="2026-01-03"),
        result(("flux", "eager"), "works", date="2026-01-02", setting="torch 3"),
        result(("flux", "compile"), "works"),
    ]
    part = table.parts_from(several)["Pipelines"]
    said = "Run from 2026-01-01 to 2026-01-03: torch 2. Run on 2026-01-02: torch 3."
    assert said in part.text
    assert part.line == "| Pipelines | 1 | 0 | 0 | 3 | 2026-01-01 to 2026-01-03 |"


def test_parts_that_did_not_run_stay_as_they_are(tmp_path: Path) -> None:
    page, limits = tmp_path / "matrix.md", tmp_path / "limits.md"
    limits.write_text(f"{START}\n{END}\n")
    cell = ("sdxl", "eager")
    table.write([result(cell, "works")], page, limits)
    table.write([result(("", "lora"), "works", section="Newer families")], page, limits)
    later = result(cell, "fails", "why", date="2026-01-02")
    before = table.parts_of(page.read_text())
    table.write([later], page, limits)
    after = table.parts_of(page.read_text())
    assert list(before) == list(after) == ["Pipelines", "Newer families"]
    assert before["Newer families"] == after["Newer families"]
    assert after["Pipelines"] == table.parts_from([later])["Pipelines"]
    assert "| Newer families | 1 | 0 | 0 | 1 | 2026-01-01 |" in limits.read_text()
    assert "| Pipelines | 0 | 0 | 1 | 1 | 2026-01-02 |" in limits.read_text()


def test_every_part_of_the_page_is_one_of_the_matrix() -> None:
    parts = table.parts_of(PAGE.read_text())
    assert list(parts) == [title for title in SECTIONS if title in parts]
    assert table.page(parts) == PAGE.read_text()


def test_what_did_not_fail_need_not_run_again(tmp_path: Path) -> None:
    cell = ("sdxl", "eager")
    refused = result(cell, "refused", "leave it out", test="a")
    results = [
        refused,
        result(cell, "fails", "assert 1 == 2", test="b"),
        result(cell, "works", test="b"),  # its teardown
        result(cell, "not run", "no GPU", test="c"),
    ]
    file = tmp_path / "build" / "results.jsonl"
    table.Store(file).begin({})
    for each in results:
        table.Store(file).add(each)
    assert table.Store(file).known == {"a": [refused]}
    table.Store(file).begin(table.Store(file).known)
    assert len(file.read_text().splitlines()) == 1
    table.Store(file).begin({})
    assert table.Store(file).known == {}


def test_readme_shows_the_summary_of_the_page() -> None:
    _, start, rest = LIMITS.read_text().partition(START)
    assert start
    assert rest.partition(END)[0] in PAGE.read_text()
