"""Dots are where destinations are, borders where clusters meet, colours those of the image."""

import numpy as np
import torch
from PIL import Image

from toma_fx.lab.clusters import Grid, Merged
from toma_fx.lab.paint import BORDER, CELL_PIXELS, DESTINATION, paint_merged

GRID = Grid(4, 8, torch.arange(32))


def test_destinations_have_dots_and_others_have_none() -> None:
    clusters = torch.arange(32) // 2 * 2
    painted = paint_merged(
        Image.new("RGB", (64, 32), "navy"), Merged(clusters.unique(), clusters), GRID
    )
    scale = CELL_PIXELS // 8
    assert painted.shape == (4 * scale, 8 * scale, 3)
    centres = painted[scale // 2 :: scale, scale // 2 :: scale]
    dots = (centres == DESTINATION).all(-1)
    assert np.flatnonzero(dots).tolist() == clusters.unique().tolist()
    assert (centres[~dots] == (0, 0, 128)).all()


def test_borders_are_between_clusters_only() -> None:
    clusters = torch.zeros(32, dtype=torch.int64)
    clusters.view(4, 8)[:, 4:] = 4
    painted = paint_merged(
        Image.new("RGB", (64, 32), "navy"), Merged(clusters.unique(), clusters), GRID
    )
    columns = (painted == BORDER).all(-1).all(0)
    assert np.flatnonzero(columns).tolist() == [4 * CELL_PIXELS // 8]
    assert (painted == BORDER).all(-1).sum() == painted.shape[0]
