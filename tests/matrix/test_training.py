"""Rows: gradients through merged tokens."""

from typing import Any

import pytest
import torch
from peft import LoraConfig
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
    apply_activation_checkpointing,
)

from tests.matrix.frame import TOLERANCE, Cell, difference, row
from tests.tiny import flux_inputs, tiny_flux, tiny_sdxl_unet, unet_inputs
from toma_fx import MergeConfig, transform
from toma_fx.errors import InputError

PRESETS = ("default", "toma")

pytestmark = [
    pytest.mark.parametrize("config", [MergeConfig.preset(n) for n in PRESETS], ids=PRESETS),
    # Of a version check in what diffusers calls to checkpoint a block.
    pytest.mark.filterwarnings("ignore:Dynamo detected a call to a .functools.lru_cache"),
    # Dynamo looks for one on every tensor that a compiled block is given in a container.
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf"),
]

SECTION = "Life of a model"
STEPS = 4


def with_lora(family: str) -> Any:
    """A model of which only a LoRA is trained."""
    model = tiny_sdxl_unet() if family == "sdxl" else tiny_flux()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        adapter = LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False)
        model.requires_grad_(False).add_adapter(adapter)
    return model.train()


def trained(model: Any, family: str) -> list[torch.Tensor]:
    """Losses of some steps of training, then what was trained."""
    inputs: dict[str, Any]
    if family == "sdxl":
        inputs = unet_inputs(model, height=16, width=16)
    else:
        inputs = flux_inputs(model, height=8, width=8)
    generator = torch.Generator().manual_seed(0)
    target = torch.randn(model(**inputs).sample.shape, generator=generator)
    weights = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(weights, lr=0.05)
    losses = []
    for _ in range(STEPS):
        loss = (model(**inputs).sample - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        assert all(weight.grad is not None and weight.grad.any() for weight in weights)
        optimizer.step()
        losses.append(loss.detach())
    assert losses == sorted(losses, reverse=True)
    return [torch.stack(losses), *(weight.detach() for weight in weights)]


@row("Training a LoRA", section=SECTION, quick=())
def test_training(cell: Cell, config: MergeConfig) -> None:
    expected = trained(transform(with_lora(cell.family), config), cell.family)
    original = with_lora(cell.family)
    got = trained(cell.apply(transform(original, config)), cell.family)
    for one, other in zip(got, expected, strict=True):
        assert difference(one, other) < TOLERANCE
    shared = [weight for weight in original.parameters() if weight.requires_grad]
    assert all(torch.equal(a, b) for a, b in zip(shared, got[1:], strict=True))
    untouched = trained(with_lora(cell.family), cell.family)
    assert difference(untouched[0], expected[0]) > 1e-3


@row("Training with gradient checkpointing", section=SECTION, quick=())
def test_checkpointing(cell: Cell, config: MergeConfig) -> None:
    expected = trained(transform(with_lora(cell.family), config), cell.family)
    before = with_lora(cell.family)
    before.enable_gradient_checkpointing()
    before = transform(before, config)
    after = transform(with_lora(cell.family), config)
    after.enable_gradient_checkpointing()
    if cell.mode == "compile":
        cell.apply(after)
        with cell.refuses(InputError, match="compile_repeated_blocks"):
            trained(after, cell.family)
        return
    for model in (before, after) if cell.mode == "eager" else (after,):
        for one, other in zip(trained(cell.apply(model), cell.family), expected, strict=True):
            assert difference(one, other) < TOLERANCE


@pytest.mark.parametrize("when", ["before", "after"])
@row(
    "Training with `checkpoint_wrapper` around blocks, {when} `transform`",
    section=SECTION,
    modes=("eager", "regional"),
)
def test_wrapped_blocks(cell: Cell, config: MergeConfig, when: str) -> None:
    expected = trained(transform(with_lora(cell.family), config), cell.family)
    model = with_lora(cell.family)
    if when == "before":
        wrap(model)
    model = transform(model, config)
    if when == "after":
        wrap(model)
    assert any("_checkpoint_wrapped_module" in name for name, _ in model.named_modules())
    for one, other in zip(trained(cell.apply(model), cell.family), expected, strict=True):
        assert difference(one, other) < TOLERANCE


def wrap(model: Any) -> None:
    """Checkpoint every block, as FSDP's users do."""
    names = model._repeated_blocks
    apply_activation_checkpointing(model, check_fn=lambda m: type(m).__name__ in names)
