"""How plans and attention kwargs travel from block to block."""

import math
import re
from typing import Any

import pytest
import torch
from diffusers.models.embeddings import apply_rotary_emb
from torch import Tensor

from tests.runtime.tokens import random_tokens
from tests.tiny import tiny_flux
from toma_fx.errors import InputError
from toma_fx.runtime import plan
from toma_fx.runtime.selector import select

PLAN = (torch.zeros(1), torch.ones(1))


def test_a_shared_plan_reaches_the_blocks_of_the_same_call_only() -> None:
    first, second = {plan.SCOPE: plan.PlanScope()}, {plan.SCOPE: plan.PlanScope()}
    assert plan.share(first, "Block", *PLAN) == PLAN
    assert plan.shared(first, "Block") == PLAN
    with pytest.raises(InputError):
        plan.shared(second, "Block")


def test_the_latest_plan_is_the_one_that_is_shared() -> None:
    kwargs = {plan.SCOPE: plan.PlanScope()}
    plan.share(kwargs, "Block", torch.zeros(2))
    plan.share(kwargs, "Block", *PLAN)
    assert plan.shared(kwargs, "Block") == PLAN


def test_blocks_of_another_class_and_parts_of_a_model_have_their_own_plans() -> None:
    time = (torch.tensor(3), torch.tensor(1))
    kwargs = {"scale": 0.5, plan.SCOPE: plan.PlanScope(time)}
    plan.share(kwargs, "Block", *PLAN)
    plan.share(kwargs, "SingleBlock", torch.zeros(2))
    assert plan.shared(kwargs, "Block") == PLAN
    part = plan.own_scope(kwargs)
    assert part["scale"] == 0.5
    assert plan.time_of(part) is time
    with pytest.raises(InputError):
        plan.shared(part, "Block")
    assert plan.share(plan.own_scope(None), "Block", *PLAN) == PLAN


@pytest.mark.parametrize("kwargs", [None, {}, {"scale": 1.0}])
def test_a_leader_that_is_called_on_its_own_still_gets_its_plan(kwargs: Any) -> None:
    assert plan.share(kwargs, "Block", *PLAN) == PLAN


WITHOUT_SCOPE = pytest.mark.parametrize(
    "kwargs",
    [None, {}, {"scale": 1.0}, {plan.SCOPE: plan.PlanScope()}],
    ids=["none", "empty", "other kwargs", "empty scope"],
)


@WITHOUT_SCOPE
def test_a_follower_that_is_called_on_its_own(kwargs: Any) -> None:
    message = (
        "this block (Block) shares the plan of its group's first block, which did not run before "
        "it; call the whole model, or, to run blocks on their own or to skip the first, "
        "transform with share='block', where each makes its own plan"
    )
    with pytest.raises(InputError, match=f"^{re.escape(message)}$"):
        plan.shared(kwargs, "Block")


@pytest.mark.parametrize(
    ("kwargs", "due"),
    [
        (None, False),
        ({"scale": 1.0}, False),
        ({plan.SCOPE: plan.PlanScope()}, True),
        ({plan.SCOPE: plan.PlanScope(merging=False)}, False),
    ],
    ids=["none", "other kwargs", "empty scope", "a call that does not merge"],
)
def test_a_plan_is_due_until_it_is_made(kwargs: Any, due: bool) -> None:
    assert plan.is_due(kwargs, "Block") is due
    plan.share(kwargs, "Block", *PLAN)
    assert not plan.is_due(kwargs, "Block")


def test_a_postponed_plan_is_made_once_and_only_when_a_block_asks() -> None:
    kwargs = {plan.SCOPE: plan.PlanScope()}
    made = []

    def planner() -> None:
        made.append(plan.share(kwargs, "Block", *PLAN))

    plan.postpone(kwargs, "Block", planner)
    assert not made
    assert plan.shared(kwargs, "Block") == plan.shared(kwargs, "Block") == PLAN
    assert len(made) == 1


@WITHOUT_SCOPE
def test_a_block_with_a_schedule_that_is_called_on_its_own(kwargs: Any) -> None:
    message = (
        "this block keeps its plan on a schedule and needs the model's clock; call the whole "
        "model, or transform without a schedule to run blocks on their own"
    )
    with pytest.raises(InputError, match=f"^{re.escape(message)}$"):
        plan.time_of(kwargs)


def test_time_of_a_call() -> None:
    time = (torch.tensor(3), torch.tensor(1))
    assert plan.time_of({plan.SCOPE: plan.PlanScope(time)}) is time


def test_the_attention_layers_get_all_kwargs_but_the_scope() -> None:
    kwargs = {"scale": 0.5, "ip_hidden_states": [PLAN[0]], plan.SCOPE: plan.PlanScope()}
    carried = plan.carry(kwargs, "gligen", "ip_adapter_masks")
    assert carried == {"scale": 0.5, "ip_hidden_states": [PLAN[0]]}
    assert plan.SCOPE in kwargs  # the blocks that follow still need it


@pytest.mark.parametrize("kwargs", [None, {}])
def test_no_kwargs_become_an_empty_dictionary(kwargs: Any) -> None:
    assert plan.carry(kwargs, "gligen") == {}


