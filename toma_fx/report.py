"""What was rewritten, what it saves, and what was left alone and why."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any

from tabulate import tabulate
from torch import nn

from toma_fx.arithmetic import Call, count_parts
from toma_fx.config import MergeConfig
from toma_fx.inputs import random_inputs, weightless
from toma_fx.models import Rewrite
from toma_fx.runtime.regions import kept_tokens, region_size
from toma_fx.transform import model_of, rewrite_of
from toma_fx.treatment import Treatment, plan_options


@dataclass(frozen=True, kw_only=True)
class GroupReport:
    """Consecutive blocks of one list that were treated alike."""

    path: str
    """Path of the list."""
    blocks: tuple[int, int]
    """First and last index in it."""
    merged: tuple[str, ...]
    """What runs on merged tokens: ``("block",)``, components, or nothing."""
    skipped: str
    """Why nothing does; empty when something does."""
    tokens_before: int
    tokens_after: int
    flops_before: int
    flops_after: int


@dataclass(frozen=True, kw_only=True)
class Report:
    """What `transform` did to a model; ``print`` it.

    Arithmetic is counted by running both models on tensors without data: floating-point operations
    of matrix products, convolutions and attention, merging and planning included.
    """

    model: str
    image: str
    config: MergeConfig
    groups: tuple[GroupReport, ...]
    flops_before: int
    flops_after: int
    asked: float | None = None
    """The ``speedup`` that the ratio was chosen for."""

    @property
    def speedup(self) -> float:
        """How many times less the arithmetic of the model is: predicted, not measured time."""
        return self.flops_before / self.flops_after

    @property
    def saved(self) -> float:
        """Share of the model's arithmetic that is saved, in [0, 1)."""
        return _saved(self.flops_before, self.flops_after)

    def __str__(self) -> str:
        rows: list[tuple[Any, ...]] = [
            (
                f"{group.path}.{_range(*group.blocks)}",
                group.blocks[1] - group.blocks[0] + 1,
                _merged(group),
                _arrow(group.tokens_before, group.tokens_after),
                _arrow(_tera(group.flops_before), _tera(group.flops_after)),
                f"{_saved(group.flops_before, group.flops_after):.1%}",
            )
            for group in self.groups
        ]
        whole = _arrow(_tera(self.flops_before), _tera(self.flops_after))
        blocks = sum(row[1] for row in rows)
        rows.append(("whole model", blocks, "", "", whole, f"{self.saved:.1%}"))
        ratio = f"ratio {self.config.ratio}"
        if self.config.block_ratios:
            ratio = f"{ratio}, and {len(self.config.block_ratios)} blocks or groups with their own"
        headers = ("group", "blocks", "merged", "image tokens", "arithmetic, TFLOP", "saved")
        return (
            f"{self.model}, {self.image}, {ratio}\n"
            f"{tabulate(rows, headers, disable_numparse=True)}\n"
            f"plan: {_plan(self.config)}" + self._prediction()
        )

    def _prediction(self) -> str:
        if self.asked is None:
            return ""
        return (
            f"\nratio chosen for speedup={self.asked:g} at the model's native size; here the "
            f"predicted arithmetic is {self.speedup:.2f} times less, which is not measured time"
        )


def report(
    model: Any, *, height: int | None = None, width: int | None = None, batch: int = 1
) -> Report:
    """What `transform` did to a model and what it saves at an image size.

    Args:
        model: a transformed model, or a pipeline that holds one.
        height: of the image, in pixels; the model's native size when left out.
        width: of the image, in pixels; like ``height`` when left out.
        batch: images (with guidance, a UNet sees two for each).

    Raises:
        ModelError: when the model was not transformed, or the size is impossible.
    """
    model = model_of(model)
    rewrite = rewrite_of(model)
    paths = list(rewrite.treatments)
    untouched = weightless(rewrite.original)
    inputs = random_inputs(untouched, height=height, width=width, batch=batch)
    image = inputs["sample"] if "sample" in inputs else inputs["hidden_states"]
    call = Call((), inputs)
    tokens = _note_tokens(untouched, paths)
    before = count_parts(untouched, call, ["", *paths])
    after = count_parts(model, call, ["", *paths])
    groups = []
    for parent, treatment, members in _alike(model, rewrite):
        given = tokens[members[0]]
        groups.append(
            GroupReport(
                path=parent,
                blocks=(int(members[0].rpartition(".")[2]), int(members[-1].rpartition(".")[2])),
                merged=treatment.components,
                skipped=treatment.skipped,
                tokens_before=given,
                tokens_after=tokens_after(given, rewrite.config, treatment.ratio)
                if treatment.role
                else given,
                flops_before=sum(before[path] for path in members),
                flops_after=sum(after[path] for path in members),
            )
        )
    return Report(
        model=type(model).__name__,
        image=f"latents {' x '.join(map(str, image.shape))}",
        config=rewrite.config,
        groups=tuple(groups),
        flops_before=before[""],
        flops_after=after[""],
        asked=rewrite.speedup,
    )


def tokens_after(tokens: int, config: MergeConfig, ratio: float) -> int:
    """Image tokens that are left of ``tokens`` in a block that merges with a ratio."""
    size = region_size(tokens, plan_options(config, ratio).region_tokens)
    return tokens // size * kept_tokens(size, ratio)


def _alike(model: nn.Module, rewrite: Rewrite) -> Iterator[tuple[str, Treatment, list[str]]]:
    """Consecutive blocks of a list that were treated alike, and the list's path."""

    def treatment(path: str) -> tuple[str, Treatment]:
        return path.rpartition(".")[0], replace(rewrite.treatments[path], role=None)

    in_order = [path for path, _ in model.named_modules() if path in rewrite.treatments]
    for (parent, _), members in groupby(in_order, treatment):
        paths = list(members)
        yield parent, rewrite.treatments[paths[0]], paths


def _note_tokens(model: nn.Module, paths: list[str]) -> dict[str, int]:
    """Image tokens of each block, by its path: filled by the next call of the model."""
    tokens: dict[str, int] = {}

    def note(path: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            tokens[path] = (args[0] if args else kwargs["hidden_states"]).shape[1]

        return hook

    for path in paths:
        model.get_submodule(path).register_forward_pre_hook(note(path), with_kwargs=True)
    return tokens


def _plan(config: MergeConfig) -> str:
    where = (
        config.region if config.region == "image" else f"{config.region} of {config.region_tokens}"
    )
    times = config.schedule
    return (
        f"{config.selector} in each {where}, weights over the {config.merge_over} at temperature "
        f"{config.temperature:g}, unmerge by {config.unmerge}, one for each {config.share}, "
        f"selected every {_steps(times.select_every)} and weighed every {_steps(times.weigh_every)}"
        f"{_when(config)}"
    )


def _when(config: MergeConfig) -> str:
    below = config.merge_below
    return "" if below == 1 else f"\nmerges below a noise level of {below:g}, timestep over 1000"


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
    return f"{flops / 1e12:.3g}"


def _saved(before: int, after: int) -> float:
    return 1 - after / before if before else 0.0
