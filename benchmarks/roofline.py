"""The least that an operator needs, the machine's peaks, and the time that follows from both."""

from dataclasses import dataclass

import torch

from toma_fx.bench.timing import WALL, Clock, sample


@dataclass(frozen=True, kw_only=True)
class Needs:
    """The least that an operator moves and computes, from its shapes."""

    bytes: int
    """Inputs read once and outputs written once."""
    matmul: int
    """Floating-point operations that are matrix products."""
    other: int = 0
    """Floating-point operations that are not."""


@dataclass(frozen=True, kw_only=True)
class Peaks:
    """The peaks of the machine, measured in the same run."""

    bytes: float
    """Bytes a second of a large copy, read and written."""
    flops: dict[torch.dtype, float]
    """Floating-point operations a second of a large matrix product, by dtype."""

    def bound(self, needs: Needs, dtype: torch.dtype) -> float:
        """Seconds in which the machine could meet the needs, if memory and arithmetic overlap.

        All operations count at the rate of a matrix product of ``dtype``, so that the bound is a
        little low for an operator with many others.
        """
        return max(needs.bytes / self.bytes, (needs.matmul + needs.other) / self.flops[dtype])

    def limit(self, needs: Needs, dtype: torch.dtype) -> str:
        """``"memory"`` or ``"arithmetic"``, whichever decides the bound."""
        return "memory" if self.bound(needs, dtype) * self.bytes <= needs.bytes else "arithmetic"


def measure_peaks(
    device: str,
    dtypes: tuple[torch.dtype, ...],
    *,
    small: bool = False,
    clock: Clock = WALL,
) -> Peaks:
    """Time a large copy, and a large matrix product in each dtype; the best of several calls.

    Args:
        device: ``"cuda"`` or ``"cpu"``.
        dtypes: of the matrix products.
        small: sizes for a test, whose figures mean little.
        clock: as in `toma_fx.bench.timing.interleaved`.
    """
    gpu = device == "cuda"
    side, count, repeats = (8192, 2**30, 20) if gpu else (2048, 2**27, 5)
    if small:
        side, count, repeats = 128, 2**16, 2
    source = torch.empty(count, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    target.copy_(source)
    seconds = min(sample(lambda: target.copy_(source), clock=clock) for _ in range(repeats))
    flops = {}
    for dtype in dict.fromkeys(dtypes):
        matrix = torch.randn(side, side, device=device).to(dtype)
        product = torch.mm(matrix, matrix)

        def multiply(a: torch.Tensor = matrix, out: torch.Tensor = product) -> None:
            torch.mm(a, a, out=out)

        flops[dtype] = 2 * side**3 / min(sample(multiply, clock=clock) for _ in range(repeats))
    return Peaks(bytes=2 * count / seconds, flops=flops)


def select_needs(
    batch: int, tokens: int, width: int, regions: int, size: int, keep: int, item: int
) -> Needs:
    """The needs of facility location: all similarities of a region, then ``keep`` gains.

    Args:
        batch: images.
        tokens: ``N``.
        width: ``D``.
        regions: ``R``.
        size: places of a region, ``n``.
        keep: destinations of a region, ``m``.
        item: bytes of a number in the tokens.
    """
    return Needs(
        bytes=batch * (tokens * width * item + regions * keep * 8),
        matmul=2 * batch * regions * size * size * width,
        other=3 * batch * regions * keep * size * size,  # subtract, clip, add
    )


def weigh_needs(
    batch: int, tokens: int, width: int, regions: int, size: int, keep: int, item: int
) -> Needs:
    """The needs of ``weigh`` over regions; arguments as in `select_needs`."""
    weights = regions * size * keep
    return Needs(
        bytes=batch * (tokens * width * item + regions * keep * 8 + 2 * weights * item),
        matmul=2 * batch * weights * width,
        other=7 * batch * weights,  # a softmax (5) and the normalised rows (2)
    )


def mix_needs(
    batch: int, tokens: int, width: int, regions: int, size: int, keep: int, item: int
) -> Needs:
    """The needs of ``merge``, and also of ``unmerge``; arguments as in `select_needs`."""
    kept, weights = regions * keep, regions * size * keep
    return Needs(
        bytes=batch * item * ((tokens + kept) * width + weights),
        matmul=2 * batch * weights * width,
    )


def reorder_needs(batch: int, tokens: int, width: int, item: int) -> Needs:
    """The needs of ``reorder``, which moves every token; arguments as in `select_needs`."""
    return Needs(bytes=tokens * (8 + 2 * batch * width * item), matmul=0)
