"""Rows of figures as a table for people, which benchmarks and evaluations print."""

import re
import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tabulate import tabulate

WIDTH = 80
"""Columns of a screen."""
PADDING = 2
"""Columns by which tabulate makes a header wider than it is."""
PATH = re.compile(r"[a-z]\w*(\.\w+)*\.(\d+(-\d+)?|\*)")
"""The path of a block, of consecutive blocks, or of all blocks of a list."""


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
        headers = [c.header for c in shown]
        reasons = [f"[{number}] {failure}" for number, failure in enumerate(failures, 1)]
        around = [self.title, *reasons, *self.notes]
        if style == "simple":
            body, around = fitted(headers, cells), [wrapped(line) for line in around]
        else:
            body = str(tabulate(cells, headers, style, disable_numparse=True))
        title, *below = around
        lines = [*([title] if title else []), body, *below]
        return ("\n\n" if style != "simple" else "\n").join(lines)


def fitted(headers: Sequence[str], rows: Sequence[Sequence[Any]], width: int | None = WIDTH) -> str:
    """A table for a screen: where it would be too wide, cells are broken into lines.

    The path of a block is abbreviated instead.

    Args:
        headers: of the columns.
        rows: their cells.
        width: columns of the screen; None breaks nothing.
    """
    if width is None:
        return str(tabulate(rows, headers, disable_numparse=True))
    columns = [
        [_pieces(str(cell)) for cell in column] for column in zip(headers, *rows, strict=True)
    ]
    spare = [PADDING, *[0] * len(rows)]
    widths, least = (
        [max(map(sum, zip(map(size, column), spare, strict=True))) for column in columns]
        for size in (_whole, _longest)
    )
    while sum(widths) + 2 * (len(widths) - 1) > width:
        # The widest of those that can be narrower.
        room = [wide if wide > few else 0 for wide, few in zip(widths, least, strict=True)]
        if not any(room):
            break
        widths[room.index(max(room))] -= 1
    broken = [
        [_filled(cell, wide - more) for cell, more in zip(column, spare, strict=True)]
        for column, wide in zip(columns, widths, strict=True)
    ]
    first, *others = zip(*broken, strict=True)
    return str(tabulate(others, first, disable_numparse=True))


def wrapped(line: str, width: int | None = WIDTH) -> str:
    """A line for a screen, broken where it would be too long."""
    if width is None:
        return line
    how: dict[str, Any] = {"break_long_words": False, "break_on_hyphens": False}
    return textwrap.fill(line, width, subsequent_indent="  ", **how)


def _pieces(text: str) -> list[str]:
    """Parts of a text, after each of which a line may end; numbers have one part."""
    return [piece for piece in re.split(r"(?<=[\s,:+])|(?<=[^\d\s]\.)", text) if piece]


def _whole(pieces: Sequence[str]) -> int:
    return len("".join(pieces).rstrip())


def _longest(pieces: Sequence[str]) -> int:
    if PATH.fullmatch(text := "".join(pieces)):
        return len(_abbreviated(text, 0))
    return max((len(piece.rstrip()) for piece in pieces), default=0)


def _abbreviated(path: str, width: int) -> str:
    """A block's path with stars for its longest words after the first one, until it fits.

    A star matches a word as in the patterns of `toma_fx.MergeConfig.skip`.

    >>> _abbreviated("down_blocks.1.attentions.0.transformer_blocks.0-1", 24)
    'down_blocks.1.*.0.*.0-1'
    """
    first, *rest = path.split(".")
    for word in sorted((each for each in rest if each[0].isalpha()), key=len, reverse=True):
        if len(path) <= width:
            break
        rest[rest.index(word)] = "*"
        path = ".".join([first, *rest])
    return path


def _filled(pieces: Sequence[str], width: int) -> str:
    if PATH.fullmatch(text := "".join(pieces)):
        return _abbreviated(text, width)
    lines = [""]
    for piece in pieces:
        if lines[-1] and len((lines[-1] + piece).rstrip()) > width:
            lines.append("")
        lines[-1] += piece
    return "\n".join(line.rstrip() for line in lines)


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
