"""The cost of merging in a compiled block, read from the code that Inductor writes.

A lost fusion or a new copy shows up here as a diff.
"""

import re
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import fx, nn
from torch._inductor.utils import run_and_get_code
from torch.utils._python_dispatch import TorchDispatchMode

from tests.passes.blocks import (
    NAMES,
    block_of,
    hand_on_pass,
    inputs_of,
    merge_pass,
    rewrite,
    row_of,
    scope_kwargs,
)
from toma_fx.passes.install import install
from toma_fx.passes.merge import Merge
from toma_fx.passes.one_plan import OnePlan
from toma_fx.passes.plan_apart import plan_apart
from toma_fx.runtime.plan import MERGED, CallScope

MakeMerge = Callable[[nn.Module], Merge]
KERNEL_CALL = re.compile(
    r"^\s+(?:\w+ = )?(extern_kernels|torch\.ops|cpp_fused)[._]([\w.]+)\(", re.M
)
LAYOUT = {"clone", "copy", "permute", "view", "transpose", "expand", "slice", "unsqueeze", "split"}
LAYOUT |= {"with", "sizes"}  # of split_with_sizes


def kernels(function: Any, inputs: dict[str, Any], **more: Any) -> Counter[str]:
    """How often the code that Inductor makes of a function runs a kernel of each kind."""
    torch._dynamo.reset()
    caches = torch._inductor.config.patch(fx_graph_cache=False)
    with torch.no_grad(), caches, torch._functorch.config.patch(enable_autograd_cache=False):
        compiled = torch.compile(function, fullgraph=True, dynamic=False)
        _, sources = run_and_get_code(compiled, **inputs, **more)
    (source,) = sources
    calls = KERNEL_CALL.findall(source[source.index("def call(") :])
    return Counter(_kind(where, name) for where, name in calls)


def _kind(where: str, name: str) -> str:
    if where != "cpp_fused":
        return name.removeprefix("aten.").removesuffix(".default").lstrip("_")
    return "copy" if LAYOUT.issuperset(re.findall("[a-z]+", name)) else "fused"


def contiguous_inputs(name: str) -> dict[str, Any]:
    inputs = inputs_of(name, height=16, width=16)
    return {**inputs, "hidden_states": inputs["hidden_states"].contiguous()}


def once(block: nn.Module) -> Merge:
    return merge_pass(block, "block", residual="keep")


def each_component(block: nn.Module) -> Merge:
    return merge_pass(block, "component")


def graph_of(block: nn.Module, role: Any, merge: MakeMerge = once) -> fx.GraphModule:
    return rewrite(block, merge(block), OnePlan(), hand_on_pass(block, role))


def beside_a_follower(
    name: str, merge: MakeMerge
) -> tuple[dict[str, Any], nn.Module, nn.Module, dict[str, Any]]:
    """Inputs, an untouched block, one that uses a plan, and the kwargs that bring it the plan."""
    inputs, untouched, merged = contiguous_inputs(name), block_of(name), block_of(name)
    scope = scope_kwargs(merged, CallScope())
    graph_of(merged, "lead", merge)(**inputs, **scope)
    follow = graph_of(merged, "follow", merge)
    kwargs = row_of(merged).flow.attention_kwargs
    install(merged, {MERGED: follow}, attention_kwargs=kwargs)
    return inputs, untouched, merged, scope


# Two products for each site: a UNet's block has three, and Flux's attention and MLP are two in a
# double-stream block, one in a single-stream block, whose site holds text tokens too: they are put
# beside the merged tokens, and images with text between them are no batch that a product can take.
# What diffusers divides attention's output by was fused with the residual, and is a kernel now.
COMPILED = {
    "unet": {"bmm": 6, "fused": 2},
    "flux_double": {"bmm": 4},
    "flux_single": {"bmm": 2, "fused": 1, "copy": 1},
}
EAGER = {
    "unet": {"bmm": 6},
    "flux_double": {"bmm": 4},
    "flux_single": {"bmm": 2, "cat": 2, "clone": 2},
}


@pytest.mark.parametrize("name", NAMES)
def test_a_block_pays_two_matrix_products_and_one_addition(name: str) -> None:
    assert paid_compiled(name, once) == {"bmm": 2, "fused": 1}


@pytest.mark.parametrize("name", NAMES)
def test_a_block_that_merges_each_component_pays_two_matrix_products_a_site(name: str) -> None:
    assert paid_compiled(name, each_component) == COMPILED[name]


def paid_compiled(name: str, merge: MakeMerge) -> dict[str, int]:
    """Kernels that a compiled block runs more than an untouched one."""
    inputs, untouched, merged, scope = beside_a_follower(name, merge)
    before = kernels(untouched, inputs)
    after = kernels(merged, inputs, **scope)
    assert before["scaled_dot_product_flash_attention_for_cpu"] > 0
    after.subtract(before)
    return {kind: count for kind, count in after.items() if count}


class Operators(TorchDispatchMode):
    """Counts operators that compute; views are left out."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not func.is_view and func._overloadpacket not in VIEWS:
            self.counts[func._overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


VIEWS = {torch.ops.aten._unsafe_view, torch.ops.aten._reshape_alias}


@pytest.mark.parametrize("name", NAMES)
def test_an_eager_block_pays_two_matrix_products_and_two_additions(name: str) -> None:
    assert paid_eager(name, once) == {"bmm": 2, "sub": 1, "add": 1}


@pytest.mark.parametrize("name", NAMES)
def test_an_eager_block_that_merges_each_component_pays_two_a_site(name: str) -> None:
    assert paid_eager(name, each_component) == EAGER[name]


def paid_eager(name: str, merge: MakeMerge) -> dict[str, int]:
    """Operators that an eager block calls more than an untouched one."""
    inputs, untouched, merged, scope = beside_a_follower(name, merge)
    with torch.no_grad(), Operators() as before:
        untouched(**inputs)
    with torch.no_grad(), Operators() as after:
        merged(**inputs, **scope)
    assert before.counts["addmm"] > 0
    after.counts.subtract(before.counts)
    return {kind: count for kind, count in after.counts.items() if count}


def test_a_plan_is_two_matrix_products_and_a_loop() -> None:
    block = block_of("unet")
    graph = plan_apart(graph_of(block, "lead"))
    assert graph is not None
    plan = fx.GraphModule(block, graph)
    counts = kernels(plan, contiguous_inputs("unet"), **scope_kwargs(block, CallScope()))
    # Similarities of all pairs, and of tokens and destinations.
    assert counts == {"bmm": 2, "fused": 4}
