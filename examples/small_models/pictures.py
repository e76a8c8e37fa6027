"""Captioned pictures, drawn from numbers: one index gives one scene, its caption and its pixels.

A scene has a sky, a textured ground, and one or two things, a row of equal things, or a thing and
its mirror image. The caption names everything but small changes of place, which a seed decides.

    scene = scene_of(7)
    caption(scene)        # "a small red star in front of a large blue ring on a dotted grey ..."
    draw(scene, seed=7)   # (128, 128, 3), uint8
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from examples.small_models import detail

SIZE = 128
DETAILED_SIZE = 256

SIZES = ("small", "large")
COLOURS = {
    "red": (0.86, 0.16, 0.14),
    "yellow": (0.97, 0.82, 0.16),
    "green": (0.15, 0.62, 0.24),
    "blue": (0.15, 0.33, 0.86),
    "black": (0.10, 0.10, 0.12),
    "white": (0.95, 0.95, 0.95),
}
TEXTURES = ("plain", "striped", "checked", "dotted", "grainy")
GROUNDS = {
    "green": (0.36, 0.62, 0.30),
    "brown": (0.58, 0.40, 0.24),
    "grey": (0.55, 0.56, 0.58),
    "purple": (0.52, 0.32, 0.62),
}
SKIES = {  # at the top, at the horizon
    "blue": ((0.30, 0.55, 0.92), (0.80, 0.91, 0.99)),
    "orange": ((0.93, 0.46, 0.16), (1.00, 0.85, 0.55)),
    "pink": ((0.85, 0.45, 0.68), (0.99, 0.86, 0.88)),
    "starry": ((0.03, 0.04, 0.14), (0.17, 0.19, 0.40)),
}
LAYOUTS = {  # how often each is drawn
    "one": 0.15,
    "left of": 0.25,
    "above": 0.20,
    "in front of": 0.20,
    "row": 0.10,
    "mirror": 0.10,
}
PAIRS = ("left of", "above", "in front of")

Pixels = npt.NDArray[np.floating[Any]]


@dataclass(frozen=True, kw_only=True, slots=True)
class Thing:
    """A shape of one colour."""

    size: str
    colour: str
    shape: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Scene:
    """All that a caption says."""

    layout: str
    first: Thing
    second: Thing | None
    texture: str
    ground: str
    sky: str


@dataclass(frozen=True, slots=True)
class Placed:
    """A thing with its centre and its radius, in a picture whose height is 128."""

    thing: Thing
    x: float
    y: float
    radius: float
    mirrored: bool = False


def is_held_out(thing: Thing) -> bool:
    """Whether training shows nothing of this colour and shape, such as a red star.

    Each colour lacks one shape: three further in the list than the colour is in its own.
    """
    return list(SHAPES).index(thing.shape) == (list(COLOURS).index(thing.colour) + 3) % len(SHAPES)


def scene_of(index: int, *, held_out: bool = False) -> Scene:
    """The scene of an index; with ``held_out``, one whose first thing training never shows."""
    generator = np.random.default_rng((index, int(held_out)))

    def pick(words: Iterable[str]) -> str:
        return str(generator.choice(list(words)))

    def thing(wanted: bool) -> Thing:
        while True:
            found = Thing(size=pick(SIZES), colour=pick(COLOURS), shape=pick(SHAPES))
            if is_held_out(found) == wanted:
                return found

    layout = str(generator.choice(list(LAYOUTS), p=list(LAYOUTS.values())))
    first = thing(held_out)
    second = thing(False) if layout in PAIRS else None
    while second is not None and (second.colour, second.shape) == (first.colour, first.shape):
        second = thing(False)
    return Scene(
        layout=layout,
        first=first,
        second=second,
        texture=pick(TEXTURES),
        ground=pick(GROUNDS),
        sky=pick(SKIES),
    )


def caption(scene: Scene) -> str:
    """A scene in words."""
    first = f"{scene.first.size} {scene.first.colour} {scene.first.shape}"
    if scene.layout == "row":
        things = f"a row of {first}s"
    elif scene.layout == "mirror":
        things = f"a {first} and its mirror image"
    else:
        things = f"a {first}"
    if scene.second is not None:
        second = f"{scene.second.size} {scene.second.colour} {scene.second.shape}"
        things += f" {scene.layout} a {second}"
    article = "an" if scene.sky.startswith("o") else "a"
    return f"{things} on a {scene.texture} {scene.ground} ground under {article} {scene.sky} sky"


def parse(text: str) -> Scene:
    """The scene that a caption describes; the inverse of ``caption``.

    Raises:
        ValueError: for words that no caption has.
    """
    things, _, place = text.partition(" on a ")
    words = things.split()
    layout = next((pair for pair in PAIRS if f" {pair} a " in things), "one")
    if words[:3] == ["a", "row", "of"]:
        layout, words = "row", ["a", *words[3:-1], words[-1].removesuffix("s")]
    elif things.endswith(" and its mirror image"):
        layout = "mirror"
    texture, ground, *_, sky, _ = [*place.split(), "", "", "", ""][:7]
    size, colour, shape = [*words[1:4], "", "", ""][:3]
    second = Thing(size=words[-3], colour=words[-2], shape=words[-1]) if layout in PAIRS else None
    scene = Scene(
        layout=layout,
        first=Thing(size=size, colour=colour, shape=shape),
        second=second,
        texture=texture,
        ground=ground,
        sky=sky,
    )
    if caption(scene) != text:
        raise ValueError(f"not a caption of these pictures: {text!r}; one is {caption(scene)!r}")
    return scene


def words() -> list[str]:
    """Every word that a caption can have."""
    grammar = {"a", "an", "row", "of", "and", "its", "mirror", "image"}
    grammar |= {"on", "ground", "under", "sky"}
    grammar |= {word for pair in PAIRS for word in pair.split()}
    shapes = [word for shape in SHAPES for word in (shape, f"{shape}s")]
    return sorted({*grammar, *SIZES, *COLOURS, *TEXTURES, *GROUNDS, *SKIES, *shapes})


def draw(
    scene: Scene,
    seed: int,
    without: Thing | None = None,
    *,
    size: int = SIZE,
    detailed: bool = False,
) -> npt.NDArray[np.uint8]:
    """The scene's pixels, ``(size, size, 3)``. Edges are smooth: a pixel takes its covered share.

    Args:
        scene: what is drawn.
        seed: decides its places.
        without: a thing of the scene that is left out; all else stays where it is.
        size: pixels along a side.
        detailed: with fine detail that the caption does not name, which the seed decides.
    """
    generator = np.random.default_rng((seed, 1234))
    fine = np.random.default_rng((seed, 4321)) if detailed else None
    picture = background(scene, generator, size, size, fine)
    for placed in places(scene, generator):
        if placed.thing != without:
            picture = add_thing(picture, placed, fine)
    return to_bytes(picture)


def background(
    scene: Scene,
    generator: np.random.Generator,
    height: int,
    width: int,
    fine: np.random.Generator | None = None,
) -> Pixels:
    """Sky and ground, ``(height, width, 3)`` from 0 to 1; what is drawn by ``fine`` is square."""
    x, y, scale = _grid(height, width)
    horizon = SIZE * generator.uniform(0.52, 0.66)
    picture = _sky(scene, y / horizon, generator, fine)
    if fine is not None:
        haze = np.array(SKIES[scene.sky][1], np.float32)
        picture = detail.add_mountains(picture, y, horizon, haze, fine)
    ground = _ground(scene, x, y, horizon, generator, fine)
    picture = _blend(picture, ground, _cover((horizon - y) / scale))
    if fine is not None:
        picture = detail.add_trees(picture, x, y, horizon, fine)
    return picture


def add_thing(picture: Pixels, placed: Placed, fine: np.random.Generator | None = None) -> Pixels:
    """A picture ``(H, W, 3)`` with a thing in front."""
    x, y, scale = _grid(*picture.shape[:2])
    left, top, radius = placed.x, placed.y, placed.radius
    side = -1.0 if placed.mirrored else 1.0
    shape = SHAPES[placed.thing.shape]
    distance = shape(side * (x - left), y - top, radius)
    light = 1.0 + 0.25 * np.clip((top - y) / radius, -1, 1)
    if fine is not None:
        light = light + detail.surface(len(picture), fine)
        shadow = shape(side * (x - left - 4), y - top - 5, radius)
        picture = _blend(picture, 0.45 * picture, _cover(shadow / 4))
    colour = np.array(COLOURS[placed.thing.colour], np.float32)
    edge = np.full(3, 0.55 if placed.thing.colour == "black" else 0.05, np.float32)
    picture = _blend(picture, edge, _cover(distance / scale))
    return _blend(picture, light[..., None] * colour, _cover((distance + 1.6) / scale))


def to_bytes(picture: Pixels) -> npt.NDArray[np.uint8]:
    """Numbers from 0 to 1 as bytes."""
    return np.asarray(np.clip(picture, 0, 1) * 255 + 0.5, np.uint8)


def _grid(height: int, width: int) -> tuple[Pixels, Pixels, np.floating[Any]]:
    """Each pixel's x and y, of which y runs to 128 at every size, and a pixel's side."""
    scale = np.float32(SIZE / height)
    y, x = (np.mgrid[0:height, 0:width].astype(np.float32) + np.float32(0.5)) * scale
    return x, y, scale


def _sky(
    scene: Scene,
    height: Pixels,
    generator: np.random.Generator,
    fine: np.random.Generator | None,
) -> Pixels:
    top, bottom = (np.array(colour, np.float32) for colour in SKIES[scene.sky])
    sky: Pixels = top + (bottom - top) * np.clip(height, 0, 1)[..., None]
    if fine is not None:
        add = detail.add_stars if scene.sky == "starry" else detail.add_clouds
        return add(sky, fine)
    if scene.sky == "starry":
        for star in generator.integers(2, SIZE - 2, (40, 2)):
            row, column = star * sky.shape[:2] // SIZE
            sky[row, column] = 0.95
            sky[row - 1 : row + 2, column] = np.maximum(sky[row - 1 : row + 2, column], 0.55)
            sky[row, column - 1 : column + 2] = np.maximum(sky[row, column - 1 : column + 2], 0.55)
    return sky


def _ground(
    scene: Scene,
    x: Pixels,
    y: Pixels,
    horizon: float,
    generator: np.random.Generator,
    fine: np.random.Generator | None,
) -> Pixels:
    """The texture's share of the darker tone, over a gradient that darkens to the front."""
    shift = generator.uniform(0, 16)
    if scene.texture == "striped":
        dark = _cover(4 - np.abs((x + y + shift) % 16 - 8))
    elif scene.texture == "checked":
        wave_x, wave_y = (np.abs((v) % 20 - 10) - 5 for v in (x + shift, y - horizon + 5))
        dark = _cover(wave_x) * _cover(wave_y) + _cover(-wave_x) * _cover(-wave_y)
    elif scene.texture == "dotted":
        dark = _cover(np.hypot((x + shift) % 14 - 7, (y - horizon) % 14 - 7) - 3.5)
    else:
        dark = np.zeros_like(x)
    tone = 1.08 - 0.25 * (y - horizon) / (SIZE - horizon) - 0.4 * dark
    if scene.texture == "grainy":
        tone = tone + generator.normal(0, 0.09, x.shape).astype(np.float32)
    if fine is not None:
        tone = tone + detail.grain(len(x), fine)
    return np.asarray(tone[..., None] * np.array(GROUNDS[scene.ground]), np.float32)


