"""Settings for all tests."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings

# Nothing is downloaded in a test, and asking for it would only wait for a network.
os.environ["HF_HUB_OFFLINE"] = "1"
# Before torch is imported. torch keeps compiled code between processes under the names of the
# operators in a graph, which do not change when what they do does.
os.environ["TORCHINDUCTOR_AUTOGRAD_CACHE"] = "0"

# No deadline, because the first example of a test may have to compile or import something. And the
# same examples everywhere, so that a test which fails for one fails for all.
settings.register_profile("toma_fx", deadline=None, derandomize=True, database=None)
settings.load_profile("toma_fx")


@pytest.fixture
def backend_as_it_was() -> Iterator[None]:
    """diffusers keeps the backend that was set last for models to come."""
    from diffusers.models.attention_dispatch import _AttentionBackendRegistry

    before = _AttentionBackendRegistry._active_backend
    yield
    _AttentionBackendRegistry._active_backend = before


def pytest_collection_modifyitems(items: list[Any]) -> None:
    # diffusers' Euler scheduler hands a tensor to numpy
    for item in items:
        if {"lab", "benchmarks"} & {*item.path.relative_to(item.config.rootpath).parts}:
            item.add_marker(
                pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
            )


@pytest.fixture(scope="session")
def sdxl(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a tiny SDXL pipeline."""
    from tests.pipelines import tiny_sdxl_pipeline

    folder = tmp_path_factory.mktemp("pipelines") / "sdxl"
    tiny_sdxl_pipeline().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def flux(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a tiny Flux pipeline."""
    from tests.pipelines import tiny_flux_pipeline

    folder = tmp_path_factory.mktemp("pipelines") / "flux"
    tiny_flux_pipeline().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a tiny CLIP."""
    from tests.tiny_networks import save_tiny_clip

    return save_tiny_clip(tmp_path_factory.mktemp("networks") / "clip")


@pytest.fixture(scope="session")
def dino(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a tiny DINO."""
    from tests.tiny_networks import save_tiny_dino

    return save_tiny_dino(tmp_path_factory.mktemp("networks") / "dino")
