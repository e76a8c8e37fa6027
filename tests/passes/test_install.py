"""A graph as the forward of a block: for everyone else the block is what it was."""

import copy
import inspect
import linecache
import pickle
import subprocess
import sys
import traceback
import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import fx, nn
from torch._dynamo.testing import CompileCounter

from tests.passes.blocks import (
    GROUP,
    NAMES,
    OPTIONS,
    Role,
    assert_close,
    block_of,
    capture,
    hand_on_pass,
    in_group,
    inputs_of,
    is_equal,
    kwargs_argument,
    left_behind,
    merge_pass,
    rewrite,
    row_of,
    run,
    scope_kwargs,
)
from toma_fx.errors import ModelError
from toma_fx.passes.install import install, uninstall
from toma_fx.passes.one_plan import OnePlan
from toma_fx.passes.pipeline import Pass
from toma_fx.runtime.plan import MERGED, REUSE, SCOPE, UNTOUCHED, WEIGH, CallScope

EVERY_BLOCK = pytest.mark.parametrize("name", NAMES)
Graphs = dict[str, fx.GraphModule | None]


def graph_of(block: nn.Module) -> fx.GraphModule:
    return rewrite(block, merge_pass(block, "block"))


def put(block: nn.Module, graphs: Graphs, **options: Any) -> None:
    install(block, graphs, attention_kwargs=row_of(block).flow.attention_kwargs, **options)


def installed(name: str, *, untouched: bool = False) -> Any:
    block = block_of(name)
    put(block, {MERGED: graph_of(block), **({UNTOUCHED: None} if untouched else {})})
    return block


def call(block: nn.Module, inputs: dict[str, Any], variant: str) -> tuple[torch.Tensor, ...]:
    return run(block, inputs, **scope_kwargs(block, CallScope(variant)))


@EVERY_BLOCK
def test_the_block_runs_the_graph(name: str) -> None:
    block, inputs = block_of(name), inputs_of(name)
    gm = graph_of(block)
    before = run(block, inputs)
    put(block, {MERGED: gm})
    assert is_equal(run(block, inputs), run(gm, inputs))
    assert not is_equal(run(block, inputs), before)


@EVERY_BLOCK
def test_the_block_is_of_its_class_in_every_way_that_shows(name: str) -> None:
    plain, block = block_of(name), installed(name)
    original = type(plain)
    assert isinstance(block, original)
    for attribute in ("__name__", "__qualname__", "__module__", "__doc__"):
        assert getattr(type(block), attribute) == getattr(original, attribute)
    ours, theirs = inspect.signature(block.forward), inspect.signature(plain.forward)
    assert list(ours.parameters) == list(theirs.parameters)
    assert repr(block) == repr(plain)


@EVERY_BLOCK
def test_submodules_parameters_and_hooks_stay(name: str) -> None:
    block, inputs = block_of(name), inputs_of(name)
    modules, state = dict(block.named_modules()), block.state_dict()
    called: list[str] = []
    block.register_forward_hook(lambda *_: called.append("block"))
    first, child = next(block.named_children())
    child.register_forward_hook(lambda *_: called.append(first))
    put(block, {MERGED: graph_of(block)})
    assert dict(block.named_modules()) == modules
    assert list(block.state_dict()) == list(state)
    assert all(torch.equal(value, state[key]) for key, value in block.state_dict().items())
    run(block, inputs)
    assert called == [first, "block"]


def test_blocks_with_the_same_code_share_their_class() -> None:
    """So that they share one code object, which is compiled once."""
    first, second = installed("unet"), installed("unet")
    assert type(first) is type(second)
    assert type(first).forward.__code__ is type(second).forward.__code__
    other = block_of("unet")
    put(other, {MERGED: capture(other)})
    assert type(other) is not type(first)


@EVERY_BLOCK
@pytest.mark.parametrize(
    "duplicate",
    [copy.deepcopy, lambda block: pickle.loads(pickle.dumps(block))],
    ids=["deepcopy", "pickle"],
)
def test_a_copy_is_a_block_of_its_own(name: str, duplicate: Any) -> None:
    block, inputs = installed(name), inputs_of(name)
    before = run(block, inputs)
    twin = duplicate(block)
    assert type(twin) is type(block)
    assert is_equal(run(twin, inputs), before)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.zero_()
    assert is_equal(run(block, inputs), before)


