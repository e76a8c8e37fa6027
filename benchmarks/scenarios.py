"""What `benchmarks.methods` compares: scenarios of a small model in the place of a real one.

A scenario says what is drawn and judged, and its rows are the ways to draw it with less arithmetic.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import diffusers
from PIL import Image

import toma_fx
from benchmarks.caches import CacheDit, DeepCache, first_block_cache, taylor_seer
from benchmarks.edit_references import pipeline as kontext
from benchmarks.real_size import RealSize, real_share
from benchmarks.rivals import Rival, named_rival
from examples.small_models.edits import draw_edit, edit_of
from examples.small_models.pictures import (
    DETAILED_SIZE,
    Scene,
    caption,
    draw,
    parse,
    scene_of,
)
from examples.small_models.text import PROMPT_TOKENS
from examples.small_models.videos import FRAMES
from toma_fx import Memory, MergeConfig
from toma_fx.transform import while_transformed

Applied = Iterator[tuple[Mapping[str, Any], Callable[[], float]]]
"""Changes of the pipeline's call, and a function to the arithmetic of the run that was drawn."""


class Drawing(Protocol):
    """What a row needs of the bench that draws it."""

    scenario: "Scenario"
    pipe: Any

    def draw_others(self) -> Any:
        """Images of other prompts than those that are measured."""

    def scheduled(self, steps: int, power: float) -> dict[str, Any]:
        """A call whose steps lie at ``(1 - n / steps) ** power``."""

    def best_power(self, steps: int) -> float:
        """The power that draws other prompts closest to the untouched model."""


@dataclass(frozen=True)
class Item:
    """One image to draw."""

    prompt: str
    scene: Scene
    """What the judge looks for."""
    inputs: Mapping[str, Any] = field(default_factory=dict)
    """Arguments of this image alone, such as the picture that it starts from."""


def text_item(index: int, held_out: bool, size: int) -> Item:
    """An image from its prompt."""
    scene = scene_of(index, held_out=held_out)
    return Item(caption(scene), scene)


def second_pass_item(index: int, held_out: bool, size: int) -> Item:
    """A true picture, enlarged to twice its side, for a pass that adds detail."""
    scene = scene_of(index, held_out=held_out)
    picture = Image.fromarray(draw(scene, index, size=size, detailed=size == DETAILED_SIZE))
    enlarged = picture.resize((2 * size, 2 * size), Image.Resampling.BICUBIC)
    return Item(caption(scene), scene, {"image": enlarged})


def edit_item(index: int, held_out: bool, size: int) -> Item:
    """A true picture, and what should change in it."""
    edit = edit_of(index)
    before, _ = draw_edit(edit, index)
    return Item(edit.prompt, parse(edit.prompt), {"image": Image.fromarray(before)})


def _text_to_image(folder: Path) -> Any:
    return diffusers.DiffusionPipeline.from_pretrained(folder)


def _image_to_image(folder: Path) -> Any:
    return diffusers.AutoPipelineForImage2Image.from_pipe(_text_to_image(folder))


@dataclass(frozen=True, kw_only=True)
class Scenario:
    """What is drawn: a small model in the place of a real one.

    Attributes:
        model: folder of the small model.
        real: the call of the real model, whose arithmetic is counted.
        steps: of the untouched run.
        call: arguments of the pipeline, besides the size.
        rows: ways to draw with less arithmetic, for a number of steps.
        item: an image by its index; whether it shows things that training did not; its size.
        load: makes the pipeline from a folder.
        scheduler: "dpm" for DPM++; None for the pipeline's own.
    """

    model: str
    real: RealSize
    steps: int
    call: Mapping[str, Any]
    rows: Callable[[int], Iterator["Row"]]
    item: Callable[[int, bool, int], Item] = text_item
    load: Callable[[Path], Any] = _text_to_image
    scheduler: str | None = None

    def nominal(self, steps: int) -> int:
        """The pipeline's number of steps so that it runs ``steps``; a second pass runs some."""
        strength: float = self.call.get("strength", 1)
        return round(steps / strength)


@dataclass(frozen=True)
class Row:
    """A way to draw with less arithmetic; this one leaves out steps.

    Attributes:
        name: in tables.
        steps: of the run; None for the scenario's.
        power: of the schedule. Above 1, more of the steps lie where noise is low; "searched" takes
            the power that draws other prompts closest to the untouched model.
    """

    name: str
    steps: int | None = None
    power: float | str = 1.0

    @contextmanager
    def on(self, bench: Drawing) -> Applied:
        """The pipeline changed."""
        steps = self.steps or bench.scenario.steps
        changes: dict[str, Any] = {"num_inference_steps": bench.scenario.nominal(steps)}
        if self.power != 1:
            power = bench.best_power(steps) if self.power == "searched" else float(self.power)
            changes = bench.scheduled(steps, power)
        yield changes, lambda: steps / bench.scenario.steps


