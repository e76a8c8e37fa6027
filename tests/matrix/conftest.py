"""Runs the rows of the matrix and gathers their outcomes."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.matrix import table
from tests.matrix.frame import SECTIONS, Cell

RESULTS = Path("build/matrix.jsonl")
"""Every result as it comes, so that a run that was broken off need not begin again."""


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("matrix")
    group.addoption("--matrix-table", metavar="FILE", help="write the table and its summary")
    group.addoption(
        "--matrix-continue",
        action="store_true",
        help=f"with --matrix-table: keep what worked in {RESULTS}, and run the rest",
    )
    group.addoption(
        "--matrix-section",
        action="append",
        choices=list(SECTIONS),
        help="run the rows of this section alone; the others stay as the table has them",
    )
    group.addoption("--matrix-backend", default="aot_eager", help="what torch.compile compiles by")


@pytest.fixture
def cell(request: pytest.FixtureRequest) -> Iterator[Cell]:
    """The family and the mode of a row's test."""
    torch._dynamo.reset()
    family, mode = request.param
    made = Cell(family, mode, request.config.getoption("--matrix-backend", "aot_eager"))
    yield made
    torch._dynamo.reset()
    request.node.user_properties.append(("matrix_refusals", made.refusals))


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--matrix-table", None) and not hasattr(config, "workerinput"):
        config.pluginmanager.register(_Gathering(config), "matrix-table")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    sections = config.getoption("--matrix-section", None)
    if sections:
        marked = [(item, item.get_closest_marker("matrix")) for item in items]
        items[:] = [item for item, mark in marked if mark and mark.kwargs["section"] in sections]
    goes_on = config.getoption("--matrix-table", None) and config.getoption("--matrix-continue")
    known = table.Store(RESULTS).known if goes_on else {}
    for order, item in enumerate(items):
        mark = item.get_closest_marker("matrix")
        if mark is not None:
            params = item.callspec.params  # type: ignore[attr-defined]
            title = mark.kwargs["title"].format(**params)
            about = {**mark.kwargs, "title": title, "cell": params["cell"], "order": order}
            item.user_properties.append(("matrix", about))
            if item.nodeid in known:
                item.add_marker(pytest.mark.skip("it ran before"))


class _Gathering:
    """Turns the reports of tests, which may have run in other processes, into the table."""

    def __init__(self, config: pytest.Config) -> None:
        selected = config.option.keyword or config.option.markexpr
        if selected or [Path(arg).resolve() for arg in config.args] != [Path(__file__).parent]:
            raise pytest.UsageError("--matrix-table is for all rows: run pytest tests/matrix")
        self.config = config
        self.store = table.Store(RESULTS)
        self.known = self.store.known if config.getoption("--matrix-continue") else {}
        self.store.begin(self.known)
        self.setting = table.setting(config.getoption("--matrix-backend"))
        self.results: list[table.Result] = []

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        properties: dict[str, Any] = dict(report.user_properties)
        if "matrix" not in properties or (report.passed and report.when != "teardown"):
            return
        if report.nodeid in self.known:
            if report.skipped:  # and not the teardown, which follows
                known = self.known[report.nodeid]
                self.results += [replace(each, **properties["matrix"]) for each in known]
            return
        outcome, said = "works", tuple[str, ...]()
        if report.failed:
            outcome, said = "fails", (_message(report),)
        elif report.skipped:
            outcome, said = "not run", (_message(report),)
        elif properties.get("matrix_refusals"):
            outcome, said = "refused", tuple(properties["matrix_refusals"])
        result = table.Result(
            **properties["matrix"],
            test=report.nodeid,
            outcome=outcome,
            said=said,
            date=table.today(),
            setting=self.setting,
        )
        self.results.append(result)
        self.store.add(result)

    def pytest_sessionfinish(self, exitstatus: int) -> None:
        if exitstatus in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED):
            table.write(self.results, Path(self.config.getoption("--matrix-table")))


def _message(report: pytest.TestReport) -> str:
    """The first line of the error or of the reason."""
    if isinstance(report.longrepr, tuple):
        return report.longrepr[2].splitlines()[0]
    crash = getattr(report.longrepr, "reprcrash", None)
    return str(crash.message if crash else report.longrepr).splitlines()[0]
