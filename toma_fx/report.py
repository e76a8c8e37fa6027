"""A report of the blocks that merge, what they save, and why other blocks do not merge."""

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from itertools import groupby
from typing import Any

from toma_fx.arithmetic import run_operations
from toma_fx.build import recipe_of_transformed
from toma_fx.calls import LastCall, to_meta
from toma_fx.config import MergeConfig
from toma_fx.grids import sequence_in
from toma_fx.inputs import random_inputs, weightless
from toma_fx.model_border import given_in, grids_in
from toma_fx.recipe import BlockRecipe, Recipe, plan_options
from toma_fx.references import reference_grids, tokens_left
from toma_fx.runtime import regions
from toma_fx.runtime.plan import REMEMBER, UNTOUCHED
from toma_fx.tables import WIDTH, fitted, wrapped
from toma_fx.transform import model_of

STEPS = 25
"""Number of steps of the denoising run that a report assumes by default."""
PAYING = 1.05
"""A memory whose run needs more than 1 / PAYING of the arithmetic is not worth its bytes."""
ADVICE = "; to save more, a memory needs a high ratio, such as 0.9"


@dataclass(frozen=True, kw_only=True)
class GroupReport:
    """Consecutive blocks of one list that were treated in the same way."""

    path: str
    """Module path of the list."""
    blocks: tuple[int, int]
    """Indices of the first and last block in the list."""
    merged: tuple[str, ...]
    """Parts that run on merged tokens: ``("block",)``, components, or empty."""
    skipped: str
    """Reason why nothing merges; empty if something does."""
    tokens_before: int
    tokens_after: int
    flops_before: int
    flops_after: int


@dataclass(frozen=True, kw_only=True)
class Report:
    """Result of `report`; ``print`` it.

    Arithmetic is the number of floating-point operations of matrix products, convolutions and
    attention, including merging and planning. It is counted by running both models on tensors
    without data. It is the average per call over a denoising run, because some calls may not merge
    or not plan.
    """

    model: str
    image: str
    config: MergeConfig
    steps: int
    """Number of steps of the denoising run."""
    shares: Mapping[str, float]
    """Share of the run's calls for each variant of the blocks."""
    groups: tuple[GroupReport, ...]
    flops_before: int
    flops_after: int
    frames: int = 1
    """Number of latent frames; 1 for an image."""
    unmerged_frames: int = 0
    """Number of frames that stay unmerged because they are given, or may be given."""
    references: tuple[tuple[int, int], ...] | None = None
    """Tokens of each reference before and after, if only references merge."""
    kept_bytes: int = 0
    """Bytes of the plans and memories that a run keeps from step to step."""
    theta: float | None = None
    """Share of the correction that a step between full steps adds, with memory."""
    asked: float | None = None
    """The ``speedup`` for which the ratio was chosen, if any."""

    @property
    def speedup(self) -> float:
        """Factor by which the model's arithmetic shrinks: a prediction, not a measured time."""
        return self.flops_before / self.flops_after

    @property
    def saved(self) -> float:
        """Share of the model's arithmetic that is saved, in [0, 1); higher is better."""
        return _saved(self.flops_before, self.flops_after)

    def __str__(self) -> str:
        return self.text(None)

    def text(self, width: int | None = WIDTH) -> str:
        """The report for people.

        Args:
            width: columns of the screen, beyond which lines are broken; None breaks none.
        """
        rows: list[tuple[Any, ...]] = [
            (
                f"{group.path}.{_range(*group.blocks)}",
                "extrapolated" if self._extrapolates and not group.skipped else _merged(group),
                _arrow(group.tokens_before, group.tokens_after),
                _arrow(_tera(group.flops_before), _tera(group.flops_after)),
                f"{_saved(group.flops_before, group.flops_after):.1%}",
            )
            for group in self.groups
        ]
        whole = _arrow(_tera(self.flops_before), _tera(self.flops_after))
        blocks = sum(last - first + 1 for first, last in (each.blocks for each in self.groups))
        rows.append((f"whole model, {blocks} blocks", "", "", whole, f"{self.saved:.1%}"))
        ratio = "nothing merges" if self._extrapolates else f"ratio {self.config.ratio}"
        if self.config.block_ratios and not self._extrapolates:
            ratio = f"{ratio}, and {len(self.config.block_ratios)} blocks or groups with their own"
        headers = ("blocks", "merged", "tokens", "TFLOP", "saved")
        lines = (
            f"{self.model}, {self.image}, {ratio}",
            fitted(headers, rows, width),
            "" if self._extrapolates else f"plan: {_plan(self.config)}",
            self._of_references(),
            self._video(),
            self._when(),
            self._kept(),
            self._prediction(),
        )
        screen = [line if "\n" in line else wrapped(line, width) for line in lines if line]
        return "\n".join(screen)

    @property
    def _extrapolates(self) -> bool:
        return self.theta == 0

    def as_dict(self) -> dict[str, Any]:
        """Every field, and what follows from them, as JSON takes it."""
        return {**asdict(self), "saved": self.saved, "speedup": self.speedup}

    def _of_references(self) -> str:
        if self.references is None:
            return ""
        each = ", ".join(_arrow(*pair) for pair in self.references)
        if not each:
            return "references: none in this call, which runs untouched"
        return f"references: {each} tokens, merged at the model's border; the image is not"

    def _video(self) -> str:
        if self.frames == 1:
            return ""
        through = given = ""
        if self.config.region == "tile":
            through = f", tiles reach through {self.config.region_frames}, the first is apart"
        if self.unmerged_frames:
            given = f"; {self.unmerged_frames} given, or not known to be drawn, and never merged"
        return f"video: {self.frames} latent frames{through}{given}"

    def _when(self) -> str:
        below = self.config.merge_below
        if below == 1:
            return ""
        lower = round((1 - self.shares[UNTOUCHED]) * self.steps)
        what = "extrapolates" if self._extrapolates else "merges"
        averages = "; arithmetic and savings are averages of a run"
        return (
            f"{what} below a noise level of {below:g}: {lower} of {self.steps} steps"
            f"{'' if self.kept_bytes else averages}"
        )

    def _kept(self) -> str:
        if not self.kept_bytes:
            return ""
        size = f"{self.kept_bytes / 2**20:,.0f} MiB"
        if self.config.memory is None:
            return f"a run keeps {size} of plans"
        full = round(self.shares[REMEMBER] * self.steps)
        between = f"add {self.theta:g} of the correction" if self.theta else "only extrapolate"
        advice = "" if self.speedup > PAYING else ADVICE
        return (
            f"memory: {full} of {self.steps} steps are full, those between {between}; a run keeps "
            f"{size}; arithmetic and savings are averages of a run{advice}"
        )

    def _prediction(self) -> str:
        if self.asked is None:
            return ""
        return (
            f"ratio chosen for speedup={self.asked:g} at the model's native size; here the "
            f"predicted arithmetic is {self.speedup:.2f} times less, which is not measured time"
        )


