"""Blocks of tiny real models, inputs that suit them, and the helpers of the passes' tests."""

import copy
import functools
import gc
import linecache
import os
from collections import Counter
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, fx, nn
from torch.fx.graph_module import _loader

from tests import reference
from tests.tiny import TEXT_TOKENS, TEXT_WIDTH, smooth_images, tiny_flux, tiny_sdxl_unet
from toma_fx.build import captured
from toma_fx.families import all_families
from toma_fx.families.rows import Block, Family
from toma_fx.passes.capture import STAR
from toma_fx.passes.guard_inputs import GuardInputs
from toma_fx.passes.hand_on import HandOn
from toma_fx.passes.merge import Merge
from toma_fx.passes.one_plan import OnePlan
from toma_fx.passes.pipeline import LEAF_VALUE, Pass, run_passes
from toma_fx.passes.plan_nodes import PlanOptions
from toma_fx.passes.readable import readable
from toma_fx.passes.sites import WHOLE_BLOCK, Site, choose_sites
from toma_fx.runtime import plan
from toma_fx.runtime.arguments import RotaryTable
from toma_fx.runtime.regions import WHOLE_IMAGE

Role = Literal["lead", "follow"]

NAMES = ("unet", "flux_double", "flux_single")
GROUP = "blocks"
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


def family_of(block: nn.Module) -> Family:
    """The first family whose table has the block's class."""
    return next(each for each in all_families() if each.block_row(type(block)) is not None)


def row_of(block: nn.Module) -> Block:
    """The block's row in its family's table."""
    row = family_of(block).block_row(type(block))
    assert row is not None
    return row


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
    return captured(block, family_of(block))


def merge_pass(
    block: nn.Module,
    placement: str = "component",
    *,
    components: tuple[str, ...] = COMPONENTS,
    options: PlanOptions = OPTIONS,
    residual: str = "replace",
) -> Merge:
    """The pass that merges in a block: once around all of it, or around some components."""
    row = row_of(block)
    sites: tuple[Site, ...] = (WHOLE_BLOCK,)
    if placement == "component":
        sites = tuple(
            choose_sites(row.sites, components, {name for name, _ in block.named_modules()})
        )
    return Merge(flow=row.flow, sites=sites, options=options, residual=residual)


def guard_pass(block: nn.Module, components: tuple[str, ...] = COMPONENTS) -> GuardInputs:
    """The pass that guards a block's inputs."""
    row = row_of(block)
    return GuardInputs(
        components=components,
        masks=row.masks,
        refused=row.refused,
        refused_by_attention=row.refused_by_attention,
    )


def hand_on_pass(block: nn.Module, role: Role = "lead", **more: Any) -> HandOn:
    """The pass that hands a block's plan on to its group."""
    kwargs = row_of(block).flow.attention_kwargs
    return HandOn(attention_kwargs=kwargs, group=GROUP, role=role, **more)


def in_group(
    block: nn.Module, role: Role = "lead", placement: str = "block", **more: Any
) -> fx.GraphModule:
    """The graph of a block that makes its group's plan, or uses it."""
    merge = merge_pass(block, placement)
    return rewrite(block, merge, OnePlan(), hand_on_pass(block, role, **more))


def rewrite(block: nn.Module, *passes: Pass) -> fx.GraphModule:
    """The graph of a block after some passes."""
    return run_passes(capture(block), passes)


def kwargs_argument(block: nn.Module) -> str:
    """The argument of a block with the attention kwargs."""
    name = row_of(block).flow.attention_kwargs
    assert name is not None
    return name


