"""Reordering of the tokens of a live model into token order on entry, and back on exit.

`toma_fx.passes.order_tokens` does the same in a graph that other code captured; both read the
borders of the model's family.
"""

import contextlib
import inspect
from collections.abc import Callable, Mapping
from functools import wraps
from typing import Any

import torch
from torch import Tensor

from toma_fx.calls import Arguments, named_arguments
from toma_fx.families.rows import TokenSequence
from toma_fx.runtime.current_order import tokens_in

toma = torch.ops.toma


def in_token_order(forward: Callable[..., Any], call: Arguments, sequence: TokenSequence) -> Any:
    """Call a model on tokens in tile order; its output is in the caller's order."""
    order = _order_of(call, sequence, sequence.tokens, sequence.ids)
    call = rows_in_order(call, sequence, order)
    if sequence.references is not None and call.get(sequence.references[0]) is not None:
        tokens, ids = sequence.references
        _place(call, sequence, tokens, ids, _order_of(call, sequence, tokens, ids))
    raster = order.argsort()
    with known_order(lambda: order):
        output = forward(**call)
    if isinstance(output, tuple):
        return (toma.reorder(output[0], raster), *output[1:])
    output.sample = toma.reorder(output.sample, raster)
    return output


def rows_in_order(call: Arguments, sequence: TokenSequence, order: Tensor) -> Arguments:
    """Return a call in which all values with a row per token have their rows in an order.

    Args:
        call: arguments of the model, by name.
        sequence: description of the model's tokens.
        order: ``(n,)`` int64: indices of the tokens that are left, in order.
    """
    call = dict(call)
    tokens = call[sequence.tokens].shape[1]
    _place(call, sequence, sequence.tokens, sequence.ids, order)
    for name in sequence.more:
        if call.get(name) is not None:
            call[name] = [toma.reorder(each, order) for each in call[name]]
    for name in sequence.joint:
        if call.get(name) is not None:
            text = call[name].shape[1] - tokens
            image = call[name][:, text:].index_select(1, order)
            call[name] = torch.cat([call[name][:, :text], image], dim=1)
    return call


def _order_of(call: Arguments, sequence: TokenSequence, tokens: str, ids: str) -> Tensor:
    order: Tensor = toma.tile_order_of_ids(sequence.places(image_ids(call, sequence, tokens, ids)))
    return order


def _place(call: Arguments, sequence: TokenSequence, tokens: str, ids: str, order: Tensor) -> None:
    """Put tokens and their ids in an order."""
    mine = image_ids(call, sequence, tokens, ids)
    given = call[ids] if call[ids].ndim == 2 else call[ids][0]
    call[tokens] = toma.reorder(call[tokens], order)
    text = given[: given.shape[0] - mine.shape[0]]
    placed = torch.cat([text, mine[order]]) if sequence.text_first else mine[order]
    # Keep the batch dimension if there was one, because hooks may split along it.
    call[ids] = placed if call[ids].ndim == 2 else placed.expand(call[ids].shape[0], -1, -1)


def image_ids(call: Mapping[str, Any], sequence: TokenSequence, tokens: str, ids: str) -> Tensor:
    """Return the ids of image tokens, ``(N, 3)`` or wider, without those of the text.

    Args:
        call: arguments of the model.
        sequence: description of the model's tokens.
        tokens: name of the argument with the tokens.
        ids: name of the argument with their ids.
    """
    given: Tensor = call[ids] if call[ids].ndim == 2 else call[ids][0]
    if not sequence.text_first:
        return given
    return given[given.shape[0] - call[tokens].shape[1] :]


def known_order(order: Callable[[], Tensor]) -> Any:
    """Let foreign code ask for the order of the tokens within the context, in eager mode."""
    compiling = torch.compiler.is_dynamo_compiling()
    return contextlib.nullcontext() if compiling else tokens_in(order)


def enter_in_order(method: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap a method that makes tokens from a grid, its first argument: tokens get tile order."""
    named, (grid_name, *_) = named_arguments(method), _argument_names(method)

    @wraps(method)
    def enter(self: Any, *args: Any, **kwargs: Any) -> Any:
        call = named(args, kwargs)
        height, width = call[grid_name].shape[-2:]
        made = method(self, **call)
        tokens, *others = made if isinstance(made, tuple) else (made,)
        tokens = toma.reorder(tokens, toma.tile_order(tokens, height, width))
        return (tokens, *others) if isinstance(made, tuple) else tokens

    return enter


def leave_in_order(method: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap a method that makes a grid from tokens in tile order; takes tokens and a like grid."""
    named, (tokens_name, grid_name, *_) = named_arguments(method), _argument_names(method)

    @wraps(method)
    def leave(self: Any, *args: Any, **kwargs: Any) -> Any:
        call = named(args, kwargs)
        tokens, (height, width) = call[tokens_name], call[grid_name].shape[-2:]
        raster = toma.tile_order(tokens, height, width).argsort()
        return method(self, **{**call, tokens_name: toma.reorder(tokens, raster)})

    return leave


def _argument_names(method: Callable[..., Any]) -> list[str]:
    return list(inspect.signature(method).parameters)[1:]


TOKEN_ORDER_HOOK = "toma_token_order"


def token_order_hook(sequence: TokenSequence) -> Any:
    """Return a diffusers hook that reorders a model's tokens before other hooks see them."""
    from diffusers.hooks import ModelHook

    class TokenOrderHook(ModelHook):  # type: ignore[misc]
        """Reorders tokens outside the hook that splits them among ranks: all tokens at once."""

        def new_forward(self, module: Any, *args: Any, **kwargs: Any) -> Any:
            call = module.toma_named(args, kwargs)
            if not torch.compiler.is_dynamo_compiling():
                module.toma_check_ranks(call)
            forward = self.fn_ref.original_forward
            return in_token_order(forward, call, sequence)

    return TokenOrderHook()
