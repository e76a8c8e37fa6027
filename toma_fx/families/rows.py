"""Types with which a family's file describes its models.

Classes are given by qualified name, so that a table of families does not import any model.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from tabulate import tabulate
from torch import Tensor, nn

from toma_fx.passes.plan_nodes import TokenFlow
from toma_fx.passes.sites import Site

NOT_MEASURED = "the first quarter of a list is spared, since the family was not measured"

LeafValue = Callable[..., Any]
"""Takes a submodule and the arguments of its call; returns an example of its output."""


@dataclass(frozen=True, kw_only=True)
class Form:
    """Arguments whose kind selects the branches of a block; the block has one graph per form."""

    argument: str
    more: tuple[str, ...] = ()
    of: Callable[..., str]
    """Returns the form for the arguments' values. It must be a named function: pickles refer to
    it."""
    names: tuple[str, ...]
    """All forms; a block that is inspected on its own takes the first."""


WITH_MASK = " with a mask"


def _form_of_mask(mask: Tensor | None) -> str:
    return "" if mask is None else WITH_MASK


@dataclass(frozen=True, kw_only=True)
class KeyMask:
    """A key mask argument that a call may leave out, as the attention code then asks.

    It matters only where attention is rewritten; elsewhere it is passed on unchanged.
    """

    argument: str
    shape: tuple[int, ...]
    """Shape of an example mask that fits the block's other examples."""

    @property
    def form(self) -> Form:
        """Form of the block's graph: with or without the mask."""
        return Form(argument=self.argument, of=_form_of_mask, names=("", WITH_MASK))

    def example(self, form: str) -> Tensor | None:
        """Return an example of the argument for a form."""
        masked = form == WITH_MASK
        return torch.empty(self.shape, dtype=torch.bool, device="meta") if masked else None


@dataclass(frozen=True, kw_only=True, eq=False)
class Block:
    """How one class of transformer block treats its tokens."""

    cls: str
    """Qualified name of the class."""
    sites: tuple[Site, ...]
    """Parts that can merge; sites of one component come before sites of several."""
    flow: TokenFlow
    """Position of the tokens, by the names of the block's arguments."""
    examples: Callable[..., dict[str, Any]]
    """Returns example arguments of a block, on the meta device. They select the graph's branches.
    If the block has forms, it also takes the form."""
    form: Form | None = None
    """Arguments that select branches when the block runs."""
    key_mask: KeyMask | None = None
    """A key mask that a call may leave out."""
    key_examples: Mapping[str, Any] = field(default_factory=dict)
    """Further examples where attention is rewritten; they select the branches of its code."""
    masks: tuple[tuple[str, str], ...] = ()
    """Pairs of an attention mask argument and the component that uses it."""
    refused: tuple[str, ...] = ()
    """Attention kwargs that no merged block supports."""
    refused_by_attention: tuple[str, ...] = ()
    """Attention kwargs that refer to single image tokens."""
    example_tokens: int = 0
    """Number of image tokens in the examples, if the block's tokens include those of the text."""

    def __reduce__(self) -> Any:
        # Rows hold functions, so a pickle stores the name.
        from toma_fx.families import all_families, load_block

        family = next(each for each in all_families() if self in each.blocks)
        return load_block, (family.name, self.cls)


def _rebuilt(cls: Any, values: dict[str, Any]) -> Any:
    return cls(**values)


@dataclass(frozen=True, kw_only=True, eq=False)
class DerivedBlock(Block):
    """A row that was derived from a call instead of a family's file."""

    def __reduce__(self) -> Any:
        return _rebuilt, (
            type(self),
            {each.name: getattr(self, each.name) for each in fields(self)},
        )


@dataclass(frozen=True, kw_only=True)
class Stage:
    """A module that holds a grid of tokens and whose blocks form groups of their own.

    It takes ``(B, C, H, W)``; its blocks take ``(B, H * W, D)`` in token order.
    """

    cls: str
    """Qualified name of the class."""
    enter: str
    """Name of the method that turns a grid into tokens: its first argument is the grid, and its
    result (or the first of several) is the tokens."""
    leave: str
    """Name of the method that turns tokens into a grid: it takes the tokens and a grid of the same
    size."""


def _as_they_are(ids: Tensor) -> Tensor:
    return ids


