"""Plans and attention kwargs travel from block to block."""

import math
import re
from typing import Any

import pytest
import torch
from diffusers.models.embeddings import apply_rotary_emb
from torch import Tensor

from tests.runtime.tokens import cut, random_tokens
from tests.tiny import tiny_flux
from toma_fx.errors import InputError
from toma_fx.runtime import plan
from toma_fx.runtime.arguments import rotary_tables
from toma_fx.runtime.merging import rows
from toma_fx.runtime.regions import layout
from toma_fx.runtime.selector import select

PLAN = (torch.zeros(1), torch.ones(1))


def test_a_shared_plan_reaches_the_blocks_of_the_same_call_only() -> None:
    first, second = {plan.SCOPE: plan.CallScope()}, {plan.SCOPE: plan.CallScope()}
    assert plan.share(first, "Block", *PLAN) == PLAN
    assert plan.shared(first, "Block") == PLAN
    with pytest.raises(InputError):
        plan.shared(second, "Block")


def test_the_latest_plan_is_the_one_that_is_shared() -> None:
    kwargs = {plan.SCOPE: plan.CallScope()}
    plan.share(kwargs, "Block", torch.zeros(2))
    plan.share(kwargs, "Block", *PLAN)
    assert plan.shared(kwargs, "Block") == PLAN


def test_groups_and_stages_have_their_own_plans() -> None:
    scope = plan.CallScope(plan.REUSE, grids=(48, 16), keeps=True)
    kwargs = {"scale": 0.5, plan.SCOPE: scope}
    plan.share(kwargs, "Block", *PLAN)
    plan.share(kwargs, "SingleBlock", torch.zeros(2))
    assert plan.shared(kwargs, "Block") == PLAN
    stage = plan.own_scope(kwargs, "mid_block.attentions.0")
    assert stage["scale"] == 0.5
    assert (stage[plan.SCOPE].variant, stage[plan.SCOPE].grids) == (plan.REUSE, (48, 16))
    with pytest.raises(InputError):
        plan.shared(stage, "Block")
    plan.share(stage, "Block", torch.ones(3))
    assert plan.shared(kwargs, "Block") == PLAN
    made = scope.made()
    assert {path: list(plans) for path, plans in made.items()} == {
        "": ["Block", "SingleBlock"],
        "mid_block.attentions.0": ["Block"],
    }


def test_the_plans_of_an_earlier_call_are_known_by_stage_and_group() -> None:
    kept = {"": {"Block": PLAN}, "stage": {"Block": (torch.ones(3), torch.ones(4))}}
    for variant, reused in ((plan.REUSE, True), (plan.WEIGH, False)):
        kwargs = {plan.SCOPE: plan.CallScope(variant, kept=kept)}
        stage = plan.own_scope(kwargs, "stage")
        assert plan.kept_destinations(kwargs, "Block") is PLAN[-1]
        assert plan.kept_destinations(stage, "Block") is kept["stage"]["Block"][-1]
        assert ("Block" in kwargs[plan.SCOPE].plans) == reused
        assert ("Block" in stage[plan.SCOPE].plans) == reused
        assert plan.own_scope(kwargs, "new stage")[plan.SCOPE].plans == {}
    assert kept["stage"].keys() == {"Block"}


@pytest.mark.parametrize(
    ("asked", "group", "kept", "runs"),
    [
        (plan.MERGED, "Block", {}, plan.MERGED),
        (plan.UNTOUCHED, "Block", {}, plan.UNTOUCHED),
        (plan.REUSE, "Block", {"Block": PLAN}, plan.REUSE),
        (plan.WEIGH, "Block", {"Block": PLAN}, plan.WEIGH),
        # A block whose plan nobody kept makes one, and one that makes none asks for the call's.
        (plan.REUSE, "Block", {}, plan.MERGED),
        (plan.WEIGH, "Block", {"SingleBlock": PLAN}, plan.MERGED),
        (plan.REUSE, "", {}, plan.REUSE),
    ],
)
def test_the_variant_of_a_block(asked: str, group: str, kept: Any, runs: str) -> None:
    kwargs = {plan.SCOPE: plan.CallScope(asked, kept={"": kept})}
    assert plan.variant(kwargs, group) == runs
    assert plan.variant({"scale": 1.0}, group) == plan.variant(None) == plan.MERGED