def places(scene: Scene, generator: np.random.Generator) -> list[Placed]:
    """The scene's things in their places, from back to front."""

    def near(value: float, spread: float) -> float:
        return float(SIZE * generator.uniform(value - spread, value + spread))

    def radius(thing: Thing) -> float:
        return near({"small": 0.14, "large": 0.215}[thing.size], 0.008)

    first, second = scene.first, scene.second
    if scene.layout == "row":
        y, shift, size = near(0.6, 0.12), near(0, 0.03), radius(first) * 0.68
        return [Placed(first, SIZE * (0.18 + 0.32 * i) + shift, y, size) for i in range(3)]
    if scene.layout == "mirror":
        x, y, size = near(0.26, 0.02), near(0.55, 0.12), radius(first)
        return [Placed(first, x, y, size), Placed(first, SIZE - x, y, size, mirrored=True)]
    if second is None:
        return [Placed(first, near(0.5, 0.12), near(0.55, 0.12), radius(first))]
    sizes = radius(first), radius(second)
    if scene.layout == "left of":
        centres = [(near(x, 0.02), near(0.55, 0.1)) for x in (0.26, 0.74)]
    elif scene.layout == "above":
        x = near(0.5, 0.1)
        centres = [(x + near(0, 0.05), near(y, 0.02)) for y in (0.25, 0.75)]
    else:
        side = generator.choice([-1, 1])
        reach = 0.5 * max(sizes) + 0.42 * min(sizes)
        x, y = near(0.5, 0.08), near(0.52, 0.08)
        centres = [(x + side * v * reach, y + 0.5 * v * reach) for v in (0.9, -0.9)]
    front, back = centres
    return [Placed(second, *back, sizes[1]), Placed(first, *front, sizes[0])]