@dataclass(frozen=True, kw_only=True)
class TokenSequence:
    """A model that takes its image tokens as a sequence, with position ids.

    The tokens are put in token order, together with all values that have a row for each of them.
    """

    tokens: str
    """Argument with the tokens, ``(B, N, C)``; the model returns the same number of tokens."""
    ids: str
    """Argument with the position ids, ``(N, 3)`` or ``(1, N, 3)``: image number, row and
    column."""
    more: tuple[str, ...] = ()
    """Arguments with lists of tensors that have a row for each token in dimension 1."""
    joint: tuple[str, ...] = ()
    """Arguments with a tensor that has a row for each token in dimension 1, text tokens first."""
    text_first: bool = False
    """True if the ids have rows for text tokens before those for image tokens."""
    references: tuple[str, str] | None = None
    """Arguments with the tokens of further images and their ids. These tokens are put in order
    separately, and the model returns none for them."""
    places: Callable[[Tensor], Tensor] = _as_they_are
    """Converts ids ``(N, 3)`` into integer image number, row and column of each token."""
    enter: str
    """Path of the module that takes the tokens, in a graph captured by other code."""
    leave: str
    """Path of the module that returns the tokens."""
    positions: str
    """Path of the module that takes the ids of text and image tokens."""


@dataclass(frozen=True)
class Grid:
    """A grid of image tokens in raster order: frame by frame, row by row."""

    rows: int
    columns: int
    frames: int = 1

    @property
    def tokens(self) -> int:
        """Number of tokens in all frames."""
        return self.frames * self.area

    @property
    def area(self) -> int:
        """Number of tokens per frame."""
        return self.rows * self.columns


@dataclass(frozen=True, kw_only=True)
class Place:
    """A tensor at a border that has a row for each image token."""

    module: str = ""
    """Path of the module that takes or returns the tensor; ``""`` is the model."""
    method: str = "forward"
    argument: str | None = None
    """Name of the argument that is the tensor; None for an output."""
    output: int | None = None
    """Index of the output that is the tensor, if there are several."""
    dim: int = 1
    """Dimension of the rows. Rows of other tokens may follow."""
    last: bool = False
    """True if rows of other tokens come first instead."""
    dims: int = 1
    """Number of dimensions over which the rows are spread: ``dim`` and those after it."""
    ndim: int | None = None
    """Number of dimensions of the tensor, if a tensor with another number has no token rows."""
    patches: bool = False
    """True if the tensor is the image itself, ``(..., H, W)`` or ``(..., F, H, W)``, in which each
    patch becomes a token."""
    listed: bool = False
    """True if it is a list, tuple or dictionary of such tensors, one for each sample or block."""
    told: tuple[str, str] | None = None
    """Names of the module's argument that gives the number of tokens, and of the model's argument
    that it comes from. If the model is called with fewer tokens, the module still gets the full
    number, and rows are picked from its output."""


@dataclass(frozen=True, kw_only=True)
class Reading:
    """Optional arguments of a model that can be computed from the values of another argument."""

    argument: str
    """Name of the other argument, a tensor."""
    makes: Callable[[Tensor], Mapping[str, Any]]
    """Computes the optional arguments from that tensor."""


def _no_patch(config: Any) -> tuple[int, ...]:
    return 1, 1


def _never(call: Mapping[str, Any]) -> bool:
    return False


# Functions, because Dynamo does not trace `operator.itemgetter`.
def _timestep(call: Mapping[str, Any]) -> Any:
    return call["timestep"]


def _hidden_states(call: Mapping[str, Any]) -> Any:
    return call["hidden_states"]


def _no_frames(model: Any, call: Mapping[str, Any]) -> tuple[int, ...]:
    return ()


def _no_tokens(model: Any, call: Mapping[str, Any]) -> int:
    return 0


def _no(model: Any, call: Mapping[str, Any]) -> bool:
    return False


