"""Merging in a captured graph is merging in the model: the same plans, the same values."""

import functools
import io
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.export import Dim, ExportedProgram
from torch.utils import _pytree as pytree

import toma_fx
from tests.tiny import flux_inputs, tiny_flux, tiny_sd_unet, tiny_sdxl_unet, unet_inputs
from toma_fx import Schedule
from toma_fx.errors import CaptureError, ModelError
from toma_fx.passes.flat_nodes import module_stack

KINDS = ("export", "module", "trace", "dynamo")
FAMILIES = ("unet", "flux")
EVERY_FAMILY = pytest.mark.parametrize("family", FAMILIES)
COMPONENT: dict[str, Any] = {"placement": "component", "skip": ()}
OPTIONS: list[dict[str, Any]] = [
    {"residual": "replace"},
    {"region": "stripe", "share": "block"},
    {"region": "image", "merge_over": "image", "unmerge": "pinv", "ratio": 0.75},
    {"selector": "fixed"},
    {"skip": ("*.0",)},
    {"skip": None},
    {"placement": "component", "components": ("mlp",)},
    {"placement": "component", "components": ("self_attention",), "share": "block"},
]


@pytest.fixture(autouse=True)
def _no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


@functools.cache
def model_of(family: str) -> Any:
    return (tiny_sdxl_unet if family == "unet" else tiny_flux)()


def inputs_of(family: str, **options: Any) -> dict[str, Any]:
    """Two stages of 64 and 16 tokens, or 64 image tokens beside 6 of text."""
    if family == "unet":
        inputs = unet_inputs(model_of(family), **{"height": 16, "width": 16, **options})
    else:
        inputs = flux_inputs(model_of(family), **{"height": 8, "width": 8, **options})
    return {**inputs, "return_dict": False}


def export(model: nn.Module, inputs: dict[str, Any], **options: Any) -> ExportedProgram:
    return torch.export.export(model, (), inputs, strict=False, **options)


@functools.cache
def program_of(family: str) -> ExportedProgram:
    """One for all tests: that no test can change it is promised."""
    return export(model_of(family), inputs_of(family))


def compiled(model: nn.Module, **options: Any) -> Any:
    """A model that merges tokens in the graph which Dynamo captures, and runs that graph."""

    def merge(gm: fx.GraphModule, _: Any) -> fx.GraphModule:
        return toma_fx.transform(gm, **options)

    torch._dynamo.reset()
    compile_with: Any = torch.compile
    return compile_with(model, backend=merge, fullgraph=True)


def merged_output(kind: str, family: str, inputs: dict[str, Any], **options: Any) -> Any:
    """What a captured model returns after merging tokens in it."""
    model = model_of(family)
    if kind == "dynamo":
        return compiled(model, **options)(**inputs)[0]
    if kind == "trace":
        gm = toma_fx.trace(model, {k: v for k, v in inputs.items() if k != "return_dict"})
        named = {**inputs, **inputs.get("added_cond_kwargs", {})}
        names = [str(node.target) for node in gm.graph.find_nodes(op="placeholder")]
        return toma_fx.transform(gm, **options)(*(named[name] for name in names))
    program = program_of(family)
    if kind == "module":
        return toma_fx.transform(program.module(), **options)(**inputs)[0]
    return toma_fx.transform(program, **options).module()(**inputs)[0]


def expected_output(model: nn.Module, inputs: dict[str, Any], **options: Any) -> Any:
    return toma_fx.transform(model, **options)(**inputs)[0]


