"""Pipelines on disk, made once."""

from pathlib import Path
from typing import Any

import pytest

from examples.small_models.architecture import KINDS, pipeline


def pytest_collection_modifyitems(items: list[Any]) -> None:
    # diffusers' Euler scheduler hands a tensor to numpy
    for item in items:
        if "tests/app" in item.path.as_posix():
            item.add_marker(
                pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
            )


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Holds a tiny SDXL, ``sdxl``, and a tiny Flux, ``flux``."""
    made = tmp_path_factory.mktemp("pipelines")
    for kind in KINDS:
        pipeline(kind, tiny=True).save_pretrained(made / kind)
    return made