@pytest.mark.parametrize(
    ("grids", "segments"),
    [
        (None, (64,)),
        ((48, 16), (48, 16)),
        ((48, 48), (64,)),  # of the whole sequence, of which a rank holds a part
    ],
)
def test_a_call_s_grids_are_cut_each_for_itself(grids: Any, segments: tuple[int, ...]) -> None:
    kwargs = {plan.SCOPE: plan.CallScope(grids=grids)}
    tokens = torch.zeros(2, 64, 3)
    assert plan.region_layout(kwargs, tokens, 16, 0.5) == layout(segments, 16, 0.5)
    assert plan.region_layout(None, tokens, 16, 0.5) == layout((64,), 16, 0.5)


@pytest.mark.parametrize("kwargs", [None, {}, {"scale": 1.0}])
def test_a_leader_that_is_called_on_its_own_still_gets_its_plan(kwargs: Any) -> None:
    assert plan.share(kwargs, "Block", *PLAN) == PLAN


WITHOUT_SCOPE = pytest.mark.parametrize(
    "kwargs",
    [None, {}, {"scale": 1.0}, {plan.SCOPE: plan.CallScope()}],
    ids=["none", "empty", "other kwargs", "empty scope"],
)


@WITHOUT_SCOPE
def test_a_follower_that_is_called_on_its_own(kwargs: Any) -> None:
    message = (
        "this block (Block) shares the plan of its group's first block, which did not run before "
        "it; call the whole model, or, to run or export blocks on their own or to skip the first, "
        "transform with share='block', where each makes its own plan"
    )
    with pytest.raises(InputError, match=f"^{re.escape(message)}$"):
        plan.shared(kwargs, "Block")


@pytest.mark.parametrize(
    ("kwargs", "due"),
    [
        (None, False),
        ({"scale": 1.0}, False),
        ({plan.SCOPE: plan.CallScope()}, True),
        ({plan.SCOPE: plan.CallScope(plan.UNTOUCHED)}, False),
    ],
    ids=["none", "other kwargs", "empty scope", "a call that does not merge"],
)
def test_a_plan_is_due_until_it_is_made(kwargs: Any, due: bool) -> None:
    assert plan.is_due(kwargs, "Block") is due
    plan.share(kwargs, "Block", *PLAN)
    assert not plan.is_due(kwargs, "Block")


def test_a_postponed_plan_is_made_once_and_only_when_a_block_asks() -> None:
    kwargs = {plan.SCOPE: plan.CallScope()}
    made = []

    def planner() -> None:
        made.append(plan.share(kwargs, "Block", *PLAN))

    plan.postpone(kwargs, "Block", planner)
    assert not made
    assert plan.shared(kwargs, "Block") == plan.shared(kwargs, "Block") == PLAN
    assert len(made) == 1


def test_the_attention_layers_get_all_kwargs_but_the_scope() -> None:
    kwargs = {"scale": 0.5, "ip_hidden_states": [PLAN[0]], plan.SCOPE: plan.CallScope()}
    carried = plan.pass_on(kwargs, "gligen", "ip_adapter_masks")
    assert carried == {"scale": 0.5, "ip_hidden_states": [PLAN[0]]}
    assert plan.SCOPE in kwargs  # the blocks that follow still need it


@pytest.mark.parametrize("kwargs", [None, {}])
def test_no_kwargs_become_an_empty_dictionary(kwargs: Any) -> None:
    assert plan.pass_on(kwargs, "gligen") == {}


def test_a_refused_kwarg() -> None:
    message = (
        "the attention kwarg 'gligen' refers to the full grid of image tokens and cannot be "
        "carried through merged tokens; leave it out, or call the untransformed model"
    )
    with pytest.raises(InputError, match=f"^{re.escape(message)}$"):
        plan.pass_on({"gligen": {"boxes": PLAN[0]}}, "ip_adapter_masks", "gligen")


def test_a_refused_kwarg_that_is_none_is_as_good_as_left_out() -> None:
    assert plan.pass_on({"gligen": None}, "gligen") == {"gligen": None}


