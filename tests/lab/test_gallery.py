"""Files are whole, hold their seconds, and are not mixed."""

from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from toma_fx.errors import ConfigError
from toma_fx.lab.contenders import Contender
from toma_fx.lab.draw import Task
from toma_fx.lab.gallery import Gallery, save_image, seconds_of
from toma_fx.lab.prompts import Prompt

TASK = Task(model="m", prompts=(Prompt(text="a"),))
CONTENDER = Contender(
    variant="toma:region=tile",
    ratio=0.5,
    steps=25,
    arithmetic=0.7,
    identity="one",
    changed=nullcontext,
)


def test_a_file_for_each_image(tmp_path: Path) -> None:
    gallery = Gallery(tmp_path)
    gallery.open(TASK, [CONTENDER])
    file = gallery.file(CONTENDER, 3, 1)
    assert file == tmp_path / "images" / "toma_region=tile_r0.5" / "p0003_s1.png"
    assert not file.exists()
    save_image(Image.new("RGB", (4, 4), "red"), file, seconds=1.25)
    assert seconds_of(file) == 1.25
    with Image.open(file) as image:
        assert image.getpixel((0, 0)) == (255, 0, 0)
    assert [f.name for f in file.parent.iterdir() if f.suffix != ".json"] == [file.name]


def test_the_same_settings_open_it_again(tmp_path: Path) -> None:
    Gallery(tmp_path).open(TASK, [CONTENDER])
    more = [replace(CONTENDER, ratio=0.25), CONTENDER, replace(CONTENDER, arithmetic=0.8)]
    Gallery(tmp_path).open(replace(TASK, seeds=5), more)


@pytest.mark.parametrize(
    ("task", "contender", "expected"),
    [
        (replace(TASK, steps=9), CONTENDER, "settings.json holds other settings: steps was 25 and"),
        (replace(TASK, guidance=2.0), CONTENDER, "guidance was None and is 2.0"),
        (replace(TASK, prompts=(Prompt(text="b"),)), CONTENDER, "prompts was"),
        (TASK, replace(CONTENDER, identity="two"), "identity was 'one' and is 'two'"),
        (TASK, replace(CONTENDER, steps=12), "steps was 25 and is 12"),
    ],
)
def test_other_settings_are_refused(
    tmp_path: Path, task: Task, contender: Contender, expected: str
) -> None:
    Gallery(tmp_path).open(TASK, [CONTENDER])
    with pytest.raises(ConfigError) as raised:
        Gallery(tmp_path).open(task, [contender])
    assert expected in str(raised.value)
    assert "another --out" in str(raised.value)


def test_a_foreign_image_is_named(tmp_path: Path) -> None:
    Image.new("RGB", (4, 4)).save(tmp_path / "x.png")
    with pytest.raises(ConfigError, match=r"x\.png was not drawn by toma-fx eval"):
        seconds_of(tmp_path / "x.png")
