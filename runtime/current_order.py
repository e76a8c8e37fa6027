"""The current order of the tokens, for foreign code that runs inside the model."""

import contextlib
import threading
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

_THREAD = threading.local()


@contextlib.contextmanager
def tokens_in(order: Callable[[], Tensor]) -> Iterator[None]:
    """Make `token_order` return this order within the context."""
    before = getattr(_THREAD, "order", None)
    _THREAD.order = order
    try:
        yield
    finally:
        _THREAD.order = before


def token_order() -> Tensor | None:
    """Return the current order of the image tokens, for hooks and other code inside the model.

    Hooks on transformer blocks of a model with ``region="tile"`` get tokens along a Hilbert curve.
    To get a map of the image in raster order, use ``tokens[:, token_order().argsort()]``.

    Returns:
        ``(N,)`` int64: for each place, the raster index of its token. None if tokens are in the
        caller's order, for example outside of such a model.

    Raises:
        RuntimeError: in compiled code, where the order is a part of the graph.

    Example:
        >>> def keep_features(block, args, output):  # doctest: +SKIP
        ...     order = toma_fx.token_order()
        ...     features.append(output if order is None else output[:, order.argsort()])
        >>> unet.mid_block.attentions[0].transformer_blocks[0].register_forward_hook(keep_features)
        ... # doctest: +SKIP
    """
    if torch.compiler.is_compiling():
        raise RuntimeError("token_order works only in eager code; do not compile its caller")
    order = getattr(_THREAD, "order", None)
    return None if order is None else order()
