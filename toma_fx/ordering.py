"""Bring the tokens of a live model into token order where they enter, and back where they leave.

As `toma_fx.passes.order_tokens` does in a graph that others captured; both read the borders of the
model's family.
"""

import contextlib
import inspect
from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch import Tensor

from toma_fx.calls import Arguments, named_arguments
from toma_fx.families.rows import TokenSequence
from toma_fx.runtime.current_order import tokens_in

toma = torch.ops.toma


def in_token_order(forward: Callable[..., Any], call: Arguments, sequence: TokenSequence) -> Any:
    """A model on tokens in tile order; what comes out is in the caller's order."""
    call = dict(call)
    ids = call[sequence.ids]
    ids = ids if ids.ndim == 2 else ids[0]
    order = toma.tile_order_of_ids(ids)
    call[sequence.tokens] = toma.reorder(call[sequence.tokens], order)
    call[sequence.ids] = ids[order]
    for name in sequence.more:
        if call.get(name) is not None:
            call[name] = [toma.reorder(each, order) for each in call[name]]
    raster = order.argsort()
    with known_order(lambda: order):
        output = forward(**call)
    if isinstance(output, tuple):
        return (toma.reorder(output[0], raster), *output[1:])
    output.sample = toma.reorder(output.sample, raster)
    return output


def known_order(order: Callable[[], Tensor]) -> Any:
    """Within it, code of others may ask for the order of the tokens, in eager mode."""
    compiling = torch.compiler.is_dynamo_compiling()
    return contextlib.nullcontext() if compiling else tokens_in(order)


def enter_in_order(method: Callable[..., Any]) -> Callable[..., Any]:
    """A method that makes tokens of a grid, its first argument; the tokens come in tile order."""
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
    """A method that makes a grid of tokens in tile order, its first argument; then a like grid."""
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
    """A hook of diffusers that brings a model's tokens into order before other hooks see them."""
    from diffusers.hooks import ModelHook

    class TokenOrderHook(ModelHook):  # type: ignore[misc]
        """Token order around the hook that splits tokens among ranks, so among all of them."""

        def new_forward(self, module: Any, *args: Any, **kwargs: Any) -> Any:
            call = module.toma_named(args, kwargs)
            forward = self.fn_ref.original_forward
            return in_token_order(forward, call, sequence)

    return TokenOrderHook()