@dataclass(frozen=True)
class Merging(Row):
    """A configuration of `toma_fx.transform`, whose theta may be calibrated on other prompts."""

    config: MergeConfig = field(default_factory=MergeConfig)
    calibrated: bool = False

    @contextmanager
    def on(self, bench: Drawing) -> Applied:
        """The pipeline transformed."""
        config = self.config
        if self.calibrated:
            found = toma_fx.calibrate_theta(bench.pipe, lambda _: bench.draw_others(), config)
            config = found.config
            print(f"{self.name}: the calibrated theta is {found.theta:g}", flush=True)
        scenario = bench.scenario
        with while_transformed(bench.pipe, config):
            yield {}, lambda: real_share(bench.pipe, scenario.real, config, scenario.steps)


@dataclass(frozen=True)
class Allotted(Row):
    """Merging at every step, with ratios that are calibrated by block on other prompts.

    Attributes:
        ratio: the one that costs the small model as much everywhere.
    """

    ratio: float = 0.5

    @contextmanager
    def on(self, bench: Drawing) -> Applied:
        """The pipeline transformed."""
        found = toma_fx.calibrate(
            bench.pipe, lambda _: bench.draw_others(), MergeConfig(skip=()), name=self.name
        )
        with Merging(self.name, config=found.config(self.ratio)).on(bench) as applied:
            yield applied


class Cache(Protocol):
    """A cache of another project."""

    @property
    def name(self) -> str:
        """In tables."""

    def on(self, pipe: Any, real: RealSize) -> AbstractContextManager[Callable[[], float]]:
        """The pipeline with the cache, and a function to the real model's arithmetic."""


@dataclass(frozen=True)
class Cached(Row):
    """A cache of another project on the pipeline."""

    cache: Cache = field(kw_only=True)

    @contextmanager
    def on(self, bench: Drawing) -> Applied:
        """The pipeline with the cache."""
        with self.cache.on(bench.pipe, bench.scenario.real) as share:
            yield {}, share


@dataclass(frozen=True)
class Rivalled(Row):
    """Another way to merge tokens."""

    rival: Rival = field(kw_only=True)
    ratio: float = 0.5

    @contextmanager
    def on(self, bench: Drawing) -> Applied:
        """The pipeline changed by the rival."""
        with self.rival.changed(bench.pipe, self.ratio):
            yield {}, lambda: self.rival.real_share(self.ratio, bench.scenario.real)


def cached(cache: Cache) -> Cached:
    """A row of a cache, under its own name."""
    return Cached(cache.name, cache=cache)


def sdxl_rows(steps: int) -> Iterator[Row]:
    """Rows of a UNet."""
    yield from _fewer(steps)
    yield from _merging(steps)
    if steps == 4:
        for ratio in (0.25, 0.5):
            name = f"merged at every step, ratios by block for {ratio:g}"
            yield Allotted(name, ratio=ratio)
    for every in (2, 3, 5) if steps == 25 else (2,):
        yield cached(DeepCache(every))
    for name, ratio in (("tomesd", 0.5), ("tofu", 0.5), ("todo", 0.75)):
        yield Rivalled(f"{name}, ratio {ratio:g}", rival=named_rival(name), ratio=ratio)


def flux_rows(steps: int) -> Iterator[Row]:
    """Rows of a transformer."""
    yield from _fewer(steps)
    yield from _merging(steps)
    yield from _transformer_caches(steps, guided=True)


def wan_rows(steps: int) -> Iterator[Row]:
    """Rows of a transformer for video, whose pipeline takes no schedule."""
    yield from _fewer(steps, searched=False)
    yield from _merging(steps)
    yield from _transformer_caches(steps, guided=True)


def second_pass_rows(steps: int) -> Iterator[Row]:
    """Rows of a second pass with a UNet."""
    yield from (Row(f"{count} steps", steps=count) for count in (8, 6, 4))
    for ratio in (0.25, 0.5, 0.75):
        yield Merging(f"merged at every step, ratio {ratio:g}", config=_config(ratio))
    yield Merging(
        "memory every 2, ratio 0.9", config=_config(0.9, Memory(every=2)), calibrated=True
    )
    yield Merging("memory every 2, theta 0", config=_config(0.5, Memory(every=2, theta=0.0)))
    yield cached(DeepCache(2))
    yield Rivalled("tomesd, ratio 0.5", rival=named_rival("tomesd"), ratio=0.5)


