"""Pipelines and networks on disk, made once."""

from pathlib import Path
from typing import Any

import pytest

from tests.lab.tiny_networks import save_tiny_clip, save_tiny_dino
from tests.pipelines import tiny_flux_pipeline, tiny_sdxl_pipeline


def pytest_collection_modifyitems(items: list[Any]) -> None:
    # diffusers' Euler scheduler hands a tensor to numpy
    for item in items:
        if "tests/lab" in item.path.as_posix():
            item.add_marker(
                pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
            )


@pytest.fixture(scope="session")
def sdxl(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a tiny SDXL pipeline."""
    folder = tmp_path_factory.mktemp("pipelines") / "sdxl"
    tiny_sdxl_pipeline().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def flux(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a tiny Flux pipeline."""
    folder = tmp_path_factory.mktemp("pipelines") / "flux"
    tiny_flux_pipeline().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a tiny CLIP."""
    return save_tiny_clip(tmp_path_factory.mktemp("networks") / "clip")


@pytest.fixture(scope="session")
def dino(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a tiny DINO."""
    return save_tiny_dino(tmp_path_factory.mktemp("networks") / "dino")
