"""Measures against their closed forms."""

import math

import pytest
import torch
from torch import Tensor

from toma_fx.images import mse, psnr
from toma_fx.lab.distances import cosine, frechet_distance, ssim
from toma_fx.lab.measures import MEASURES, Unavailable


@pytest.fixture
def image() -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 240, (3, 24, 20), dtype=torch.uint8, generator=generator)


def test_mse_is_on_the_scale_of_bytes(image: Tensor) -> None:
    assert mse(image + 10, image) == 100
    assert mse(torch.full((3, 2, 2), 255), torch.zeros(3, 2, 2)) == 255**2
    assert mse(image, image) == 0


def test_psnr_of_a_known_difference(image: Tensor) -> None:
    assert psnr(image + 10, image) == pytest.approx(10 * math.log10(255**2 / 100))
    assert psnr(image, image) == math.inf


def test_ssim_is_1_for_equal_images_and_less_for_others(image: Tensor) -> None:
    assert ssim(image, image) == pytest.approx(1)
    assert ssim(image.flip(-1), image) < 0.5
    grey, lighter = torch.full_like(image, 100), torch.full_like(image, 120)
    contrast_free = (2 * 100 * 120 + 2.55**2) / (100**2 + 120**2 + 2.55**2)
    assert ssim(grey, lighter) == pytest.approx(contrast_free, rel=1e-6)


def test_cosine_is_taken_row_by_row() -> None:
    rows = torch.tensor([[1.0, 0.0], [1.0, 1.0]])
    others = torch.tensor([[0.0, 2.0], [3.0, 3.0]])
    torch.testing.assert_close(cosine(rows, others), torch.tensor([0.0, 1.0], dtype=torch.float64))


def test_frechet_distance_of_gaussians() -> None:
    features = torch.randn(300, 6, generator=torch.Generator().manual_seed(0))
    assert frechet_distance(features, features) == pytest.approx(0, abs=1e-9)
    shift = torch.arange(6.0)
    moved = frechet_distance(features + shift, features)
    assert moved == pytest.approx(float(shift.square().sum()), rel=1e-4)
    centred = features - features.mean(0)
    # Covariance 9 C against C: tr(9 C + C - 2 * 3 C) = 4 tr C.
    stretched = frechet_distance(3 * centred, centred)
    assert stretched == pytest.approx(4 * float(centred.T.cov().trace()), rel=1e-4)


def test_frechet_distance_of_fewer_images_than_features_is_finite() -> None:
    features = torch.randn(8, 16, generator=torch.Generator().manual_seed(0))
    assert 0 < frechet_distance(features[:4], features[4:]) < math.inf


def test_every_measure_has_a_label_with_its_unit() -> None:
    assert {"mse", "psnr", "ssim", "lpips", "dino", "clip_image", "clip", "fid"} < set(MEASURES)
    assert "0-255" in MEASURES["mse"].label and "dB" in MEASURES["psnr"].label
    assert str(Unavailable("no such network")) == "unavailable: no such network"