def report(
    model: Any,
    *,
    height: int | None = None,
    width: int | None = None,
    frames: int | None = None,
    batch: int = 1,
    steps: int = STEPS,
    inputs: Mapping[str, Any] | None = None,
) -> Report:
    """Report how `transform` changed a model and what that saves.

    The report is about one call, taken from the first available source: ``inputs``; a made-up call
    of the given size; the model's last real call; a made-up call at the model's native size.

    Args:
        model: a transformed model, or a pipeline that holds one; it may be compiled or wrapped.
        height: image height in pixels.
        width: image width in pixels; ``height`` if omitted.
        frames: number of video frames.
        batch: number of images (with guidance, a UNet runs two samples per image).
        steps: number of denoising steps over which arithmetic is averaged.
        inputs: keyword arguments of a call.

    Raises:
        ModelError: when the model was not transformed, when the size is impossible, or when no
            fitting call can be made up; the message then asks for ``inputs``.
    """
    model = model_of(model)
    recipe = recipe_of_transformed(model)
    last = getattr(model, "toma_last_call", None)
    sized = any(size is not None for size in (height, width, frames)) or batch != 1
    if inputs is not None:
        call = LastCall(to_meta(inputs), grids_in(model, inputs), given_in(model, inputs))
    elif last is not None and not sized:
        call = last
    else:
        size = {"height": height, "width": width, "frames": frames}
        call = _made_up(model, recipe, random_inputs(weightless(model), batch=batch, **size))
    scheduler = getattr(getattr(model, "toma_reader", None), "scheduler", None)
    counted = run_operations(model, recipe, call, steps, scheduler)
    image = recipe.family.image(call.arguments)
    sequence = sequence_in(model, call.arguments, call.given)
    references = _references(model, recipe, call)
    fewer = sum(before - after for before, after in references or ())
    unmerged, grids = 0, call.grids
    if sequence is not None:
        unmerged, grids = sequence.unmerged, sequence.segments
    whole = image.shape[1] if grids is None else unmerged + sum(grids)
    groups = []
    for parent, members in _alike(recipe):
        block = members[0]
        given = whole if block.row.flow.joint else counted.tokens[block.path]
        # Some blocks do not run in every call, such as those for reference images.
        left = tokens_after(given, recipe.config, block.ratio, grids, unmerged) if given else 0
        groups.append(
            GroupReport(
                path=parent,
                blocks=tuple(int(m.path.rpartition(".")[2]) for m in (block, members[-1])),  # type: ignore[arg-type]
                merged=block.components,
                skipped=block.unmerged_because,
                tokens_before=given,
                tokens_after=left if block.role and recipe.makes_plans else given - fewer,
                flops_before=sum(counted.before[m.path] for m in members),
                flops_after=sum(counted.after[m.path] for m in members),
            )
        )
    return Report(
        model=type(model).__name__,
        image=f"latents {' x '.join(map(str, image.shape))}",
        config=recipe.config,
        steps=steps,
        shares=counted.shares,
        groups=tuple(groups),
        flops_before=counted.before[""],
        flops_after=counted.after[""],
        frames=1 if sequence is None else sequence.grids[0].frames,
        unmerged_frames=0 if sequence is None else len(sequence.given_frames),
        references=references,
        kept_bytes=counted.kept_bytes,
        theta=recipe.theta if recipe.config.memory is not None else None,
        asked=recipe.speedup,
    )


