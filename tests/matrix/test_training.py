"""Rows: gradients through merged tokens."""

import copy
from typing import Any

import pytest
import torch
from peft import LoraConfig

from tests.matrix.frame import Cell, difference, row
from tests.matrix.pictures import SCHEDULED, STATELESS
from tests.tiny import flux_inputs, tiny_flux, tiny_sdxl_unet, unet_inputs
from toma_fx import MergeConfig, transform

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


@row("Training a LoRA, with and without gradient checkpointing", section=SECTION)
@pytest.mark.parametrize("config", [STATELESS, SCHEDULED], ids=["stateless", "scheduled"])
@pytest.mark.parametrize("checkpointed", ["before", "after", "never"])
def test_training(cell: Cell, config: MergeConfig, checkpointed: str) -> None:
    expected = trained(transform(with_lora(cell.family), config), cell.family)
    original = with_lora(cell.family)
    if checkpointed == "before":
        original.enable_gradient_checkpointing()
    model = transform(original, config)
    if checkpointed == "after":
        model.enable_gradient_checkpointing()
    got = trained(cell.apply(model), cell.family)
    for one, other in zip(got, expected, strict=True):
        assert difference(one, other) < 1e-4
    shared = [weight for weight in original.parameters() if weight.requires_grad]
    assert all(torch.equal(a, b) for a, b in zip(shared, got[1:], strict=True))
    untouched = trained(copy.deepcopy(with_lora(cell.family)), cell.family)
    assert difference(untouched[0], expected[0]) > 1e-3
