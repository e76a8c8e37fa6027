"""Every Python snippet and every command of the README and of the pages is one that works.

The snippets of a page run in order in one namespace. Names that a page takes for granted, such as
``pipe``, are tiny real models, made anew for each snippet; a name of the hub is that of one on
disk, a GPU is the CPU, an image takes two steps, and blocks compile without Inductor. A snippet
that cannot run here says why in a comment above it, ``<!-- not run: reason -->``; its syntax and
its names of toma_fx are still looked at.
"""

import argparse
import ast
import re
import runpy
import shlex
import sys
from collections.abc import Callable, Iterator
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from diffusers import (
    DiffusionPipeline,
    FluxKontextPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)

import toma_fx
from tests.pipelines import tiny_flux_pipeline, tiny_sdxl_pipeline
from tests.tiny import flux_inputs, tiny_flux, tiny_sdxl_unet

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


def tiny_pipe() -> StableDiffusionXLPipeline:
    """Draws 128 x 128 pixels."""
    pipe = tiny_sdxl_pipeline()
    pipe.unet.register_to_config(sample_size=16)
    return pipe


def tiny_kontext_pipe() -> FluxKontextPipeline:
    return FluxKontextPipeline(**tiny_flux_pipeline().components)


HUB: dict[str, Callable[[], Any]] = {
    "stabilityai/stable-diffusion-xl-base-1.0": tiny_pipe,
    "black-forest-labs/FLUX.1-Kontext-dev": tiny_kontext_pipe,
}
"""Names of the hub on the pages, and what they load here."""


GIVEN: dict[str, Callable[[], Any]] = {
    "torch": lambda: torch,
    "toma_fx": lambda: toma_fx,
    "pipe": tiny_pipe,
    "unet": tiny_sdxl_unet,
    "model": tiny_flux,
    "example": lambda: flux_inputs(tiny_flux()),
    "prompts": lambda: ["a b"],
    "program_of_yours": lambda: toma_fx.trace(tiny_sdxl_unet()),
}
"""What pages take for granted."""


class Snippet(NamedTuple):
    page: Path
    line: int
    source: str
    not_run: str | None
    """Why."""


def snippets(page: Path, language: str) -> list[Snippet]:
    text = page.read_text(encoding="utf-8")
    block = rf"^(?:<!-- not run: (.+) -->\n)?```{language}\n(.*?)^```$"
    return [
        Snippet(page, text[: found.start(2)].count("\n") + 1, found[2], found[1])
        for found in re.finditer(block, text, re.MULTILINE | re.DOTALL)
    ]