@dataclass(frozen=True, kw_only=True, eq=False)
class TokenGrids:
    """A model whose grids of image tokens follow from the shapes of its arguments.

    Tokens are reordered at places before the first block and after the last one: every value that
    enters with a row for each token, and every such output.
    """

    grids: Callable[[Any, Mapping[str, Any]], tuple[Grid, ...]]
    """Returns the grids of a call, ``(model, call)``: the output's first, then references'."""
    enter: tuple[Place, ...]
    leave: tuple[Place, ...]
    patch: Callable[[Any], tuple[int, ...]] = _no_patch
    """Returns the size of a token in the model's input, ``(H, W)`` or ``(F, H, W)``, from the
    model's config."""
    given_frames: Callable[[Any, Mapping[str, Any]], tuple[int, ...]] = _no_frames
    """Returns the frames of the first grid that are, or may be, given and not generated, according
    to the shapes of a call, ``(model, call)``; -1 is the last frame. They stay unmerged and come
    before all others in token order."""
    reads_given: Callable[[Any, Mapping[str, Any]], tuple[bool, ...] | None] | None = None
    """Tells for each frame of the first grid whether it is given, according to the values of a
    call, ``(model, call)``; None if they do not tell. Given frames stay unmerged too."""
    frames_apart: Callable[[Any, Mapping[str, Any]], bool] = _no
    """Tells whether a call, ``(model, call)``, needs each frame ordered separately, because the
    model computes something per token of a frame that no place reaches."""
    given_tokens: Callable[[Any, Mapping[str, Any]], int] = _no_tokens
    """Returns the number of tokens outside all grids in a call, ``(model, call)``; they stay
    unmerged."""
    given_last: bool = False
    """True if those tokens come after the grids instead of before them."""
    reading: Reading | None = None
    """Arguments that a call may leave out and that follow from a tensor's values."""

    def is_ordered(self, region: str) -> bool:
        """Return whether tokens may have to be reordered for a kind of region.

        Stripes keep the caller's order, unless frames or tokens other than the first are given.
        """
        return region == "tile" or self.reads_given is not None or self.given_last


def _first(model: Any, grids: tuple[Grid, ...]) -> int:
    return 1


@dataclass(frozen=True, kw_only=True, eq=False)
class References:
    """Images that a model edits; their tokens follow those of the generated image.

    They carry no noise, and pipelines discard the model's output for them. If a `TokenSequence`
    gives their positions, each image number except the first is a reference.
    """

    tokens: str = "hidden_states"
    """Argument with all image tokens, ``(B, N, C)``."""
    drawn: Callable[[Any, tuple[Grid, ...]], int] = _first
    """Returns how many of the grids of a call, ``(model, grids)``, counted from the first, are
    generated."""
    shorter: Callable[[Mapping[str, Any], int, tuple[int, ...]], dict[str, Any]] | None = None
    """Returns the arguments that give the number of tokens, adapted to shorter references,
    ``(call, generated grids, tokens of each reference)``."""
    refused: tuple[str, ...] = ()
    """Arguments that refer to single tokens of references, or move them."""
    example: Callable[[Mapping[str, Any]], dict[str, Any]]
    """Makes, from a call without references, a call with one reference as large as the image."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Family:
    """A model class and its blocks."""

    name: str
    cls: str
    """Qualified name of the model's class."""
    title: str
    """Name of the models for people."""
    blocks: tuple[Block, ...]
    borders: tuple[Stage | TokenSequence | TokenGrids, ...]
    """Places where tokens enter token order and leave it."""
    attention_kwargs: str | None = None
    """Argument of the model with the attention kwargs, which reach every block; None if there is
    none."""
    timestep: Callable[[Mapping[str, Any]], Any] = _timestep
    """Returns the timestep of a call: one per sample, or one for all."""
    time_rises: bool = False
    """True if timesteps rise from noise to the image."""
    rows_change: Callable[[Mapping[str, Any]], bool] = _never
    """Tells whether tokens have rows in a call that change from step to step, such as a timestep
    per token, so that a kept plan needs new rows."""
    prompt: tuple[str, ...]
    """Arguments of the model with the prompt's embeddings. The first tensor in the given ones
    distinguishes denoising runs."""
    leaf_values: Mapping[str, LeafValue] = field(default_factory=dict)
    """Functions for the output of submodules that return more than tokens, by class name."""
    unmerged_by_default: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    """Blocks that stay unmerged unless ``skip`` says otherwise: ``(a, b)`` leaves out the first
    ``a`` of ``b`` blocks in the list at a path, and the same share of a list of another length."""
    unmerged_because: str = ""
    never_merged: Mapping[str, str] = field(default_factory=dict)
    """Patterns for the paths of blocks that cannot merge, each with the reason."""
    regretted: str = (
        "ruined the images of the transformers on which it was measured, a small Flux and a small "
        "Wan; on this one it was not measured"
    )
    """Effect of merging without memory on images, as it was measured, for a warning; empty if it
    deserves none."""
    theta: float = 0.25
    """Default of `toma_fx.Memory.theta`."""
    noise_level: Callable[[float, Any], float]
    """Returns the noise level of a timestep under a scheduler, 1 for pure noise and 0 for the
    image; the scheduler is None if unknown."""
    run_levels: Callable[[Any, int, Mapping[str, Any]], list[float]]
    """Returns the noise levels of a run, ``(scheduler, steps, call)``; for the family's usual
    scheduler if it is None."""
    example_call: Callable[..., dict[str, Any]]
    """Makes up the keyword arguments of a call, ``(model, like, *, batch, height, width)``: sizes
    in pixels, the model's own if None; tensors with the device and dtype of ``like``."""
    sequence_lengths: Callable[[Mapping[str, Any]], set[int]]
    """Returns the lengths of the sequences that attention sees in a call."""
    image: Callable[[Mapping[str, Any]], Tensor] = _hidden_states
    """Returns the argument of a call that holds the image."""
    references: References | None = None
    """The images that the models edit; None if no model edits images."""
    reads_values: bool = False
    """True if the model picks the words of a text by its mask, so that it cannot run on tensors
    without data unless it is told which tokens are words."""
    architectures: Mapping[str, Mapping[str, Any]]
    """Configurations of published models, by their names on the command line."""
    block_counts: Mapping[str, str] = field(default_factory=dict)
    """For the path of each list of blocks that merge, the field of the model's configuration with
    the number of blocks: a number, or a list with an item per block."""

    def block_row(self, cls: type[nn.Module]) -> Block | None:
        """Return the row of a block class or of its first known base class; None if unknown."""
        names = [qualified_name(base) for base in cls.__mro__]
        return next((row for row in self.blocks if row.cls in names), None)

    def __reduce__(self) -> Any:
        # Rows hold functions, so a pickle stores the name.
        from toma_fx.families import load_family

        return load_family, (self.name,)


