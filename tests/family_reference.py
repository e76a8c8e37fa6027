"""The method written a second time for FLUX.2, Qwen-Image, Z-Image and Wan: plain, slow, obvious.

It shares no code with ``toma_fx``. Tokens stay in the order in which diffusers has them, regions
are lists of their places, and each sample runs alone: diffusers' own block on merged tokens, with
the destinations' rows of whatever belongs to a token picked by plain indexing.

Shapes: B batch, N image tokens, S tokens of a sequence, which may hold text too, K tokens that are
left of it, D width, n tokens of a region, m destinations of a region.
"""

import copy
import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from tests import reference
from tests.reference import ReferenceOptions, Regions, cosine_similarity, hilbert_index

Grid = tuple[int, int, int]
"""Frames, rows and columns of tokens."""


@dataclass(frozen=True)
class Picture:
    """What the image tokens of a call show."""

    grids: Sequence[Grid]
    """The output's first, then those of references."""
    given: Sequence[int] = ()
    """Frames of the first grid that are never merged, in their order."""

    @property
    def tokens(self) -> int:
        return sum(math.prod(grid) for grid in self.grids)

    @property
    def unmerged(self) -> int:
        """Tokens that are never merged."""
        return len(self.given) * math.prod(self.grids[0][1:])


def cut(picture: Picture, options: ReferenceOptions, frames: int = 4) -> tuple[Regions, int]:
    """The regions of image tokens, and how many destinations each has.

    A region holds neighbours of one segment. The output is a segment, and so is each reference. In
    tiles, a video is several: its first frame, and then each chunk of ``frames`` frames.
    """
    size, ratio = options.region_tokens, options.ratio
    segments = _segments(picture, options.region, frames)
    counts = [len(segment) for segment in segments]
    if options.region == "image":
        return [list(chain(*segments))], _round((1 - ratio) * sum(counts))
    numbers, destinations = _numbers(counts, size, ratio)
    regions = []
    for segment, number in zip(segments, numbers, strict=True):
        edges = [index * len(segment) // number for index in range(number + 1)]
        regions += [segment[edges[i] : edges[i + 1]] for i in range(number)]
    return regions, destinations


def _segments(picture: Picture, region: str, frames: int) -> list[list[int]]:
    before, segments = 0, []
    for place, (count, rows, columns) in enumerate(picture.grids):
        given = picture.given if place == 0 else ()
        pieces = [range(count)]
        if region == "tile":
            first = 1
            while range(first) != range(count) and list(given[: first + 1]) == [*range(first + 1)]:
                first += 1
            chunks = [range(i, min(i + frames, count)) for i in range(first, count, frames)]
            pieces = [range(first), *chunks]
        for piece in pieces:
            drawn = [frame for frame in piece if frame not in given]
            cells = [(f, y, x) for f in drawn for y in range(rows) for x in range(columns)]
            if region == "tile":
                cells.sort(key=lambda cell: (hilbert_index(cell[2], cell[1]), cell[0]))
            if cells:
                segments.append([before + (f * rows + y) * columns + x for f, y, x in cells])
        before += count * rows * columns
    return segments


def _numbers(counts: list[int], size: int, ratio: float) -> tuple[list[int], int]:
    """How many regions each segment is cut into, and how many destinations a region has."""
    kept = _round((1 - ratio) * size)
    # So many regions that one token less in some of them matters little.
    many = max(17, math.ceil(100 * kept / (3 * size))) * size
    if all(count % size == 0 or count >= many for count in counts):
        return [math.ceil(count / size) for count in counts], kept
    if len(counts) == 1:
        divisors = [d for d in range(1, counts[0] + 1) if counts[0] % d == 0]
        nearest = min(divisors, key=lambda d: max(d / size, size / d))
        if size <= 2 * nearest and nearest <= 2 * size:
            return [counts[0] // nearest], _round((1 - ratio) * nearest)
    numbers = [_round(count / size) for count in counts]
    largest = max(math.ceil(count / n) for count, n in zip(counts, numbers, strict=True))
    return numbers, min(largest, _round((1 - ratio) * sum(counts) / sum(numbers)))


def _round(number: float) -> int:
    return max(1, math.floor(number + 0.5))


@dataclass(frozen=True)
class Plan:
    """What becomes of one sample's tokens; those of no region stay as they are."""

    kept_K: Tensor
    merge_KS: Tensor
    unmerge_SK: Tensor


def make_plan(
    x_SD: Tensor, before: int, regions: Regions, destinations: int, options: ReferenceOptions
) -> Plan:
    """Selects destinations and weighs every token's share in them (Eq. 6, Eq. 7).

    Args:
        x_SD: a sample's tokens.
        before: how many stand before the image's.
        regions: places of image tokens.
        destinations: of each region. One of fewer tokens takes its last token again.
        options: of the method.
    """
    places = [[before + index for index in region] for region in regions]
    picks = []
    for region in places:
        few = min(destinations, len(region))
        chosen = [region[i] for i in reference.select(x_SD[region], few)]
        picks.append(chosen + [region[-1]] * (destinations - few))
    pairs = list(zip(picks, places, strict=True))
    if options.merge_over == "image":
        pairs = [(list(chain(*picks)), list(chain(*places)))]
    behind = max(map(max, places)) + 1
    ahead = [place for place in range(behind) if place not in set(chain(*places))]
    after = list(range(behind, len(x_SD)))
    kept = [*ahead, *chain(*picks), *after]
    merge_KS, unmerge_SK = torch.zeros(len(kept), len(x_SD)), torch.zeros(len(x_SD), len(kept))
    for row, place in [*enumerate(ahead), *enumerate(after, len(kept) - len(after))]:
        merge_KS[row, place] = unmerge_SK[place, row] = 1
    row = len(ahead)
    for chosen, sources in pairs:
        logits_nm = cosine_similarity(x_SD[sources], x_SD[chosen]) / options.temperature
        weight_nm = logits_nm.softmax(dim=1)
        mean_mn = (weight_nm / weight_nm.sum(dim=0)).T
        back_nm = torch.linalg.pinv(mean_mn) if options.unmerge == "pinv" else weight_nm
        rows = torch.arange(row, row + len(chosen))
        merge_KS[rows[:, None], torch.tensor(sources)] = mean_mn
        unmerge_SK[torch.tensor(sources)[:, None], rows] = back_nm
        row += len(chosen)
    return Plan(torch.tensor(kept), merge_KS.to(x_SD.dtype), unmerge_SK.to(x_SD.dtype))


@dataclass
class Group:
    """The blocks that share plans, one for each sample: those of one list."""

    picture: Picture
    options: ReferenceOptions
    frames: int
    plans: list[Plan] = field(default_factory=list)

    def plans_for(self, x_BSD: Tensor, text_first: bool) -> list[Plan]:
        """The plans in force, made of ``x_BSD`` if there are none."""
        if not self.plans:
            regions, destinations = cut(self.picture, self.options, self.frames)
            before = x_BSD.shape[1] - self.picture.tokens if text_first else 0
            self.plans = [
                make_plan(x_SD, before, regions, destinations, self.options) for x_SD in x_BSD
            ]
        return self.plans


Pick = Callable[[str, Any, int, Tensor, int], Any]
"""Takes an argument's name and value, the sample, the tokens that are left and the batch; gives
what the sample alone is called with."""


def pick_sample(name: str, value: Any, sample: int, kept_K: Tensor, batch: int) -> Any:
    """The sample's own, of what has no row for a token."""
    if not isinstance(value, Tensor):
        return value
    assert value.shape[0] == batch, f"{name} of shape {tuple(value.shape)} in a batch of {batch}"
    return value[sample : sample + 1]


def pick_flux2(name: str, value: Any, sample: int, kept_K: Tensor, batch: int, text: int) -> Any:
    """One rotary table for all samples, text before image."""
    if name != "image_rotary_emb":
        return pick_sample(name, value, sample, kept_K, batch)
    return tuple(torch.cat([table[:text], table[text:][kept_K]]) for table in value)


def pick_qwen(name: str, value: Any, sample: int, kept_K: Tensor, batch: int) -> Any:
    """A rotary table for the image and one for the text; a time for references, too."""
    if name == "image_rotary_emb":
        image, text = value
        return image[kept_K], text
    if name == "temb":
        return value[sample::batch]  # behind all samples' times may be those of their references
    own = pick_sample(name, value, sample, kept_K, batch)
    return own[:, kept_K] if name == "modulate_index" and own is not None else own


def pick_z_image(name: str, value: Any, sample: int, kept_K: Tensor, batch: int) -> Any:
    """Rotary values and a mask of keys, with a row for each token of each sample."""
    own = pick_sample(name, value, sample, kept_K, batch)
    per_token = name in ("freqs_cis", "attn_mask", "attention_mask") and own is not None
    return own[:, kept_K] if per_token else own


def pick_wan(name: str, value: Any, sample: int, kept_K: Tensor, batch: int) -> Any:
    """Rotary tables for all samples; a time for each sample or for each token."""
    if name == "rotary_emb" and value is not None:
        return tuple(table[:, kept_K] for table in value)
    own = pick_sample(name, value, sample, kept_K, batch)
    return own[:, kept_K] if name == "temb" and own.ndim == 4 else own


@dataclass(frozen=True, kw_only=True)
class Part:
    """A module that runs on merged tokens: a block, or a layer in it."""

    pick: Pick = pick_sample
    tokens: str = "hidden_states"
    output: int | None = None
    """Which output is the tokens, where there are several."""
    text_first: bool = False
    """Whether text stands before the image among the tokens."""
    also: tuple[str, ...] = ()
    """Further tokens that are merged alike."""
    spread: tuple[int, ...] = ()
    """Outputs that are further tokens."""


_FLUX2 = Part(pick=partial(pick_flux2, text=7), output=1)  # tests.tiny.TEXT_TOKENS
_FLUX2_SINGLE = Part(pick=partial(pick_flux2, text=0), text_first=True)
_QWEN = Part(pick=pick_qwen, output=1)
_Z_IMAGE = Part(pick=pick_z_image, tokens="x")
_Z_ATTENTION = Part(pick=pick_z_image)
_WAN = Part(pick=pick_wan)
_VACE = Part(
    pick=pick_wan, tokens="control_hidden_states", output=1, also=("hidden_states",), spread=(0,)
)
_WAN_LAYERS = {"attn1": _WAN, "attn2": _WAN, "ffn": _WAN}
_Z_LAYERS = {"attention": _Z_ATTENTION, "feed_forward": _Z_IMAGE}

Parts = Mapping[str, Mapping[str, Part]]
"""By the path of a list of blocks, the parts of each block, by path in it, that are merged."""

BLOCKS: Mapping[str, Parts] = {
    "flux2": {
        "transformer_blocks": {"": _FLUX2},
        "single_transformer_blocks": {"": _FLUX2_SINGLE},
    },
    "qwen_image": {"transformer_blocks": {"": _QWEN}},
    "z_image": {"noise_refiner": {"": _Z_IMAGE}, "layers": {"": _Z_IMAGE}},
    "wan": {"blocks": {"": _WAN}},
    "wan_vace": {"vace_blocks": {"": _VACE}, "blocks": {"": _WAN}},
}
COMPONENTS: Mapping[str, Parts] = {
    "flux2": {
        "transformer_blocks": {
            "attn": Part(pick=_FLUX2.pick, output=0),
            "ff": Part(tokens="x"),
        },
        "single_transformer_blocks": {"attn": _FLUX2_SINGLE},
    },
    "qwen_image": {
        "transformer_blocks": {"attn": Part(pick=pick_qwen, output=0), "img_mlp": Part()}
    },
    "z_image": {"noise_refiner": _Z_LAYERS, "layers": _Z_LAYERS},
    "wan": {"blocks": _WAN_LAYERS},
    "wan_vace": {"vace_blocks": _WAN_LAYERS, "blocks": _WAN_LAYERS},
}


def reference_model(
    model: Any,
    family: str,
    picture: Picture,
    options: ReferenceOptions,
    frames: int = 4,
    keeps: bool = False,
) -> Any:
    """A copy of the model whose blocks compute on merged tokens of a picture.

    Args:
        model: of diffusers.
        family: a key of `BLOCKS`.
        picture: what a call's image tokens show.
        options: of the method.
        frames: of a chunk.
        keeps: whether later calls merge by the plans of the first.
    """
    model = copy.deepcopy(model)
    by_component = options.placement == "component"
    groups: list[Group] = []
    for path, parts in (COMPONENTS if by_component else BLOCKS)[family].items():
        groups.append(Group(picture, options, frames))
        for index, block in enumerate(model.get_submodule(path)):
            if f"{path}.{index}" in options.skip:
                continue
            if options.share == "block":
                groups.append(Group(picture, options, frames))
            for name, part in parts.items():
                keep = not by_component and options.residual == "keep"
                _install(block.get_submodule(name), part, groups[-1], keep)

    def forget(*_: Any) -> None:
        for group in groups:
            group.plans = group.plans if keeps else []

    model.register_forward_pre_hook(forget)
    return model


def _install(module: nn.Module, part: Part, group: Group, keep: bool) -> None:
    original = module.forward

    def run(*args: Any, **kwargs: Any) -> Any:
        call = _named(original, args, kwargs)
        plans = group.plans_for(call[part.tokens], part.text_first)
        samples = [_run_sample(original, part, call, i, plan, keep) for i, plan in enumerate(plans)]
        outputs = [
            None if parts[0] is None else torch.cat(parts) for parts in zip(*samples, strict=True)
        ]
        return outputs[0] if part.output is None else tuple(outputs)

    module.forward = run


def _run_sample(
    original: Callable[..., Any],
    part: Part,
    call: Mapping[str, Any],
    sample: int,
    plan: Plan,
    keep: bool,
) -> list[Any]:
    batch = len(call[part.tokens])
    merged = {
        name: plan.merge_KS @ call[name][sample : sample + 1] for name in (part.tokens, *part.also)
    }
    others = {
        name: part.pick(name, value, sample, plan.kept_K, batch)
        for name, value in call.items()
        if name not in merged
    }
    result = original(**merged, **others)
    outputs = [result] if part.output is None else list(result)
    place = part.output or 0
    if keep:
        update_1SD = plan.unmerge_SK @ (outputs[place] - merged[part.tokens])
        outputs[place] = call[part.tokens][sample : sample + 1] + update_1SD
    else:
        outputs[place] = plan.unmerge_SK @ outputs[place]
    for index in part.spread:
        if outputs[index] is not None:
            outputs[index] = plan.unmerge_SK @ outputs[index]
    return outputs


def _named(
    forward: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> dict[str, Any]:
    """The arguments of a call by name."""
    signature = inspect.signature(forward)
    named: dict[str, Any] = {}
    for name, value in signature.bind(*args, **kwargs).arguments.items():
        kind = signature.parameters[name].kind
        assert kind is not inspect.Parameter.VAR_POSITIONAL or not value
        if kind is inspect.Parameter.VAR_KEYWORD:
            named |= value
        elif kind is not inspect.Parameter.VAR_POSITIONAL:
            named[name] = value
    return named
