"""The measures of an image; `toma_fx.lab.distances` and `networks` compute them.

Paired measures compare with the image that the untouched model draws from the same prompt and seed,
so they say how much merging changes. The others look at an image, or a set of images, alone. The
paper uses CLIP, DINO, MSE and FID (section 5, Tables 2, 3 and 6 to 10). ``answers`` and
``frechet`` come from the judge of the repository's small models (`toma_fx.lab.judge`).
"""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class Measure:
    """A column of the tables and an axis of the plots."""

    label: str
    better: Literal["higher", "lower"]
    kind: Literal["paired", "prompt", "set"]
    """``"paired"`` compares with the untouched image, ``"prompt"`` with the text; ``"set"`` takes
    all images of a contender at once."""


MEASURES: dict[str, Measure] = {
    "mse": Measure(label="MSE (0-255 scale)", better="lower", kind="paired"),
    "psnr": Measure(label="PSNR (dB)", better="higher", kind="paired"),
    "ssim": Measure(label="SSIM", better="higher", kind="paired"),
    "lpips": Measure(label="LPIPS", better="lower", kind="paired"),
    "dino": Measure(label="DINO distance", better="lower", kind="paired"),
    "clip_image": Measure(label="CLIP image similarity", better="higher", kind="paired"),
    "clip": Measure(label="CLIP score", better="higher", kind="prompt"),
    "fid": Measure(label="FID", better="lower", kind="set"),
    "answers": Measure(label="right answers (%)", better="higher", kind="prompt"),
    "frechet": Measure(label="Frechet distance", better="lower", kind="set"),
}

OF_SMALL_MODELS = ("answers", "frechet")
"""Measures that only images of the repository's small models can have."""


@dataclass(frozen=True)
class Unavailable:
    """The reason why a measure has no figures here; tables show it in their place."""

    reason: str

    def __str__(self) -> str:
        return f"unavailable: {self.reason}"
