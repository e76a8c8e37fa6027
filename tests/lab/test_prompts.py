"""Prompt files of every format that people have, and clear words for the rest."""

import json
from pathlib import Path

import pytest

from toma_fx.errors import ConfigError
from toma_fx.lab.prompts import Prompt, load_prompts

GEMREC = """prompt_id,tag,size,seed,prompt,negativePrompt,sampler,cfgScale,note
6,animal,512x768,29,"a tiger, a masterpiece","blurry, bad art",Eular a,7,
7,abstract,768x512,84,Sound, ,Eular a,7,
"""


def write(tmp_path: Path, name: str, text: str) -> Path:
    (tmp_path / name).write_text(text, encoding="utf-8")
    return tmp_path / name


def texts(file: Path, **options: object) -> list[str]:
    return [prompt.text for prompt in load_prompts(file, **options)]  # type: ignore[arg-type]


def test_plain_text_is_a_prompt_a_line(tmp_path: Path) -> None:
    file = write(tmp_path, "a.txt", "\N{ZERO WIDTH NO-BREAK SPACE}a red cube\n\n  a, b \n")
    assert texts(file) == ["a red cube", "a, b"]
    assert texts(file, limit=1) == ["a red cube"]
    assert texts(file, template="a {} here") == ["a a red cube here", "a a, b here"]


def test_gemrec_has_negative_prompts(tmp_path: Path) -> None:
    assert load_prompts(write(tmp_path, "a.csv", GEMREC)) == (
        Prompt(text="a tiger, a masterpiece", negative="blurry, bad art"),
        Prompt(text="Sound"),
    )


def test_a_table_of_images_has_each_prompt_once(tmp_path: Path) -> None:
    rows = [
        f'{model},{seed},"{prompt}",x' for prompt in "ab" for model in (1, 2) for seed in (3, 4)
    ]
    table = "\n".join(["model_id,seed,prompt,negativePrompt", *rows, "1,3,b,y"])
    file = write(tmp_path, "a.csv", table)
    assert texts(file) == ["a", "b", "b"]  # the last b has another negative prompt
    assert texts(file, limit=1) == ["a"]


def test_a_cell_may_hold_several_lines(tmp_path: Path) -> None:
    assert texts(write(tmp_path, "a.csv", 'prompt\n"a\nb"\nc\n')) == ["a\nb", "c"]


def test_prompt_comes_before_other_columns_and_case_is_ignored(tmp_path: Path) -> None:
    assert texts(write(tmp_path, "a.tsv", "text\tPROMPT\nno\tyes\n")) == ["yes"]


def test_json_lists_and_lines(tmp_path: Path) -> None:
    rows = ["a", {"caption": "b", "negative_prompt": "c"}]
    expected = (Prompt(text="a"), Prompt(text="b", negative="c"))
    assert load_prompts(write(tmp_path, "a.json", json.dumps(rows))) == expected
    lines = "\n".join(map(json.dumps, rows))
    assert load_prompts(write(tmp_path, "a.jsonl", lines)) == expected


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.txt", "n01440764 tench, Tinca tinca\nn02123045 tabby_cat"),
        ("b.txt", "n01440764 449 tench\nn02123045 174 tabby_cat"),
        ("c.txt", "{0: 'tench, Tinca tinca',\n 281: \"tabby cat\"}"),
        ("a.json", '{"0": ["n01440764", "tench"], "281": ["n02123045", "tabby_cat"]}'),
        ("b.json", '{"0": "tench, Tinca tinca", "281": "tabby cat"}'),
    ],
)
def test_imagenet_classes_become_photos(tmp_path: Path, name: str, text: str) -> None:
    file = write(tmp_path, name, text)
    assert texts(file) == ["a photo of a tench", "a photo of a tabby cat"]
    assert texts(file, template="{}") == ["tench", "tabby cat"]


@pytest.mark.parametrize(
    ("name", "text", "options", "expected"),
    [
        ("a.yaml", "x", {}, "must end in .txt, .csv"),
        ("a.txt", "\n \n", {}, "holds no prompt"),
        ("a.csv", "title,id\nx,1\n", {}, "'title', 'id' hold none named 'prompt'"),
        ("a.json", '[{"title": 1}]', {}, "'title' hold none"),
        ("a.json", "[1]", {}, "1 must be a string"),
        ("a.json", "3", {}, "3 must be a list"),
        ("a.json", '{"0": 1}', {}, "1 must be a class name"),
        ("a.json", "[", {}, "is no .json file"),
        ("a.txt", "x", {"template": "a photo"}, "must say where"),
        ("a.txt", "x", {"limit": 0}, "limit=0"),
    ],
)
def test_mistakes_are_named(
    tmp_path: Path, name: str, text: str, options: dict[str, object], expected: str
) -> None:
    with pytest.raises(ConfigError, match=expected.replace(".", "[.]")):
        texts(write(tmp_path, name, text), **options)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"none\.txt' cannot be read: No such file"):
        load_prompts(tmp_path / "none.txt")