def edit_rows(steps: int) -> Iterator[Row]:
    """Rows of edits with Kontext."""
    yield from _fewer(steps)
    for ratio in (0.25, 0.5, 0.75):
        config = MergeConfig(ratio=ratio, tokens="references")
        yield Merging(f"references merged, ratio {ratio:g}", config=config)
    yield from _merging(steps)
    yield from _transformer_caches(steps, guided=False)


def _transformer_caches(steps: int, *, guided: bool) -> Iterator[Row]:
    for threshold in (0.06, 0.1, 0.15) if steps == 25 else (0.1,):
        yield cached(first_block_cache(threshold))
    for every in (2, 3) if steps == 25 else (2,):
        yield cached(taylor_seer(every))
    if steps == 25:  # a run of four steps is its warm-up
        yield cached(CacheDit(0.24, guided))


def _fewer(steps: int, *, searched: bool = True) -> Iterator[Row]:
    counts = (20, 18, 15, 12, 10) if steps == 25 else (3, 2)
    yield from (Row(f"{count} steps", steps=count) for count in counts)
    for count in ((18, 12) if steps == 25 else (3,)) if searched else ():
        yield Row(f"{count} steps, searched schedule", steps=count, power="searched")


def _merging(steps: int) -> Iterator[Row]:
    for ratio in (0.25, 0.5, 0.75):
        yield Merging(f"merged at every step, ratio {ratio:g}", config=_config(ratio))
    for ratio in (0.5, 0.75):
        name = f"merged below noise level 0.8, ratio {ratio:g}"
        yield Merging(name, config=_config(ratio, level=0.8))
    for every in (2, 3) if steps == 25 else (2,):
        level = 0.8 if steps == 25 else 1.0
        where = f"below noise level {level:g}, every {every}" if level < 1 else f"every {every}"
        memory = f"memory {where}, ratio 0.9"
        yield Merging(memory, config=_config(0.9, Memory(every=every), level), calibrated=True)
        extrapolated = _config(0.5, Memory(every=every, theta=0.0), level)
        yield Merging(f"memory {where}, theta 0", config=extrapolated)
        if steps == 25 and every == 2:
            plain = Memory(every=every, theta=1.0, extrapolate=False)
            yield Merging(f"{memory}, no extrapolation", config=_config(0.9, plain, level))
            plain = replace(plain, control=False)
            name = f"memory {where}, ratio 0.5, no extrapolation, no control"
            yield Merging(name, config=_config(0.5, plain, level))


def _config(ratio: float, memory: Memory | None = None, level: float = 1.0) -> MergeConfig:
    # Memory has no use for blocks that stay unmerged, and so that all compare alike, none does.
    return MergeConfig(ratio=ratio, merge_below=level, memory=memory, skip=())


SDXL: Mapping[str, Any] = {
    "model": "sdxl",
    "real": RealSize("sdxl", height=1024),
    "call": {"guidance_scale": 7.5},
    "rows": sdxl_rows,
}
SECOND_PASS: Mapping[str, Any] = {
    **SDXL,
    "real": RealSize("sdxl", height=2048),
    "call": {"guidance_scale": 7.5, "strength": 0.4},
    "rows": second_pass_rows,
    "item": second_pass_item,
    "load": _image_to_image,
}
FLUX: Mapping[str, Any] = {
    "model": "flux",
    "real": RealSize("flux", height=1024),
    "call": {
        "true_cfg_scale": 2.0,
        "max_sequence_length": PROMPT_TOKENS,
        "negative_prompt": "",
    },
    "rows": flux_rows,
}
KONTEXT: Mapping[str, Any] = {
    "model": "kontext",
    "real": RealSize("flux", height=1024, references=1),
    "call": {"max_area": 128 * 128, "_auto_resize": False, "max_sequence_length": PROMPT_TOKENS},
    "rows": edit_rows,
    "item": edit_item,
    "load": kontext,
}
WAN: Mapping[str, Any] = {
    "model": "wan",
    "real": RealSize("wan2.1-1.3b", height=None),
    "call": {
        "guidance_scale": 5.0,
        "num_frames": FRAMES,
        "max_sequence_length": PROMPT_TOKENS,
    },
    "rows": wan_rows,
}
SCENARIOS = {
    "sdxl-25": Scenario(**SDXL, steps=25),
    "sdxl-25-dpm": Scenario(**SDXL, steps=25, scheduler="dpm"),
    "sdxl-4": Scenario(**SDXL, steps=4),
    "second-pass": Scenario(**SECOND_PASS, steps=10),
    "flux-25": Scenario(**FLUX, steps=25),
    "flux-4": Scenario(**FLUX, steps=4),
    "kontext-25": Scenario(**KONTEXT, steps=25),
    "video-25": Scenario(**WAN, steps=25),
}
