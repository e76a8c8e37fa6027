"""Rows of figures as a table for people; what benchmarks and evaluations print."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tabulate import tabulate


@dataclass(frozen=True)
class Column:
    """A column of a table on screen; files have every key of the rows."""

    key: str
    header: str
    show: Callable[[Any], str] = str


@dataclass(frozen=True, kw_only=True)
class Table:
    """Rows of figures under one title."""

    title: str
    columns: tuple[Column, ...]
    rows: Sequence[Mapping[str, Any]]
    """Seconds, bytes and shares, not rounded. A row with a ``"failure"`` has no figures."""
    notes: tuple[str, ...] = ()

    def text(self, style: str = "simple") -> str:
        """The table for people; ``style`` is one of tabulate's formats.

        A column without a figure is left out, and reasons for missing rows stand below.
        """
        failures: list[str] = []
        shown = [c for c in self.columns if any(_present(row.get(c.key)) for row in self.rows)]
        cells = []
        for row in self.rows:
            values = [c.show(row[c.key]) if _present(row.get(c.key)) else "" for c in shown]
            if row.get("failure"):
                if row["failure"] not in failures:
                    failures.append(row["failure"])
                values[-1] = f"[{failures.index(row['failure']) + 1}]"
            cells.append(values)
        lines = [
            *([self.title] if self.title else []),
            str(tabulate(cells, [c.header for c in shown], style, disable_numparse=True)),
            *(f"[{number}] {failure}" for number, failure in enumerate(failures, 1)),
            *self.notes,
        ]
        return ("\n\n" if style != "simple" else "\n").join(lines)


def seconds(value: float) -> str:
    """Seconds with three figures and the unit that suits them.

    >>> seconds(12.3456), seconds(0.0123456), seconds(1.23456e-05)
    ('12.3 s', '12.3 ms', '12.3 us')
    """
    for scale, unit in ((1.0, "s"), (1e-3, "ms"), (1e-6, "us")):
        if value >= scale or unit == "us":
            break
    return f"{value / scale:.3g} {unit}"


def span(show: Callable[[float], str]) -> Callable[[Sequence[float]], str]:
    """How the two ends of a spread are shown."""
    return lambda ends: f"{show(ends[0])} to {show(ends[1])}"


def mebibytes(value: float) -> str:
    """Bytes in MiB."""
    return f"{value / 2**20:.4g} MiB"


def percent(value: float) -> str:
    """A share in per cent."""
    return f"{value:.1%}"


def times(value: float) -> str:
    """A ratio with two decimals."""
    return f"{value:.2f}"


def number(value: float) -> str:
    """A number in the shortest form."""
    return f"{value:g}"


def _present(value: Any) -> bool:
    return value is not None and value != ""
