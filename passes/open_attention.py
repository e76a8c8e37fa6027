"""An attention module whose layers, and attention itself, are nodes of its block's graph.

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

Diffusers' processor is traced, with ``dispatch_attention_fn`` as one node. Nothing of the process
is patched for it: the processor's code runs with globals of its own. The backend is asked for when
the block runs, so that `set_attention_backend` still counts.
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
"""By a function that computes attention, where its tokens are."""

WAY_OUT = "leave its block out with skip, or transform with placement='block'"


def opened_arguments(kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The keyword arguments of an attention whose forward is traced.

    One of the block's own arguments that the examples leave out must then be left out.

    Raises:
        CaptureError: when the attention is to the text alone.
    """
    return {name: _opened(name, value) for name, value in kwargs.items()}


def _opened(name: str, value: Any) -> Any:
    if not isinstance(value, fx.Proxy) or value.node.meta["val"] is not None:
        return value
    if name == "encoder_hidden_states":
        raise CaptureError(
            f"an attention takes its keys from {value.node} alone, which is no self-attention; "
            f"{WAY_OUT}"
        )
    args = (value, None, str(value.node))
    value.tracer.create_proxy("call_function", arguments.expect_value, args, {})
    return None


@contextmanager
def rewritable(path: str, cls: type[nn.Module]) -> Iterator[None]:
    """Within it, an attention runs on proxies; an error of its code says which it was.

    Raises:
        CaptureError: when the code does what a graph cannot hold.
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
    """The processor of an attention module, of which a tracer sees all that it does.

    Args:
        attention: of the model, not a stand-in.
        tracer: in whose graph attention is one node.

    Raises:
        CaptureError: when it is not one that can be traced.
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
