"""The page shows the images of the two pipelines, even if several sessions ask at the same time."""

import math
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from tests.family_pipelines import tiny_wan_pipeline
from toma_fx.app import words
from toma_fx.app.compare import CancelledError, Comparison, Studio, Wish
from toma_fx.choices import PROMPT
from toma_fx.config import MergeConfig
from toma_fx.errors import ConfigError, ModelError
from toma_fx.lab import small_models
from toma_fx.runtime import selector
from toma_fx.transform import model_of

STEPS = 4
OPTIONS: list[dict[str, Any]] = [
    {"ratio": 0.5},
    {"ratio": 0.75, "merge_below": 0.8, "memory": 2, "theta": 0.5},
    {"merge_below": 0.8, "memory": 2, "size": 96},
]


@pytest.fixture(autouse=True)
def _small(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The tiny pipelines are called as the repository's trained ones are."""
    monkeypatch.setattr(small_models, "FOLDER", folder)


@pytest.fixture(scope="module", params=["sdxl", "flux"])
def studio(request: pytest.FixtureRequest, folder: Path) -> Studio:
    return Studio([str(folder / request.param)])


@pytest.fixture(scope="module")
def sdxl(folder: Path) -> Studio:
    return Studio([str(folder / "sdxl")])


def wish(studio: Studio, **options: Any) -> Wish:
    return Wish(**{"model": studio.models[0], "prompt": PROMPT, "steps": STEPS, **options})


def pixels(image: Image.Image) -> Any:
    return np.asarray(image)


def drawn_by_code(made: Comparison) -> Any:
    """The image that the program on the page draws."""
    namespace: dict[str, Any] = {}
    exec(words.code(made), namespace)
    return pixels(namespace["image"])


@pytest.mark.parametrize("options", OPTIONS, ids=["merged", "memory", "extrapolated"])
def test_the_code_on_the_page_draws_the_merged_image(
    studio: Studio, options: dict[str, Any]
) -> None:
    made = studio.compare(wish(studio, **options))
    assert not np.array_equal(pixels(made.merged), pixels(made.untouched.image))
    assert np.array_equal(drawn_by_code(made), pixels(made.merged))
    assert 0 < made.report.saved < 1
    assert made.report.steps == STEPS
    assert 0 < made.psnr < 99
    assert made.difference().shape == pixels(made.merged).shape
    assert made.difference().any()


def test_ratio_0_is_the_untouched_image(studio: Studio) -> None:
    made = studio.compare(wish(studio, ratio=0))
    assert math.isinf(made.psnr)
    assert made.kept is None
    assert not made.difference().any()
    assert words.table(made)[1] == ("arithmetic of a call", "", "as untouched")
    assert words.of_kept(made) == "No tokens merged: the ratio is 0."


def test_theta_0_merges_nothing_and_leaves_no_block_out(studio: Studio) -> None:
    made = studio.compare(wish(studio, memory=2))
    assert made.kept is None
    assert words.of_kept(made).startswith("No tokens merged: with theta 0")
    assert not any("Left unmerged" in each for each in words.sentences(made))
    assert made.wish.config.skip == ()


def test_an_image_of_another_size_is_drawn_again(sdxl: Studio) -> None:
    own = sdxl.compare(wish(sdxl))
    other = sdxl.compare(wish(sdxl, size=96), own.untouched)
    assert not other.reused
    assert other.untouched.image.size == other.merged.size == (96, 96) != own.merged.size
    assert sdxl.compare(wish(sdxl, size=96, ratio=0.25), other.untouched).reused
    assert np.array_equal(
        pixels(sdxl.compare(wish(sdxl)).merged), pixels(own.merged)
    )  # and the card's own size is still what it was


def test_the_pipeline_is_untouched_again(studio: Studio) -> None:
    first = studio.compare(wish(studio))
    (pipeline,) = studio._pipelines.values()
    assert getattr(model_of(pipeline), "toma_recipe", None) is None
    assert not any(module._forward_pre_hooks for module in model_of(pipeline).modules())
    again = studio.compare(wish(studio))
    assert not again.reused
    assert np.array_equal(pixels(again.untouched.image), pixels(first.untouched.image))
    assert np.array_equal(pixels(again.merged), pixels(first.merged))


def test_kept_tokens_are_those_of_the_last_plan(
    studio: Studio, monkeypatch: pytest.MonkeyPatch
) -> None:
    picks: list[Tensor] = []
    by_step: dict[str, list[Tensor]] = {}
    real = selector.facility_location

    def note(similarity: Tensor, keep: int, *sized: Tensor, **padding: Any) -> Tensor:
        picks.append(real(similarity, keep, *sized, **padding))
        return picks[-1]

    def tell(text: str, share: float) -> None:
        by_step[text] = [*picks]
        picks.clear()

    studio.compare(wish(studio, steps=1))  # loads
    monkeypatch.setattr(selector, "facility_location", note)
    made = studio.compare(wish(studio, ratio=0.75, memory=2, theta=0.5), tell=tell)
    kept = made.kept
    assert kept is not None
    assert kept.step == 3  # steps 1 and 3 are full
    assert by_step["merged image: step 4 of 4"] == []
    planned = by_step["merged image: step 3 of 4"]
    if studio.models[0].endswith("flux"):
        planned = planned[: len(planned) // 2]  # the others are the call's with the negative prompt
    side, regions = (16, 4) if studio.models[0].endswith("flux") else (32, 16)
    assert (kept.grid.height, kept.grid.width) == (side, side)
    inside = planned[-1].unflatten(0, (-1, regions))[-1]  # those of the batch's last image
    places = (inside + 64 * torch.arange(regions)[:, None]).flatten()
    chosen = kept.merged.destinations
    assert len(chosen) == side * side // 4
    assert torch.equal(kept.grid.tile_order[places].sort().values, chosen)
    painted = kept.painted(made.merged)
    assert painted.shape == (320, 320, 3)
    assert f"{len(chosen)} of {side * side} in {kept.block} at step 3 of 4" in words.of_kept(made)


def test_steps_are_told_and_the_untouched_image_is_used_again(sdxl: Studio) -> None:
    told: list[tuple[str, float]] = []
    first = sdxl.compare(wish(sdxl), tell=lambda *each: told.append(each))
    steps = [text for text, _ in told if "step" in text]
    assert steps == [
        *(f"untouched image: step {step} of {STEPS}" for step in range(STEPS + 1)),
        *(f"merged image: step {step} of {STEPS}" for step in range(STEPS + 1)),
    ]
    shares = [share for _, share in told]
    assert shares == sorted(shares) and shares[-1] == 1
    told.clear()
    second = sdxl.compare(
        wish(sdxl, ratio=0.25), first.untouched, tell=lambda *each: told.append(each)
    )
    assert second.reused and second.untouched is first.untouched
    assert not any(text.startswith("untouched") for text, _ in told)
    assert any("comparison before" in each for each in words.sentences(second))
    other = sdxl.compare(wish(sdxl, seed=1), first.untouched)
    assert not other.reused
    assert not np.array_equal(pixels(other.untouched.image), pixels(first.untouched.image))


def test_sessions_at_the_same_time_get_their_own_images(sdxl: Studio) -> None:
    wishes = [wish(sdxl, prompt=PROMPT, ratio=0.5), wish(sdxl, prompt="a blue square", ratio=0.75)]
    alone = [sdxl.compare(each) for each in wishes]
    told: dict[int, list[str]] = {0: [], 1: []}
    together: dict[int, Comparison] = {}

    def ask(number: int) -> None:
        together[number] = sdxl.compare(
            wishes[number], tell=lambda text, share: told[number].append(text)
        )

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for number, made in enumerate(alone):
        assert np.array_equal(pixels(together[number].merged), pixels(made.merged))
        assert np.array_equal(
            pixels(together[number].untouched.image), pixels(made.untouched.image)
        )
    waiting = [number for number in told if told[number][0].startswith("waiting")]
    assert len(waiting) == 1


@pytest.mark.parametrize("when", ["untouched image: step 2", "merged image: step 2"])
def test_cancelling_leaves_the_pipeline_as_it_was(studio: Studio, when: str) -> None:
    before = studio.compare(wish(studio))
    cancelled = threading.Event()
    told: list[str] = []

    def tell(text: str, share: float) -> None:
        told.append(text)
        if text.startswith(when):
            cancelled.set()

    with pytest.raises(CancelledError):
        studio.compare(wish(studio), tell=tell, cancelled=cancelled)
    assert told[-1].startswith(when)
    after = studio.compare(wish(studio))
    assert np.array_equal(pixels(after.untouched.image), pixels(before.untouched.image))
    assert np.array_equal(pixels(after.merged), pixels(before.merged))


def test_a_session_that_waits_can_cancel(sdxl: Studio) -> None:
    cancelled = threading.Event()
    sdxl._lock.acquire()
    with pytest.raises(CancelledError):
        sdxl.compare(wish(sdxl), tell=lambda text, share: cancelled.set(), cancelled=cancelled)
    sdxl._lock.release()
    assert sdxl.compare(wish(sdxl)).psnr > 0


def test_what_toma_fx_warns_of_and_leaves_out_is_told(folder: Path) -> None:
    flux = Studio([str(folder / "flux")])
    said = words.sentences(flux.compare(wish(flux, ratio=0.5)))
    assert any(each.startswith("Warning: merging without memory") for each in said)
    said = words.sentences(flux.compare(wish(flux, ratio=0.5, merge_below=0.8, memory=2)))
    assert not any(each.startswith("Warning") for each in said)
    assert any("run in full and are remembered, which keeps" in each for each in said)
    assert any("noise level 0.8 and run untouched" in each for each in said)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"prompt": " "}, "prompt=' ' is empty; say what to draw"),
        ({"prompt": None}, "prompt=None is empty"),
        ({"seed": -1}, "seed=-1 must be a whole number from 0"),
        ({"seed": None}, "seed=None must be a whole number"),
        ({"steps": 0}, "steps=0 must be a whole number of at least 1"),
        ({"ratio": 2}, r"ratio=2 must be a number in \[0, 1\)"),
        ({"ratio": None}, "ratio=None must be a number"),
        ({"merge_below": 0}, r"merge_below=0 must be a number in \(0, 1\]"),
        ({"memory": -1}, "memory.every=-1 must be a whole number"),
        ({"memory": 2, "theta": 2}, r"memory.theta=2 must be a number in \[0, 1.5\]"),
        ({"size": 0}, "size=0 must be a whole number of at least 1"),
    ],
)
def test_bad_input_is_a_sentence(options: dict[str, Any], expected: str) -> None:
    with pytest.raises(ConfigError, match=expected):
        Wish(**{"model": "sdxl", "prompt": PROMPT, **options})


def test_models_that_cannot_be_compared(sdxl: Studio, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="must name at least one"):
        Studio([])
    with pytest.raises(ConfigError, match="model='other' must be one of"):
        sdxl.compare(Wish(model="other", prompt=PROMPT))
    nothing = Studio([str(tmp_path)])
    with pytest.raises(ModelError, match="no pipeline could be loaded"):
        nothing.compare(wish(nothing))
    tiny_wan_pipeline().save_pretrained(tmp_path / "wan")
    wan = Studio([str(tmp_path / "wan")])
    with pytest.raises(ModelError, match="draws videos, and the page compares images"):
        wan.compare(wish(wan))


def test_a_wish_has_the_config_of_its_options() -> None:
    assert Wish(model="sdxl", prompt=PROMPT).config == MergeConfig()
