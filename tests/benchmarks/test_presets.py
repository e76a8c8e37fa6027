"""Sets of tables run at small size, and go on after a failure."""

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import presets
from benchmarks.operators import OPERATORS
from benchmarks.tiny import tiny
from toma_fx.bench.contenders import Setting
from toma_fx.bench.record import Record


def test_a_preset_goes_on_after_a_failure_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail() -> Any:
        raise RuntimeError("out of memory")

    def good() -> Any:
        return [presets._operators(Setting(overrides=tiny("sdxl"), compiled=False))]

    parts = {"one": fail, "two": good}
    monkeypatch.setitem(presets.PRESETS, "readme", lambda small, compiled: parts)
    with pytest.raises(SystemExit) as ended:
        presets.main(["readme", "--tiny", "--out", str(tmp_path)])
    assert ended.value.code == 1
    assert "RuntimeError: out of memory" in capsys.readouterr().out
    (file,) = tmp_path.glob("*.json")
    whole = json.loads(file.read_text())
    assert whole["command"].startswith("python -m benchmarks.presets readme --tiny")
    failed, measured = whole["tables"]
    assert failed["rows"] == [{"part": "one", "failure": "RuntimeError: out of memory"}]
    assert len(measured["rows"]) == len(OPERATORS) + 2  # tomesd merges and unmerges


def test_parts_after_the_time_are_named_not_dropped() -> None:
    tables = list(presets.run_preset("h200", Record(command=""), small=True, minutes=0.0))
    assert len(tables) == len(presets.h200(small=True))
    assert all("not started after" in table.rows[0]["failure"] for table in tables)


PRESETS = pytest.mark.parametrize("name", ["readme", "h200"])


def check_preset(name: str, *, compiled: bool) -> None:
    record = Record(command=name)
    how: dict[str, Any] = {"small": True, "compiled": compiled, "minutes": 60.0}
    tables = list(presets.run_preset(name, record, **how))
    plain = [table for table in tables if "additions" not in table.title]  # some need a GPU
    assert [row["failure"] for t in plain for row in t.rows if row.get("failure")] == []
    assert record.tables == tables


@PRESETS
def test_presets_run_at_small_size(name: str) -> None:
    check_preset(name, compiled=False)


@pytest.mark.slow
@PRESETS
def test_presets_run_compiled(name: str) -> None:
    check_preset(name, compiled=True)


def test_tiny_models_are_those_of_known_families() -> None:
    with pytest.raises(ValueError, match="--tiny is for random weights"):
        tiny("elsewhere")