def scope_kwargs(block: nn.Module, scope: plan.CallScope) -> dict[str, Any]:
    """The argument that carries the scope in which blocks share a plan."""
    return {kwargs_argument(block): {plan.SCOPE: scope}}


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
        # A block's submodules are asked for shapes alone, so only other graphs know strides.
        self.strides = LEAF_VALUE not in gm.meta

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        if n.op != "output":
            self._expect(n.meta["val"], result, n.format_node() or "")
        if isinstance(result, Tensor):
            self.versions.append((n, result, result._version))
        return result

    def call_module(self, target: Any, args: Any, kwargs: Any) -> Any:
        kwargs = dict(kwargs)
        return super().call_module(target, args, {**kwargs, **kwargs.pop(STAR, {})})

    def _expect(self, example: Any, result: Any, where: str) -> None:
        if isinstance(example, Tensor):
            assert isinstance(result, Tensor), where
            assert (example.shape, example.dtype) == (result.shape, result.dtype), where
            assert not self.strides or example.stride() == result.stride(), where
            return
        if isinstance(example, list | tuple):  # an operator's several results are either
            assert isinstance(result, list | tuple), where
            assert len(example) == len(result), where
            for each, like in zip(example, result, strict=True):
                self._expect(each, like, where)
            return
        assert type(example) is type(result), where
        if isinstance(example, torch.device):  # those of examples is meta
            return
        if isinstance(example, RotaryTable):
            self._expect(example.values, result.values, where)
        elif isinstance(example, plan.CallScope):
            assert (example.variant, example.grids) == (result.variant, result.grids), where
            self._expect((example.plans, example.kept), (result.plans, result.kept), where)
        elif isinstance(example, dict):
            assert example.keys() == result.keys(), where
            self._expect(tuple(example.values()), tuple(result.values()), where)
        else:
            assert example == result, where


def materialise(example: Any) -> Any:
    """A real value for an example value."""
    if isinstance(example, plan.CallScope):
        scope = plan.CallScope(grids=example.grids, kept=materialise(example.kept_by_stage))
        scope.plans = materialise(example.plans)
        return scope
    if isinstance(example, dict):
        return {key: materialise(value) for key, value in example.items()}
    if isinstance(example, tuple):
        return tuple(map(materialise, example))
    if not isinstance(example, Tensor):
        return example
    values = torch.rand(example.shape, generator=torch.Generator().manual_seed(0)).to(example.dtype)
    if 0 in example.stride():  # expanded
        return values
    return torch.empty_strided(example.shape, example.stride(), dtype=example.dtype).copy_(values)


def check_values(gm: fx.GraphModule) -> None:
    """Check that a run of the graph finds on every node what its example value says.

    And that no node writes into the value of another. The examples of blocks are float16, and so
    their graphs' modules must be.
    """
    arguments = gm.graph.find_nodes(op="placeholder")
    check = _ValueCheck(gm)
    with torch.no_grad():
        check.run(*(materialise(node.meta["val"]) for node in arguments))
    assert not [node for node, value, version in check.versions if value._version != version]


def expect_text(text: str, name: str) -> None:
    """Compare a text with a golden one; with ``EXPECTTEST_ACCEPT=1``, write that instead."""
    path = Path(__file__).with_name(f"{name}.expected")
    if os.environ.get("EXPECTTEST_ACCEPT") == "1":
        path.write_text(text)
    assert text == path.read_text()


def expect_change(before: fx.GraphModule, after: fx.GraphModule, name: str) -> None:
    """Compare a graph before and after a pass with their golden text."""
    expect_text(f"# before\n{readable(before)}\n\n# after\n{readable(after)}\n", name)


def left_behind() -> tuple[int, int, int]:
    """How many sources of graphs torch.fx and Python hold, and how many classes of modules."""
    for _ in range(3):  # what earlier tests left, some of it only freed by freeing the rest
        gc.collect()
    sources = [name for name in linecache.cache if "eval_with_key" in name]
    classes: set[type] = set()
    todo: list[type] = [nn.Module]
    while todo:
        new: set[type] = {*type.__subclasses__(todo.pop())} - classes
        classes |= new
        todo += new
    return len(_loader.eval_cache), len(sources), len(classes)
