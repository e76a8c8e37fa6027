"""Networks from folders, and the reason where one is missing."""

from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tests.tiny_networks import WIDTH
from toma_fx.images import pixels
from toma_fx.lab.distances import cosine
from toma_fx.lab.measures import Unavailable
from toma_fx.lab.networks import (
    BATCH,
    Encoder,
    load_clip,
    load_features,
    load_lpips,
    load_vision,
    read_image,
)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("images")
    generator = np.random.default_rng(0)
    files = [folder / f"{number}.png" for number in range(BATCH + 2)]
    for file in files:
        noise = generator.integers(0, 256, size=(4, 5, 3), dtype=np.uint8)
        Image.fromarray(noise).resize((40, 36), Image.Resampling.BICUBIC).save(file)
    return files


def test_clip_has_features_of_images_and_texts(clip: Path, files: list[Path]) -> None:
    encoder = load_clip(str(clip))
    assert isinstance(encoder, Encoder)
    features = encoder.images(files)
    assert features.shape == (len(files), WIDTH)
    torch.testing.assert_close(features[-1:], encoder.images(files[-1:]))
    texts = encoder.texts(["a b", "c " * 50])
    assert texts.shape == (2, WIDTH)
    assert not torch.allclose(texts[0], texts[1])


def test_a_vision_network_gives_its_class_token(dino: Path, files: list[Path]) -> None:
    encoder = load_vision(str(dino))
    assert isinstance(encoder, Encoder)
    features = encoder.images(files)
    assert features.shape == (len(files), WIDTH)
    assert float(cosine(features, features).min()) == pytest.approx(1)
    assert float(cosine(features[:1], features[1:2])) < 0.9999
    others = load_features(str(dino))
    assert callable(others)
    torch.testing.assert_close(others(files), features)


def test_what_cannot_be_loaded_says_why() -> None:
    for missing in (load_clip("no/such-clip"), load_vision("no/such-dino")):
        assert isinstance(missing, Unavailable)
        assert "'no/such-" in str(missing) and "could not be loaded: " in str(missing)


@pytest.mark.skipif(find_spec("torchvision") is not None, reason="shows what is said without it")
def test_what_needs_torchvision_says_so() -> None:
    lpips = load_lpips("alex")
    assert isinstance(lpips, Unavailable)
    assert "torchvision" in lpips.reason
    inception = load_features("inception")
    assert isinstance(inception, Unavailable)
    assert "orch-fidelity" in inception.reason


def test_an_image_is_read_as_it_is(files: list[Path]) -> None:
    image = pixels(read_image(files[0]))
    assert image.shape == (3, 36, 40) and image.dtype == torch.uint8
    with Image.open(files[0]) as same:
        assert image[:, 3, 7].tolist() == list(same.getpixel((7, 3)))  # type: ignore[arg-type]
