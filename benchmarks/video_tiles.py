"""The number of latent frames that a tile of a video should reach through, on painted scenes.

A scene is a background that moves as a camera pans, and things that move on it, each at a speed of
its own. It is seen as a video model sees it: 8 x 8 pixels and 4 frames become a latent, 2 x 2
latents a token. Tokens are merged and spread back. The error is their distance from the original
tokens, as a share of their spread. No model takes part, so the result says where tokens are alike,
and not what a model makes of them.

    python -m benchmarks.video_tiles
"""

import argparse

import torch
from tabulate import tabulate
from torch import Tensor

import toma_fx.runtime.ops  # noqa: F401  registers the operators
from toma_fx.config import MergeConfig
from toma_fx.families.rows import Grid, TokenGrids
from toma_fx.grids import image_sequence, token_order
from toma_fx.runtime import regions

toma = torch.ops.toma

FRAMES, ROWS, COLUMNS = 21, 30, 52
"""The grid of tokens: Wan's 81 frames of 480 x 832 pixels."""
SPEEDS = (0.0, 0.25, 0.5, 1.0, 2.0)
"""Speeds of the camera, in tokens a latent frame; 1 is 64 pixels a second at 16 frames a second."""
CHUNKS = (1, 2, 4, 8, 20)
CHANNELS = 16
THINGS = 6


def waves(count: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Directions and phases of waves, of which fine ones are weaker, as in pictures."""
    frequency = torch.rand(count, 2, generator=generator).mul(2).sub(1) * torch.logspace(
        -1.3, 0.2, count
    ).unsqueeze(1)
    weight = 0.2 / (0.05 + frequency.norm(dim=1))
    return frequency, torch.rand(count, CHANNELS, generator=generator) * 6.28, weight


def texture(position: Tensor, made: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    """``(..., 2)`` positions in tokens to ``(..., CHANNELS)`` colours."""
    frequency, phase, weight = made
    angle = (position @ frequency.T * 6.28).unsqueeze(-1) + phase
    return (angle.cos() * weight.unsqueeze(-1)).sum(-2)


def scene(speed: float, seed: int) -> Tensor:
    """Tokens ``(1, N, 4 * CHANNELS)`` in raster order of a scene whose camera moves at a speed."""
    generator = torch.Generator().manual_seed(seed)
    background = waves(48, generator)
    things = [
        (
            torch.rand(2, generator=generator) * torch.tensor([ROWS, COLUMNS]),
            (torch.rand(2, generator=generator) - 0.5) * 2 * max(speed, 0.25),
            1.5 + 4 * float(torch.rand(1, generator=generator)),
            waves(24, generator),
        )
        for _ in range(THINGS)
    ]
    half = torch.arange(0.25, 1, 0.5)  # two latents a token along each side
    row, column = torch.meshgrid(
        (torch.arange(ROWS)[:, None] + half).flatten(),
        (torch.arange(COLUMNS)[:, None] + half).flatten(),
        indexing="ij",
    )
    frames = []
    for frame in range(FRAMES):
        total = torch.zeros(2 * ROWS, 2 * COLUMNS, CHANNELS)
        moments = [0.0] if frame == 0 else [0.0, 0.25, 0.5, 0.75]
        for moment in moments:
            time = frame + moment
            position = torch.stack([row, column + speed * time], -1)
            seen = texture(position, background)
            for start, velocity, radius, made in things:
                centre = start + velocity * time
                offset = torch.stack([row, column], -1) - centre
                inside = offset.norm(dim=-1, keepdim=True) < radius
                seen = torch.where(inside, texture(offset, made) + 1, seen)
            total += seen / len(moments)
        patches = total.unflatten(0, (ROWS, 2)).unflatten(2, (COLUMNS, 2)).permute(0, 2, 1, 3, 4)
        frames.append(patches.flatten(2).flatten(0, 1))
    return torch.cat(frames)[None]


def error(tokens: Tensor, ratio: float, chunk: int) -> float:
    """The error of merging, as a share of the tokens' spread."""
    config = MergeConfig(ratio=ratio, region_frames=chunk)
    border = TokenGrids(
        grids=lambda model, call: (Grid(ROWS, COLUMNS, FRAMES),), enter=(), leave=()
    )
    sequence = image_sequence(border, config, None, {})
    order = token_order(sequence, tokens, config)
    ordered = toma.reorder(tokens, order)
    layout = regions.layout(sequence.segments, config.region_tokens, ratio)
    chosen = toma.select(ordered, layout, config.selector)
    how = (config.temperature, config.merge_over, config.unmerge)
    merging, spreading = toma.weigh(ordered, chosen, layout, *how)
    back = toma.unmerge(toma.merge(ordered, merging, layout), spreading, layout)
    return float((back - ordered).norm() / (ordered - ordered.mean(1, keepdim=True)).norm())


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--scenes", type=int, default=4)
    scenes = parser.parse_args().scenes
    rows = []
    for speed in SPEEDS:
        tokens = [scene(speed, seed) for seed in range(scenes)]
        for ratio in (0.25, 0.5, 0.75):
            means = [sum(error(each, ratio, chunk) for each in tokens) / scenes for chunk in CHUNKS]
            rows.append((speed, ratio, *(f"{mean:.3f}" for mean in means)))
    headers = ("speed", "ratio", *(f"{chunk} frames" for chunk in CHUNKS))
    print(tabulate(rows, headers))


if __name__ == "__main__":
    main()
