"""Tokens for tests of the runtime."""

import torch
from torch import Tensor


def random_tokens(*shape: int, seed: int = 0) -> Tensor:
    """Tokens of no structure, the same at every call."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))
