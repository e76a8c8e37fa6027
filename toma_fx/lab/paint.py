"""Tokens drawn over the image that they belong to."""

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from toma_fx.lab.clusters import Grid, Merged

DESTINATION = (255, 40, 40)
BORDER = (255, 255, 255)
CELL_PIXELS = 320
"""Approximate side of a picture in a figure; a token is at least 6 pixels wide all the same."""

Picture = NDArray[np.uint8]
"""``(H, W, 3)``."""


def scale_of(grid: Grid) -> int:
    """Pixels a side of a token where clusters are painted."""
    return max(6, round(CELL_PIXELS / max(grid.height, grid.width)))


def paint_merged(image: Image.Image, merged: Merged, grid: Grid) -> Picture:
    """The image with a dot on every destination and borders between clusters.

    Args:
        image: an image of any size; it is scaled to a whole number of pixels for each token.
        merged: the clusters of the image's tokens.
        grid: the grid of the tokens.
    """
    scale = scale_of(grid)
    picture = np.array(image.convert("RGB").resize((grid.width * scale, grid.height * scale)))
    clusters = merged.clusters.cpu().numpy().reshape(grid.height, grid.width)
    wide = clusters.repeat(scale, 0).repeat(scale, 1)
    picture[1:][wide[1:] != wide[:-1]] = BORDER
    picture[:, 1:][wide[:, 1:] != wide[:, :-1]] = BORDER
    margin = scale // 3
    for token in merged.destinations.tolist():
        top, left = token // grid.width * scale, token % grid.width * scale
        dot = picture[top + margin : top + scale - margin, left + margin : left + scale - margin]
        dot[:] = DESTINATION
    return picture
