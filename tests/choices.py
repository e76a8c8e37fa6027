"""The destinations that a transformed model chose, for a reference that follows them."""

from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from tests.reference import cosine_similarity

# The step in which gains are compared, and half a step for the rounding of the gains themselves.
GAIN_STEP = 1.5 / 4096


class Choices(TorchFunctionMode):
    """The destinations that a transformed model chose, region by region.

    Rounding decides between destinations that are equally good, and one other pick changes all that
    follow. So the reference takes over each pick of the model, once it has seen that no other would
    have gained more.
    """

    def __init__(self) -> None:
        super().__init__()
        self.made: list[tuple[Tensor, list[int]]] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func is torch.ops.toma.select.default:
            tokens_BND, layout, *_ = args
            regions = _regions(list(layout))
            for x_ND, picks_Rm in zip(tokens_BND, result.tolist(), strict=True):
                for region, picks in zip(regions, picks_Rm, strict=True):
                    distinct = list(dict.fromkeys(picks))
                    # A region of fewer tokens than destinations names its last one again.
                    assert picks == distinct + [region[-1]] * (len(picks) - len(distinct))
                    assert len(distinct) == min(len(picks), len(region))
                    own = [pick - region[0] for pick in distinct]
                    self.made.append((x_ND[list(region)], own))
        return result

    def follow(self, x_nD: Tensor, count: int) -> list[int]:
        """What `tests.reference.select` is replaced by; every choice is followed once."""
        same_size = [i for i, (y_nD, _) in enumerate(self.made) if y_nD.shape == x_nD.shape]
        distances = {i: float((self.made[i][0] - x_nD).abs().max()) for i in same_size}
        nearest = min(distances, key=distances.__getitem__)
        assert distances[nearest] < 1e-2 * float(x_nD.abs().max()), "other tokens in a region"
        _, picks = self.made.pop(nearest)
        assert len(picks) == count
        similarity_nn = cosine_similarity(x_nD, x_nD)
        covered_n = torch.full_like(similarity_nn[0], -1.0)
        for place, pick in enumerate(picks):
            gain_n = (similarity_nn - covered_n[:, None]).clamp(min=0).sum(dim=0)
            gain_n[picks[:place]] = -1.0
            assert gain_n[pick] >= gain_n.max() - GAIN_STEP
            covered_n = torch.maximum(covered_n, similarity_nn[:, pick])
        return picks


def _regions(layout: list[int]) -> list[range]:
    """The tokens of each region of a layout, ``[m, n, N_1, R_1, ...]``."""
    before, regions = 0, []
    for tokens, count in zip(layout[2::2], layout[3::2], strict=True):
        edges = [before + index * tokens // count for index in range(count + 1)]
        regions += [range(edges[i], edges[i + 1]) for i in range(count)]
        before += tokens
    return regions
