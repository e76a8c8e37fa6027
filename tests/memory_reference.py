"""Steps with memory, written a second time: diffusers' own blocks, dense matrices, a sample a turn.

A full step runs each block as it is, and keeps what it added to its tokens. A step between runs the
block on merged tokens, by the plan of the full step, and a stream of tokens ``x`` comes out as

    x + u + e + theta * unmerge((u_m - u_m0) - merge(e))

Streams that do not merge, such as text, do the same without merge and unmerge. Only the plans are
made by `tests.family_reference`. Tokens stay in the order in which diffusers has them.
"""

import copy
import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from tests.family_reference import Group, Picture, Plan
from tests.reference import ReferenceOptions


@dataclass(frozen=True, kw_only=True)
class Kind:
    """How a class of block takes and returns its tokens."""

    tokens: str = "hidden_states"
    output: int | None = None
    """Which output is the image, where there are several."""
    others: Mapping[int, str] = field(default_factory=dict)
    """Further outputs with tokens that do not merge, and the arguments to which the block adds."""
    also: str | None = None
    """Further tokens that are merged like those of the image."""
    also_output: int | None = None
    """An output with further tokens of the image."""
    text_first: bool = False
    """Whether text stands before the image among the tokens."""
    image_first: bool = False
    """Whether the rows of the image come before those of the text, where both have some."""
    tables: Mapping[str, int] = field(default_factory=dict)
    """What has a row for each token and is shared by the samples, with the rows' dimension."""
    each: Mapping[str, int] = field(default_factory=dict)
    """What has a row for each token of each sample."""


_TEXT_BEFORE = Kind(output=1, others={0: "encoder_hidden_states"}, tables={"image_rotary_emb": 0})


def _hunyuan(rotary: str) -> Kind:
    return Kind(
        output=0,
        others={1: "encoder_hidden_states"},
        image_first=True,
        tables={rotary: 0},
        each={"attention_mask": -1},
    )


KINDS: Mapping[str, Kind] = {
    "BasicTransformerBlock": Kind(),
    "FluxTransformerBlock": _TEXT_BEFORE,
    "FluxSingleTransformerBlock": _TEXT_BEFORE,
    "Flux2TransformerBlock": _TEXT_BEFORE,
    "Flux2SingleTransformerBlock": Kind(text_first=True, tables={"image_rotary_emb": 0}),
    "QwenImageTransformerBlock": _TEXT_BEFORE,
    "JointTransformerBlock": _TEXT_BEFORE,
    "HunyuanVideoTransformerBlock": _hunyuan("freqs_cis"),
    "HunyuanVideoSingleTransformerBlock": _hunyuan("image_rotary_emb"),
    "HunyuanVideoTokenReplaceTransformerBlock": _hunyuan("freqs_cis"),
    "HunyuanVideoTokenReplaceSingleTransformerBlock": _hunyuan("image_rotary_emb"),
    "WanTransformerBlock": Kind(tables={"rotary_emb": 1}, each={"temb": 1}),
    "WanVACETransformerBlock": Kind(
        tokens="control_hidden_states",
        output=1,
        also="hidden_states",
        also_output=0,
        tables={"rotary_emb": 1},
    ),
    "ZImageTransformerBlock": Kind(
        tokens="x", each={"freqs_cis": 1, "attn_mask": 1, "attention_mask": 1}
    ),
    "Krea2TransformerBlock": Kind(
        text_first=True, tables={"image_rotary_emb": 0}, each={"attention_mask": -1}
    ),
    "LTX2VideoTransformerBlock": Kind(
        output=0,
        others={1: "audio_hidden_states"},
        each={
            "temb": 1,
            "temb_ca_scale_shift": 1,
            "temb_ca_gate": 1,
            "video_rotary_emb": -2,
            "ca_video_rotary_emb": -2,
        },
    ),
}
"""By the name of a class of blocks."""

Updates = dict[int, Tensor]
"""What a block adds to its streams, by the place of the output."""


@dataclass(frozen=True, kw_only=True)
class Form:
    """What is remembered, and how much merged tokens are believed."""

    every: int
    theta: float
    extrapolate: bool = True
    control: bool = True


class Steps:
    """The steps of one run."""

    def __init__(self, form: Form) -> None:
        self.form = form
        self.step = -1
        self.full_at: list[int] = []

    def next(self, *_: Any) -> None:
        """Before each call of the model."""
        self.step += 1
        if self.is_full:
            self.full_at.append(self.step)

    @property
    def is_full(self) -> bool:
        return self.step % self.form.every == 0

    @property
    def ahead(self) -> float:
        """How far updates are extrapolated, in units of what lies between the last full steps."""
        if not self.form.extrapolate or len(self.full_at) < 2:
            return 0.0
        before, last = self.full_at[-2:]
        return (self.step - last) / (last - before)


def remembering(
    model: Any, picture: Picture | None, options: ReferenceOptions, form: Form
) -> tuple[Any, Steps]:
    """A copy of a model that remembers, and the steps of its run.

    Args:
        model: of diffusers.
        picture: what a call's image tokens show; None for a UNet, whose stages have other sizes.
        options: of the method.
        form: of the memory.
    """
    model, steps = copy.deepcopy(model), Steps(form)
    model.register_forward_pre_hook(steps.next)
    for path, blocks in model.named_modules():
        listed = isinstance(blocks, nn.ModuleList) and len(blocks) > 0
        if not listed or type(blocks[0]).__name__ not in KINDS:
            continue
        if path.startswith("context_refiner"):  # Z-Image's caption, in blocks of the same class
            continue
        group = _Remembering(Picture([(1, 1, 1)]) if picture is None else picture, options, 4)
        if picture is None:
            stage = model.get_submodule(path.rpartition(".")[0])
            assert isinstance(stage, Transformer2DModel)
            stage.register_forward_pre_hook(group.see_grid)
        for index, block in enumerate(blocks):
            block.forward = _Block(block, group, steps, leads=index == 0)
    return model, steps


