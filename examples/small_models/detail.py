"""Fine detail that no caption names: clouds, stars, mountains, trees, grain and surfaces.

A caption leaves it open, so that a model has to decide it from noise, as a large model decides most
of its picture. Everything works in `pictures`' units, of which a picture has 128 along a side.
"""

from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

Pixels = npt.NDArray[np.floating[Any]]


def fractal(
    generator: np.random.Generator, size: int, *, grids: tuple[int, ...], stretch: int = 1
) -> Pixels:
    """Noise with detail at several scales, of mean 0 and standard deviation 1.

    Args:
        generator: Decides the values.
        size: Pixels along a side of the result, ``(size, size)``.
        grids: Random values along a side, from the coarsest scale to the finest. Each scale has a
            little more than half of the amplitude of the one before it.
        stretch: How many times fewer values there are along a row, so that shapes get wide.
    """
    total = np.zeros((size, size), np.float32)
    for index, count in enumerate(grids):
        values = generator.standard_normal((count, max(2, count // stretch))).astype(np.float32)
        smooth = Image.fromarray(values).resize((size, size), Image.Resampling.BICUBIC)
        total += np.float32(0.55**index) * np.asarray(smooth)
    return np.asarray((total - total.mean()) / total.std(), np.float32)


def add_clouds(sky: Pixels, generator: np.random.Generator) -> Pixels:
    """Clouds in front of a sky by day, ``(size, size, 3)``."""
    noise = fractal(generator, len(sky), grids=(6, 12, 24, 48, 96), stretch=2)
    cover = np.clip((noise - generator.uniform(-0.2, 1.2)) / 1.2, 0, 1)[..., None]
    shade = 1 - 0.12 * np.clip(np.roll(noise, -4, axis=0), 0, 2)[..., None]
    return np.asarray(sky + (shade * (0.45 * sky + 0.55) - sky) * 0.9 * cover, np.float32)


def add_stars(sky: Pixels, generator: np.random.Generator) -> Pixels:
    """Stars of different brightness and a faint cloud of light in a sky at night."""
    size = len(sky)
    glow = np.clip(fractal(generator, size, grids=(3, 6, 12, 24, 48)), 0, 3)[..., None]
    lit = sky + glow * np.array((0.05, 0.04, 0.08), np.float32)
    centres = generator.integers(1, size - 1, (size, 2))
    for (row, column), brightness in zip(
        centres, generator.uniform(0.15, 0.95, size) ** 2, strict=True
    ):
        lit[row, column] = np.maximum(lit[row, column], brightness)
        spread = lit[row - 1 : row + 2, column - 1 : column + 2]
        np.maximum(spread, 0.5 * brightness, out=spread)
    return np.asarray(lit, np.float32)


def add_mountains(
    picture: Pixels, y: Pixels, horizon: float, haze: Pixels, generator: np.random.Generator
) -> Pixels:
    """Up to two ridges in front of the sky, the nearer one lower and darker, some with snow.

    Args:
        picture: ``(size, size, 3)``.
        y: Height of each pixel, from the top.
        horizon: Where the ground begins.
        haze: Colour of the sky at the horizon, which far ridges take on.
        generator: Decides the values.
    """
    size, steepness = len(picture), len(picture) / 128
    for distance in (0.65, 0.3)[: int(generator.integers(0, 3))]:
        outline = fractal(generator, size, grids=(4, 8, 16, 32, 64))[0]
        ridge = horizon - 34 * distance - 13 * distance * outline
        rock = np.array(((0.30, 0.30, 0.36), (0.36, 0.31, 0.27))[int(generator.integers(2))])
        light = 1 + 0.22 * fractal(generator, size, grids=(8, 16, 32, 64, 128))
        colour = light[..., None] * (rock + (haze - rock) * 0.55 * distance)
        if generator.uniform() < 0.5:
            edge = ridge + 9 + 5 * fractal(generator, size, grids=(16, 32, 64, 128))
            snow = np.clip(0.5 + steepness * (edge - y), 0, 1)[..., None]
            colour = colour + (0.93 - colour) * snow
        cover = np.clip(0.5 + steepness * (y - ridge), 0, 1)[..., None]
        picture = picture + (colour - picture) * cover
    return np.asarray(picture, np.float32)


def add_trees(
    picture: Pixels, x: Pixels, y: Pixels, horizon: float, generator: np.random.Generator
) -> Pixels:
    """A few firs on the horizon."""
    steepness = len(picture) / 128
    ragged = fractal(generator, len(picture), grids=(32, 64, 128))
    for _ in range(int(generator.integers(0, 9))):
        centre, height = generator.uniform(0, 128), generator.uniform(6, 15)
        foot = horizon + generator.uniform(0, 4)
        down = (y - foot + height) / height
        saw = 0.16 * height * ((4 * down) % 1 - 0.5)
        inside = 0.3 * height * np.clip(down, 0, 1) + saw + 0.5 * ragged - np.abs(x - centre)
        inside = np.minimum(inside, np.minimum(y - foot + height, foot - y))
        colour = np.array((0.07, 0.24, 0.13)) * (1 + 0.3 * ragged[..., None])
        cover = np.clip(0.5 + steepness * inside, 0, 1)[..., None]
        picture = picture + (colour - picture) * cover
    return np.asarray(picture, np.float32)


def grain(size: int, generator: np.random.Generator) -> Pixels:
    """How much lighter or darker each pixel of the ground is, about 0."""
    patches = fractal(generator, size, grids=(4, 8, 16, 32))
    blades = fractal(generator, size, grids=(size // 2, size), stretch=1)
    return np.asarray(0.05 * patches + 0.05 * blades, np.float32)


def surface(size: int, generator: np.random.Generator) -> Pixels:
    """How much lighter or darker each pixel of a thing is, about 0: veins of stone."""
    veins = 1 - np.abs(fractal(generator, size, grids=(8, 16, 32, 64)))
    return np.asarray(0.13 * (veins - veins.mean()), np.float32)
