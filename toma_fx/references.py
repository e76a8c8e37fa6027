"""References of edit models, merged once at the model's border and never unmerged.

The tokens of the images to edit carry no noise: they are the same at every step of a run. And what
the model returns for them is thrown away. So they are merged before diffusers' forward, which then
runs as it is on a shorter sequence, and nothing has to be spread back.

Each reference is one region, so that flat parts give up most of their tokens and detail keeps its
own. A token that is left has the position of the one that it was. Models hold positions once for
all rows of a batch, so all rows keep the tokens at the same places, chosen by their similarities in
the mean over rows; each row's weights are its own.
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
"""The name of their plan among those of a call: the merged tokens of all references,
``(B, n, C)``, and the tokens of the sequence that are left, ``(N,)``."""


def reference_grids(model: Any, call: Mapping[str, Any]) -> tuple[int, ...] | None:
    """Tokens of the image that is drawn, and of each reference; None in a call without any.

    Args:
        model: transformed, of a family with references.
        call: its arguments, by name.

    Raises:
        InputError: when tokens of the image that is drawn stand behind a reference.
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
    """Tokens of each image, of which the first is drawn, by the image number of each token."""
    runs = [(number, len(list(run))) for number, run in groupby(numbers.round().tolist())]
    if any(number == runs[0][0] for number, _ in runs[1:]):
        raise InputError(
            "tokens of the image that is drawn stand behind those of a reference; "
            "tokens='references' needs all of them first"
        )
    return tuple(tokens for _, tokens in runs)


def _references(key: BorderKey) -> References:
    assert key.family.references is not None, "the recipe refused families without"
    return key.family.references


def refuse_traced(key: BorderKey) -> None:
    """Refuse a call of which a graph is made that has no values.

    Raises:
        ModelError: when values tell which tokens are those of references.
    """
    if key.positions is not None:
        raise ModelError(
            f"which tokens are those of references is told by the values of {key.positions.ids}, "
            "which no graph knows. Compile the model itself, by torch.compile(model), "
            "model.compile() or model.compile_repeated_blocks(); export it with toma_fx.export"
        )


def _check_call(key: BorderKey, call: Mapping[str, Any]) -> None:
    """Refuse arguments that speak of single tokens.

    Raises:
        InputError: when a call has one.
    """
    family, references = key.family, _references(key)
    for name in references.refused:
        if call.get(name) is not None:
            raise InputError(
                f"{name}={call[name]!r:.60} speaks of the tokens of references, which "
                "tokens='references' merges; leave it out, or call the untransformed model"
            )
    kwargs = None if family.attention_kwargs is None else call.get(family.attention_kwargs)
    refused = {name for row in family.blocks for name in (*row.refused, *row.refused_by_attention)}
    plan.pass_on(kwargs, *sorted(refused))


def kept_plan(model: Any, call: Mapping[str, Any], grids: tuple[int, ...]) -> Kept | None:
    """The plan for the references of a call, made once for all calls with the same ones.

    It is told by their values, since pipelines copy them into a new tensor at every step. On a GPU,
    asking waits for it. None where gradients of the references are wanted.

    Raises:
        InputError: when an argument speaks of single tokens.
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
        grids: of the image that is drawn, and of each reference.
        config: the options.

    Returns:
        merged tokens ``(B, n, C)``, one reference behind the other, and the tokens of the sequence
        that are left, ``(grids[0] + n,)`` int64, in rising order.
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
    # Cosines of the rows' unit tokens side by side are the mean of the rows' cosines.
    side_by_side = unit_tokens(reference).transpose(0, 1).flatten(1).unsqueeze(0)
    chosen = toma.select(side_by_side, layout, config.selector).sort(dim=-1).values
    of_rows = chosen.expand(reference.shape[0], -1, -1)
    options = (config.temperature, config.merge_over, config.unmerge)
    weight, _ = toma.weigh(reference, of_rows, layout, *options)
    return toma.merge(reference, weight, layout), chosen.flatten()


def tokens_left(grids: tuple[int, ...], ratio: float) -> tuple[int, ...]:
    """Tokens of each reference that are left.

    Args:
        grids: of the image that is drawn, and of each reference.
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
    """Call a model on merged references, and on all its other tokens.

    Args:
        forward: diffusers'.
        call: its arguments, by name.
        model: transformed, for what its border knows.
        grids: of `reference_grids`, where values tell them.
        kept: the plan of `kept_plan`; one is made where there is none.
        keep: whether the plan is wanted.

    Returns:
        what ``forward`` does, with zeros for all tokens of references, since those that are left
        stand for others too, and pipelines use none; and the plan.
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
