"""Blocks of tiny real models, inputs that suit them, and what tests of passes look at."""

import copy
import functools
import os
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn

from tests import reference
from tests.tiny import TEXT_TOKENS, TEXT_WIDTH, smooth_images, tiny_flux, tiny_sdxl_unet
from toma_fx.families import FAMILIES, Block, example_inputs, leaf_value
from toma_fx.passes.capture import STAR, capture_block
from toma_fx.passes.pipeline import Pass, run_passes
from toma_fx.passes.plan_nodes import PlanOptions, TokenFlow
from toma_fx.passes.readable import readable
from toma_fx.runtime import plan
from toma_fx.runtime.regions import WHOLE_IMAGE

NAMES = ("unet", "flux_double", "flux_single")
COMPONENTS = ("self_attention", "cross_attention", "mlp")

# A large temperature, at which every weight counts and rounding is not magnified.
OPTIONS = PlanOptions(region_tokens=16, temperature=0.1)


@functools.cache
def _blocks() -> dict[str, nn.Module]:
    unet, flux = tiny_sdxl_unet(), tiny_flux()
    return {
        "unet": unet.mid_block.attentions[0].transformer_blocks[0],
        "flux_double": flux.transformer_blocks[0],
        "flux_single": flux.single_transformer_blocks[0],
    }


def block_of(name: str, dtype: torch.dtype = torch.float32) -> Any:
    """A copy of a block, to do with as one likes."""
    return copy.deepcopy(_blocks()[name]).to(dtype)


def row_of(block: nn.Module) -> Block:
    """The block's row in the table of block structures."""
    (row,) = (row for family in FAMILIES for row in family.blocks if isinstance(block, row.cls))
    return row


def flow_of(block: nn.Module) -> TokenFlow:
    row = row_of(block)
    return TokenFlow(output=row.output, text=row.text, text_first=row.text_first, rotary=row.rotary)


def inputs_of(
    name: str,
    dtype: torch.dtype = torch.float32,
    *,
    batch: int = 2,
    height: int = 8,
    width: int = 8,
    text_tokens: int = TEXT_TOKENS,
    seed: int = 0,
) -> dict[str, Any]:
    """Keyword arguments of a call of a block."""
    generator = torch.Generator().manual_seed(seed)
    images = smooth_images((batch, 32, height, width), generator)
    text = torch.randn(batch, text_tokens, TEXT_WIDTH, generator=generator)
    inputs: dict[str, Any] = {
        "hidden_states": images.flatten(2).transpose(1, 2).to(dtype),
        "encoder_hidden_states": text.to(dtype),
    }
    if name != "unet":
        ids = torch.zeros(text_tokens + height * width, 3)
        ids[text_tokens:, 1] = torch.arange(height).repeat_interleave(width)
        ids[text_tokens:, 2] = torch.arange(width).repeat(height)
        inputs["temb"] = torch.randn(batch, 32, generator=generator).to(dtype)
        inputs["image_rotary_emb"] = tiny_flux().pos_embed(ids)
    return inputs


def capture(block: nn.Module) -> fx.GraphModule:
    """The graph of a block."""
    row = row_of(block)
    return capture_block(block, example_inputs(row, block), row.attention_kwargs, leaf_value)


def rewrite(block: nn.Module, *passes: Pass) -> fx.GraphModule:
    """The graph of a block after some passes."""
    return run_passes(capture(block), passes)


def scope_kwargs(block: nn.Module, scope: plan.PlanScope) -> dict[str, Any]:
    """The argument that carries the scope in which blocks share a plan."""
    return {row_of(block).attention_kwargs: {plan.SCOPE: scope}}


def run(module: nn.Module, inputs: dict[str, Any], **more: Any) -> tuple[Tensor, ...]:
    """What a block or its graph returns, as a tuple."""
    with torch.no_grad():
        result = module(**inputs, **more)
    return result if isinstance(result, tuple) else (result,)


