"""Prompt files, and clear errors for other files."""

from pathlib import Path

import pytest

from toma_fx.errors import ConfigError
from toma_fx.lab.prompts import Prompt, load_prompts

TABLE = """prompt_id,tag,prompt,negative_prompt
6,animal,"a tiger, a masterpiece","blurry, bad art"
7,abstract,Sound,
8,abstract,Sound,
9,lines,"a
b",
"""


def write(tmp_path: Path, name: str, text: str) -> Path:
    (tmp_path / name).write_text(text, encoding="utf-8")
    return tmp_path / name


def texts(file: Path, **options: int) -> list[str]:
    return [prompt.text for prompt in load_prompts(file, **options)]


def test_plain_text_is_a_prompt_a_line(tmp_path: Path) -> None:
    file = write(tmp_path, "a.txt", "\N{ZERO WIDTH NO-BREAK SPACE}a red cube\n\n  a, b \na, b\n")
    assert texts(file) == ["a red cube", "a, b"]
    assert texts(file, limit=1) == ["a red cube"]


def test_a_table_has_prompts_and_negative_ones_each_once(tmp_path: Path) -> None:
    assert load_prompts(write(tmp_path, "a.csv", TABLE)) == (
        Prompt(text="a tiger, a masterpiece", negative="blurry, bad art"),
        Prompt(text="Sound"),
        Prompt(text="a\nb"),
    )


@pytest.mark.parametrize(
    ("name", "text", "options", "expected"),
    [
        ("a.txt", "\n \n", {}, "holds no prompt"),
        ("a.csv", "title,id\nx,1\n", {}, "has the columns title, id; name the one with"),
        ("a.txt", "x", {"limit": 0}, "limit=0"),
    ],
)
def test_mistakes_are_named(
    tmp_path: Path, name: str, text: str, options: dict[str, int], expected: str
) -> None:
    with pytest.raises(ConfigError, match=expected):
        texts(write(tmp_path, name, text), **options)


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"none\.txt' cannot be read: No such file"):
        load_prompts(tmp_path / "none.txt")
    (tmp_path / "image.txt").write_bytes(b"\x89PNG\xff")
    with pytest.raises(ConfigError, match="is no text in UTF-8"):
        load_prompts(tmp_path / "image.txt")
