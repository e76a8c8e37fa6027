"""Every snippet of the pages for compiler people runs, in order, in one namespace."""

import re
from pathlib import Path
from typing import Any

import pytest

PAGE = Path(__file__).parent.parent / "docs" / "compiler.md"


def test_snippets_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    page = PAGE.read_text()
    namespace: dict[str, Any] = {"__name__": "page"}
    for match in re.finditer(r"```python\n(.*?)```", page, re.DOTALL):
        line = page[: match.start()].count("\n") + 2
        source = "\n" * (line - 1) + match[1]  # so that a traceback names the page's line
        exec(compile(source, str(PAGE), "exec"), namespace)
    assert (tmp_path / "graphs" / "0_captured.py").exists()


def test_table_names_every_pass() -> None:
    import toma_fx.passes

    page = PAGE.read_text()
    modules = re.findall(r"^(\w+) {2,}\S", toma_fx.passes.__doc__ or "", re.MULTILINE)
    assert len(modules) == 9
    for module in modules:
        name = {"sites": "FindSites"}.get(module, module.title().replace("_", ""))
        assert re.search(rf"^\| `({name}\(|{module}`)", page, re.MULTILINE), module
