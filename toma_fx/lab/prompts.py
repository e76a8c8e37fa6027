"""Prompt files: a prompt a line, or a table with a column of prompts."""

import csv
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from toma_fx.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """The words that one image is drawn from, with any seed."""

    text: str
    negative: str = ""


def load_prompts(path: str | Path, *, limit: int | None = None) -> tuple[Prompt, ...]:
    """The prompts of a file, each once: the same prompt again would draw the same images.

    Args:
        path: a ``.csv`` table with a column ``prompt``, and perhaps one ``negative_prompt``; any
            other file holds a prompt a line.
        limit: take only this many prompts, from the first.

    Raises:
        ConfigError: when there is no such file, or it holds no prompt.
    """
    path = Path(path)
    if limit is not None and limit < 1:
        raise ConfigError(f"limit={limit} must be a number of prompts, at least 1")
    read = _table if path.suffix == ".csv" else _lines
    try:
        found = [prompt for prompt in read(path) if prompt.text]
    except OSError as error:
        raise ConfigError(f"prompts={str(path)!r} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"prompts={str(path)!r} is no text in UTF-8: {error}") from error
    if not found:
        raise ConfigError(f"prompts={str(path)!r} holds no prompt; write one a line")
    return tuple(dict.fromkeys(found))[:limit]


def _lines(path: Path) -> Iterator[Prompt]:
    for line in path.read_text(encoding="utf-8-sig").splitlines():
        yield Prompt(text=line.strip())


def _table(path: Path) -> Iterator[Prompt]:
    with path.open(newline="", encoding="utf-8-sig") as stream:
        table = csv.DictReader(stream)
        if "prompt" not in (table.fieldnames or ()):
            raise ConfigError(
                f"prompts={str(path)!r} has the columns {', '.join(table.fieldnames or ())}; name "
                "the one with the prompts 'prompt'"
            )
        for row in table:
            negative = (row.get("negative_prompt") or "").strip()
            yield Prompt(text=(row["prompt"] or "").strip(), negative=negative)
