"""The notebook runs from top to bottom, and the repository's copy holds no outputs."""

from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbclient import NotebookClient

ROOT = Path(__file__).parent.parent
FILE = ROOT / "examples" / "quickstart.ipynb"


@pytest.fixture
def notebook() -> Any:
    return nbformat.read(FILE, as_version=4)  # type: ignore[no-untyped-call]


def code(notebook: Any) -> list[Any]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def test_it_holds_no_outputs(notebook: Any) -> None:
    nbformat.validate(notebook)
    assert len(code(notebook)) > 5
    assert not any(cell.outputs or cell.execution_count for cell in code(notebook))


def test_it_runs(notebook: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # The kernel is a process of its own: this tree and no other, one thread, no warnings of others.
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("PYTHONWARNINGS", "ignore")
    monkeypatch.setenv("MPLBACKEND", "module://matplotlib_inline.backend_inline")
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    cells = code(notebook)
    for cell in cells:  # fewer steps than a reader would take, and no wait for Inductor
        cell.source = cell.source.replace("STEPS, SIZE = 25, 256", "STEPS, SIZE = 5, 256")
        cell.source = cell.source.replace("fullgraph=True)", 'fullgraph=True, backend="eager")')
    resources = {"metadata": {"path": str(tmp_path)}}
    NotebookClient(notebook, timeout=600, kernel_name="python3", resources=resources).execute()
    said = "".join(output.get("text", "") for cell in cells for output in cell.outputs)
    pictures = [o for cell in cells for o in cell.outputs if "image/png" in o.get("data", {})]
    assert "whole model" in said
    assert "with memory: " in said
    assert len(pictures) == 3
