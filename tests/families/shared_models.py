"""Two processes draw with one model of a family, split by context parallelism."""

from typing import Any

import torch
from diffusers import ContextParallelConfig
from diffusers.models._modeling_parallel import ContextParallelOutput
from torch import Tensor

from tests.families.lives import LIVES, SPLIT, run
from tests.matrix.ranks import RANKS
from toma_fx import MergeConfig, TomaError, restore, transform

Case = tuple[str, MergeConfig, dict[str, Any], bool]
"""A family, what is merged, the size of the call, and whether ranks may hold unequal parts."""


def split(cases: list[Case], mode: str = "eager") -> list[Tensor | str]:
    """Outputs of transformed models that ranks share, or the messages of their refusals."""
    return [_split(*case, mode) for case in cases]


def _split(
    name: str, config: MergeConfig, size: dict[str, Any], anything: bool, mode: str
) -> Tensor | str:
    torch._dynamo.reset()
    life = SPLIT[name]
    model = transform(life.build(), config)
    parallel = ContextParallelConfig(ulysses_degree=RANKS, ulysses_anything=anything)
    try:
        model.enable_parallelism(config=parallel)
        if mode == "compile":
            model.compile(fullgraph=True, backend="aot_eager")
        elif mode == "regional":
            model.compile_repeated_blocks(fullgraph=True, backend="aot_eager")
        return run(model, life.call(model, batch=1, **size)).clone()
    except TomaError as error:
        return f"{type(error).__name__}: {error}"


def joint(names: list[str]) -> list[str]:
    """The messages of splitting models whose blocks take image and text in one sequence."""
    said = []
    plan: dict[str, Any] = {"proj_out": ContextParallelOutput(gather_dim=1, expected_dims=3)}
    for name in names:
        model = transform(LIVES[name].build())
        try:
            model.enable_parallelism(
                config=ContextParallelConfig(ulysses_degree=RANKS), cp_plan=plan
            )
        except TomaError as error:
            said.append(str(error))
    return said


def restored(cases: list[tuple[str, dict[str, Any]]]) -> list[Tensor]:
    """Outputs of models that ranks share, restored."""
    outputs = []
    for name, size in cases:
        life = LIVES[name]
        model = transform(life.build())
        model.enable_parallelism(config=ContextParallelConfig(ulysses_degree=RANKS))
        call = life.call(model, batch=1, **size)
        outputs.append(run(restore(model), call).clone())
    return outputs
