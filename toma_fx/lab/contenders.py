"""Contenders: each is a variant at a ratio, which draws one set of images at a known cost."""

import inspect
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn

import toma_fx
import toma_fx.families
import toma_fx.passes
import toma_fx.runtime
from toma_fx.arithmetic import Call, run_operations
from toma_fx.build import recipe_of_transformed
from toma_fx.calls import LastCall, to_meta
from toma_fx.config import MergeConfig
from toma_fx.model_border import given_in, grids_in
from toma_fx.transform import model_of, pipeline_models, transform
from toma_fx.variants import STEPS, UNTOUCHED, FewerSteps, Merging

Changed = Callable[[], AbstractContextManager[None]]
"""Within this context, a pipeline draws as a contender does."""


@dataclass(frozen=True, kw_only=True)
class Contender:
    """One row of the summary, one point of the plots."""

    variant: str
    ratio: float | None
    """``None`` where there is none: untouched, and a given number of steps."""
    steps: int
    arithmetic: float
    """Operations of the denoising model for an image, relative to those of the untouched model."""
    identity: str
    """Everything that decides the images; images of another identity are not reused."""
    changed: Changed

    @property
    def folder(self) -> str:
        """Name of the folder with its images; contenders with equally few steps share one."""
        if self.variant.partition("=")[0] == STEPS:
            return f"{STEPS}={self.steps}"
        name = re.sub(r"[^\w.=+-]+", "_", self.variant)
        return name if self.ratio is None else f"{name}_r{self.ratio:g}"


class Other(Protocol):
    """Another way to save arithmetic, such as those of ``benchmarks/rivals.py``."""

    @property
    def name(self) -> str:
        """Name in tables."""

    def contender(self, pipeline: Any, ratio: float, steps: int, call: Call) -> Contender:
        """The contender at one ratio; the arguments are those of `contend`."""


Variant = Merging | FewerSteps | Other


def contend(
    pipeline: Any, variants: Sequence[Variant], ratios: Sequence[float], steps: int, call: Call
) -> list[Contender]:
    """The untouched model, then every variant at every ratio.

    Args:
        pipeline: an untouched pipeline.
        variants: in the order of the tables.
        ratios: shares of tokens merged away.
        steps: of the untouched model.
        call: of the denoising model, for counting; see `first_call`.

    Raises:
        TomaError: when a variant does not take a ratio, or the model.
    """
    model = model_of(pipeline)
    merging = next((v for v in variants if isinstance(v, Merging)), None)
    found = [
        Contender(
            variant=UNTOUCHED,
            ratio=None,
            steps=steps,
            arithmetic=1.0,
            identity=UNTOUCHED,
            changed=nullcontext,
        )
    ]
    for variant in variants:
        follows = merging if isinstance(variant, FewerSteps) else variant
        for ratio in follows.ratios(ratios) if isinstance(follows, Merging) else ratios:
            if isinstance(variant, Merging):
                found.append(_merging(variant, pipeline, ratio, steps, call))
            elif not isinstance(variant, FewerSteps):
                found.append(variant.contender(pipeline, ratio, steps, call))
            elif variant.count is None:
                config = MergeConfig(ratio=ratio) if merging is None else merging.config(ratio)
                paid = _share_of_run(transform(model, config), pipeline, steps, call)
                found.append(_fewer(variant, ratio, affordable(steps, paid), steps))
        if isinstance(variant, FewerSteps) and variant.count is not None:
            found.append(_fewer(variant, None, variant.count, steps))
    return found


def affordable(steps: int, share: float) -> int:
    """The number of steps whose arithmetic is nearest to a share of all steps'.

    A share below 1 gives fewer steps than all, however few there are. All steps would draw the
    untouched image, at a higher cost than merging had.

    >>> affordable(25, 0.78), affordable(4, 0.95), affordable(4, 0.4), affordable(25, 1.1)
    (20, 3, 2, 25)
    """
    most = steps if share >= 1 else steps - 1
    return max(1, min(most, round(steps * share)))


def _merging(variant: Merging, pipeline: Any, ratio: float, steps: int, call: Call) -> Contender:
    config = variant.config(ratio)
    transformed = transform(model_of(pipeline), config)
    return Contender(
        variant=variant.name,
        ratio=ratio,
        steps=steps,
        arithmetic=_share_of_run(transformed, pipeline, steps, call),
        # The code comes first, so that a message about another identity does not cut it off.
        identity=f"code {_code()}, torch {torch.__version__}, {config!r}",
        changed=lambda: _in_place_of(pipeline, transformed),
    )


def _code() -> str:
    """Fingerprint of the code that may decide a merged image: the package without lab and bench."""
    packages = (toma_fx, toma_fx.families, toma_fx.passes, toma_fx.runtime)
    files = [file for each in packages for file in sorted(Path(each.__path__[0]).glob("*.py"))]
    return sha256(b"".join(file.read_bytes() for file in files)).hexdigest()[:16]


def _share_of_run(transformed: nn.Module, pipeline: Any, steps: int, call: Call) -> float:
    """Operations of a run, some of whose steps may not merge or not plan, relative to untouched."""
    named = inspect.signature(transformed.forward).bind(*call.args, **call.kwargs).arguments
    last = LastCall(to_meta(named), grids_in(transformed, named), given_in(transformed, named))
    recipe = recipe_of_transformed(transformed)
    counted = run_operations(transformed, recipe, last, steps, pipeline.scheduler)
    return counted.after[""] / counted.before[""]


def _fewer(variant: FewerSteps, ratio: float | None, taken: int, steps: int) -> Contender:
    return Contender(
        variant=variant.name,
        ratio=ratio,
        steps=taken,
        arithmetic=taken / steps,
        identity=f"{UNTOUCHED}, {taken} steps",
        changed=nullcontext,
    )


@contextmanager
def _in_place_of(pipeline: Any, transformed: nn.Module) -> Iterator[None]:
    original = model_of(pipeline)
    part = next(name for name, model in pipeline_models(pipeline).items() if model is original)
    setattr(pipeline, part, transformed)
    try:
        yield
    finally:
        setattr(pipeline, part, original)
