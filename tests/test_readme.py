"""The README and the pages on options and on how it works agree with the code."""

import runpy
from pathlib import Path

import pytest

import toma_fx
from tests.tiny import tiny_sdxl_unet
from toma_fx.build import block_graphs
from toma_fx.config import PRESETS, MergeConfig
from toma_fx.passes.readable import readable

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
OPTIONS = (ROOT / "docs" / "options.md").read_text()
HOW = (ROOT / "docs" / "how_it_works.md").read_text()


def test_printed_block_is_the_generated_one() -> None:
    _, _, lead = next(block_graphs(tiny_sdxl_unet(), MergeConfig()))
    assert readable(lead) in HOW


@pytest.mark.parametrize(
    ("repository", "link", "picture"),
    [
        (None, "[text](#here), more, [paper](https://a.b/c)", ""),
        (
            "https://a.b",
            "[text](#here), [more](https://a.b/blob/main/docs/more.md#x), [paper](https://a.b/c)",
            "![seen](https://a.b/raw/main/docs/a.png)",
        ),
    ],
)
def test_the_readme_of_an_index_has_no_relative_link(
    repository: str | None, link: str, picture: str
) -> None:
    change = runpy.run_path(str(ROOT / "setup.py"))["for_the_index"]
    text = "[text](#here), [more](docs/more.md#x), [paper](https://a.b/c)"
    assert change(text, repository) == link
    assert change("![seen](docs/a.png)", repository) == picture


def test_every_field_and_preset_is_named() -> None:
    for name in [*MergeConfig.__dataclass_fields__, *PRESETS]:
        assert f"`{name}`" in OPTIONS or f'`"{name}"`' in OPTIONS, name


def test_the_readme_is_short() -> None:
    assert len(README.splitlines()) <= 120


def test_import_does_not_touch_the_gpu() -> None:
    import torch

    assert toma_fx.__version__ in (ROOT / "CHANGELOG.md").read_text()
    assert not torch.cuda.is_initialized()