def test_a_pickled_block_can_be_loaded_by_another_process(tmp_path: Path) -> None:
    block, inputs = installed("flux_double"), inputs_of("flux_double")
    (tmp_path / "block.pkl").write_bytes(pickle.dumps((block, inputs)))
    script = (
        "import pickle, sys, torch\n"
        "with open(sys.argv[1], 'rb') as file: block, inputs = pickle.load(file)\n"
        "with torch.no_grad(): torch.save(block(**inputs), sys.argv[2])\n"
    )
    paths = tmp_path / "block.pkl", tmp_path / "result.pt"
    subprocess.run([sys.executable, "-c", script, *map(str, paths)], check=True)
    assert_close(torch.load(paths[1]), run(block, inputs))


def test_a_traceback_shows_the_line_of_the_generated_forward() -> None:
    block = installed("unet")
    for _ in range(2):
        try:
            block(torch.zeros(1, 16, 33), encoder_hidden_states=torch.zeros(1, 7, 32))
        except RuntimeError:
            text = traceback.format_exc()
        assert "norm1 = self.norm1(merged)" in text
        assert "<toma_fx BasicTransformerBlock " in text
        linecache.checkcache()  # forgets the files that have changed or are gone


def test_the_source_of_the_forward_can_be_read() -> None:
    """Debuggers and torch.compile's messages ask for it."""
    source = inspect.getsource(type(installed("unet")).forward)
    assert source.startswith("def forward(self, hidden_states")
    assert "torch.ops.toma.merge" in source


def test_installing_into_a_block_on_another_device_moves_nothing() -> None:
    block = block_of("unet").to("meta")
    put(block, {MERGED: graph_of(block)})
    assert {parameter.device.type for parameter in block.parameters()} == {"meta"}


@EVERY_BLOCK
def test_the_call_says_which_variant_runs(name: str) -> None:
    block, inputs, plain = installed(name, untouched=True), inputs_of(name), block_of(name)
    merged = run(graph_of(plain), inputs)
    assert is_equal(call(block, inputs, MERGED), merged)
    assert is_equal(call(block, inputs, UNTOUCHED), run(plain, inputs))
    assert is_equal(run(block, inputs), merged)  # on its own, the first
    assert is_equal(call(block, inputs, WEIGH), merged)  # which it has not


@EVERY_BLOCK
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_untouched_variant_is_the_block_to_the_last_bit(name: str, dtype: torch.dtype) -> None:
    block = block_of(name, dtype)
    expected = run(block, inputs_of(name, dtype))
    put(block, {MERGED: graph_of(block), UNTOUCHED: None})
    assert is_equal(call(block, inputs_of(name, dtype), UNTOUCHED), expected)


