"""References of edit models, merged once at the model's border and never unmerged.

The tokens of reference images carry no noise: they are the same at every step of a run, and the
model's output for them is discarded. So they are merged before diffusers' forward, which then runs
unchanged on a shorter sequence, and no result has to be spread back.

Each reference is one region, so that flat parts lose most of their tokens and detail keeps its own.
A kept token has its original position. Models hold one set of positions for all samples of a batch,
so all samples keep the tokens at the same places, chosen by similarities averaged over samples;
each sample has its own weights.
"""

from collections.abc import Callable, Mapping
from itertools import groupby
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from toma_fx.border import BorderKey
from toma_fx.calls import Arguments
from toma_fx.config import MergeConfig
from toma_fx.errors import InputError, ModelError
from toma_fx.families.rows import References
from toma_fx.grids import rows_in_order as grid_rows_in_order
from toma_fx.ordering import image_ids, rows_in_order
from toma_fx.runtime import plan, regions
from toma_fx.runtime.memory import Kept
from toma_fx.runtime.plan import CallScope, Plan
from toma_fx.runtime.selector import unit_tokens

toma = torch.ops.toma

REFERENCES = "references"
"""Name of the references' plan among the plans of a call. The plan holds the merged tokens of all
references, ``(B, n, C)``, and the indices of the tokens that are left, ``(N,)``."""


def reference_grids(model: Any, call: Mapping[str, Any]) -> tuple[int, ...] | None:
    """Return the token counts of the generated image and of each reference.

    Returns None in a call without references.

    Args:
        model: a transformed model of a family with references.
        call: arguments of the call, by name.

    Raises:
        InputError: when tokens of the generated image follow those of a reference.
    """
    key: BorderKey = model.toma_key
    if key.grids is not None:
        grids = key.grids.grids(model, call)
        drawn = _references(key).drawn(model, grids)
        tokens = [grid.tokens for grid in grids]
        found = (sum(tokens[:drawn]), *tokens[drawn:])
    else:
        sequence = key.positions
        assert sequence is not None, "a family with references says where its tokens are"
        ids = image_ids(call, sequence, sequence.tokens, sequence.ids)
        if ids.is_meta:
            return None
        found = model.toma_state.read((ids,), lambda: _runs(sequence.places(ids)[:, 0]))
    return found if len(found) > 1 else None


def _runs(numbers: Tensor) -> tuple[int, ...]:
    """Return the token count of each image, given the image number of each token."""
    runs = [(number, len(list(run))) for number, run in groupby(numbers.round().tolist())]
    if any(number == runs[0][0] for number, _ in runs[1:]):
        raise InputError(
            "some tokens of the generated image come after those of a reference; "
            "tokens='references' needs all of them first"
        )
    return tuple(tokens for _, tokens in runs)


def _references(key: BorderKey) -> References:
    assert key.family.references is not None, "the recipe refused families without"
    return key.family.references


def refuse_traced(key: BorderKey) -> None:
    """Refuse to trace a call whose references are identified by tensor values.

    Raises:
        ModelError: when the values of ids tell which tokens belong to references.
    """
    if key.positions is not None:
        raise ModelError(
            f"the values of {key.positions.ids} tell which tokens belong to references, and a "
            "traced graph does not know them. Compile the model itself, by torch.compile(model), "
            "model.compile() or model.compile_repeated_blocks(); export it with toma_fx.export"
        )


def _check_call(key: BorderKey, call: Mapping[str, Any]) -> None:
    """Refuse arguments that refer to single tokens.

    Raises:
        InputError: when the call has such an argument.
    """
    family, references = key.family, _references(key)
    for name in references.refused:
        if call.get(name) is not None:
            raise InputError(
                f"{name}={call[name]!r:.60} refers to the tokens of references, which "
                "tokens='references' merges; leave it out, or call the untransformed model"
            )
    kwargs = None if family.attention_kwargs is None else call.get(family.attention_kwargs)
    refused = {name for row in family.blocks for name in (*row.refused, *row.refused_by_attention)}
    plan.pass_on(kwargs, *sorted(refused))


def kept_plan(model: Any, call: Mapping[str, Any], grids: tuple[int, ...]) -> Kept | None:
    """Return the plan for the references of a call, made once for all calls with equal references.

    References are compared by their values, because pipelines copy them into a new tensor at every
    step; on a GPU, this comparison waits for the device. Returns None if gradients of the
    references are needed.

    Raises:
        InputError: when an argument refers to single tokens.
    """
    key: BorderKey = model.toma_key
    _check_call(key, call)
    tokens = call[_references(key).tokens]
    if torch.is_grad_enabled() and tokens.requires_grad:
        return None

    def make() -> Plan:
        return plan_references(tokens, grids, key.config)

    made = model.toma_state.plan_for(tokens[:, grids[0] :], grids, make)
    return Kept({"": {REFERENCES: made}})


