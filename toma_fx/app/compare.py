"""One image, drawn by the untouched and by the transformed pipeline, with the figures of both.

Any number of sessions may ask at the same time. One lock lets them draw one after the other, so
that no session sees the transformed model of another.
"""

import threading
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from toma_fx.app.kept import Kept, Planned, planning
from toma_fx.checkpoints import load_pipeline
from toma_fx.config import MergeConfig
from toma_fx.errors import ConfigError, ModelError, TomaWarning
from toma_fx.images import pixels, psnr
from toma_fx.inputs import draws_videos
from toma_fx.lab.compare import DIFFERENCE_GAIN
from toma_fx.lab.draw import Task, default_dtype, draw
from toma_fx.lab.prompts import Prompt
from toma_fx.lab.small_models import own_settings
from toma_fx.option_values import count
from toma_fx.report import Report, report
from toma_fx.schedule import Memory
from toma_fx.transform import model_of, while_transformed

Tell = Callable[[str, float], None]
"""A function that takes the current work in words, and the share that is done, in [0, 1]."""

WARM_UP_STEPS = 2
WAIT_SECONDS = 0.1
"""A waiting session looks this often whether it was cancelled."""


class CancelledError(Exception):
    """The session that asked for a comparison cancelled it."""


@dataclass(frozen=True, kw_only=True)
class Wish:
    """The image and the settings that a session asks for.

    Raises:
        ConfigError: when a field holds a value that it cannot take, or the options do not combine.
    """

    model: str
    """Folder or hub name of a diffusers pipeline."""
    prompt: str
    seed: int = 0
    steps: int = 25
    """Denoising steps."""
    ratio: float = 0.5
    merge_below: float = 1.0
    memory: int = 0
    """Steps from one full step to the next; 0 for no memory."""
    theta: float = 0.0
    """`toma_fx.Memory.theta`, where there is a memory. With 0, no block stays out (``skip=()``),
    since nothing merges between full steps."""
    size: int | None = None
    """Pixels along a side; None for the pipeline's own."""
    config: MergeConfig = field(init=False)

    def __post_init__(self) -> None:
        if not isinstance(self.prompt, str) or not self.prompt.strip():
            raise ConfigError(f"prompt={self.prompt!r} is empty; say what to draw")
        if not isinstance(self.seed, int) or not 0 <= self.seed < 2**63:
            raise ConfigError(f"seed={self.seed!r} must be a whole number from 0 to 2**63 - 1")
        count("steps", self.steps, 25)
        if self.size is not None:
            count("size", self.size, 512)
        memory = Memory(every=self.memory, theta=self.theta) if self.memory else None
        skip = () if memory and memory.theta == 0 else None
        config = MergeConfig(
            ratio=self.ratio, merge_below=self.merge_below, memory=memory, skip=skip
        )
        object.__setattr__(self, "config", config)

    def task(self, dtype: str) -> Task:
        """The task for `toma_fx.lab.draw`, with the settings that a small model's card names."""
        prompts = (Prompt(text=self.prompt),)
        settings = {**own_settings(self.model)}
        if self.size is not None:
            settings |= {"height": self.size, "width": self.size}
        return Task(model=self.model, prompts=prompts, steps=self.steps, dtype=dtype, **settings)

    @property
    def of_untouched(self) -> tuple[Any, ...]:
        """All that the untouched image depends on."""
        return self.model, self.prompt, self.seed, self.steps, self.size