@EVERY_BLOCK
def test_the_scope_does_not_reach_what_the_untouched_variant_calls(name: str) -> None:
    block = installed(name, untouched=True)
    seen: list[set[str]] = []

    def note(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        seen.append(kwargs.keys() & {SCOPE})

    for path, module in block.named_modules():
        if path in ("attn", "attn1"):
            module.register_forward_pre_hook(note, with_kwargs=True)
    argument = kwargs_argument(block)
    call = {**inputs_of(name), argument: {SCOPE: CallScope(UNTOUCHED)}}
    run(block, call)
    names = list(inspect.signature(block.forward).parameters)
    by_place = [call.get(each) for each in names[: names.index(argument) + 1]]
    with torch.no_grad():
        block(*by_place)
    assert seen == [set(), set()]
    assert list(call[argument]) == [SCOPE]


def test_a_leader_without_a_kept_plan_merges() -> None:
    """As where a hook skipped it in the call before."""
    block = block_of("unet")
    graphs: Graphs = {
        MERGED: in_group(block, keep=True),
        WEIGH: in_group(block, keep=True, kept_destinations=True),
        REUSE: in_group(block, "follow"),
    }
    followers: Graphs = {MERGED: in_group(block, "follow")}
    lead, inputs = block_of("unet"), inputs_of("unet")
    put(lead, graphs, leads=GROUP, follower=followers)
    merged = call(lead, inputs, MERGED)
    for variant in (WEIGH, REUSE):
        scope = CallScope(variant, kept={"": {}})
        assert is_equal(run(lead, inputs, **scope_kwargs(lead, scope)), merged)
        assert GROUP in scope.plans


@EVERY_BLOCK
@pytest.mark.parametrize("untouched", [False, True])
def test_uninstall_gives_the_class_back(name: str, untouched: bool) -> None:
    plain, block = block_of(name), installed(name, untouched=untouched)
    with torch.no_grad():
        for parameter in (*plain.parameters(), *block.parameters()):
            parameter.mul_(1.25)  # what was done since stays
    heard: list[nn.Module] = []
    block.register_forward_pre_hook(lambda module, args: heard.append(module))
    uninstall(block)
    assert type(block) is type(plain)
    assert vars(block).keys() == vars(plain).keys()
    assert is_equal(run(block, inputs_of(name)), run(plain, inputs_of(name)))
    assert heard == [block]


def test_compiled_code_goes_when_a_block_is_uninstalled() -> None:
    block, inputs = installed("unet"), inputs_of("unet")
    frames = CompileCounter()
    block.compile(backend=frames)
    run(block, inputs)
    uninstall(block)
    assert is_equal(run(block, inputs), run(block_of("unet"), inputs))
    assert frames.frame_count == 1


def test_a_class_that_someone_put_over_the_installed_one() -> None:
    block = installed("unet")
    cls: Any = type(block)
    block.__class__ = type("Theirs", (cls,), {"__module__": "theirs"})
    with pytest.raises(ModelError, match=r"got another class after .* theirs\.Theirs; undo"):
        uninstall(block)
    block.__class__ = cls
    uninstall(block)
    assert type(block) is type(block_of("unet"))


def test_blocks_with_other_variants_are_of_another_class() -> None:
    both, one = installed("unet", untouched=True), installed("unet")
    assert type(both) is not type(one)
    assert type(both) is type(installed("unet", untouched=True))


@pytest.mark.parametrize(
    "duplicate", [copy.deepcopy, lambda block: pickle.loads(pickle.dumps(block))]
)
def test_a_copy_has_every_variant(duplicate: Any) -> None:
    block, inputs = installed("unet", untouched=True), inputs_of("unet")
    twin = duplicate(block)
    assert type(twin) is type(block)
    for variant in (MERGED, UNTOUCHED):
        assert is_equal(call(twin, inputs, variant), call(block, inputs, variant))


def kept() -> tuple[int, ...]:
    """Sources and classes in the process, and rows in diffusers' registry of blocks."""
    from diffusers.hooks._helpers import TransformerBlockRegistry

    TransformerBlockRegistry._register()
    left = left_behind()
    sources = sum(name.startswith("<toma_fx ") for name in linecache.cache)
    return (*left, sources, len(TransformerBlockRegistry._registry))


def own_graph(block: nn.Module, *more: Pass) -> fx.GraphModule:
    """A graph that no other test installs, whose class nothing else keeps."""
    options = replace(OPTIONS, ratio=0.3125)
    return rewrite(block, merge_pass(block, "block", options=options), OnePlan(), *more)


def test_what_was_installed_goes_with_the_last_block() -> None:
    def installed_here() -> Any:
        block = block_of("unet")
        put(block, {MERGED: own_graph(block), UNTOUCHED: None})
        return block

    installed_here()
    before = kept()
    first, second = installed_here(), installed_here()
    with_two = kept()
    assert with_two[2] == before[2] + 1  # both are of one class
    assert with_two[3] > before[3]
    assert with_two[4] == before[4] + 1
    twin = copy.deepcopy(first)
    del first, second
    assert kept() == with_two
    del twin
    assert kept() == before


def test_many_installs_leave_nothing() -> None:
    def install_and_forget() -> weakref.ref[Any]:
        block = block_of("flux_single")
        roles: tuple[Role, Role] = ("lead", "follow")
        lead, follow = (own_graph(block, hand_on_pass(block, role)) for role in roles)
        graphs: Graphs = {MERGED: lead, UNTOUCHED: None}
        put(block, graphs, leads=GROUP, follower={MERGED: follow, UNTOUCHED: None})
        run(block, inputs_of("flux_single"))
        return weakref.ref(type(block))

    install_and_forget()
    before = kept()
    classes = [install_and_forget() for _ in range(5)]
    assert kept() == before
    assert [each() for each in classes] == [None] * 5


def test_a_block_that_is_uninstalled_and_kept_leaves_nothing_either() -> None:
    block = block_of("unet")
    graph = own_graph(block)
    before = kept()
    for _ in range(3):
        put(block, {MERGED: graph})
        assert kept()[4] == before[4] + 1
        uninstall(block)
        assert kept() == before