def is_equal(results: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> bool:
    return all(torch.equal(result, like) for result, like in zip(results, expected, strict=True))


def assert_close(results: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> None:
    for result, like in zip(results, expected, strict=True):
        torch.testing.assert_close(result, like)


def calls(gm: fx.GraphModule) -> Counter[str]:
    """What a graph calls, and how often."""
    names: Counter[str] = Counter()
    for node in gm.graph.nodes:
        if isinstance(node.target, torch._ops.OpOverload):
            names[str(node.target.overloadpacket)] += 1
        elif node.op.startswith("call_"):
            names[getattr(node.target, "__name__", str(node.target))] += 1
    return names


class _SiteGroup(reference.Group):
    """Makes a plan for each component, as long as no pass lets them share one."""

    def plan_for(self, component: str, x_BND: Tensor) -> reference.Plan | None:
        self.plan = None
        return super().plan_for(component, x_BND)


def reference_group(
    options: PlanOptions = OPTIONS, *, share: bool = False, **more: Any
) -> reference.Group:
    """A group whose regions are those of `PlanOptions`: runs of tokens in the given order."""
    chosen = reference.ReferenceOptions(
        ratio=options.ratio,
        region="image" if options.region_tokens == WHOLE_IMAGE else "stripe",
        region_tokens=options.region_tokens,
        merge_over=options.merge_over,
        unmerge=options.unmerge,
        temperature=options.temperature,
        **more,
    )
    group = reference.Group(chosen) if share else _SiteGroup(chosen)
    group.enter(8, 8)
    return group


def reference_components(
    name: str, block: nn.Module, group: reference.Group, inputs: dict[str, Any]
) -> tuple[Tensor, ...]:
    """What the reference says of a block with a merge around each component."""
    forward: Any = {
        "unet": reference.unet_components,
        "flux_double": reference.flux_double_components,
        "flux_single": reference.flux_single_components,
    }[name]
    with torch.no_grad():
        result = forward(block, group, **inputs)
    return result if isinstance(result, tuple) else (result,)


def reference_once(
    name: str, block: nn.Module, group: reference.Group, inputs: dict[str, Any]
) -> tuple[Tensor, ...]:
    """What the reference says of a block with a merge once around all of it."""
    forward: Any = reference.unet_block if name == "unet" else reference.flux_block
    with torch.no_grad():
        result = forward(block, group, **inputs)
    return result if isinstance(result, tuple) else (result,)


class _ValueCheck(fx.Interpreter):
    """Runs a graph and compares each result with the node's example value."""

    def __init__(self, gm: fx.GraphModule) -> None:
        super().__init__(gm)
        self.versions: list[tuple[fx.Node, Tensor, int]] = []

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        if n.op != "output":
            _assert_alike(n.meta["val"], result, n.format_node() or "")
        if isinstance(result, Tensor):
            self.versions.append((n, result, result._version))
        return result

    def call_module(self, target: Any, args: Any, kwargs: Any) -> Any:
        kwargs = dict(kwargs)
        return super().call_module(target, args, {**kwargs, **kwargs.pop(STAR, {})})


def _assert_alike(example: Any, result: Any, where: str) -> None:
    assert type(example) is type(result), where
    if isinstance(example, Tensor):
        assert (example.shape, example.dtype) == (result.shape, result.dtype), where
    elif isinstance(example, plan.RotaryTable):
        _assert_alike(example.values, result.values, where)
    elif isinstance(example, plan.PlanScope):
        _assert_alike((example.plans, example.time), (result.plans, result.time), where)
    elif isinstance(example, dict):
        assert example.keys() == result.keys(), where
        _assert_alike(tuple(example.values()), tuple(result.values()), where)
    elif isinstance(example, tuple) and type(example) is tuple:
        assert len(example) == len(result), where
        for each, like in zip(example, result, strict=True):
            _assert_alike(each, like, where)
    else:
        assert example == result, where


def materialise(example: Any) -> Any:
    """A real value for an example value."""
    if isinstance(example, plan.PlanScope):
        scope = plan.PlanScope((torch.tensor(0), torch.tensor(0)))
        scope.plans = materialise(example.plans)
        return scope
    if isinstance(example, dict):
        return {key: materialise(value) for key, value in example.items()}
    if isinstance(example, tuple):
        return tuple(map(materialise, example))
    return torch.rand(example.shape).to(example.dtype) if isinstance(example, Tensor) else example


def check_values(gm: fx.GraphModule) -> None:
    """Check that a run of the graph finds on every node what its example value says.

    And that no node writes into the value of another. The examples are float16, and so the graph's
    modules must be.
    """
    arguments = gm.graph.find_nodes(op="placeholder")
    check = _ValueCheck(gm)
    with torch.no_grad():
        check.run(*(materialise(node.meta["val"]) for node in arguments))
    assert not [node for node, value, version in check.versions if value._version != version]


def expect_graph(gm: fx.GraphModule, name: str) -> None:
    """Compare a graph with its golden text; with ``EXPECTTEST_ACCEPT=1``, write that instead."""
    path = Path(__file__).with_name(f"{name}.expected")
    text = readable(gm) + "\n"
    if os.environ.get("EXPECTTEST_ACCEPT") == "1":
        path.write_text(text)
    assert text == path.read_text()
