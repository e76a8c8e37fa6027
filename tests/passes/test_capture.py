"""Captured blocks: the same numbers to the last bit, at every size, and the same arguments."""

import copy
import inspect
import math
import re
import traceback
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
    expect_text,
    inputs_of,
    is_equal,
    kwargs_argument,
    left_behind,
    merge_pass,
    run,
)
from tests.tiny import TEXT_WIDTH
from toma_fx.errors import CaptureError, InputError
from toma_fx.passes.capture import capture_block
from toma_fx.passes.pipeline import run_passes
from toma_fx.passes.readable import readable
from toma_fx.runtime.plan import SCOPE, CallScope

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
    [None, {}, {"gain": 0.5}, {SCOPE: CallScope()}, {"gain": 0.5, SCOPE: CallScope()}],
    ids=["none", "empty", "gain", "scope", "gain and scope"],
)
def test_attention_kwargs_reach_the_attention_layers(name: str, kwargs: Any) -> None:
    block, inputs = with_gain(block_of(name)), inputs_of(name)
    argument = kwargs_argument(block)
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


def state_of(module: nn.Module) -> list[Any]:
    """The attributes of a module and of all in it."""
    return [
        {k: copy.copy(v) if isinstance(v, dict | list) else v for k, v in vars(each).items()}
        for each in module.modules()
    ]


@EVERY_BLOCK
def test_capturing_does_not_run_or_change_the_block(name: str) -> None:
    """Weights may be offloaded or quantised: on the meta device, nothing could be computed."""
    block = block_of(name).to("meta")
    before = state_of(block)
    assert calls(capture(block)) == calls(capture(block_of(name)))
    assert state_of(block) == before


@EVERY_BLOCK
def test_example_values_are_true(name: str) -> None:
    check_values(capture(block_of(name, torch.float16)))


@EVERY_BLOCK
def test_graph(name: str) -> None:
    expect_text(f"{readable(capture(block_of(name)))}\n", f"capture.{name}")


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
    examples = {"hidden_states": torch.empty(2, 5, 4)}
    gm = capture_block(module, examples, "attention_kwargs", example_of)
    hidden_states = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    assert torch.equal(gm(hidden_states), module(hidden_states))


class Scaled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.to_q = nn.Linear(4, 4)
        self.scale = 0.5


class Everything(nn.Module):
    """Uses its modules and tensors in every way that a forward may."""

    shift: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.attn = Scaled()
        self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))
        self.last = [self.layers[2]]
        self.act = self._act
        self.table = nn.Parameter(torch.randn(4))
        self.register_buffer("shift", torch.randn(4))
        self.plain = torch.randn(4)
        self.seen: list[Any] = []
        self.calls = 0

    def _act(self, x: Any, *, gain: Any) -> Any:
        return nn.functional.relu(x) * gain + self.shift

    def forward(self, hidden_states: Any, attention_kwargs: Any = None, *, gain: Any = 2.0) -> Any:
        assert isinstance(self, Everything)
        assert isinstance(self.attn.to_q, nn.Linear)
        assert type(self.attn.to_q).__name__ == "Linear"
        assert "scale" not in attention_kwargs
        self.calls += 1
        self.seen.append(hidden_states)
        x = self.attn.to_q(input=hidden_states) * self.attn.scale
        for layer in self.layers[:2]:
            x = layer(x)
        x = self.act(self.last[0](x), gain=gain)
        scale, shift = (self.table + self.plain).chunk(2)
        return x * torch.cat((shift, scale)) + torch.tensor([1.0, 2.0, 3.0, 4.0])


