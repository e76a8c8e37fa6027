"""A person in front of the page: types, drags, presses, and sees what was asked for."""

import io
import os
import re
import shutil
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from toma_fx.app.compare import Studio, Wish

ROOT = Path(__file__).parents[2]
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
BROWSER = next(filter(None, map(shutil.which, BROWSERS)), None)
MISSING = [name for name in ("gradio", "playwright") if find_spec(name) is None]
if BROWSER is None:
    MISSING.append(f"a browser ({', '.join(BROWSERS)})")
STEPS = 3
PROMPTS = ("a large red circle", "a small blue square on a striped green ground")
WAIT = 60_000
"""Milliseconds after which a page that shows nothing has failed."""

pytestmark = [
    pytest.mark.skipif(bool(MISSING), reason=f"there is no {', no '.join(MISSING)}"),
    # Playwright's own event loop, and the pipes to its driver, when they are collected.
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
]


@pytest.fixture(scope="module")
def url(folder: Path) -> Iterator[str]:
    """Of the page that ``toma-fx app`` serves, with the tiny SDXL, and one that takes an image."""
    models = [str(folder / name) for name in ("sdxl", "needs_image")]
    command = [sys.executable, "-m", "toma_fx", "app", "--model", *models]
    # Pages must not go through a proxy to this machine.
    environment = {**os.environ, "no_proxy": "127.0.0.1", "PYTHONUNBUFFERED": "1"}
    with subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True
    ) as server:
        assert server.stdout is not None
        said = server.stdout.readline()
        found = re.search(r"http://127\.0\.0\.1:\d+", said)
        assert found, said
        yield found[0]
        server.terminate()


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        launched = playwright.chromium.launch(
            executable_path=BROWSER,
            args=["--no-sandbox"],  # which Chromium demands where tests run as root
        )
        yield launched
        launched.close()


@pytest.fixture
def visit(browser: Any, url: str) -> Iterator[Any]:
    """Opens the page as one more person; no request may leave this machine."""
    visits: list[Any] = []
    foreign: list[str] = []

    def note(request: Any) -> None:
        if not request.url.startswith((url, "data:", "blob:")):
            foreign.append(request.url)

    def open_page() -> Any:
        page = browser.new_context().new_page()
        visits.append(page)
        page.on("request", note)
        page.goto(url)
        page.get_by_label("Steps").fill(str(STEPS))
        return page

    yield open_page
    for page in visits:
        page.context.close()
    assert foreign == []


def draw(page: Any, prompt: str) -> None:
    page.get_by_label("Prompt").fill(prompt)
    page.get_by_role("button", name="Draw both").click()


def images(page: Any) -> tuple[Any, Any]:
    """Pixels of the untouched and of the merged image, as the browser loads them."""
    page.wait_for_selector("#figures table", timeout=WAIT)
    sources = [each.get_attribute("src") for each in page.query_selector_all("#both img")]
    assert len(sources) == 2
    first, second = (Image.open(io.BytesIO(urllib.request.urlopen(src).read())) for src in sources)
    return np.asarray(first.convert("RGB")), np.asarray(second.convert("RGB"))


def expected(folder: Path, prompt: str, **options: Any) -> tuple[Any, Any]:
    """The same, drawn without the page."""
    model = str(folder / "sdxl")
    made = Studio([model]).compare(Wish(model=model, prompt=prompt, steps=STEPS, **options))
    return np.asarray(made.untouched.image), np.asarray(made.merged)


def equal(shown: tuple[Any, Any], drawn: tuple[Any, Any]) -> bool:
    return all(map(np.array_equal, shown, drawn))


def test_typing_dragging_and_drawing(visit: Any, folder: Path) -> None:
    page = visit()
    ratio = page.get_by_label("range slider for Ratio")
    box = ratio.bounding_box()
    middle = box["y"] + box["height"] / 2
    page.mouse.move(box["x"] + 0.53 * box["width"], middle)
    page.mouse.down()
    page.mouse.move(box["x"] + 0.80 * box["width"], middle, steps=5)
    page.mouse.up()
    chosen = float(page.get_by_label("number input for Ratio").input_value())
    assert 0.7 <= chosen <= 0.85
    draw(page, PROMPTS[0])
    shown = images(page)
    assert equal(shown, expected(folder, PROMPTS[0], ratio=chosen))
    assert not np.array_equal(*shown)
    for picture in ("#difference img", "#kept img"):
        assert page.locator(picture).evaluate("image => image.naturalWidth") > 0
    code = page.locator("#code .cm-content").inner_text()
    assert f"toma_fx.transform(pipe, ratio={chosen:g})" in code
    assert PROMPTS[0] in code
    assert "GFLOP" in page.inner_text("#figures") or "MFLOP" in page.inner_text("#figures")
    assert "Kept tokens: " in page.inner_text("#notes")
    assert "after a warm-up" in page.inner_text("#notes")


def test_the_images_lie_under_a_slider_that_can_be_dragged(visit: Any) -> None:
    page = visit()
    draw(page, PROMPTS[0])
    images(page)
    handle = page.locator("#both .inner").first
    before = handle.bounding_box()
    page.mouse.move(before["x"] + before["width"] / 2, before["y"] + before["height"] / 2)
    page.mouse.down()
    page.mouse.move(before["x"] + 80, before["y"] + before["height"] / 2, steps=5)
    page.mouse.up()
    assert handle.bounding_box()["x"] > before["x"] + 40


