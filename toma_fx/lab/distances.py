"""Distances between images, between features, and between sets of features.

None of them needs a network of `toma_fx.lab.networks`. `toma_fx.images` has MSE and PSNR.
"""

import torch
from torch import Tensor, nn

from toma_fx.images import DATA_RANGE


def ssim(image: Tensor, reference: Tensor) -> float:
    """Structural similarity (Wang et al., 2004), Gaussian window of sigma 1.5; 1 is equal.

    Args:
        image: ``(3, H, W)`` uint8, at least 12 pixels a side.
        reference: ``(3, H, W)`` uint8.
    """
    from torchmetrics.functional.image import structural_similarity_index_measure

    value = structural_similarity_index_measure(
        image[None].double(), reference[None].double(), data_range=DATA_RANGE
    )
    assert isinstance(value, Tensor)
    return float(value)


def cosine(features_ND: Tensor, others_ND: Tensor) -> Tensor:
    """Cosine similarity of each row with the same row of the other, ``(N,)``, in [-1, 1]."""
    return nn.functional.cosine_similarity(features_ND.double(), others_ND.double(), dim=-1)


def frechet_distance(features_ND: Tensor, reference_MD: Tensor) -> float:
    """Frechet distance of the Gaussians fitted to two sets of features; 0 for equal sets.

    ``|mu - mu'|^2 + tr(C + C' - 2 (C C')^(1/2))``; over Inception's features it is FID (Heusel et
    al., 2017). It is biased upwards for few images: compare only sets of equal size.

    Args:
        features_ND: ``(N, D)``, at least 2 rows.
        reference_MD: ``(M, D)``, at least 2 rows.
    """
    from torchmetrics.image.fid import FrechetInceptionDistance

    identity = nn.Identity()
    identity.num_features = features_ND.shape[1]  # type: ignore[assignment]
    distance = FrechetInceptionDistance(feature=identity).set_dtype(torch.float64)
    distance.update(reference_MD.double(), real=True)
    distance.update(features_ND.double(), real=False)
    return max(0.0, float(distance.compute()))  # rounding can leave a distance of 0 below 0
