"""The tables of the page on families are those that the library gives."""

import os
import re

import pytest

from tests.families import table
from tests.families.table import PAGE, SHOWN, families, savings, savings_table
from toma_fx.checkpoints import FAMILIES

QUICK = ("flux2-klein-4b", "wan2.1-1.3b")


def section(name: str) -> str:
    """What stands between the marks of a table."""
    found = re.search(rf"<!-- {name}:.*?-->\n(.*?)\n<!-- end of {name} -->", PAGE.read_text(), re.S)
    assert found is not None, f"{PAGE.name} has no marks of {name}"
    return found[1]


def written(name: str, text: str) -> None:
    """Put a table between its marks, if asked to."""
    if os.environ.get("EXPECTTEST_ACCEPT"):
        end = f"\n<!-- end of {name} -->"
        PAGE.write_text(PAGE.read_text().replace(section(name) + end, text + end))


def test_what_is_known_of_each_family() -> None:
    written("families", families())
    assert section("families") == families()


def test_shown_models_are_known() -> None:
    assert FAMILIES.keys() >= SHOWN
    assert FAMILIES.keys() >= set(table.SIZES)


@pytest.mark.parametrize("name", QUICK)
def test_what_a_model_saves(name: str) -> None:
    (row,) = savings([name])
    assert [cell.strip() for cell in _lines()[name].strip("|").split("|")] == list(row)


def _lines() -> dict[str, str]:
    rows = section("savings").splitlines()[2:]
    return {line.strip("| ").partition(" ")[0]: line for line in rows}


@pytest.mark.slow
def test_what_all_models_save() -> None:
    text = savings_table(savings())
    written("savings", text)
    assert section("savings") == text