class _Remembering(Group):
    """The blocks of a list, and the plans of the last full step."""

    def see_grid(self, stage: nn.Module, args: tuple[Tensor, ...]) -> None:
        self.picture = Picture([(1, *args[0].shape[-2:])])


class _Block:
    """The forward of one block."""

    def __init__(self, block: nn.Module, group: Group, steps: Steps, *, leads: bool) -> None:
        self.original = block.forward
        self.kind = KINDS[type(block).__name__]
        self.group, self.steps, self.leads = group, steps, leads
        self.update: Updates = {}
        self.merged: Updates = {}
        self.earlier: Updates = {}

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        call = _named(self.original, args, kwargs)
        if self.steps.is_full:
            return self._remember(call)
        return self._recall(call)

    def _remember(self, call: dict[str, Any]) -> Any:
        if self.leads:
            self.group.plans = []
        self._plans(call)
        output = self._run(call)
        before, self.update = self.update, self._updates(call, output)
        self.earlier = before or self.update
        self.merged = self._updates_of_merged(call)
        return output

    def _recall(self, call: dict[str, Any]) -> Any:
        theta, now, out = self.steps.form.theta, self._updates_of_merged(call), {}
        for place, update in self.update.items():
            change = (update - self.earlier[place]) * self.steps.ahead
            known = self.merged[place]
            if not self.steps.form.control:
                known = self._spread(call, place, update, "merge_KS")
            missed = (now[place] - known) - self._spread(call, place, change, "merge_KS")
            back = self._spread(call, place, missed, "unmerge_SK")
            out[place] = self._tokens(call, place) + update + change + theta * back
        if self.kind.output is None:
            return out[0]
        return tuple(out.get(place) for place in range(max(out) + 1))

    def _plans(self, call: Mapping[str, Any]) -> list[Plan]:
        return self.group.plans_for(call[self.kind.tokens], self.kind.text_first)

    def _spread(self, call: Mapping[str, Any], place: int, value: Tensor, how: str) -> Tensor:
        """Tokens merged, or spread; as they are in streams that do not merge."""
        if place in self.kind.others:
            return value
        samples = zip(self._plans(call), value, strict=True)
        return torch.stack([getattr(plan, how) @ sample for plan, sample in samples])

    def _tokens(self, call: Mapping[str, Any], place: int) -> Any:
        """What the block adds to; nothing where an output is made anew."""
        if place == self.kind.also_output:
            return 0.0
        return call[self.kind.others.get(place, self.kind.tokens)]

    def _outputs(self, output: Any) -> Iterator[tuple[int, Tensor]]:
        several = [output] if self.kind.output is None else output
        return ((place, each) for place, each in enumerate(several) if each is not None)

    def _updates(self, call: Mapping[str, Any], output: Any) -> Updates:
        return {p: each - self._tokens(call, p) for p, each in self._outputs(output)}

    def _updates_of_merged(self, call: Mapping[str, Any]) -> Updates:
        """What the block adds to merged tokens, and to what does not merge beside them."""
        samples = []
        for index, plan in enumerate(self._plans(call)):
            own = self._of_sample(call, index, plan)
            samples.append(self._updates(own, self._run(own)))
        return {place: torch.cat([each[place] for each in samples]) for place in samples[0]}

    def _run(self, call: dict[str, Any]) -> Any:
        named = dict(call)
        more = named.pop("args", ())  # they come by place alone
        return self.original(*named.values(), *more) if more else self.original(**named)

    def _of_sample(self, call: Mapping[str, Any], index: int, plan: Plan) -> dict[str, Any]:
        """The arguments of one sample, with rows for the tokens that are left."""
        kind, tokens = self.kind, call[self.kind.tokens].shape[1]
        batch = len(call[kind.tokens])

        def of_sample(name: str, value: Any) -> Any:
            if not isinstance(value, Tensor):
                return value
            if name in (kind.tokens, kind.also):
                return plan.merge_KS @ value[index : index + 1]
            if name not in kind.tables and value.shape[0] == batch:
                value = value[index : index + 1]
            dim = {**kind.tables, **kind.each}.get(name)
            if dim is None or value.shape[dim] < tokens:
                return value
            text = torch.arange(value.shape[dim] - tokens)
            image_first = [plan.kept_K, tokens + text]
            text_first = [text, len(text) + plan.kept_K]
            rows = torch.cat(image_first if kind.image_first else text_first)
            return value.index_select(dim, rows)

        return {
            name: pytree.tree_map(lambda each, name=name: of_sample(name, each), value)
            for name, value in call.items()
        }


def _named(
    forward: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> dict[str, Any]:
    """The arguments of a call by name; ``args`` are those that have none."""
    signature = inspect.signature(forward)
    named: dict[str, Any] = {}
    for name, value in signature.bind(*args, **kwargs).arguments.items():
        if signature.parameters[name].kind is inspect.Parameter.VAR_KEYWORD:
            named |= value
        else:
            named[name] = value
    return named
