"""Captioned clips: the scenes of pictures.py, in which things swing and the ground passes by.

A seed decides how each thing moves and whether the camera does. The caption says nothing of it, and
is true of every frame.

    scene = scene_of(7)
    draw_clip(scene, seed=7)   # (17, 96, 96, 3), uint8
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from examples.small_models.pictures import (
    SIZE,
    Placed,
    Scene,
    add_thing,
    background,
    places,
    scene_of,
    to_bytes,
)

FRAMES = 17  # five frames of latents, of which the first is of one frame and the others of four
CLIP_SIZE = 96  # pixels along a side
LOOKED_AT = (0, FRAMES // 2, FRAMES - 1)
"""Frames that a judge of pictures sees of a clip."""
TOGETHER = ("row", "mirror", "in front of")
"""Layouts whose things move alike; in others, each moves by itself."""

Clip = npt.NDArray[np.uint8]


@dataclass(frozen=True, kw_only=True, slots=True)
class Swing:
    """A part of a round on an ellipse, about a thing's place; lengths in a picture's 1/128."""

    reach: tuple[float, float]
    start: float
    turn: float
    """Radians between two frames."""
    lag: float
    """Radians by which y is behind x."""

    def at(self, frame: int) -> tuple[float, float]:
        """How far a thing is from its place."""
        angle = self.start + self.turn * frame
        return self.reach[0] * np.sin(angle), self.reach[1] * np.sin(angle + self.lag)


def draw_clip(scene: Scene, seed: int, frames: int = FRAMES) -> Clip:
    """The first ``frames`` frames of a scene's clip, ``(frames, 96, 96, 3)``."""
    generator = np.random.default_rng((seed, 1234))
    pan = int(np.random.default_rng((seed, 77)).integers(-1, 2))  # pixels from frame to frame
    reach = (FRAMES - 1) * abs(pan)
    wide = background(scene, generator, CLIP_SIZE, CLIP_SIZE + reach)
    things = places(scene, generator)
    swings = swings_of(scene, things, seed)
    clip = []
    for frame in range(frames):
        left = pan * frame + (reach if pan < 0 else 0)
        picture = wide[:, left : left + CLIP_SIZE]
        for placed, swing in zip(things, swings, strict=True):
            x, y = swing.at(frame)
            picture = add_thing(picture, replace(placed, x=placed.x + x, y=placed.y + y))
        clip.append(to_bytes(picture))
    return np.stack(clip)


def swings_of(scene: Scene, things: Sequence[Placed], seed: int) -> list[Swing]:
    """How each thing moves: not far, so that the judge of pictures knows it in every frame.

    Nothing moves beyond the picture's edge, or at all where it lies over the edge by itself.
    """
    generator = np.random.default_rng((seed, 99))
    if scene.layout not in TOGETHER:
        return [_swing([each], generator) for each in things]
    swing = _swing(things, generator)
    reach = (-swing.reach[0], swing.reach[1])
    return [replace(swing, reach=reach) if each.mirrored else swing for each in things]


def _swing(things: Sequence[Placed], generator: np.random.Generator) -> Swing:
    def reach(centres: Sequence[float]) -> float:
        room = min(
            min(at, SIZE - at) - 1.15 * thing.radius  # a star's points are further out
            for at, thing in zip(centres, things, strict=True)
        )
        return float(np.clip(room, 0, generator.uniform(4, 8)))

    return Swing(
        reach=(reach([each.x for each in things]), reach([each.y for each in things])),
        start=generator.uniform(0, 2 * np.pi),
        turn=generator.choice([-1, 1]) * 2 * np.pi * generator.uniform(0.4, 0.7) / FRAMES,
        lag=generator.uniform(0, 2 * np.pi),
    )


def clips_of(indices: Sequence[int], frames: int = FRAMES) -> Clip:
    """The clips of some indices, ``(clips, frames, 96, 96, 3)``."""
    return np.stack([draw_clip(scene_of(index), index, frames) for index in indices])


def looked_at(drawn: Clip, scenes: Sequence[Scene]) -> tuple[Clip, list[Scene]]:
    """Pictures that a judge sees, and the scene of each.

    Args:
        drawn: pictures ``(N, H, W, 3)``, all of which it sees, or clips ``(N, 17, H, W, 3)``, of
            which it sees `LOOKED_AT`.
        scenes: of the ``N``.
    """
    if drawn.ndim == 4:
        return drawn, list(scenes)
    pictures = drawn[:, LOOKED_AT].reshape(-1, *drawn.shape[2:])
    return pictures, [scene for scene in scenes for _ in LOOKED_AT]
