"""Runs a part of a row in two processes, as if each had an accelerator of its own."""

from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from diffusers import ContextParallelConfig, TensorParallelConfig
from diffusers.hooks import tensor_parallel
from torch import Tensor
from torch.multiprocessing.spawn import spawn

from tests.matrix.frame import Cell
from tests.tiny import flux_inputs, tiny_flux
from toma_fx import MergeConfig, transform

RANKS = 2

Job = Callable[..., Any]


def on_ranks(job: Job, folder: Path, *args: Any) -> Any:
    """What a job returns in the first of two processes.

    Args:
        job: a function of a module.
        folder: for files between the processes.
        *args: of the job; they are pickled.
    """
    spawn(_rank, (job, folder, args), nprocs=RANKS)
    return torch.load(folder / "result.pt")


def _rank(rank: int, job: Job, folder: Path, args: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    meet = f"file://{folder / 'meet'}"
    dist.init_process_group("gloo", init_method=meet, rank=rank, world_size=RANKS)
    # diffusers places ranks on accelerators, of which the CPU has none, and lists where it tested
    # tensor parallelism; what it then does is the same on the CPU.
    with (
        mock.patch("torch.accelerator.device_count", return_value=RANKS),
        mock.patch.object(tensor_parallel, "_SUPPORTED_TP_DEVICES", ("cpu",)),
        torch.no_grad(),
    ):
        result = job(*args)
    if rank == 0:
        torch.save(result, folder / "result.pt")
    dist.destroy_process_group()


def call(model: Any) -> Tensor:
    """The output of a Flux, twice the same, as a pipeline asks for it."""
    inputs = flux_inputs(model, batch=1)
    outputs = [model(**inputs, return_dict=False)[0] for _ in range(2)]
    assert torch.equal(*outputs)
    first: Tensor = outputs[0].clone()  # a plain tensor, when the ranks' parts have come
    return first


def ulysses(mode: str, backend: str, configs: list[MergeConfig]) -> list[Tensor]:
    """Outputs of transformed models, each split among the ranks by Ulysses attention."""
    outputs = []
    for config in configs:
        torch._dynamo.reset()
        model = transform(tiny_flux(), config)
        model.enable_parallelism(config=ContextParallelConfig(ulysses_degree=RANKS))
        outputs.append(call(Cell("flux", mode, backend).apply(model)))
    return outputs


def tensor_parallelism(mode: str, backend: str, when: str) -> tuple[Tensor, tuple[int, ...]]:
    """Output of a transformed model split by tensor parallelism, and a weight's part on a rank."""
    model = tiny_flux()
    split = TensorParallelConfig(tp_degree=RANKS)
    if when == "before":
        model.enable_parallelism(config=split)
    model = transform(model)
    if when == "after":
        model.enable_parallelism(config=split)
    weight: Any = model.transformer_blocks[0].attn.to_q.weight
    output = call(Cell("flux", mode, backend).apply(model))
    return output, tuple(weight.to_local().shape)


def split_before() -> str:
    """The message of transforming a model that ranks share already."""
    model = tiny_flux()
    model.enable_parallelism(config=ContextParallelConfig(ulysses_degree=RANKS))
    try:
        transform(model)
    except ValueError as error:
        return f"{type(error).__name__}: {error}"
    return ""