def assert_close(output: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(output, expected, rtol=1e-4, atol=1e-5)


def operators(graph: fx.Graph) -> Counter[str]:
    return Counter(str(n.target).split(".")[1] for n in graph.nodes if "toma." in str(n.target))


@EVERY_FAMILY
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("options", [{"skip": ()}, COMPONENT], ids=["block", "component"])
def test_every_kind_of_graph_equals_the_model(
    kind: str, family: str, options: dict[str, Any]
) -> None:
    inputs = inputs_of(family)
    expected = expected_output(model_of(family), inputs, **options)
    assert not torch.allclose(expected, model_of(family)(**inputs)[0], atol=1e-3)
    assert_close(merged_output(kind, family, inputs, **options), expected)


@EVERY_FAMILY
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_options_mean_what_they_mean_for_a_model(family: str, options: dict[str, Any]) -> None:
    inputs, options = inputs_of(family), {"skip": (), **options}
    expected = expected_output(model_of(family), inputs, **options)
    assert_close(merged_output("export", family, inputs, **options), expected)


def test_the_blocks_that_flux_spares_are_spared() -> None:
    model, inputs = tiny_flux(num_layers=4, num_single_layers=8), inputs_of("flux")
    program = toma_fx.transform(export(model, inputs))
    assert operators(program.graph)["merge"] == 3 + 7
    assert_close(program.module()(**inputs)[0], expected_output(model, inputs))


@EVERY_FAMILY
def test_blocks_of_a_group_share_one_plan(family: str) -> None:
    found = operators(toma_fx.transform(program_of(family), **COMPONENT).graph)
    groups, blocks = (7, 11) if family == "unet" else (2, 5)
    assert found["select"] == found["weigh"] == groups
    assert found["merge"] == found["unmerge"] == (3 * blocks if family == "unet" else 2 * 2 + 3)
    whole = operators(toma_fx.transform(program_of(family), skip=(), share="block").graph)
    assert whole["select"] == whole["merge"] == blocks


@EVERY_FAMILY
def test_the_argument_is_left_alone(family: str) -> None:
    program, inputs = program_of(family), inputs_of(family)
    text, expected = str(program.graph), program.module()(**inputs)[0]
    merged = toma_fx.transform(program, skip=())
    assert str(program.graph) == text
    assert torch.equal(program.module()(**inputs)[0], expected)
    for name, tensor in program.state_dict.items():
        assert merged.state_dict[name] is tensor


@EVERY_FAMILY
def test_a_ratio_of_zero_is_an_unchanged_copy(family: str) -> None:
    program, inputs = program_of(family), inputs_of(family)
    copied = toma_fx.transform(program, ratio=0)
    assert copied is not program
    assert str(copied.graph) == str(program.graph)
    assert torch.equal(copied.module()(**inputs)[0], program.module()(**inputs)[0])


@EVERY_FAMILY
def test_a_merged_program_is_saved_and_loaded(family: str) -> None:
    inputs = inputs_of(family)
    program = toma_fx.transform(program_of(family), skip=())
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    loaded = torch.export.load(file).module()(**inputs)[0]
    assert torch.equal(loaded, program.module()(**inputs)[0])


def test_lowering_leaves_aten_and_one_kind_of_loop() -> None:
    inputs = inputs_of("flux")
    program = toma_fx.transform(program_of("flux"), **COMPONENT)
    lowered = program.run_decompositions()
    left = {str(n.target).split(".")[0] for n in lowered.graph.nodes if n.op == "call_function"}
    assert left == {"aten", "while_loop", "<built-in function getitem>"}
    expected = program.module()(**inputs)[0]
    torch.testing.assert_close(lowered.module()(**inputs)[0], expected, rtol=1e-3, atol=1e-4)


@EVERY_FAMILY
@pytest.mark.parametrize("options", [{"skip": ()}, COMPONENT], ids=["block", "component"])
def test_example_values_are_true(family: str, options: dict[str, Any]) -> None:
    program = toma_fx.transform(program_of(family), **options)
    tensors = {**program.state_dict, **program.constants}
    user = iter(pytree.tree_leaves(inputs_of(family)))
    specs = program.graph_signature.input_specs
    inputs = [tensors[spec.target] if spec.target else next(user) for spec in specs]

    class Compare(fx.Interpreter):
        def run_node(self, n: fx.Node) -> Any:
            value = super().run_node(n)
            if n.op == "call_function" and isinstance(value, Tensor):
                said = n.meta["val"]
                assert (said.shape, said.dtype) == (value.shape, value.dtype), n.format_node()
                assert said.stride() == value.stride(), n.format_node()
            return value

    Compare(program.graph_module).run(*inputs)


def test_new_nodes_have_the_metadata_of_what_they_serve() -> None:
    program = toma_fx.transform(program_of("unet"), **COMPONENT)
    merges = [n for n in program.graph.nodes if n.target is torch.ops.toma.merge.default]
    parts = Counter(list(module_stack(n))[-1].split(".transformer_blocks.")[1] for n in merges)
    assert {part.split(".")[1] for part in parts} == {"attn1", "attn2", "ff"}
    assert all(n.meta["stack_trace"] for n in merges)


@EVERY_FAMILY
def test_a_batch_may_stay_dynamic(family: str) -> None:
    batch = Dim("batch", min=2, max=8)

    def shape_of(path: Any, value: Any) -> Any:
        fixed = not isinstance(value, Tensor) or value.ndim == 0 or "_ids'" in str(path[-1])
        return None if fixed and "time_ids" not in str(path[-1]) else {0: batch}

    inputs = inputs_of(family)
    shapes = pytree.tree_map_with_path(shape_of, inputs)
    merged = toma_fx.transform(export(model_of(family), inputs, dynamic_shapes=shapes), skip=())
    three = inputs_of(family, batch=3)
    expected = expected_output(model_of(family), three, skip=())
    assert_close(merged.module()(**three)[0], expected)


@pytest.mark.parametrize("options", [{"skip": ()}, COMPONENT], ids=["block", "component"])
def test_sizes_that_are_equal_by_chance_are_told_apart(options: dict[str, Any]) -> None:
    """32 image tokens, 32 text tokens, and tokens that are 32 wide."""
    inputs = inputs_of("flux", batch=1, height=4, width=8, text=32)
    merged = toma_fx.transform(export(model_of("flux"), inputs), **options)
    assert_close(merged.module()(**inputs)[0], expected_output(model_of("flux"), inputs, **options))


def test_controlnet_residuals_come_in_the_order_of_the_tokens() -> None:
    inputs = inputs_of("flux")
    for name in ("controlnet_block_samples", "controlnet_single_block_samples"):
        inputs[name] = [torch.randn(2, 64, 32, generator=torch.Generator().manual_seed(1))]
    merged = toma_fx.transform(export(model_of("flux"), inputs), skip=())
    assert_close(merged.module()(**inputs)[0], expected_output(model_of("flux"), inputs, skip=()))


@pytest.mark.parametrize("options", [{}, {"placement": "component"}], ids=["block", "component"])
def test_text_masks_and_uneven_images(options: dict[str, Any]) -> None:
    model = tiny_sd_unet()
    inputs = {**unet_inputs(model, height=24, width=40), "return_dict": False}
    inputs["encoder_attention_mask"] = torch.tensor([[1.0] * 3 + [0.0] * 4] * 2)
    merged = toma_fx.transform(export(model, inputs), **options)
    assert_close(merged.module()(**inputs)[0], expected_output(model, inputs, **options))


class Wrapped(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.denoiser = model

    def forward(self, **inputs: Any) -> Any:
        return self.denoiser(**inputs)


@EVERY_FAMILY
def test_the_model_may_be_a_part_of_what_was_captured(family: str) -> None:
    skip = ("mid_block.*",) if family == "unet" else ("transformer_blocks.0",)
    inputs = inputs_of(family)
    merged = toma_fx.transform(export(Wrapped(model_of(family)), inputs), skip=skip)
    expected = expected_output(model_of(family), inputs, skip=skip)
    assert_close(merged.module()(**inputs)[0], expected)


class Twice(Wrapped):
    def forward(self, **inputs: Any) -> Any:
        first = self.denoiser(**inputs)[0]
        return self.denoiser(**{**inputs, "hidden_states": first})


@pytest.mark.parametrize("region", ["tile", "stripe"])
def test_several_calls_of_a_model_in_one_graph_are_refused(region: str) -> None:
    model, inputs = Twice(model_of("flux")), inputs_of("flux")
    with pytest.raises(CaptureError, match="called several times"):
        toma_fx.transform(export(model, inputs), skip=(), region=region)
    with pytest.raises(Exception, match="called several times"):
        compiled(model, skip=(), region=region)(**inputs)


class Blocks(nn.Module):
    """Blocks of Flux without what is around them."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.single_transformer_blocks = model.single_transformer_blocks

    def forward(self, tokens: Tensor, text: Tensor, emb: Tensor, rotary: Any) -> Tensor:
        for block in self.single_transformer_blocks:
            text, tokens = block(tokens, text, emb, rotary)
        return tokens


def test_blocks_alone_can_be_merged_but_not_ordered() -> None:
    make = functools.partial(torch.randn, generator=torch.Generator().manual_seed(0))
    inputs = (make(2, 64, 32), make(2, 6, 32), make(2, 32), (make(70, 16), make(70, 16)))
    program = torch.export.export(Blocks(model_of("flux")), inputs, strict=False)
    with pytest.raises(ModelError, match=r"x_embedder, proj_out, pos_embed.*region='stripe'"):
        toma_fx.transform(program, skip=())
    merged = toma_fx.transform(program, skip=(), region="stripe")
    assert merged.module()(*inputs).shape == (2, 64, 32)


@pytest.mark.parametrize(
    ("spelling", "path"),
    [
        ("", ""),
        ("mid_block.attentions.0", "mid_block.attentions.0"),
        ("L['self'].__dict__['_modules']['blocks'].0.attn", "blocks.0.attn"),
        ("L['self']._modules['blocks']._modules['0'].attn", "blocks.0.attn"),
        ("L['m'].inner.__dict__['_modules']['blocks'][3]", "inner.blocks.3"),
        ("__dict__['_modules']['blocks'].0", "blocks.0"),
    ],
)
def test_module_paths_in_every_spelling(spelling: str, path: str) -> None:
    node = fx.Graph().placeholder("x")
    node.meta["nn_module_stack"] = {"key": (spelling, nn.Linear)}
    assert module_stack(node) == {path: "torch.nn.modules.linear.Linear"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"schedule": Schedule(select_every=2)}, r"^Schedule\(.*several graphs.*Schedule\(\)"),
        ({"merge_below": 0.5}, "^merge_below=0.5 takes several graphs.*use merge_below=1"),
    ],
)
def test_what_takes_several_graphs_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        toma_fx.transform(program_of("unet"), **options)


def test_a_graph_without_blocks_says_what_was_looked_for() -> None:
    with pytest.raises(ModelError, match=r"BasicTransformerBlock.*nn_module_stack"):
        toma_fx.transform(fx.symbolic_trace(nn.Linear(2, 2)))


def test_skipping_every_block_is_an_error() -> None:
    with pytest.raises(ModelError, match="nothing to merge in this graph"):
        toma_fx.transform(program_of("unet"), skip=("*",))
    with pytest.raises(ModelError, match="matches no block"):
        toma_fx.transform(program_of("unet"), skip=("nothing",))


def test_merging_twice_is_an_error() -> None:
    with pytest.raises(ModelError, match="merges tokens already"):
        toma_fx.transform(toma_fx.transform(program_of("unet")))


def test_a_decomposed_program_is_refused() -> None:
    with pytest.raises(ModelError, match="run_decompositions"):
        toma_fx.transform(program_of("flux").run_decompositions())


def test_a_ratio_that_merges_nothing_is_refused() -> None:
    options: dict[str, Any] = {"ratio": 0.001, "region": "image", "region_tokens": 1024}
    with pytest.raises(CaptureError, match=r"too small to merge any of 64 tokens"):
        toma_fx.transform(program_of("flux"), **options, skip=())


def test_ids_that_are_made_too_late_are_refused() -> None:
    inputs = inputs_of("flux")
    inputs["img_ids"] = inputs["img_ids"][None]
    with pytest.raises(CaptureError, match=r"cat.*not an input of the model"):
        toma_fx.transform(export(model_of("flux"), inputs), skip=())
