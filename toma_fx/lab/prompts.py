"""Prompt files: plain text, tables with a prompt column (GEMRec's among them), ImageNet classes."""

import csv
import io
import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from toma_fx.errors import ConfigError

PROMPT_COLUMNS = ("prompt", "caption", "text")
"""Names of the column with the prompt, the first that is there; upper and lower case are equal."""
NEGATIVE_COLUMNS = ("negativeprompt", "negative_prompt", "negative")
"""Names of the column with the negative prompt; the first is GEMRec's."""
CLASS_TEMPLATE = "a photo of a {}"
"""What a class name is put into when the file holds ImageNet's classes."""
CLASS_LINES = (
    re.compile(r"n\d{8}\s+(?:\d+\s+)?(?P<names>.+)"),
    re.compile(r"""\{?\s*\d+:\s*(['"])(?P<names>.+)\1[,}]*"""),
)
"""Lines of ImageNet's lists of classes: ``n01440764 tench, Tinca tinca``, the same with a number
between as in its development kit, and ``{0: 'tench, Tinca tinca',``."""


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """What one image is drawn from, whatever the seed."""

    text: str
    negative: str = ""


def load_prompts(
    path: str | Path, *, template: str | None = None, limit: int | None = None
) -> tuple[Prompt, ...]:
    """The prompts of a file, each once: the same prompt again would draw the same images.

    Args:
        path: ``.txt``: a prompt a line, or ImageNet's classes (`CLASS_LINES`). ``.csv`` and
            ``.tsv``: a table with a column ``prompt``, ``caption`` or ``text``, and perhaps one
            with negative prompts, such as GEMRec's, which has a row for each image. ``.json`` and
            ``.jsonl``: strings, or objects with such fields; or ImageNet's
            ``{"0": ["n01440764", "tench"], ...}``.
        template: what every entry is put into at ``{}``. ``"a photo of a {}"`` for classes, and the
            entry itself for prompts, when left out.
        limit: take only the first so many.

    Raises:
        ConfigError: when there is no such file, its ending is unknown, or it holds no prompt.
    """
    path = Path(path)
    if path.suffix not in _READERS:
        raise ConfigError(f"prompts={str(path)!r} must end in {', '.join(_READERS)}")
    if template is not None and "{}" not in template:
        raise ConfigError(
            f"template={template!r} must say where the entry goes: {CLASS_TEMPLATE!r}"
        )
    if limit is not None and limit < 1:
        raise ConfigError(f"limit={limit} must be a number of prompts, at least 1")
    try:
        text = path.read_text(encoding="utf-8-sig")
        found = [entry for entry in _READERS[path.suffix](text) if entry.text]
    except OSError as error:
        raise ConfigError(f"prompts={str(path)!r} cannot be read: {error.strerror}") from error
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ConfigError(f"prompts={str(path)!r} is no {path.suffix} file: {error}") from error
    if not found:
        raise ConfigError(f"prompts={str(path)!r} holds no prompt; write one a line")
    prompts = (Prompt(text=_filled(entry, template), negative=entry.negative) for entry in found)
    return tuple(dict.fromkeys(prompts))[:limit]


@dataclass(frozen=True)
class _Entry:
    text: str
    negative: str = ""
    class_name: bool = False


def _filled(entry: _Entry, template: str | None) -> str:
    template = CLASS_TEMPLATE if template is None and entry.class_name else template
    return entry.text if template is None else template.replace("{}", entry.text)


def _class(names: str) -> _Entry:
    """The first of a class's names, as a person would write it."""
    return _Entry(names.partition(",")[0].replace("_", " ").strip(), class_name=True)


def _lines(text: str) -> Iterator[_Entry]:
    for line in text.splitlines():
        matches = (pattern.fullmatch(line.strip()) for pattern in CLASS_LINES)
        names = next((match["names"] for match in matches if match), None)
        yield _Entry(line.strip()) if names is None else _class(names)


def _table(delimiter: str) -> Any:
    def read(text: str) -> Iterator[_Entry]:
        table = csv.DictReader(io.StringIO(text, newline=""), delimiter=delimiter)
        _find(PROMPT_COLUMNS, table.fieldnames or [])
        for row in table:
            yield _row(row)

    return read


def _json(text: str) -> Iterator[_Entry]:
    data = json.loads(text)
    if isinstance(data, dict):
        for value in data.values():  # ImageNet's index, with or without the synset
            names = value[-1] if isinstance(value, list) and value else value
            if not isinstance(names, str):
                raise ConfigError(
                    f"prompts: {value!r} must be a class name, or a synset and a class name"
                )
            yield _class(names)
    elif isinstance(data, list):
        yield from map(_item, data)
    else:
        raise ConfigError(f"prompts: {data!r} must be a list of prompts or an index of classes")


def _json_lines(text: str) -> Iterator[_Entry]:
    return (_item(json.loads(line)) for line in text.splitlines() if line.strip())


def _item(item: object) -> _Entry:
    if isinstance(item, str):
        return _Entry(item.strip())
    if isinstance(item, dict):
        return _row(item)
    raise ConfigError(
        f"prompts: {item!r} must be a string, or an object with {_names(PROMPT_COLUMNS)}"
    )


def _row(row: dict[str, Any]) -> _Entry:
    prompt = row[_find(PROMPT_COLUMNS, row)]
    negative = next((row[c] for c in row if c and c.lower() in NEGATIVE_COLUMNS), "")
    return _Entry(str(prompt or "").strip(), str(negative or "").strip())


def _find(wanted: tuple[str, ...], columns: Iterable[str]) -> str:
    columns = [column for column in columns if column]
    for name in wanted:
        for column in columns:
            if column.lower() == name:
                return column
    raise ConfigError(
        f"prompts: the columns {', '.join(map(repr, columns))} hold none named {_names(wanted)}"
    )


def _names(columns: tuple[str, ...]) -> str:
    return " or ".join(map(repr, columns))


_READERS = {
    ".txt": _lines,
    ".csv": _table(","),
    ".tsv": _table("\t"),
    ".json": _json,
    ".jsonl": _json_lines,
}
