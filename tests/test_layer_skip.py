"""A hook that skips the block which makes its group's plan: the plan is made all the same."""

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers.hooks import LayerSkipConfig, apply_layer_skip
from torch import Tensor
from torch.overrides import TorchFunctionMode

from tests.tiny import tiny_sdxl_unet, unet_inputs
from toma_fx import Schedule, transform
from toma_fx.errors import InputError

GROUP = "mid_block.attentions.0.transformer_blocks"


def call(model: Any, **changes: Any) -> Tensor:
    with torch.no_grad():
        sample: Tensor = model(**{**unet_inputs(model), **changes}).sample
    return sample


def skipping(model: Any) -> Any:
    """The model, without the first block of a group."""
    apply_layer_skip(model, LayerSkipConfig(indices=[0], fqn=GROUP))
    return model


class Selections(TorchFunctionMode):
    """Counts how often destinations are chosen."""

    count = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func is torch.ops.toma.select.default
        return func(*args, **(kwargs or {}))


OPTIONS: list[dict[str, Any]] = [
    {},
    {"residual": "replace", "region": "stripe"},
    {"schedule": Schedule(select_every=2)},
    {"merge_below": 0.9},
]


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_the_group_merges_as_if_its_second_block_led(options: dict[str, Any], when: str) -> None:
    """Which sees the same tokens, since the first is skipped."""
    unet = tiny_sdxl_unet()
    second_leads = skipping(transform(unet, **options, skip=(f"{GROUP}.0",)))
    if when == "before":
        model = transform(skipping(copy.deepcopy(unet)), **options)
    else:
        model = skipping(transform(unet, **options))
    for timestep in (950, 800, 700):
        got = call(model, timestep=torch.tensor(timestep))
        assert torch.equal(got, call(second_leads, timestep=torch.tensor(timestep)))
    assert not torch.equal(got, call(skipping(copy.deepcopy(unet)), timestep=torch.tensor(700)))


def test_a_group_that_is_skipped_whole_makes_no_plan() -> None:
    """As the caches of whole blocks do, which would pay for it at every step."""
    model = transform(tiny_sdxl_unet(), skip=("down_blocks.*", "up_blocks.*"))
    with Selections() as counted:
        call(model)
    assert counted.count == 1
    apply_layer_skip(model, LayerSkipConfig(indices=[0, 1], fqn=GROUP))
    with Selections() as counted:
        call(model)
    assert counted.count == 0


@pytest.mark.parametrize(
    "duplicate", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))]
)
def test_a_copy_can_be_skipped_too(duplicate: Callable[[Any], Any]) -> None:
    model = transform(tiny_sdxl_unet())
    twin = skipping(duplicate(model))
    assert torch.equal(call(twin), call(skipping(model)))


def test_a_hook_that_comes_after_compiling_is_not_lost() -> None:
    unet = tiny_sdxl_unet()
    model = transform(unet)
    model.compile_repeated_blocks(fullgraph=True, backend="eager")
    whole = call(model)
    skipped = call(skipping(model))
    assert not torch.allclose(skipped, whole, atol=1e-3)
    torch.testing.assert_close(skipped, call(skipping(transform(unet))))


def test_a_plan_of_what_the_skipped_layers_compute_is_refused() -> None:
    model = skipping(transform(tiny_sdxl_unet(), placement="component"))
    with pytest.raises(InputError, match="to skip the first, transform with share='block'"):
        call(model)
    call(skipping(transform(tiny_sdxl_unet(), placement="component", share="block")))
