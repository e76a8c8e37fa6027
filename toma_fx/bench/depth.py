"""Models with random weights and fewer blocks than the published models have."""

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

from toma_fx.checkpoints import FAMILIES, RANDOM, model_class
from toma_fx.errors import ConfigError


def one_of_each(model: str) -> tuple[int, ...]:
    """One block for each list of a model; empty where the configuration has no such numbers."""
    return (1,) * len(_fields(model))


def counted(model: str, blocks: Sequence[int]) -> dict[str, Any]:
    """The changes of a model's configuration that give it these numbers of blocks.

    Args:
        model: the name of a published model.
        blocks: one number for each list that its family names, or one for all of them.

    Raises:
        ConfigError: when the model has no such lists.
    """
    fields = _fields(model)
    numbers = tuple(blocks) * (len(fields) if len(blocks) == 1 else 1)
    if not fields:
        raise ConfigError(f"{model} has no lists of blocks to shorten; leave blocks out")
    if len(numbers) != len(fields) or min(numbers) < 1:
        raise ConfigError(
            f"blocks={tuple(blocks)} must be a number of at least 1 for each list of blocks of a "
            f"model with random weights, or one number for all; the lists of {model} are "
            f"{', '.join(fields)}"
        )
    cls, config = model_class(model)
    defaults = {name: each.default for name, each in inspect.signature(cls).parameters.items()}
    published, longest = {**defaults, **config}, range(numbers[0])
    # A list names the blocks of the first one that those of its own go with.
    return {
        name: [*longest][:number] if isinstance(published[name], list | tuple) else number
        for name, number in zip(fields.values(), numbers, strict=True)
    }


def _fields(model: str) -> Mapping[str, str]:
    return FAMILIES[model].block_counts if model in RANDOM else {}