@dataclass(frozen=True, kw_only=True)
class Untouched:
    """The image of the untouched pipeline; it is the same for every ratio."""

    of: tuple[Any, ...]
    """`Wish.of_untouched` of its wish."""
    image: Image.Image
    seconds: float
    """Seconds from prompt to pixels."""


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Both images of a wish."""

    wish: Wish
    dtype: str
    device: str
    untouched: Untouched
    reused: bool
    """Whether the untouched image and its time come from an earlier comparison."""
    merged: Image.Image
    seconds: float
    """Seconds of the merged image, from prompt to pixels."""
    rewriting_seconds: float
    """Seconds that `toma_fx.transform` took."""
    report: Report
    kept: Kept | None
    warned: tuple[str, ...]
    """The warnings of toma_fx."""

    @property
    def psnr(self) -> float:
        """PSNR of the merged image against the untouched one, in dB; infinite for equal images."""
        return psnr(pixels(self.merged), pixels(self.untouched.image))

    def difference(self) -> NDArray[np.uint8]:
        """``(H, W, 3)``: how far the pixels are apart, `DIFFERENCE_GAIN` times as bright."""
        images = (self.untouched.image, self.merged)
        before, after = (np.asarray(each.convert("RGB"), np.int16) for each in images)
        bright: NDArray[np.int16] = DIFFERENCE_GAIN * np.abs(after - before)
        return bright.clip(max=255).astype(np.uint8)


class Studio:
    """The pipelines, each loaded at its first use, and the lock around them.

    Args:
        models: folders or hub names of diffusers pipelines that draw images.
        dtype: dtype of the weights; when left out, bfloat16 on a GPU and float32 without one.

    Raises:
        ConfigError: when there is no model.
    """

    def __init__(self, models: Sequence[str], *, dtype: str | None = None) -> None:
        if not models:
            raise ConfigError("models=() must name at least one diffusers pipeline")
        self.models = tuple(models)
        self.dtype = default_dtype() if dtype is None else dtype
        self._pipelines: dict[str, Any] = {}
        self._lock = threading.Lock()

    def compare(
        self,
        wish: Wish,
        known: Untouched | None = None,
        *,
        tell: Tell = lambda words, share: None,
        cancelled: threading.Event | None = None,
    ) -> Comparison:
        """Draw the image of a wish untouched, then merged, and leave the pipeline untouched.

        Args:
            wish: the image and its settings.
            known: an earlier untouched image, used again where it is the same image.
            tell: is called at every step, and while another session draws.
            cancelled: once set, it ends the drawing before the next step.

        Raises:
            CancelledError: when the drawing was cancelled.
            TomaError: when the model or an option cannot be used.
        """
        cancelled = threading.Event() if cancelled is None else cancelled
        if wish.model not in self.models:
            raise ConfigError(f"model={wish.model!r} must be one of {', '.join(self.models)}")
        with self._turn(tell, cancelled):
            pipeline = self._pipeline(wish, tell)
            run = _Run(pipeline, wish, wish.task(self.dtype), tell, cancelled)
            reused = known is not None and known.of == wish.of_untouched
            if known is None or not reused:
                run.parts = 2
                known = Untouched(of=wish.of_untouched, **run.draw("untouched"))
            return Comparison(
                wish=wish,
                dtype=self.dtype,
                device=pipeline.device.type,
                untouched=known,
                reused=reused,
                **run.merged(),
            )

    @contextmanager
    def _turn(self, tell: Tell, cancelled: threading.Event) -> Iterator[None]:
        if not self._lock.acquire(blocking=False):
            tell("waiting: the model draws for another session", 0)
            while not self._lock.acquire(timeout=WAIT_SECONDS):
                if cancelled.is_set():
                    raise CancelledError
        try:
            yield
        finally:
            self._lock.release()

    def _pipeline(self, wish: Wish, tell: Tell) -> Any:
        pipeline = self._pipelines.get(wish.model)
        if pipeline is None:
            tell(f"loading {wish.model} and warming it up", 0)
            pipeline = load_pipeline(wish.model, dtype=self.dtype)
            if draws_videos(model_of(pipeline)):
                raise ModelError(
                    f"{wish.model!r} draws videos, and the page compares images; give --model a "
                    "pipeline that draws images"
                )
            # The first calls of a process take longer, and would count as times of the method.
            task = wish.task(self.dtype)
            draw(pipeline, task, task.prompts[0], 0, steps=WARM_UP_STEPS)
            with _transformed(pipeline, MergeConfig(ratio=0.5)):
                draw(pipeline, task, task.prompts[0], 0, steps=WARM_UP_STEPS)
            self._pipelines[wish.model] = pipeline
        return pipeline


@contextmanager
def _transformed(pipeline: Any, config: MergeConfig) -> Iterator[list[str]]:
    """Transform a pipeline within this context; yields the list of warnings of toma_fx in it."""
    said: list[str] = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", TomaWarning)
        try:
            with while_transformed(pipeline, config):
                yield said
        finally:
            texts = [str(each.message) for each in caught if each.category is TomaWarning]
            said.extend(dict.fromkeys(texts))
    for each in caught:
        if each.category is not TomaWarning:
            warnings.warn_explicit(each.message, each.category, each.filename, each.lineno)


class _Run:
    """The work of one comparison on the pipeline, reported step by step."""

    def __init__(
        self, pipeline: Any, wish: Wish, task: Task, tell: Tell, cancelled: threading.Event
    ) -> None:
        self.pipeline, self.wish, self.task = pipeline, wish, task
        self.tell, self.cancelled = tell, cancelled
        self.parts = 1
        """Images to draw."""
        self.done = 0
        """Images that have been drawn."""

    def draw(self, name: str, planned: Planned | None = None) -> dict[str, Any]:
        """Draw the next image; returns it with its seconds."""
        steps = self.wish.steps

        def after_step(_: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
            if self.cancelled.is_set():
                raise CancelledError
            if planned is not None:
                planned.step = step + 2
            share = (self.done + (step + 1) / steps) / self.parts
            self.tell(f"{name} image: step {step + 1} of {steps}", share)
            return tensors

        if self.cancelled.is_set():
            raise CancelledError
        self.tell(f"{name} image: step 0 of {steps}", self.done / self.parts)
        arguments = {**self.task.arguments, "callback_on_step_end": after_step}
        task = Task(**{**vars(self.task), "arguments": arguments})
        image, seconds = draw(self.pipeline, task, task.prompts[0], self.wish.seed)
        self.done += 1
        return {"image": image, "seconds": seconds}

    def merged(self) -> dict[str, Any]:
        """Draw the merged image; returns the fields of a `Comparison` about it."""
        start = time.perf_counter()
        with _transformed(self.pipeline, self.wish.config) as warned:
            rewriting = time.perf_counter() - start
            with planning(model_of(self.pipeline)) as planned:
                drawn = self.draw("merged", planned)
            image: Image.Image = drawn["image"]
            told = report(self.pipeline, steps=self.wish.steps)
        return {
            "merged": image,
            "seconds": drawn["seconds"],
            "rewriting_seconds": rewriting,
            "report": told,
            "kept": planned.kept(image.height, image.width),
            "warned": tuple(warned),
        }
