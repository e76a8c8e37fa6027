"""How tokens are cut into regions: equal, contiguous runs of the sequence.

The operators know nothing else. A tile, a stripe and the whole image differ only in the order of
the tokens (`token_order`) and in the length of a run.

Shape suffixes, here and in every file of this folder: ``B`` batch, ``P`` tokens before the image
tokens (text), ``N`` image tokens, ``R`` regions, ``n = N / R`` tokens of a region, ``m``
destinations of a region, ``M = R * m`` destinations, ``D`` width.
"""

import math

WHOLE_IMAGE = 0
"""The ``region_tokens`` of one region that holds every token."""


def region_size(tokens: int, region_tokens: int) -> int:
    """Tokens of a region: the divisor of ``tokens`` nearest to ``region_tokens`` in ratio.

    Regions of equal size need a divisor; every token grid has one near any useful size, since its
    height and width are divisors too.

    >>> region_size(4096, 64), region_size(38 * 26, 64), region_size(4096, WHOLE_IMAGE)
    (64, 76, 4096)
    """
    if region_tokens == WHOLE_IMAGE:
        return tokens
    if tokens % region_tokens == 0:  # all that a graph of many sizes has to know of its sizes
        return region_tokens
    tokens = int(tokens)  # under symbolic shapes: here the token count becomes part of the graph
    small = [d for d in range(1, math.isqrt(tokens) + 1) if tokens % d == 0]
    divisors = small + [tokens // d for d in reversed(small)]
    return min(divisors, key=lambda d: max(d / region_tokens, region_tokens / d))


def kept_tokens(tokens: int, ratio: float) -> int:
    """Destinations kept of ``tokens`` tokens when ``ratio`` is merged away: at least 1.

    >>> kept_tokens(64, 0.5), kept_tokens(76, 0.25), kept_tokens(3, 0.99)
    (32, 57, 1)
    """
    return max(1, int(tokens * (1 - ratio) + 0.5))