def _cover(distance: Pixels) -> Pixels:
    """How much of a pixel lies inside, from its centre's signed distance to the edge."""
    share: Pixels = np.clip(0.5 - distance, 0, 1)
    return share


def _blend(below: Pixels, above: Pixels, share: Pixels) -> Pixels:
    return np.asarray(below + (above - below) * share[..., None], np.float32)


def _circle(x: Pixels, y: Pixels, radius: float) -> Pixels:
    return np.hypot(x, y) - radius


def _square(x: Pixels, y: Pixels, radius: float) -> Pixels:
    return np.maximum(np.abs(x), np.abs(y)) - 0.86 * radius


def _triangle(x: Pixels, y: Pixels, radius: float) -> Pixels:
    return np.maximum(0.866 * np.abs(x) - 0.5 * y, y) - 0.58 * radius


def _star(x: Pixels, y: Pixels, radius: float) -> Pixels:
    length, tip = np.hypot(x, y), 2 * np.pi / 5
    angle = np.abs((np.arctan2(x, -y) + tip / 2) % tip - tip / 2)
    outer, inner = 1.15 * radius, 0.5 * radius
    edge = (inner * np.cos(tip / 2) - outer, inner * np.sin(tip / 2))
    u, v = length * np.cos(angle) - outer, length * np.sin(angle)
    return np.asarray((u * edge[1] - v * edge[0]) / np.hypot(*edge), np.float32)


def _ring(x: Pixels, y: Pixels, radius: float) -> Pixels:
    return np.abs(np.hypot(x, y) - 0.74 * radius) - 0.26 * radius


def _moon(x: Pixels, y: Pixels, radius: float) -> Pixels:
    bite = 0.85 * radius - np.hypot(x - 0.55 * radius, y)
    moon: Pixels = np.maximum(np.hypot(x, y) - radius, bite)
    return moon


SHAPES: dict[str, Callable[[Pixels, Pixels, float], Pixels]] = {
    "circle": _circle,
    "square": _square,
    "triangle": _triangle,
    "star": _star,
    "ring": _ring,
    "moon": _moon,
}
