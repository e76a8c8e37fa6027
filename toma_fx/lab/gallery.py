"""Images on disk, and the guard against mixing those of different settings.

::

    DIR/settings.json                       the task (`Task.settings`)
    DIR/images/toma_r0.5/contender.json     the contender (`Contender.identity`)
    DIR/images/toma_r0.5/p0003_s1.png       prompt 3, seed 1; the file also holds its seconds

Prompts are numbered from 0. A file is there whole or not at all, so a run that was stopped can go
on at any time.
"""

import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image
from PIL.PngImagePlugin import PngInfo

from toma_fx.errors import ConfigError
from toma_fx.lab.contenders import Contender
from toma_fx.lab.draw import Task

SECONDS = "seconds"
"""Key of the text in a PNG file that holds the seconds of its drawing."""


@dataclass(frozen=True)
class Gallery:
    """The folder of one evaluation."""

    folder: Path

    def open(self, task: Task, contenders: list[Contender]) -> None:
        """Make the folders, or check that the images in them were drawn in the same way.

        Raises:
            ConfigError: when they were not; the message names the settings that differ.
        """
        self._same(self.folder / "settings.json", task.settings())
        for contender in contenders:
            what = {"identity": contender.identity, "steps": contender.steps}
            self._same(self.images(contender) / "contender.json", what)

    def images(self, contender: Contender) -> Path:
        """The folder of a contender's images."""
        return self.folder / "images" / contender.folder

    def file(self, contender: Contender, prompt: int, seed: int) -> Path:
        """The file of one image, drawn already or not."""
        return self.images(contender) / f"p{prompt:04}_s{seed}.png"

    def _same(self, file: Path, wanted: dict[str, Any]) -> None:
        if not file.exists():
            file.parent.mkdir(parents=True, exist_ok=True)
            write_whole(file, lambda part: part.write_text(json.dumps(wanted, indent=1)))
            return
        found = json.loads(file.read_text())
        differing = [k for k in {**wanted, **found} if wanted.get(k) != found.get(k)]
        if differing:
            details = ", ".join(
                f"{k} was {_short(found.get(k))} and is {_short(wanted.get(k))}" for k in differing
            )
            raise ConfigError(
                f"{file} holds other settings: {details}; use the same, or another --out"
            )


def save_image(image: Image.Image, file: Path, *, seconds: float) -> None:
    """Write a PNG file with the time its drawing took."""
    info = PngInfo()
    info.add_text(SECONDS, repr(seconds))
    write_whole(file, lambda part: image.save(part, format="PNG", pnginfo=info))


def seconds_of(file: Path) -> float:
    """The time that drawing an image took.

    Raises:
        ConfigError: when the file does not say.
    """
    with Image.open(file) as image:
        seconds = image.info.get(SECONDS)
    if seconds is None:
        raise ConfigError(f"{file} was not drawn by toma-fx eval; delete it to have it drawn")
    return float(seconds)


def write_whole(file: Path, write: Callable[[Path], object]) -> None:
    """Write a file under another name first, so that it is never there in part."""
    part = file.with_name(f".{file.name}.{os.getpid()}")
    write(part)
    part.replace(file)


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