def test_the_untouched_image_is_used_again(visit: Any, folder: Path) -> None:
    page = visit()
    draw(page, PROMPTS[0])
    first = images(page)
    page.get_by_label("number input for Ratio").fill("0.8")
    page.get_by_role("radio", name="every 2").check()
    page.get_by_role("button", name="Draw both").click()
    page.wait_for_selector("#notes :text('comparison before')", timeout=WAIT)
    shown = images(page)
    assert np.array_equal(shown[0], first[0])
    assert equal(shown, expected(folder, PROMPTS[0], ratio=0.8, memory=2))
    code = page.locator("#code .cm-content").inner_text()
    assert "memory=toma_fx.Memory(every=2, theta=0), skip=()" in code


def test_size_and_theta(visit: Any, folder: Path) -> None:
    page = visit()
    page.get_by_role("combobox", name="Size").click()
    page.get_by_role("option", name="256 x 256").click()
    page.get_by_role("radio", name="every 2").check()
    page.get_by_label("number input for Theta").fill("0.5")
    draw(page, PROMPTS[0])
    shown = images(page)
    assert equal(shown, expected(folder, PROMPTS[0], size=256, memory=2, theta=0.5))
    assert shown[0].shape == (256, 256, 3)
    code = page.locator("#code .cm-content").inner_text()
    assert "Memory(every=2, theta=0.5)" in code and "height=256, width=256" in code


def test_cancel(visit: Any, folder: Path) -> None:
    page = visit()
    page.get_by_label("Steps").fill("500")
    draw(page, PROMPTS[0])
    page.wait_for_selector(":text('untouched image: step')", timeout=WAIT)
    page.get_by_role("button", name="Cancel").click()
    page.wait_for_selector("#status :text('Cancelled')", timeout=WAIT)
    assert page.query_selector("#figures table") is None
    page.get_by_label("Steps").fill(str(STEPS))
    draw(page, PROMPTS[0])
    assert equal(images(page), expected(folder, PROMPTS[0]))
    assert page.inner_text("#status").strip() == ""


@pytest.mark.parametrize(
    ("field", "value", "sentence"),
    [
        ("Prompt", "", "prompt='' is empty; say what to draw"),
        ("Steps", "0", "steps=0 must be a whole number of at least 1"),
        ("Seed", "-1", "seed=-1 must be a whole number from 0"),
        ("Seed", "", "seed=None must be a whole number from 0"),
    ],
)
def test_bad_input_is_a_sentence(visit: Any, field: str, value: str, sentence: str) -> None:
    page = visit()
    page.get_by_label(field).fill(value)
    page.get_by_role("button", name="Draw both").click()
    page.wait_for_selector("#status [role=alert]", timeout=WAIT)
    assert page.inner_text("#status").strip().startswith(sentence)
    assert "Traceback" not in page.inner_text("body")


def test_a_ratio_that_there_is_not_becomes_the_nearest(visit: Any) -> None:
    page = visit()
    ratio = page.get_by_label("number input for Ratio")
    ratio.fill("2")
    ratio.press("Tab")
    assert ratio.input_value() == "0.95"


def test_a_pipeline_that_fails_is_a_sentence(visit: Any) -> None:
    page = visit()
    page.get_by_role("combobox", name="Model").click()
    page.get_by_role("option", name="needs_image").click()
    draw(page, PROMPTS[0])
    page.wait_for_selector("#status [role=alert]", timeout=WAIT)
    said = page.inner_text("#status").strip()
    assert re.match(r"The pipeline failed with \w+: .*PIL.Image", said)
    assert "Traceback" not in page.inner_text("body")


def test_leaving_cancels(visit: Any) -> None:
    page = visit()
    page.get_by_label("Steps").fill("100000")  # an hour, if nobody cancelled it
    draw(page, PROMPTS[0])
    page.wait_for_selector(":text('untouched image: step')", timeout=WAIT)
    page.close()
    other = visit()
    draw(other, PROMPTS[1])
    images(other)


def test_two_people_at_once_get_their_own_images(visit: Any, folder: Path) -> None:
    people = [visit(), visit()]
    for page, prompt in zip(people, PROMPTS, strict=True):
        page.get_by_label("Steps").fill("40")
        page.get_by_label("Prompt").fill(prompt)
    for page in people:  # at once, so that the first still draws when the second begins
        page.get_by_role("button", name="Draw both").click()
    people[1].wait_for_selector(":text('draws for another session')", timeout=WAIT)
    model = str(folder / "sdxl")
    studio = Studio([model])
    for page, prompt in zip(people, PROMPTS, strict=True):
        made = studio.compare(Wish(model=model, prompt=prompt, steps=40))
        assert equal(images(page), (np.asarray(made.untouched.image), np.asarray(made.merged)))
        assert prompt in page.locator("#code .cm-content").inner_text()


def test_the_keyboard_alone_draws(visit: Any) -> None:
    page = visit()
    page.get_by_label("Prompt").fill(PROMPTS[0])
    page.get_by_label("range slider for Ratio").focus()
    before = page.get_by_label("number input for Ratio").input_value()
    page.keyboard.press("ArrowRight")
    assert page.get_by_label("number input for Ratio").input_value() > before
    page.get_by_role("button", name="Draw both").focus()
    page.keyboard.press("Enter")
    images(page)
