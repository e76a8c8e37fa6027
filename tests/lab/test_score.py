"""Each measure lands in its column, and a missing one gives its reason."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from examples.small_models.judge import true_pictures
from examples.small_models.pictures import caption, scene_of
from toma_fx import images
from toma_fx.images import pixels
from toma_fx.lab import distances
from toma_fx.lab.measures import MEASURES, Unavailable
from toma_fx.lab.networks import Networks, load_clip, load_vision, read_image
from toma_fx.lab.score import load_instruments, look_at_reference, score

TEXTS = ["a b", "c d", "e f"]


def save(folder: Path, seed: int) -> list[Path]:
    folder.mkdir()
    generator = np.random.default_rng(seed)
    files = [folder / f"{number}.png" for number in range(len(TEXTS))]
    for file in files:
        noise = generator.integers(0, 256, size=(6, 6, 3), dtype=np.uint8)
        Image.fromarray(noise).resize((48, 48), Image.Resampling.BICUBIC).save(file)
    return files


@pytest.fixture
def untouched(tmp_path: Path) -> list[Path]:
    return save(tmp_path / "untouched", 0)


@pytest.fixture
def merged(tmp_path: Path) -> list[Path]:
    return save(tmp_path / "merged", 1)


@pytest.fixture
def networks(clip: Path, dino: Path) -> Networks:
    return Networks(clip=str(clip), dino=str(dino), fid=str(dino))


def test_every_measure_is_what_its_function_says(
    untouched: list[Path], merged: list[Path], networks: Networks
) -> None:
    instruments = load_instruments(tuple(MEASURES), networks)
    reference = look_at_reference(instruments, untouched)
    scores = score(instruments, merged, TEXTS, reference)
    assert list(scores) == list(MEASURES)
    first = [pixels(read_image(files[0])) for files in (merged, untouched)]
    for name, function in (
        ("mse", images.mse),
        ("psnr", images.psnr),
        ("ssim", distances.ssim),
    ):
        values = scores[name]
        assert isinstance(values, list) and len(values) == len(TEXTS)
        assert values[0] == function(*first)
    clip, dino = load_clip(networks.clip), load_vision(networks.dino)
    assert not isinstance(clip, Unavailable) and not isinstance(dino, Unavailable)
    features = [clip.images(files) for files in (merged, untouched)]
    assert scores["clip_image"] == distances.cosine(*features).tolist()
    by_text = 100 * distances.cosine(features[0], clip.texts(TEXTS))
    assert scores["clip"] == by_text.clamp(min=0).tolist()
    tokens = [dino.images(files) for files in (merged, untouched)]
    assert scores["dino"] == (1 - distances.cosine(*tokens)).tolist()
    assert scores["fid"] == [distances.frechet_distance(*tokens)]


def test_equal_images_are_equal(untouched: list[Path], networks: Networks) -> None:
    instruments = load_instruments(("mse", "ssim", "dino", "clip_image", "fid"), networks)
    scores = score(instruments, untouched, TEXTS, look_at_reference(instruments, untouched))
    assert scores["mse"] == [0, 0, 0]
    assert scores["ssim"] == pytest.approx([1, 1, 1])
    assert scores["clip_image"] == pytest.approx([1, 1, 1])
    assert scores["dino"] == pytest.approx([0, 0, 0], abs=1e-12)
    assert scores["fid"] == pytest.approx([0], abs=1e-9)


def test_untouched_is_not_paired_with_itself(untouched: list[Path], networks: Networks) -> None:
    instruments = load_instruments(tuple(MEASURES), networks)
    reference = look_at_reference(instruments, untouched)
    scores = score(instruments, untouched, TEXTS, reference, paired=False)
    assert list(scores) == ["clip", "fid", "answers", "frechet"]
    assert str(scores["answers"]).startswith("unavailable: not a caption of these pictures")


def test_the_judge_prefers_true_pictures(tmp_path: Path) -> None:
    start = 20_000_000
    true = true_pictures(12, detailed=False, start=start)
    texts = [caption(scene_of(index)) for index in range(start, start + 12)]
    sets = {"true": true, "others": np.roll(true, 1, axis=0), "black": np.zeros_like(true)}
    instruments = load_instruments(("answers", "frechet"), Networks())
    found = {}
    for name, drawn in sets.items():
        files = [tmp_path / f"{name}{index}.png" for index in range(12)]
        for file, picture in zip(files, drawn, strict=True):
            Image.fromarray(picture).save(file)
        scores = score(instruments, files, texts, look_at_reference(instruments, files))
        answers, (frechet,) = scores["answers"], scores["frechet"]  # type: ignore[misc]
        found[name] = sum(answers) / 12, frechet  # type: ignore[arg-type]
    assert found["true"][0] > 85 > found["others"][0]
    assert found["true"][1] < found["black"][1] / 2


def test_fid_compares_with_real_images_when_there_are(
    untouched: list[Path], merged: list[Path], tmp_path: Path, networks: Networks
) -> None:
    instruments = load_instruments(("fid",), networks)
    reference = look_at_reference(instruments, untouched, real=merged)
    (distance,) = score(instruments, merged, TEXTS, reference)["fid"]  # type: ignore[misc]
    assert distance == pytest.approx(0, abs=1e-9)
    assert reference.dino is None and reference.clip is None


def test_missing_networks_leave_the_rest(untouched: list[Path], merged: list[Path]) -> None:
    networks = Networks(clip="no/clip", dino="no/dino", fid="no/fid")
    instruments = load_instruments(("psnr", "dino", "clip", "clip_image", "fid"), networks)
    scores = score(instruments, merged, TEXTS, look_at_reference(instruments, untouched))
    assert isinstance(scores["psnr"], list)
    for name in ("dino", "clip", "clip_image", "fid"):
        assert isinstance(scores[name], Unavailable)


def test_one_image_has_no_covariance(untouched: list[Path], networks: Networks) -> None:
    instruments = load_instruments(("fid",), networks)
    reference = look_at_reference(instruments, untouched[:1])
    scores = score(instruments, untouched[:1], TEXTS[:1], reference)
    assert "at least 2 images" in str(scores["fid"])
    assert torch.is_grad_enabled()
