"""Captured blocks: the same numbers to the last bit, at every size, and the same arguments."""

import copy
import inspect
from typing import Any

import pytest
import torch
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.attention_processor import AttnProcessor2_0
from diffusers.models.transformers.transformer_flux import (
    FluxAttnProcessor,
    FluxIPAdapterAttnProcessor,
)
from torch import nn

from tests.passes.blocks import (
    NAMES,
    block_of,
    calls,
    capture,
    check_values,
    expect_graph,
    inputs_of,
    is_equal,
    row_of,
    run,
)
from tests.tiny import TEXT_WIDTH
from toma_fx.errors import CaptureError, InputError
from toma_fx.families import leaf_value
from toma_fx.passes.capture import capture_block
from toma_fx.runtime.plan import SCOPE, PlanScope

EVERY_BLOCK = pytest.mark.parametrize("name", NAMES)


class GainProcessor(AttnProcessor2_0):  # type: ignore[misc]
    """Takes an attention kwarg, as the processors of adapters do."""

    def __call__(self, *args: Any, gain: float = 1.0, **kwargs: Any) -> Any:
        return gain * super().__call__(*args, **kwargs)


class FluxGainProcessor(FluxAttnProcessor):  # type: ignore[misc]
    """The same for Flux, whose attention returns one or two sequences."""

    def __call__(self, *args: Any, gain: float = 1.0, **kwargs: Any) -> Any:
        result = super().__call__(*args, **kwargs)
        if isinstance(result, tuple):
            return tuple(gain * each for each in result)
        return gain * result


def with_gain(block: Any) -> Any:
    """The block, with attention layers that take the attention kwarg ``gain``."""
    if isinstance(block, BasicTransformerBlock):
        block.attn1.set_processor(GainProcessor())
        block.attn2.set_processor(GainProcessor())
    else:
        block.attn.set_processor(FluxGainProcessor())
    return block


@EVERY_BLOCK
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_captured_block_is_exact(name: str, dtype: torch.dtype) -> None:
    block, inputs = block_of(name, dtype), inputs_of(name, dtype)
    assert is_equal(run(capture(block), inputs), run(block, inputs))


@EVERY_BLOCK
@pytest.mark.parametrize(
    "sizes",
    [
        {"batch": 1},
        {"batch": 3, "height": 4},
        {"height": 13, "width": 11},
        {"text_tokens": 1},
        {"text_tokens": 77},
    ],
    ids=str,
)
def test_one_graph_serves_every_size(name: str, sizes: dict[str, Any]) -> None:
    block, inputs = block_of(name), inputs_of(name, **sizes)
    assert is_equal(run(capture(block), inputs), run(block, inputs))


@EVERY_BLOCK
@pytest.mark.parametrize(
    "kwargs",
    [None, {}, {"gain": 0.5}, {SCOPE: PlanScope()}, {"gain": 0.5, SCOPE: PlanScope()}],
    ids=["none", "empty", "gain", "scope", "gain and scope"],
)
def test_attention_kwargs_reach_the_attention_layers(name: str, kwargs: Any) -> None:
    block, inputs = with_gain(block_of(name)), inputs_of(name)
    argument = row_of(block).attention_kwargs
    original = None if kwargs is None else {k: v for k, v in kwargs.items() if k != SCOPE}
    expected = run(block, inputs, **{argument: original})
    assert is_equal(run(capture(block), inputs, **{argument: kwargs}), expected)
    assert ("gain" in (kwargs or {})) != is_equal(expected, run(block, inputs))


def test_masks_reach_the_attention_layers() -> None:
    block, inputs = block_of("unet"), inputs_of("unet")
    generator = torch.Generator().manual_seed(0)
    masks = {
        "attention_mask": torch.randn(2, 1, 64, generator=generator),
        "encoder_attention_mask": torch.randn(2, 1, 7, generator=generator),
    }
    expected = run(block, inputs, **masks)
    assert is_equal(run(capture(block), inputs, **masks), expected)
    assert not is_equal(run(block, inputs), expected)


@pytest.mark.parametrize(
    "structure",
    [
        {"only_cross_attention": True},
        {"double_self_attention": True},
        {"cross_attention_dim": None},
        {"upcast_attention": True, "attention_bias": True},
        {"norm_elementwise_affine": False, "activation_fn": "gelu"},
    ],
    ids=str,
)
def test_other_structures_of_a_unet_block(structure: dict[str, Any]) -> None:
    """Other UNets' blocks differ by arguments of the constructor, which decide branches."""
    options = {"cross_attention_dim": TEXT_WIDTH, **structure}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        block = BasicTransformerBlock(32, 2, 16, **options).eval()
    inputs = inputs_of("unet")
    assert is_equal(run(capture(block), inputs), run(block, inputs))