@pytest.mark.parametrize("merged_keys", [True, False])
def test_no_mask(merged_keys: bool) -> None:
    assert plan.pass_on_mask(None, "attention_mask", merged_keys=merged_keys) is None


@pytest.mark.parametrize("shape", [(2, 1, 7), (2, 7)], ids=["bias", "keys"])
def test_a_mask_of_text_tokens_stays_as_it_is(shape: tuple[int, ...]) -> None:
    mask = torch.zeros(shape)
    assert plan.pass_on_mask(mask, "encoder_attention_mask", merged_keys=False) is mask


@pytest.mark.parametrize(
    ("shape", "merged_keys"),
    [((2, 1, 64), True), ((2, 64), True), ((2, 64, 64), True), ((2, 64, 7), False)],
)
def test_a_mask_of_image_tokens_is_refused(shape: tuple[int, ...], merged_keys: bool) -> None:
    message = (
        f"attention_mask of shape {shape} masks single image tokens, which merging joins; "
        "pass None, or leave the component out: transform with placement='component', "
        f"components={('cross_attention' if merged_keys else 'self_attention', 'mlp')!r} and "
        "region='stripe'"
    )
    with pytest.raises(InputError, match=f"^{re.escape(message)}$"):
        plan.pass_on_mask(torch.zeros(shape), "attention_mask", merged_keys=merged_keys)


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
    tokens = random_tokens(2, 64, 6)
    destinations = select(tokens, cut(tokens), "facility_location")
    query = random_tokens(2, text_tokens + 32, 2, rotary[0].shape[-1])

    cos, sin = (rows(table, destinations, 0, text_tokens) for table in rotary)
    assert all(table.shape == (2, text_tokens + 32, rotary[0].shape[-1]) for table in (cos, sin))
    rotated = apply_rotary_emb(query, rotary_tables(cos, sin), sequence_dim=1)

    for image in range(2):
        kept = torch.cat([torch.arange(text_tokens), text_tokens + destinations[image].flatten()])
        tables = tuple(table[kept] for table in rotary)
        expected = apply_rotary_emb(query[image : image + 1], tables, sequence_dim=1)
        assert torch.equal(rotated[image : image + 1], expected)


def test_a_processor_that_takes_rotary_values_in_another_way() -> None:
    (table,) = rotary_tables(torch.zeros(2, 8, 4))
    message = (
        "rotary index (None, slice(None, None, None)) is neither [None, :, None, :] nor "
        "[None, None, :, :]; use one of diffusers' own processors with merged tokens, or leave its "
        "blocks out with skip"
    )
    with pytest.raises(InputError, match=f"^{re.escape(message)}$"):
        table[None, :]
    message = (
        "rotary values on merged tokens have their heads at dimension 1, not 0; use one of "
        "diffusers' own processors, or leave its blocks out with skip"
    )
    with pytest.raises(InputError, match=f"^{re.escape(message)}$"):
        table.unsqueeze(0)
    message = (
        "rotary values on merged tokens have no 'ndim', because each image has its own table; use "
        "one of diffusers' own processors, or leave its blocks out with skip"
    )
    with pytest.raises(InputError, match=f"^{re.escape(message)}$"):
        table.ndim  # noqa: B018
    assert not hasattr(table, "ndim")


def test_rotary_values_answer_as_diffusers_table_does() -> None:
    """Heads come behind tokens, or before them."""
    values = random_tokens(2, 8, 4)
    (table,) = rotary_tables(values)
    assert torch.equal(table[None, :, None, :], values[:, :, None])
    assert torch.equal(table.unsqueeze(1), values[:, :, None])
    assert torch.equal(table[None, None, :, :], values[:, None])
    query = random_tokens(2, 2, 8, 4, seed=1)
    tables = rotary_tables(values.cos(), values.sin())
    rotated = apply_rotary_emb(query, tables, sequence_dim=2)
    for image in range(2):
        own = values[image].cos(), values[image].sin()
        expected = apply_rotary_emb(query[image : image + 1], own, sequence_dim=2)
        assert torch.equal(rotated[image : image + 1], expected)
    assert (table.shape, table.dtype, table.device.type) == ((8, 4), torch.float32, "cpu")
    assert table.to(torch.bfloat16).float().dtype == torch.float32


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
