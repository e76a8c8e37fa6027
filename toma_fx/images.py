"""How far two images are apart, pixel by pixel: what both benchmarks and evaluations need."""

import math

import numpy as np
import torch
from PIL import Image
from torch import Tensor

DATA_RANGE = 255.0
"""The largest pixel value. The paper does not name the scale of its MSE; its figures, 1300 to 5400,
are only possible on this one."""


def pixels(image: Image.Image) -> Tensor:
    """An RGB image as ``(3, H, W)`` uint8."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


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
    error = mse(image, reference)
    return 10 * math.log10(DATA_RANGE**2 / error) if error else math.inf