@pytest.mark.parametrize("name", ["flux_double", "flux_single"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_overflow_is_clipped_where_the_block_clips_it(dtype: torch.dtype, name: str) -> None:
    """In float16 only; and the graph, which is captured in float16, serves every dtype."""
    block, inputs = block_of(name, dtype), inputs_of(name, dtype)
    limit = torch.finfo(torch.float16).max
    large = limit if dtype == torch.float16 else 2 * limit
    inputs["encoder_hidden_states"] = large * inputs["encoder_hidden_states"].sign()
    text, image = run(block, inputs)
    assert is_equal(run(capture(block), inputs), (text, image))
    assert (text.float().abs().max() > limit) == (dtype != torch.float16)


def test_an_ip_adapter_adds_an_output() -> None:
    """diffusers asks for the number of outputs, and adds the third to the image tokens."""
    block, inputs = block_of("flux_double"), inputs_of("flux_double")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        processor = FluxIPAdapterAttnProcessor(32, TEXT_WIDTH, num_tokens=(4,))
    block.attn.set_processor(processor)
    gm = capture(block)
    image = torch.randn(2, 1, 4, TEXT_WIDTH, generator=torch.Generator().manual_seed(0))
    kwargs = {"joint_attention_kwargs": {"ip_hidden_states": [image]}}
    expected = run(block, inputs, **kwargs)
    assert is_equal(run(gm, inputs, **kwargs), expected)

    block.attn.set_processor(FluxAttnProcessor())
    assert not is_equal(run(block, inputs), expected)
    with pytest.raises(InputError, match="attention returned 2 outputs, but 3 when"):
        run(gm, inputs)


def test_an_ip_adapter_that_is_loaded_too_late() -> None:
    block, inputs = block_of("flux_double"), inputs_of("flux_double")
    gm = capture(block)
    block.attn.set_processor(FluxIPAdapterAttnProcessor(32, TEXT_WIDTH, num_tokens=(4,)))
    image = torch.zeros(2, 1, 4, TEXT_WIDTH)
    with pytest.raises(InputError, match="attention returned 3 outputs, but 2 when"):
        run(gm, inputs, joint_attention_kwargs={"ip_hidden_states": [image]})


@EVERY_BLOCK
def test_gligen_is_refused(name: str) -> None:
    block = block_of(name)
    argument = row_of(block).attention_kwargs
    with pytest.raises(InputError, match="the attention kwarg 'gligen'"):
        run(capture(block), inputs_of(name), **{argument: {"gligen": {"boxes": None}}})


@EVERY_BLOCK
def test_the_graph_has_the_arguments_of_the_block(name: str) -> None:
    block = block_of(name)
    ours, theirs = (
        {each.name: each.default for each in inspect.signature(module.forward).parameters.values()}
        for module in (capture(block), block)
    )
    assert list(ours.items()) == list(theirs.items())


@EVERY_BLOCK
def test_submodules_stay_nodes_and_parameters(name: str) -> None:
    block = block_of(name)
    gm = capture(block)
    assert {node.target for node in gm.graph.find_nodes(op="call_module")} == {
        child for child, _ in block.named_children() if child != "dropout"
    }
    for key, parameter in gm.named_parameters():
        assert parameter is block.get_parameter(key)


@EVERY_BLOCK
def test_capturing_does_not_run_or_change_the_block(name: str) -> None:
    """Weights may be offloaded or quantised: on the meta device, nothing could be computed."""
    block = block_of(name).to("meta")
    before = {key: copy.copy(value) for key, value in vars(block).items()}
    assert calls(capture(block)) == calls(capture(block_of(name)))
    assert vars(block) == before


@EVERY_BLOCK
def test_example_values_are_true(name: str) -> None:
    check_values(capture(block_of(name, torch.float16)))


@EVERY_BLOCK
def test_graph(name: str) -> None:
    expect_graph(capture(block_of(name)), f"capture.{name}")


def test_a_number_of_pieces_that_depends_on_a_size() -> None:
    """``unet.enable_forward_chunking`` cuts the MLP's tokens into pieces of a size."""
    block = block_of("unet")
    block.set_chunk_feed_forward(16, dim=1)
    # One graph cannot hold "as many calls as there are pieces": it would hold as many as there were
    # in the example, and fail or be wrong at any other size.
    with pytest.raises(CaptureError):
        capture(block)


class Branches(nn.Module):
    """Asks of its argument what forwards of diffusers ask."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, hidden_states: Any, attention_kwargs: Any = None) -> Any:
        if not isinstance(hidden_states, torch.Tensor):
            raise TypeError(hidden_states)
        if hidden_states.ndim == 4:
            hidden_states = hidden_states.squeeze(1)
        batch, tokens, width = hidden_states.shape
        if width > 2 and not hidden_states.is_cuda:
            hidden_states = self.layer(hidden_states)
        flat = hidden_states.reshape(batch * tokens, width)
        half = torch.arange(width, device=flat.device)[: width // 2]
        return flat.to(hidden_states.dtype)[:, half] / len(hidden_states.shape)


@pytest.mark.parametrize("shape", [(2, 5, 4), (3, 7, 4)])
def test_questions_about_a_value_are_answered_and_sizes_are_not_frozen(
    shape: tuple[int, ...],
) -> None:
    module = Branches()
    examples = {"hidden_states": torch.empty(2, 5, 4, device="meta")}
    gm = capture_block(module, examples, "attention_kwargs", leaf_value)
    hidden_states = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    assert torch.equal(gm(hidden_states), module(hidden_states))
