"""Every measure of every image of a contender."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from toma_fx import images
from toma_fx.lab import distances, judge
from toma_fx.lab.measures import MEASURES, Unavailable
from toma_fx.lab.networks import (
    Encoder,
    Features,
    Networks,
    load_clip,
    load_features,
    load_lpips,
    load_vision,
    read_image,
)

Scores = dict[str, list[float] | Unavailable]
"""A value for each image, by measure; a measure of sets has a single value."""


@dataclass(frozen=True, kw_only=True)
class Instruments:
    """The networks of the chosen measures; ``None`` for a network that none of them needs."""

    chosen: tuple[str, ...]
    pixel: dict[str, Callable[[Tensor, Tensor], float] | Unavailable]
    clip: Encoder | Unavailable | None = None
    dino: Encoder | Unavailable | None = None
    fid: Features | Unavailable | None = None


@dataclass(frozen=True, kw_only=True)
class Reference:
    """The images and features that a contender is compared with."""

    files: tuple[Path, ...]
    """The images of the untouched model, in the order of the contender's."""
    dino: Tensor | None
    clip: Tensor | None
    fid: Tensor | None
    """Features of real images, or of the untouched model's images."""


def load_instruments(chosen: Sequence[str], networks: Networks) -> Instruments:
    """Load the networks of the chosen measures, once for all contenders.

    Args:
        chosen: names of `MEASURES`.
        networks: their names or folders.
    """
    pixel: dict[str, Callable[[Tensor, Tensor], float] | Unavailable] = {
        name: function
        for name, function in (
            ("mse", images.mse),
            ("psnr", images.psnr),
            ("ssim", distances.ssim),
        )
        if name in chosen
    }
    if "lpips" in chosen:
        pixel["lpips"] = load_lpips(networks.lpips)
    return Instruments(
        chosen=tuple(name for name in MEASURES if name in chosen),
        pixel=pixel,
        clip=load_clip(networks.clip) if {"clip", "clip_image"} & set(chosen) else None,
        dino=load_vision(networks.dino) if "dino" in chosen else None,
        fid=load_features(networks.fid) if "fid" in chosen else None,
    )


def look_at_reference(
    instruments: Instruments, untouched: Sequence[Path], real: Sequence[Path] = ()
) -> Reference:
    """Compute the features that contenders are compared with.

    Args:
        instruments: what `load_instruments` returned.
        untouched: the untouched model's images.
        real: images that FID compares with; the untouched model's images if empty.
    """
    fid = instruments.fid
    return Reference(
        files=tuple(untouched),
        dino=_features(instruments.dino, untouched),
        clip=_features(instruments.clip, untouched),
        fid=fid(real or untouched) if callable(fid) else None,
    )


def score(
    instruments: Instruments,
    files: Sequence[Path],
    texts: Sequence[str],
    reference: Reference,
    *,
    paired: bool = True,
) -> Scores:
    """The measures of one contender's images.

    Args:
        instruments: what `load_instruments` returned.
        files: the images, in the order of the reference's.
        texts: the prompt of each.
        reference: what `look_at_reference` returned.
        paired: False for the untouched model, whose images are the reference.
    """
    clip, dino, fid = instruments.clip, instruments.dino, instruments.fid
    scores: Scores = {}
    if paired:
        scores |= _pixel_scores(instruments, files, reference.files)
    if paired and dino is not None:
        scores["dino"] = _dino_distances(dino, files, reference)
    if clip is not None:
        scores |= _clip_scores(clip, files, texts, reference)
    if fid is not None:
        scores["fid"] = _fid(fid, files, reference.fid)
    if "answers" in instruments.chosen:
        scores["answers"] = judge.right_answers(files, texts)
    if "frechet" in instruments.chosen:
        scores["frechet"] = judge.distance_to_true(files)
    skipped = set() if paired else {n for n, m in MEASURES.items() if m.kind == "paired"}
    wanted = [name for name in instruments.chosen if name not in skipped]
    return {name: scores[name] for name in wanted}


def _pixel_scores(
    instruments: Instruments, files: Sequence[Path], others: Sequence[Path]
) -> Scores:
    scores: dict[str, list[float]] = {n: [] for n, f in instruments.pixel.items() if callable(f)}
    if scores:
        for file, other in zip(files, others, strict=True):
            pair = images.pixels(read_image(file)), images.pixels(read_image(other))
            for name, values in scores.items():
                function = instruments.pixel[name]
                assert callable(function)
                values.append(function(*pair))
    missing = {n: f for n, f in instruments.pixel.items() if isinstance(f, Unavailable)}
    return {**scores, **missing}


def _dino_distances(
    dino: Encoder | Unavailable, files: Sequence[Path], reference: Reference
) -> list[float] | Unavailable:
    """1 minus the cosine of the class tokens of two images; 0 is equal."""
    if isinstance(dino, Unavailable):
        return dino
    assert reference.dino is not None
    return _floats(1 - distances.cosine(dino.images(files), reference.dino))


def _clip_scores(
    clip: Encoder | Unavailable, files: Sequence[Path], texts: Sequence[str], reference: Reference
) -> Scores:
    """100 times the cosine of image and text, as in torchmetrics, and the cosine of images."""
    if isinstance(clip, Unavailable):
        return {"clip": clip, "clip_image": clip}
    assert reference.clip is not None
    features = clip.images(files)
    return {
        "clip": _floats((100 * distances.cosine(features, clip.texts(texts))).clamp(min=0)),
        "clip_image": _floats(distances.cosine(features, reference.clip)),
    }


def _fid(
    fid: Features | Unavailable, files: Sequence[Path], reference: Tensor | None
) -> list[float] | Unavailable:
    if isinstance(fid, Unavailable):
        return fid
    assert reference is not None
    if len(files) < 2 or len(reference) < 2:
        return Unavailable("a covariance needs at least 2 images of each kind")
    return [distances.frechet_distance(fid(files), reference)]


def _features(encoder: Encoder | Unavailable | None, files: Sequence[Path]) -> Tensor | None:
    return encoder.images(files) if isinstance(encoder, Encoder) else None


def _floats(values: Tensor) -> list[float]:
    return [float(value) for value in values]