@dataclass(frozen=True, kw_only=True, eq=False)
class DerivedFamily(Family):
    """A family made by `toma_fx.derive` instead of a family's file."""

    def __reduce__(self) -> Any:
        return _rebuilt, (
            type(self),
            {each.name: getattr(self, each.name) for each in fields(self)},
        )

    def __str__(self) -> str:
        """Return a table of the derived block classes, and whether the token order was found."""
        rows = [(each.cls.rpartition(".")[2], *_described(each)) for each in self.blocks]
        headers = ("block", "image tokens", "text", "a row for each token")
        ordered = any(not isinstance(each, TokenGrids) or each.enter for each in self.borders)
        order = "found, and checked" if ordered else "not found: regions are stripes"
        never = "".join(f"\n{path}: {why}" for path, why in self.never_merged.items())
        return (
            f"{self.name}\n{tabulate(rows, headers)}\nwhere tokens are put in order: {order}{never}"
        )


def _described(block: Block) -> tuple[str, str, str]:
    flow = block.flow
    text = flow.text or ""
    if flow.joint:
        text = "in one sequence, " + ("behind the image" if flow.image_first else "before it")
    items = [
        f"{row.argument}{list(row.items) if row.items else ''}{' with text' if row.joint else ''}"
        for row in flow.rows
    ]
    return flow.tokens, text, ", ".join(items)


def qualified_name(cls: type) -> str:
    """Return the module and the name of a class."""
    return f"{cls.__module__}.{cls.__qualname__}"


def grid_sizes(ids: Sequence[float], *, sort: bool) -> tuple[int, ...]:
    """Return the token counts of the grids in a sequence.

    Args:
        ids: the image number of each token.
        sort: whether token order brings the tokens of each image together; otherwise, each run of
            one number is a grid.
    """
    counts: list[tuple[float, int]] = []
    for number in sorted(ids) if sort else ids:
        if counts and counts[-1][0] == number:
            counts[-1] = number, counts[-1][1] + 1
        else:
            counts.append((number, 1))
    return tuple(count for _, count in counts)
