"""Blocks with a graph for each kind of an argument."""

import copy
import functools
import pickle
from typing import Any

import pytest
import torch
from torch import fx

from tests.passes.blocks import GROUP, Role, family_of, is_equal, merge_pass, run
from tests.tiny_families import tiny_wan
from toma_fx.build import captured
from toma_fx.families.wan import PER_TOKEN, form_of
from toma_fx.passes.hand_on import HandOn
from toma_fx.passes.install import install, uninstall
from toma_fx.passes.one_plan import OnePlan
from toma_fx.passes.pipeline import Pass, run_passes
from toma_fx.runtime.plan import MERGED, REUSE, UNTOUCHED, WEIGH, CallScope, InScope

Graphs = dict[str, fx.GraphModule | None]
FORMS = ("", PER_TOKEN)


def wan_block() -> Any:
    """A block that has a graph for a modulation of each token, and one for that of a video."""
    return copy.deepcopy(tiny_wan().blocks[1])


def wan_inputs(block: Any, form: str) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    width, heads = block.scale_shift_table.shape[-1], block.attn1.heads
    rotary = torch.randn(1, 64, 1, width // heads, generator=generator)
    return {
        "hidden_states": torch.randn(2, 64, width, generator=generator),
        "encoder_hidden_states": torch.randn(2, 520, width, generator=generator),
        "temb": torch.randn(2, *([64] if form else []), 6, width, generator=generator),
        "rotary_emb": (rotary.cos(), rotary.sin()),
    }


def wan_graphs(block: Any, *passes: Pass) -> dict[str, fx.GraphModule]:
    """By its form, the graph of a block."""
    family = family_of(block)
    return {form: run_passes(captured(block, family, form), passes) for form in FORMS}


def put_forms(block: Any, graphs: Graphs, **options: Any) -> None:
    install(block, graphs, attention_kwargs=None, form=(("temb",), form_of), **options)


@pytest.mark.parametrize("form", FORMS)
def test_the_kind_of_an_argument_says_which_graph_runs(form: str) -> None:
    block = wan_block()
    inputs = wan_inputs(block, form)
    plain = run(block, inputs)
    graphs = wan_graphs(block, merge_pass(block, "block"))
    merged = run(graphs[form], inputs)
    named: Graphs = {f"{MERGED}{each}": gm for each, gm in graphs.items()}
    put_forms(block, {**named, **{f"{UNTOUCHED}{each}": None for each in FORMS}})
    assert is_equal(run(block, inputs), merged)
    assert not is_equal(merged, plain)
    with torch.no_grad():
        assert torch.equal(block(*inputs.values()), merged[0])
    for duplicate in (copy.deepcopy(block), pickle.loads(pickle.dumps(block))):
        assert type(duplicate) is type(block)
        assert is_equal(run(duplicate, inputs), merged)
    scoped = functools.partial(InScope(block, CallScope(UNTOUCHED)), **inputs)
    with torch.no_grad():
        assert torch.equal(scoped(), plain[0])
    uninstall(block)
    assert is_equal(run(block, inputs), plain)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("variant", [WEIGH, REUSE])
def test_a_variant_that_a_block_has_not_is_the_first_of_its_form(form: str, variant: str) -> None:
    """As with those that follow a leader, in a call that uses kept plans."""
    block = wan_block()
    inputs = wan_inputs(block, form)
    graphs = wan_graphs(block, merge_pass(block, "block"))
    merged = run(graphs[form], inputs)
    put_forms(block, {f"{MERGED}{each}": gm for each, gm in graphs.items()})
    with torch.no_grad():
        assert torch.equal(InScope(block, CallScope(variant))(**inputs), merged[0])


def test_forms_that_have_one_code_have_one_function() -> None:
    block = wan_block()
    put_forms(block, {f"{UNTOUCHED}{each}": None for each in FORMS})
    assert type(block).forward is type(wan_block()).forward


@pytest.mark.parametrize("form", FORMS)
def test_a_leader_of_several_forms_that_is_skipped_leaves_its_plan(form: str) -> None:
    lead, follow = wan_block(), wan_block()
    inputs = wan_inputs(lead, form)

    def graphs(role: Role) -> Graphs:
        hand_on = HandOn(attention_kwargs=None, group=GROUP, role=role)
        made = wan_graphs(lead, merge_pass(lead, "block"), OnePlan(), hand_on)
        return {f"{MERGED}{each}": gm for each, gm in made.items()}

    followers = graphs("follow")
    put_forms(lead, graphs("lead"), leads=GROUP, follower=followers)
    put_forms(follow, followers)

    def in_order() -> torch.Tensor:
        lead(**inputs)
        output: torch.Tensor = follow(**inputs)
        return output

    with torch.no_grad():
        expected = InScope(in_order, CallScope())()
        lead.forward = lambda hidden_states, **_: hidden_states
        assert torch.equal(InScope(in_order, CallScope())(), expected)