def plan_references(tokens: Tensor, grids: tuple[int, ...], config: MergeConfig) -> Plan:
    """Merge the references of a call.

    Args:
        tokens: ``(B, N, C)``, all image tokens.
        grids: token counts of the generated image and of each reference.
        config: the options.

    Returns:
        merged tokens ``(B, n, C)``, one reference after the other, and the indices of the tokens
        that are left, ``(grids[0] + n,)`` int64, in ascending order.
    """
    drawn, *sizes = grids
    left, merged, start = [torch.arange(drawn, device=tokens.device)], [], drawn
    for reference in tokens[:, drawn:].split(sizes, dim=1):
        kept, chosen = _merge(reference, config)
        merged.append(kept)
        left.append(chosen + start)
        start += reference.shape[1]
    return torch.cat(merged, dim=1), torch.cat(left)


def _merge(reference: Tensor, config: MergeConfig) -> tuple[Tensor, Tensor]:
    count = reference.shape[1]
    layout = regions.layout([count], regions.WHOLE_IMAGE, config.ratio)
    if layout[0] == count:
        return reference, torch.arange(count, device=reference.device)
    # The cosines of the samples' unit tokens side by side are the mean of the samples' cosines.
    side_by_side = unit_tokens(reference).transpose(0, 1).flatten(1).unsqueeze(0)
    chosen = toma.select(side_by_side, layout, config.selector).sort(dim=-1).values
    of_rows = chosen.expand(reference.shape[0], -1, -1)
    options = (config.temperature, config.merge_over, config.unmerge)
    weight, _ = toma.weigh(reference, of_rows, layout, *options)
    return toma.merge(reference, weight, layout), chosen.flatten()


def tokens_left(grids: tuple[int, ...], ratio: float) -> tuple[int, ...]:
    """Return how many tokens of each reference are left.

    Args:
        grids: token counts of the generated image and of each reference.
        ratio: share of a reference's tokens that is merged away.
    """
    return tuple(regions.kept_tokens(count, ratio) for count in grids[1:])


def run_on_references(
    forward: Callable[..., Any],
    call: Arguments,
    model: Any,
    grids: tuple[int, ...] | None,
    kept: Kept | None,
    keep: bool,
) -> tuple[Any, Kept | None]:
    """Call a model on merged references and on all its other tokens.

    Args:
        forward: diffusers' forward.
        call: its arguments, by name.
        model: the transformed model.
        grids: result of `reference_grids`, if tensor values determine it.
        kept: the plan of `kept_plan`; if None, a new plan is made.
        keep: whether to return the plan.

    Returns:
        the output of ``forward`` and the plan. The output for all tokens of references is zero:
        kept tokens stand for several tokens, and pipelines do not use this output.
    """
    key: BorderKey = model.toma_key
    if key.grids is not None:
        grids = reference_grids(model, call)
    if grids is None:
        return forward(**call), Kept({}) if keep else None
    if kept is not None and kept.plans:
        made = kept.plans[""][REFERENCES]
    else:
        made = plan_references(call[_references(key).tokens], grids, key.config)
    output = _run_merged(forward, call, model, grids, made)
    return output, Kept({"": {REFERENCES: made}}) if keep else None


def _run_merged(
    forward: Callable[..., Any], call: Arguments, model: Any, grids: tuple[int, ...], made: Plan
) -> Any:
    key: BorderKey = model.toma_key
    references, (merged, left) = _references(key), made
    drawn, count = grids[0], sum(grids)
    image = torch.cat([call[references.tokens][:, :drawn], merged], dim=1)
    if key.grids is None:
        assert key.positions is not None, "as in reference_grids"
        short = rows_in_order(call, key.positions, left)
    else:
        short = grid_rows_in_order(call, key.grids, left, count)
    if references.shorter is not None:
        assert key.grids is not None, "only shapes say how many tokens there are"
        of_call = references.drawn(model, key.grids.grids(model, call))
        short |= references.shorter(call, of_call, tokens_left(grids, key.config.ratio))
    scope = None if key.grids is None else CallScope(order=left, rows=count, whole=call)
    output = _in_scope(forward, {**short, references.tokens: image}, scope)
    if isinstance(output, tuple):
        return (_with_zeros(output[0], drawn, count), *output[1:])
    output.sample = _with_zeros(output.sample, drawn, count)
    return output


def _in_scope(forward: Callable[..., Any], call: Arguments, scope: CallScope | None) -> Any:
    before = plan.enter(scope)
    try:
        return forward(**call)
    finally:
        plan.enter(before)


def _with_zeros(output: Tensor, drawn: int, count: int) -> Tensor:
    return functional.pad(output[:, :drawn], (0, 0, 0, count - drawn))
