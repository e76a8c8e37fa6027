"""Tables on screen and in files."""

import csv
import json
from pathlib import Path
from typing import Any

import torch

from toma_fx.bench.record import Record
from toma_fx.tables import Column, Table, seconds

COLUMNS = (Column("name", "name"), Column("time", "time", seconds), Column("never", "never"))
ROWS: list[dict[str, Any]] = [
    {"name": "a", "time": 0.25, "calls": [0.2, 0.3], "failure": ""},
    {"name": "b", "failure": "RuntimeError: no such kernel"},
]
TABLE = Table(title="two rows", columns=COLUMNS, rows=ROWS, notes=("a note",))


def test_text_gives_reasons_and_leaves_empty_columns_out() -> None:
    text = TABLE.text()
    for part in ("two rows", "250 ms", "[1] RuntimeError: no such kernel", "a note"):
        assert part in text
    assert "never" not in text


def test_a_reason_is_given_once() -> None:
    text = Table(title="", columns=COLUMNS, rows=[*ROWS, {**ROWS[1], "name": "c"}]).text()
    assert text.count("RuntimeError") == 1
    assert text.count("[1]") == 3


def test_files_hold_everything_that_was_measured(tmp_path: Path) -> None:
    record = Record(command="toma-fx bench --tiny", folder=tmp_path / "new")
    record.add(TABLE)
    record.add(TABLE)
    found, sheet, text = record.files
    whole = json.loads(found.read_text())
    assert whole["command"] == "toma-fx bench --tiny"
    assert whole["versions"]["torch"] == torch.__version__
    assert whole["date"].startswith(found.name[:10])
    assert [table["rows"] for table in whole["tables"]] == [ROWS, ROWS]
    with sheet.open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert [row["name"] for row in rows] == ["a", "b", "a", "b"]
    assert rows[0]["calls"] == "0.2 0.3"
    assert "| 250 ms" in text.read_text()


def test_an_earlier_result_is_never_overwritten(tmp_path: Path) -> None:
    records = [Record(command=str(number), folder=tmp_path) for number in range(3)]
    for record in records:
        record.add(TABLE)
    commands = {json.loads(record.files[0].read_text())["command"] for record in records}
    assert commands == {"0", "1", "2"}
