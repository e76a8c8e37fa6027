"""Pipelines on disk, made once."""

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionXLImg2ImgPipeline
from torch import nn

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
    """Holds a tiny SDXL, ``sdxl``, one that changes images, ``needs_image``, and a tiny Flux."""
    made = tmp_path_factory.mktemp("pipelines")
    for kind in KINDS:
        tiny = pipeline(kind, tiny=True)
        if kind == "flux":
            _open_gates(tiny.transformer)
        else:
            StableDiffusionXLImg2ImgPipeline(**tiny.components).save_pretrained(
                made / "needs_image"
            )
        tiny.save_pretrained(made / kind)
    return made


def _open_gates(transformer: nn.Module) -> None:
    """An untrained Flux's blocks change nothing, so that merging would not either."""
    torch.manual_seed(0)
    for parameter in transformer.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=0.1)
