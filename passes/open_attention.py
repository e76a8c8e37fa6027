"""Attention modules whose layers and attention function become nodes of their block's graph.

Before, one node::

    attn1 = self.attn1(norm1, rotary_emb = rotary_emb)

After::

    attn1_to_q = self.attn1.to_q(norm1)
    ...
    attn1 = self.attn1
    processor = expect_processor(attn1, 'WanAttnProcessor')
    backend = getattr(processor, '_attention_backend')
    attention = dispatch_attention_fn(query, key, value, attn_mask = None, ..., backend = backend)
    attn1_to_out_0 = self.attn1.to_out.0(flatten)

Diffusers' processor is traced, with ``dispatch_attention_fn`` as one node. The process is not
patched: the processor's code runs with its own copy of the globals. The backend is looked up when
the block runs, so that `set_attention_backend` still works.
"""

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import FunctionType
from typing import Any

from diffusers.models.attention_dispatch import dispatch_attention_fn
from torch import fx, nn
from torch.nn import functional as F

from toma_fx.errors import CaptureError, TomaError
from toma_fx.runtime import arguments

TOKEN_DIM = {F.scaled_dot_product_attention: 2, dispatch_attention_fn: 1}
"""Dimension of the tokens, for each function that computes attention."""

WAY_OUT = "leave its block out with skip, or transform with placement='block'"


def opened_arguments(kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Return the keyword arguments for an attention whose forward is traced.

    An argument of the block without an example must also be left out of calls.

    Raises:
        CaptureError: when the attention is to the text only.
    """
    return {name: _opened(name, value) for name, value in kwargs.items()}


def _opened(name: str, value: Any) -> Any:
    if not isinstance(value, fx.Proxy) or value.node.meta["val"] is not None:
        return value
    if name == "encoder_hidden_states":
        raise CaptureError(
            f"an attention takes its keys from {value.node} alone, so it is no self-attention; "
            f"{WAY_OUT}"
        )
    args = (value, None, str(value.node))
    value.tracer.create_proxy("call_function", arguments.expect_value, args, {})
    return None


@contextmanager
def rewritable(path: str, cls: type[nn.Module]) -> Iterator[None]:
    """Convert errors of an attention that runs on proxies into one that names the attention.

    Raises:
        CaptureError: when a graph cannot represent the code.
    """
    try:
        yield
    except TomaError:
        raise
    except Exception as error:
        raise CaptureError(
            f"the attention {path}, a {cls.__name__}, does what one graph cannot hold "
            f"({type(error).__name__}: {error}); {WAY_OUT}"
        ) from error


def recording_processor(attention: Any, tracer: fx.Tracer) -> Any:
    """Return a copy of an attention's processor whose operations a tracer records.

    Args:
        attention: the module of the model, not a stand-in.
        tracer: the tracer in whose graph attention is one node.

    Raises:
        CaptureError: when the processor cannot be traced.
    """
    processor = attention.processor
    cls: Any = type(processor)
    path = tracer.path_of_module(attention)
    if cls.__module__.partition(".")[0] != "diffusers" or isinstance(processor, nn.Module):
        raise CaptureError(
            f"{path} has a {cls.__module__}.{cls.__qualname__}, and placement='keys' can rewrite "
            f"only diffusers' own processors without layers; take it off, or {WAY_OUT}"
        )

    def dispatched(
        query: Any, key: Any, value: Any, *, parallel_config: Any = None, **kwargs: Any
    ) -> Any:
        args = (query, key, value)
        return tracer.create_proxy(
            "call_function", dispatch_attention_fn, args, kwargs, name="attention"
        )

    own = cls.__call__
    code = FunctionType(
        own.__code__,
        {**own.__globals__, "dispatch_attention_fn": dispatched},
        own.__name__,
        own.__defaults__,
        own.__closure__,
    )
    code.__kwdefaults__ = own.__kwdefaults__
    traced = copy.copy(processor)
    traced.__class__ = type(cls.__name__, (cls,), {"__call__": code})
    held = tracer.create_proxy("get_attr", path, (), {})
    args = (held, cls.__name__)
    checked: Any = tracer.create_proxy(
        "call_function", arguments.expect_processor, args, {}, name="processor"
    )
    if hasattr(cls, "_attention_backend"):
        traced._attention_backend = checked._attention_backend
    return traced
