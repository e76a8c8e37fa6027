"""Pairs of pictures of which one is the other with one thing edited, and all else as it was.

A thing is recoloured, removed or added. The prompt is the caption of the picture afterwards, since
the tokenizers know the words of captions alone.

    edit = edit_of(7)
    edit.prompt           # "a large yellow ring on a plain green ground under an orange sky"
    before, after = draw_edit(edit, seed=7)
"""

from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from examples.small_models.pictures import (
    COLOURS,
    Scene,
    Thing,
    caption,
    draw,
    is_held_out,
    scene_of,
)

Picture = npt.NDArray[np.uint8]


@dataclass(frozen=True, kw_only=True, slots=True)
class Version:
    """A scene, or the things that are left of it."""

    scene: Scene
    without: Thing | None = None

    @property
    def caption(self) -> str:
        """The version in words; a thing that is not there is not named."""
        first, second = self.scene.first, self.scene.second
        if self.without is None or second is None:
            return caption(self.scene)
        left = second if self.without == first else first
        return caption(replace(self.scene, layout="one", first=left, second=None))


@dataclass(frozen=True, kw_only=True, slots=True)
class Edit:
    """Two versions of a scene."""

    kind: str
    """``"recolour"``, ``"remove"`` or ``"add"``."""
    before: Version
    after: Version

    @property
    def prompt(self) -> str:
        """The prompt of the edit: the caption of the picture afterwards."""
        return self.after.caption


def edit_of(index: int) -> Edit:
    """The edit of an index. A scene of two things may change in any way, others in colour alone."""
    generator = np.random.default_rng((index, 77))
    scene = scene_of(index)
    whole = Version(scene=scene)
    if scene.second is None:
        return Edit(kind="recolour", before=whole, after=_recoloured(scene, "first", generator))
    kind = str(generator.choice(["recolour", "remove", "add"]))
    name = str(generator.choice(["first", "second"]))
    if kind == "recolour":
        return Edit(kind=kind, before=whole, after=_recoloured(scene, name, generator))
    part = Version(scene=scene, without=getattr(scene, name))
    before, after = (whole, part) if kind == "remove" else (part, whole)
    return Edit(kind=kind, before=before, after=after)


def _recoloured(scene: Scene, name: str, generator: np.random.Generator) -> Version:
    thing: Thing = getattr(scene, name)
    other = scene.second if name == "first" else scene.first
    while True:
        new = replace(thing, colour=str(generator.choice(list(COLOURS))))
        alike = other is not None and (new.colour, new.shape) == (other.colour, other.shape)
        if new.colour != thing.colour and not alike and not is_held_out(new):
            first, second = (new, other) if name == "first" else (scene.first, new)
            return Version(scene=replace(scene, first=first, second=second))


def draw_edit(edit: Edit, seed: int) -> tuple[Picture, Picture]:
    """The pictures before and after, ``(128, 128, 3)`` each."""
    before, after = (draw(each.scene, seed, each.without) for each in (edit.before, edit.after))
    return before, after
