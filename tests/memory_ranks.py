"""Two processes draw with one model with memory."""

from typing import Any

from diffusers import ContextParallelConfig
from torch import Tensor

from tests.families.lives import LIVES, run
from tests.matrix.ranks import RANKS
from toma_fx import MergeConfig, transform

STEPS = 4


def calls_of(name: str, size: dict[str, Any]) -> list[dict[str, Any]]:
    """The calls of a run, from other tokens at each lower timestep."""
    model, life = LIVES[name].build(), LIVES[name]
    first = life.call(model, batch=1, **size)
    last = life.call(model, batch=1, seed=1, **size)["hidden_states"]
    return [
        {
            **first,
            "hidden_states": first["hidden_states"] * (1 - step / 8) + last * step / 8,
            "timestep": (first["timestep"] * (1 - step / 8)).to(first["timestep"].dtype),
        }
        for step in range(STEPS)
    ]


def split(cases: list[tuple[str, MergeConfig, dict[str, Any]]]) -> list[list[Tensor]]:
    """Outputs of each step, of transformed models that ranks share."""
    outputs = []
    for name, config, size in cases:
        model = transform(LIVES[name].build(), config)
        parallel = ContextParallelConfig(ulysses_degree=RANKS, ulysses_anything=True)
        model.enable_parallelism(config=parallel)
        outputs.append([run(model, call).clone() for call in calls_of(name, size)])
    return outputs