def _made_up(model: Any, recipe: Recipe, call: dict[str, Any]) -> LastCall:
    """Return the made-up call, with an image-sized reference if only references merge."""
    family = recipe.family
    if family.references is None or not recipe.merges_references:
        return LastCall(call, None)
    edit = family.references.example(call)
    shapes_tell = reference_grids(model, edit)
    drawn = family.image(call).shape[1]
    return LastCall(edit, shapes_tell or (drawn, drawn))


def tokens_after(
    tokens: int,
    config: MergeConfig,
    ratio: float,
    grids: tuple[int, ...] | None = None,
    unmerged: int = 0,
) -> int:
    """Return how many of ``tokens`` image tokens are left in a block that merges.

    Args:
        tokens: number of tokens that enter the block.
        config: the model's options.
        ratio: the block's ratio.
        grids: tokens of each grid in the sequence.
        unmerged: number of tokens before the grids, which stay unmerged.
    """
    known = grids if grids is not None and unmerged + sum(grids) == tokens else (tokens,)
    return (
        tokens
        - sum(known)
        + regions.kept(regions.layout(known, plan_options(config, ratio).region_tokens, ratio))
    )


def _alike(recipe: Recipe) -> Iterator[tuple[str, list[BlockRecipe]]]:
    """Yield the path of each list with its consecutive blocks that were treated alike."""

    def kind(block: BlockRecipe) -> tuple[object, ...]:
        parent = block.path.rpartition(".")[0]
        return parent, block.ratio, block.components, block.unmerged_because

    for (parent, *_), members in groupby(recipe.blocks, kind):
        yield str(parent), list(members)


def _references(model: Any, recipe: Recipe, call: LastCall) -> tuple[tuple[int, int], ...] | None:
    """Return the tokens of each reference before and after, or None if all image tokens merge."""
    if not recipe.merges_references:
        return None
    grids = reference_grids(model, call.arguments) or call.grids or ()
    return tuple(zip(grids[1:], tokens_left(grids, recipe.config.ratio), strict=True))


def _plan(config: MergeConfig) -> str:
    if config.tokens == "references":
        return (
            f"{config.selector} in each reference, weights at temperature {config.temperature:g}, "
            "once for an image, never unmerged"
        )
    where = (
        config.region if config.region == "image" else f"{config.region} of {config.region_tokens}"
    )
    times = config.schedule
    when = (
        f"selected every {_steps(times.select_every)} and weighed every {_steps(times.weigh_every)}"
        if config.memory is None
        else "made at full steps"
    )
    return (
        f"{config.selector} in each {where}, weights over the {config.merge_over} at temperature "
        f"{config.temperature:g}, unmerge by {config.unmerge}, one for each {config.share}, "
        f"{when}"
    )


def _merged(group: GroupReport) -> str:
    if not group.merged:
        return f"nothing: {group.skipped}"
    return "whole block" if group.merged == ("block",) else ", ".join(group.merged)


def _steps(count: int) -> str:
    return "step" if count == 1 else f"{count} steps"


def _range(first: int, last: int) -> str:
    return str(first) if first == last else f"{first}-{last}"


def _arrow(before: Any, after: Any) -> str:
    return str(before) if before == after else f"{before} -> {after}"


def _tera(flops: int) -> str:
    tera = flops / 1e12
    return f"{tera:,.0f}" if tera >= 1000 else f"{tera:.3g}"


def _saved(before: int, after: int) -> float:
    return 1 - after / before if before else 0.0
