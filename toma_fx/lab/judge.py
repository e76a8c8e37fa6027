"""The judge of the repository's small models, as two measures that ask for good images.

A clone of the repository holds its files, beside the models that it was made for.
"""

from collections.abc import Sequence
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np

from toma_fx.lab.measures import Unavailable
from toma_fx.lab.networks import read_image


def right_answers(files: Sequence[Path], texts: Sequence[str]) -> list[float] | Unavailable:
    """Return the percentage of questions that the judge answers rightly, for each image.

    Args:
        files: The images.
        texts: The prompt of each; captions of the small models' pictures.
    """
    judge = _judge()
    if isinstance(judge, Unavailable):
        return judge
    try:
        scenes = [_module("pictures").parse(text) for text in texts]
    except ValueError as error:
        return Unavailable(str(error))
    shares = _module("judge").shares(judge, _read(files), scenes)
    return [100 * float(share) for share in shares]


def distance_to_true(files: Sequence[Path]) -> list[float] | Unavailable:
    """Return Frechet's distance from the images to true pictures, in the judge's features."""
    judge = _judge()
    if isinstance(judge, Unavailable):
        return judge
    if len(files) < 2:
        return Unavailable("a covariance needs at least 2 images")
    return [_module("judge").distance_to_true(judge, _read(files))]


@cache
def _judge() -> Any:
    try:
        return _module("judge").load_judge()
    except (ImportError, FileNotFoundError) as error:
        return Unavailable(f"the judge lies in a clone of the repository: {error}")


def _module(name: str) -> Any:
    return import_module(f"examples.small_models.{name}")


def _read(files: Sequence[Path]) -> Any:
    return np.stack([np.asarray(read_image(file)) for file in files])
