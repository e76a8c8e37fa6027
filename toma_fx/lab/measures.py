"""What is measured of an image, and the measures that need no network.

Paired measures compare with the image that the untouched model draws from the same prompt and seed,
so they say how much merging changes; the others look at an image, or a set of images, alone. The
paper's are CLIP, DINO, MSE and FID (section 5, Tables 2, 3 and 6 to 10).
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

DATA_RANGE = 255.0
"""The largest pixel value. The paper does not name the scale of its MSE; its figures, 1300 to 5400,
are only possible on this one."""


@dataclass(frozen=True, kw_only=True)
class Measure:
    """A column of the tables and an axis of the plots."""

    label: str
    better: Literal["higher", "lower"]
    kind: Literal["paired", "prompt", "set"]
    """``"paired"``: with the untouched image; ``"prompt"``: with the text; ``"set"``: of all images
    of a contender at once."""


MEASURES: dict[str, Measure] = {
    "mse": Measure(label="MSE (0-255 scale)", better="lower", kind="paired"),
    "psnr": Measure(label="PSNR (dB)", better="higher", kind="paired"),
    "ssim": Measure(label="SSIM", better="higher", kind="paired"),
    "lpips": Measure(label="LPIPS", better="lower", kind="paired"),
    "dino": Measure(label="DINO distance", better="lower", kind="paired"),
    "clip_image": Measure(label="CLIP image similarity", better="higher", kind="paired"),
    "clip": Measure(label="CLIP score", better="higher", kind="prompt"),
    "fid": Measure(label="FID", better="lower", kind="set"),
}


@dataclass(frozen=True)
class Unavailable:
    """A measure that cannot be made here, and why; stands in the tables in place of figures."""

    reason: str

    def __str__(self) -> str:
        return f"unavailable: {self.reason}"


def mse(image: Tensor, reference: Tensor) -> float:
    """Mean squared difference of pixels on the 0-255 scale, in squared pixel values; 0 is equal.

    Args:
        image: ``(3, H, W)`` uint8.
        reference: ``(3, H, W)`` uint8.
    """
    return float((image.double() - reference.double()).square().mean())


def psnr(image: Tensor, reference: Tensor) -> float:
    """Peak signal-to-noise ratio in dB, ``10 log10(255^2 / MSE)``; infinite for equal images.

    Args:
        image: ``(3, H, W)`` uint8.
        reference: ``(3, H, W)`` uint8.
    """
    from torchmetrics.functional.image import peak_signal_noise_ratio

    value = peak_signal_noise_ratio(image.double(), reference.double(), data_range=DATA_RANGE)
    return float(value)


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
