"""The order of the tokens at a place in a call, for code of others that runs inside the model."""

import contextlib
import threading
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

_THREAD = threading.local()


@contextlib.contextmanager
def tokens_in(order: Callable[[], Tensor]) -> Iterator[None]:
    """Within it, `token_order` gives this order."""
    before = getattr(_THREAD, "order", None)
    _THREAD.order = order
    try:
        yield
    finally:
        _THREAD.order = before


def token_order() -> Tensor | None:
    """The order of the image tokens, for hooks and other code that runs inside a transformed model.

    Hooks on transformer blocks of a model with ``region="tile"`` see tokens on a Hilbert curve. A
    map of the image in raster order is ``tokens[:, token_order().argsort()]``.

    Returns:
        ``(N,)`` int64: for each place, the raster index of its token; None where tokens are in the
        order of the caller, as outside of such a model.

    Raises:
        RuntimeError: in code that torch compiles, where an order is a part of the graph.

    Example:
        >>> def keep_features(block, args, output):  # doctest: +SKIP
        ...     order = toma_fx.token_order()
        ...     features.append(output if order is None else output[:, order.argsort()])
        >>> unet.mid_block.attentions[0].transformer_blocks[0].register_forward_hook(keep_features)
        ... # doctest: +SKIP
    """
    if torch.compiler.is_compiling():
        raise RuntimeError("token_order works in eager code; leave what calls it uncompiled")
    order = getattr(_THREAD, "order", None)
    return None if order is None else order()