def test_a_refused_kwarg() -> None:
    message = (
        "the attention kwarg 'gligen' refers to the full grid of image tokens and cannot be "
        "carried through merged tokens; leave it out, or call the untransformed model"
    )
    with pytest.raises(InputError, match=f"^{re.escape(message)}$"):
        plan.carry({"gligen": {"boxes": PLAN[0]}}, "ip_adapter_masks", "gligen")


def test_a_refused_kwarg_that_is_none_is_as_good_as_left_out() -> None:
    assert plan.carry({"gligen": None}, "gligen") == {"gligen": None}


@pytest.mark.parametrize("merged_keys", [True, False])
def test_no_mask(merged_keys: bool) -> None:
    assert plan.carry_mask(None, "attention_mask", merged_keys=merged_keys) is None


@pytest.mark.parametrize("shape", [(2, 1, 7), (2, 7)], ids=["bias", "keys"])
def test_a_mask_of_text_tokens_stays_as_it_is(shape: tuple[int, ...]) -> None:
    mask = torch.zeros(shape)
    assert plan.carry_mask(mask, "encoder_attention_mask", merged_keys=False) is mask


@pytest.mark.parametrize(
    ("shape", "merged_keys"),
    [((2, 1, 64), True), ((2, 64), True), ((2, 64, 64), True), ((2, 64, 7), False)],
)
def test_a_mask_of_image_tokens_is_refused(shape: tuple[int, ...], merged_keys: bool) -> None:
    message = (
        f"attention_mask of shape {shape} masks single image tokens, which merging joins; "
        "pass None, or leave the component out: components=('cross_attention', 'mlp') for a "
        "self-attention mask, ('self_attention', 'mlp') for a cross-attention mask"
    )
    with pytest.raises(InputError, match=f"^{re.escape(message)}$"):
        plan.carry_mask(torch.zeros(shape), "attention_mask", merged_keys=merged_keys)


def rotary_of(text_tokens: int, height: int, width: int) -> tuple[Tensor, Tensor]:
    """Flux's rotary values of text tokens and a grid of image tokens."""
    ids = torch.zeros(text_tokens + height * width, 3)
    ids[text_tokens:, 1] = torch.arange(height).repeat_interleave(width)
    ids[text_tokens:, 2] = torch.arange(width).repeat(height)
    rotary: tuple[Tensor, Tensor] = tiny_flux().pos_embed(ids)
    return rotary


def test_merged_tokens_are_rotated_by_the_values_of_their_destinations() -> None:
    """In a batch, each image by those of its own destinations."""
    text_tokens = 5
    rotary = rotary_of(text_tokens, 8, 8)
    destinations = select(random_tokens(2, 64, 6), 16, 0.5, "facility_location")
    query = random_tokens(2, text_tokens + 32, 2, rotary[0].shape[-1])

    values = plan.rotary_at(rotary, destinations, text_tokens)
    assert all(table.shape == (2, text_tokens + 32, rotary[0].shape[-1]) for table in values)
    rotated = apply_rotary_emb(query, plan.rotary_tables(*values), sequence_dim=1)

    for image in range(2):
        kept = torch.cat([torch.arange(text_tokens), text_tokens + destinations[image].flatten()])
        tables = tuple(table[kept] for table in rotary)
        expected = apply_rotary_emb(query[image : image + 1], tables, sequence_dim=1)
        assert torch.equal(rotated[image : image + 1], expected)


def test_rotary_values_without_text_tokens() -> None:
    rotary = rotary_of(0, 8, 8)
    destinations = select(random_tokens(1, 64, 6), 16, 0.5, "grid")
    cos, sin = plan.rotary_at(rotary, destinations, 0)
    assert torch.equal(cos[0], rotary[0][destinations.flatten()])
    assert torch.equal(sin[0], rotary[1][destinations.flatten()])


def test_a_processor_that_takes_rotary_values_in_another_way() -> None:
    tables = plan.rotary_tables(torch.zeros(2, 8, 4), torch.zeros(2, 8, 4))
    message = "is not the [None, :, None, :] of Flux's attention processors; use one of diffusers'"
    with pytest.raises(InputError, match=re.escape(message)):
        apply_rotary_emb(torch.zeros(2, 2, 8, 4), tables, sequence_dim=2)


@pytest.mark.parametrize(
    ("dtype", "expected"),
    [
        (torch.float16, [-65504.0, 1.0, 65504.0]),
        (torch.bfloat16, [-math.inf, 1.0, math.inf]),
        (torch.float32, [-math.inf, 1.0, math.inf]),
    ],
)
def test_only_float16_is_clipped(dtype: torch.dtype, expected: list[float]) -> None:
    hidden_states = torch.tensor([-math.inf, 1.0, math.inf], dtype=dtype)
    clipped = plan.clip_float16(hidden_states, -65504, 65504)
    assert torch.equal(clipped, torch.tensor(expected, dtype=dtype))


def test_expected_outputs_pass_through() -> None:
    assert plan.expect_outputs(PLAN, 2) is PLAN


@pytest.mark.parametrize("count", [1, 3])
def test_another_number_of_outputs(count: int) -> None:
    message = (
        f"attention returned 2 outputs, but {count} when the model was transformed; load or "
        "unload IP-Adapters first: toma_fx.restore, load, transform again"
    )
    with pytest.raises(InputError, match=f"^{re.escape(message)}$"):
        plan.expect_outputs(PLAN, count)