PYTHON = {page: snippets(page, "python") for page in PAGES}


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder to write into, and tiny models on the CPU for those of the hub on a GPU."""
    load: Any = DiffusionPipeline.from_pretrained
    to: Any = DiffusionPipeline.to
    compiled: Any = UNet2DConditionModel.compile_repeated_blocks
    draw: Any = StableDiffusionXLPipeline.__call__

    def call(pipe: Any, *args: Any, **options: Any) -> Any:
        return draw(pipe, *args, **{**options, "num_inference_steps": 2})

    def from_pretrained(cls: Any, /, name: str, **options: Any) -> Any:
        folder = tmp_path / "hub" / name
        HUB[name]().save_pretrained(folder)
        return load.__func__(cls, folder, **options)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(DiffusionPipeline, "from_pretrained", classmethod(from_pretrained))

    def compile_blocks(model: Any, **options: Any) -> None:
        compiled(model, **options, backend="eager")

    monkeypatch.setattr(UNet2DConditionModel, "compile_repeated_blocks", compile_blocks)
    monkeypatch.setattr(StableDiffusionXLPipeline, "__call__", call)
    monkeypatch.setattr(DiffusionPipeline, "to", lambda pipe, device: to(pipe, "cpu"))


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # diffusers' own
# The name that every diffusers from 0.38 on takes; `dtype` came to pipelines with 0.40.
@pytest.mark.filterwarnings("ignore:.torch_dtype. is deprecated:FutureWarning")
@pytest.mark.parametrize("page", [p for p in PAGES if PYTHON[p]], ids=lambda page: page.name)
def test_python_runs(page: Path, here: None) -> None:
    namespace: dict[str, Any] = {"__name__": "page"}
    own: set[str] = set()
    for snippet in PYTHON[page]:
        if snippet.not_run:
            continue
        source = "\n" * (snippet.line - 1) + snippet.source  # so that a traceback names the line
        names = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Name)]
        for name in {node.id for node in names} & GIVEN.keys() - own:
            namespace[name] = GIVEN[name]()
        exec(compile(source, str(page), "exec"), namespace)
        own |= {node.id for node in names if isinstance(node.ctx, ast.Store)}


def test_python_that_is_not_run_is_right_as_far_as_can_be_seen() -> None:
    for snippet in (s for page in PAGES for s in PYTHON[page] if s.not_run):
        for node in ast.walk(ast.parse(snippet.source)):  # a SyntaxError names the line
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("toma_fx"):
                for alias in node.names:
                    assert hasattr(import_module(node.module or ""), alias.name), snippet
            if isinstance(node, ast.Attribute) and ast.unparse(node.value) == "toma_fx":
                assert hasattr(toma_fx, node.attr), snippet


class Parsed(Exception):  # noqa: N818  (no error: the command was understood)
    pass


@pytest.fixture
def parsing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Programs stop once they have understood their options."""
    parse = argparse.ArgumentParser.parse_args

    def parse_args(self: Any, args: Any = None, namespace: Any = None) -> Any:
        parse(self, args, namespace)
        raise Parsed

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse_args)
    monkeypatch.syspath_prepend(str(ROOT))
    monkeypatch.chdir(ROOT)


def commands(source: str) -> Iterator[str]:
    """The commands of a block, with loops unrolled."""
    loop: tuple[str, list[str]] = ("", [""])
    for line in source.replace("\\\n", " ").splitlines():
        if begun := re.fullmatch(r"for (\w+) in (.*); do", line):
            loop = (f"${begun[1]}", begun[2].split())
        elif line == "done":
            loop = ("", [""])
        elif line.strip():
            yield from (line.replace(loop[0], value) if loop[0] else line for value in loop[1])


@cache
def targets() -> set[str]:
    return set(re.findall(r"^([\w -]+?):(?!=)", (ROOT / "Makefile").read_text(), re.MULTILINE))


def understood(command: str, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether a program of the repository takes a command; `False` for programs of others."""
    words = shlex.split(command, comments=True)
    if words[0] == "make":
        assert {words[1]} <= {name for line in targets() for name in line.split()}, command
        return True
    if words[0] in ("pip", "hf", "EXPECTTEST_ACCEPT=1"):
        return False
    if words[:2] == ["accelerate", "launch"]:
        start = next(i for i, word in enumerate(words) if word.endswith(".py") or word == "-m")
        words = ["python", *words[start:]]
    if words[0] == ".venv/bin/python":
        words[0] = "python"
    if words[:3] == ["python", "-m", "pytest"]:
        return False
    if words[:3] == ["python", "-m", "toma_fx"]:
        words = ["toma-fx", *words[3:]]
    with pytest.raises(Parsed):
        run(words, monkeypatch)
    return True


def run(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    if words[0] == "toma-fx":
        from toma_fx.cli import main

        main(words[1:])
    assert words[0] == "python", f"{shlex.join(words)} is of no program that is known here"
    module = words[1] == "-m"
    monkeypatch.setattr(sys, "argv", words[2 if module else 1 :])
    if module:
        runpy.run_module(words[2], run_name="__main__")
    runpy.run_path(words[1], run_name="__main__")


# Another test may have imported a program that runs here as `python -m`.
@pytest.mark.filterwarnings("ignore:.*found in sys.modules after import:RuntimeWarning")
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_are_understood(
    page: Path, parsing: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for block in snippets(page, "bash"):
        for command in commands(block.source):
            try:
                understood(command, monkeypatch)
            except SystemExit:
                pytest.fail(f"{page.name}: {command}\n{capsys.readouterr().err}")