def test_modules_and_tensors_in_every_use() -> None:
    module = Everything()
    before = state_of(module)
    x = torch.randn(2, 4)
    gm = capture_block(module, {"hidden_states": x, "gain": 2.0}, "attention_kwargs", example_of)
    assert state_of(module) == before
    assert [node.target for node in gm.graph.find_nodes(op="call_module")] == [
        "attn.to_q",
        "layers.0",
        "layers.1",
        "layers.2",
    ]
    constants = [node.target for node in gm.graph.find_nodes(op="get_attr")]
    assert constants == ["shift", "table", "plain", "_tensor_constant0"]
    assert gm.get_submodule("attn.to_q") is module.attn.to_q
    assert gm.table is module.table
    for gain in (2.0, 3.0):
        assert torch.equal(gm(x, {}, gain), module(x, {}, gain=gain))
    module.shift += 1
    assert torch.equal(gm(x, {}), module(x, {}))


def example_of(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return module(*args, **kwargs)


def test_hooks_run_when_the_graph_runs() -> None:
    block, inputs, ran = block_of("unet"), inputs_of("unet"), []
    block.attn1.register_forward_hook(lambda *_: ran.append("attn1"))
    block.register_forward_hook(lambda *_: ran.append("block"))
    gm = capture(block)
    assert ran == []
    run(gm, inputs)
    assert ran == ["attn1"]


class Registering(nn.Linear):
    """Keeps a list of its subclasses."""

    known: list[type] = []  # noqa: RUF012

    def __init_subclass__(cls) -> None:
        Registering.known.append(cls)


class Registered(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = Registering(4, 4)

    def forward(self, hidden_states: Any, attention_kwargs: Any = None) -> Any:
        return self.layer(hidden_states)


def test_classes_do_not_hear_of_stand_ins() -> None:
    capture_block(Registered(), {"hidden_states": torch.ones(1, 4)}, "attention_kwargs", example_of)
    assert Registering.known == []


class TakesAnything(nn.Module):
    def forward(self, hidden_states: Any, **attention_kwargs: Any) -> Any:
        return hidden_states


class TakesAnyNumber(nn.Module):
    def forward(self, *hidden_states: Any, attention_kwargs: Any = None) -> Any:
        return hidden_states


class TakesRoot(nn.Module):
    def forward(self, hidden_states: Any, attention_kwargs: Any = None) -> Any:
        return hidden_states / math.sqrt(hidden_states.shape[1])


class OwnSubclass(BasicTransformerBlock):  # type: ignore[misc]
    """Hands on what it is given."""

    def forward(self, hidden_states: Any, *args: Any, **kwargs: Any) -> Any:
        return super().forward(hidden_states, *args, **kwargs)


def test_a_subclass_that_takes_more_than_it_names() -> None:
    block = OwnSubclass(32, 2, 16, cross_attention_dim=TEXT_WIDTH)
    message = r"OwnSubclass.forward takes \*args: Any, \*\*kwargs: Any, and a graph .* names all"
    with pytest.raises(CaptureError, match=message):
        capture(block)


class Extra(nn.Module):
    """Takes more than it needs, as the MLP of diffusers does."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, hidden_states: Any, *args: Any, scale: Any = None, **kwargs: Any) -> Any:
        if len(args) > 0 or kwargs.get("gain") is not None:
            hidden_states = 2 * hidden_states
        return self.layer(hidden_states)


def test_arguments_without_names() -> None:
    """A graph has none of them, and says so when it is given some."""
    module, x = Extra(), torch.randn(2, 4)
    gm = capture_block(module, {"hidden_states": x}, None, example_of)
    assert (
        str(inspect.signature(gm.forward)) == "(hidden_states, *args, scale=None, **kwargs) -> Any"
    )
    assert torch.equal(gm(x), module(x))
    assert torch.equal(gm(x, scale=3.0), module(x))
    with pytest.raises(InputError, match=r"got args \(1.0,\), but its graph was made for \(\)"):
        gm(x, 1.0)
    with pytest.raises(InputError, match=r"got kwargs {'gain': 2}, but its graph was made for {}"):
        gm(x, gain=2)


class Decides(nn.Module):
    """Its branches depend on arguments that are no tensors."""

    def forward(
        self, x: Any, mask: Any = None, flip: Any = False, index: Any = 0, how: Any = "add"
    ) -> Any:
        x = x if mask is None else x * mask
        x = x.flip(0) if flip else x
        return x + index if how == "add" else x * index


@pytest.mark.parametrize(
    "fixed",
    [
        {"mask": None, "flip": False, "index": 0, "how": "add"},
        {"mask": None, "flip": True, "index": 3, "how": "multiply"},
    ],
    ids=str,
)
def test_what_decides_branches_is_fixed(fixed: dict[str, Any]) -> None:
    module, x = Decides(), torch.randn(2, 4)
    gm = capture_block(module, {"x": x, **fixed}, None, example_of)
    assert calls(gm)["expect_value"] == len(fixed)
    assert torch.equal(gm(x, **fixed), module(x, **fixed))
    others = {"mask": torch.ones(2, 4), "flip": not fixed["flip"], "index": 7, "how": "divide"}
    for name in fixed:
        given = "of shape (2, 4)" if name == "mask" else repr(others[name])
        message = (
            f"a merged block got {name} {given}, but its graph was made for {fixed[name]!r}; leave "
            "it out, or leave the block unmerged with skip"
        )
        with pytest.raises(InputError, match=f"^{re.escape(message)}$"):
            gm(x, **{**fixed, name: others[name]})


def test_a_fixed_argument_is_checked_in_a_compiled_graph() -> None:
    module, x = Decides(), torch.randn(2, 4)
    fixed = {"mask": None, "flip": True, "index": 3, "how": "add"}
    compiled = torch.compile(
        capture_block(module, {"x": x, **fixed}, None, example_of), backend="eager", fullgraph=True
    )
    assert torch.equal(compiled(x, **fixed), module(x, **fixed))
    compiled = torch.compile(
        capture_block(module, {"x": x, **fixed}, None, example_of), backend="eager"
    )
    with pytest.raises(InputError, match="its graph was made for True"):
        compiled(x, **{**fixed, "flip": False})


def test_a_number_with_a_fraction_stays_an_argument() -> None:
    module, x = Decides(), torch.randn(2, 4)
    gm = capture_block(
        module, {"x": x, "mask": None, "flip": False, "how": "add", "index": 0.5}, None, example_of
    )
    for index in (0.5, 2.5):
        assert torch.equal(gm(x, index=index), module(x, index=index))


@pytest.mark.parametrize(
    ("block", "message"),
    [
        (TakesAnything(), r"TakesAnything.forward takes \*\*attention_kwargs.*names all"),
        (TakesAnyNumber(), r"TakesAnyNumber.forward takes \*hidden_states.*names all"),
        (nn.Linear(4, 4), "Linear.forward has no argument 'attention_kwargs'.*it has input"),
        (TakesRoot(), "fix it to its example value"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_a_graph_cannot_hold_is_refused(block: nn.Module, message: str) -> None:
    examples = {"hidden_states": torch.ones(1, 4)}
    with pytest.raises(CaptureError, match=message):
        capture_block(block, examples, "attention_kwargs", example_of)


def test_captures_leave_nothing_behind() -> None:
    block = block_of("unet")
    merge = merge_pass(block)
    run_passes(capture(block), [merge])
    before = left_behind()
    for _ in range(10):
        run_passes(capture(block), [merge])
    assert left_behind() == before
    gm = run_passes(capture(block), [merge])
    assert left_behind() == tuple(count + 1 for count in before)
    del gm
    assert left_behind() == before


def test_a_traceback_into_a_graph_shows_its_line() -> None:
    gm, inputs = capture(block_of("unet")), inputs_of("unet")
    capture(block_of("unet"))
    inputs["hidden_states"] = inputs["hidden_states"][..., :-1]
    with pytest.raises(RuntimeError) as failure:
        type(gm).forward(gm, **inputs)
    assert "norm1 = self.norm1(hidden_states)" in "".join(traceback.format_tb(failure.tb))
