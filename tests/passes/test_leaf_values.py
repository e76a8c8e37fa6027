"""Shape and type of a submodule's output, found without its weights."""

import re
from typing import Any

import pytest
import torch
from diffusers.models.attention_processor import AttnProcessor2_0
from diffusers.models.transformers.transformer_flux import FluxAttnProcessor
from diffusers.models.transformers.transformer_wan import WanAttnProcessor
from peft import LoraConfig
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from tests.passes.blocks import block_of, inputs_of
from tests.tiny import tiny_flux
from tests.tiny_families import tiny_wan
from toma_fx.errors import CaptureError
from toma_fx.passes.leaf_values import run_on_examples


def on_meta(values: Any, dtype: torch.dtype = torch.float32) -> Any:
    return pytree.tree_map_only(Tensor, lambda each: each.to("meta", dtype), values)


def check(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """Compare an example with what the module returns; in float16 too, whatever is stored."""
    with torch.no_grad():
        expected = module(*args, **kwargs)
    for dtype in (torch.float32, torch.float16):
        example = run_on_examples(module, on_meta(args, dtype), on_meta(kwargs, dtype))
        flat, like = pytree.tree_leaves(example), pytree.tree_leaves(expected)
        assert pytree.tree_structure(example) == pytree.tree_structure(expected)
        for each, real in zip(flat, like, strict=True):
            assert (each.shape, each.dtype, each.device.type) == (real.shape, dtype, "meta")
    return example


TOKENS = torch.ones(2, 5, 32)


@pytest.mark.parametrize(
    "module",
    [
        nn.Linear(32, 7),
        nn.Linear(32, 7, dtype=torch.float32).requires_grad_(requires_grad=False),
        nn.LayerNorm(32),
        nn.Sequential(nn.Linear(32, 4), nn.GELU(), nn.Linear(4, 3)),
        nn.Identity(),
    ],
    ids=repr,
)
def test_plain_layers(module: nn.Module) -> None:
    check(module, TOKENS)
    check(module, input=TOKENS) if isinstance(module, nn.Linear) else None


@pytest.mark.parametrize("name", ["unet", "flux_double", "flux_single"])
def test_layers_of_a_block(name: str) -> None:
    """What each is called with is what a run of the block says."""
    block, inputs = block_of(name), inputs_of(name)
    called: list[tuple[nn.Module, Any, Any]] = []
    hooks = [
        child.register_forward_pre_hook(
            lambda module, args, kwargs: called.append((module, args, kwargs)), with_kwargs=True
        )
        for child in block.children()
    ]
    with torch.no_grad():
        block(**inputs)
    for hook in hooks:
        hook.remove()
    assert called
    for module, args, kwargs in called:
        check(module, *args, **kwargs)


def test_attention_that_returns_a_tuple() -> None:
    attention = block_of("flux_double").attn
    text = torch.ones(2, 7, 32)
    ids = torch.zeros(12, 3)
    rotary = tiny_flux().pos_embed(ids)
    image_out, text_out = check(
        attention, hidden_states=TOKENS, encoder_hidden_states=text, image_rotary_emb=rotary
    )
    assert (image_out.shape, text_out.shape) == ((2, 5, 32), (2, 7, 32))


def test_adapted_layers() -> None:
    model = tiny_flux()
    targets = ["to_q", "to_k", "to_v", "to_out.0", "proj_mlp"]
    model.add_adapter(LoraConfig(r=2, target_modules=targets, init_lora_weights="gaussian"))
    block = model.single_transformer_blocks[0]
    assert hasattr(block.proj_mlp, "lora_A")
    check(block.proj_mlp, TOKENS)
    check(block.attn, hidden_states=TOKENS)


class Packed(nn.Module):
    """A layer of a library for quantisation: its weight is in bytes, which only it can read."""

    def __init__(self) -> None:
        super().__init__()
        self.in_features, self.out_features = 32, 12
        self.weight = nn.Parameter(torch.zeros(192, dtype=torch.uint8), requires_grad=False)

    def forward(self, x: Any) -> Any:
        raise AssertionError("an example is found without running it")


def test_quantised_layers() -> None:
    tokens = torch.empty(2, 5, 32, dtype=torch.float16, device="meta")
    for module in (Packed(), nn.Sequential(Packed(), nn.SiLU())):
        example = run_on_examples(module, (tokens,), {})
        assert (example.shape, example.dtype) == ((2, 5, 12), torch.float16)


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_nothing_of_a_module_is_run_or_changed(device: str) -> None:
    """Its layers may be offloaded, and its hooks would bring them."""
    attention = block_of("flux_single").attn.to(device)
    for module in attention.modules():
        module.register_forward_pre_hook(lambda *_: pytest.fail("a hook ran"))
    before = [dict(vars(module)) for module in attention.modules()]
    run_on_examples(attention, (TOKENS.to("meta"),), {})
    assert [dict(vars(module)) for module in attention.modules()] == before


class Looking(WanAttnProcessor):  # type: ignore[misc]
    """Looks at values, which an example has not."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        output = super().__call__(*args, **kwargs)
        assert output.sum().item() == output.sum().item()
        return output


class Own:
    """Written by someone, on nothing of diffusers."""

    def __call__(self, attn: Any, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return hidden_states if hidden_states.sum().item() else -hidden_states


@pytest.mark.parametrize("processor", [Looking(), Own()], ids=["of diffusers", "own"])
def test_attention_processors_of_others_are_not_run(processor: Any) -> None:
    attention = tiny_wan().blocks[0].attn1
    attention.set_processor(processor)
    tokens = torch.empty(2, 5, attention.inner_dim, device="meta")
    rotary = (torch.empty(1, 5, 1, attention.inner_dim // attention.heads, device="meta"),) * 2
    example = run_on_examples(attention, (tokens, None, None, rotary), {})
    assert example.shape == tokens.shape
    assert attention.processor is processor


@pytest.mark.parametrize("name", ["unet", "flux_double"])
def test_a_block_whose_processors_look_at_values_is_captured(name: str) -> None:
    from tests.passes.blocks import capture, is_equal, run

    class Values(AttnProcessor2_0 if name == "unet" else FluxAttnProcessor):  # type: ignore[misc]
        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            output = super().__call__(*args, **kwargs)
            assert all(each.isfinite().all().item() for each in pytree.tree_leaves(output))
            return output

    block, inputs = block_of(name), inputs_of(name)
    for each in block.modules():
        if hasattr(each, "set_processor"):
            each.set_processor(Values())
    assert is_equal(run(capture(block), inputs), run(block, inputs))


class Failing(nn.Module):
    def forward(self, x: Any) -> Any:
        return x if x.sum().item() > 0 else -x


def test_a_forward_that_needs_values() -> None:
    message = (
        r"^a Failing cannot run on tensors without data, which tell the shape of its output "
        r"\(\w+: .+\); if something was put into it, take it off and transform again$"
    )
    with pytest.raises(CaptureError, match=re.compile(message, re.DOTALL)) as failure:
        run_on_examples(Failing(), (TOKENS.to("meta"),), {})
    assert failure.value.__cause__ is not None
