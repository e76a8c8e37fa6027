"""What a family says of its models: the types of the rows in each family's file.

Classes are named by their qualified names, so that a table of families needs no model's import.
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
"""Takes a submodule and the arguments of its call; gives an example of what it returns."""


@dataclass(frozen=True, kw_only=True)
class Form:
    """Arguments whose kind decides the branches of a block, which has a graph for each."""

    argument: str
    more: tuple[str, ...] = ()
    of: Callable[..., str]
    """The form of their values. A function that has a name, since pickles hold it."""
    names: tuple[str, ...]
    """All forms; the first is that of a block that is looked at on its own."""


WITH_MASK = " with a mask"


def _form_of_mask(mask: Tensor | None) -> str:
    return "" if mask is None else WITH_MASK


@dataclass(frozen=True, kw_only=True)
class KeyMask:
    """An argument with a mask of keys that a call may leave out, as attention's code asks.

    It matters only where attention is rewritten; elsewhere it is handed on as it is.
    """

    argument: str
    shape: tuple[int, ...]
    """Of an example, with that of the block's other examples."""

    @property
    def form(self) -> Form:
        """The form of a block's graph: with the mask, or without."""
        return Form(argument=self.argument, of=_form_of_mask, names=("", WITH_MASK))

    def example(self, form: str) -> Tensor | None:
        """The argument in a call of a form."""
        masked = form == WITH_MASK
        return torch.empty(self.shape, dtype=torch.bool, device="meta") if masked else None


@dataclass(frozen=True, kw_only=True, eq=False)
class Block:
    """How one class of transformer block treats its tokens."""

    cls: str
    """Qualified name of the class."""
    sites: tuple[Site, ...]
    """What can be merged; the sites of one component before those of several."""
    flow: TokenFlow
    """Where tokens are, by the names of the block's arguments."""
    examples: Callable[..., dict[str, Any]]
    """Example arguments of a block, on the meta device. They decide the graph's branches. Where the
    block has forms, it is given the form too."""
    form: Form | None = None
    """What decides branches when the block runs."""
    key_mask: KeyMask | None = None
    """A mask of keys that a call may leave out."""
    key_examples: Mapping[str, Any] = field(default_factory=dict)
    """Further examples where attention is rewritten, which decide branches of its own."""
    masks: tuple[tuple[str, str], ...] = ()
    """Each attention mask argument, and the component that it goes to."""
    refused: tuple[str, ...] = ()
    """Attention kwargs that no merged block can carry."""
    refused_by_attention: tuple[str, ...] = ()
    """Attention kwargs that refer to single image tokens."""
    example_tokens: int = 0
    """Image tokens in the examples, where the block's tokens are those of the text too."""

    def __reduce__(self) -> Any:
        # Rows hold functions, so a pickle holds the name.
        from toma_fx.families import all_families, load_block

        family = next(each for each in all_families() if self in each.blocks)
        return load_block, (family.name, self.cls)


def _rebuilt(cls: Any, values: dict[str, Any]) -> Any:
    return cls(**values)


@dataclass(frozen=True, kw_only=True, eq=False)
class DerivedBlock(Block):
    """A row that no file states."""

    def __reduce__(self) -> Any:
        return _rebuilt, (
            type(self),
            {each.name: getattr(self, each.name) for each in fields(self)},
        )


@dataclass(frozen=True, kw_only=True)
class Stage:
    """A module whose blocks are groups of their own, and which holds a grid of tokens.

    ``(B, C, H, W)`` comes in, ``(B, H * W, D)`` goes through its blocks, in token order.
    """

    cls: str
    """Qualified name of the class."""
    enter: str
    """The method that makes tokens of a grid: its first argument is the grid, and its result, or
    the first of several, the tokens."""
    leave: str
    """The method that makes a grid of tokens: it takes the tokens, then a grid of the same size."""


def _as_they_are(ids: Tensor) -> Tensor:
    return ids


@dataclass(frozen=True, kw_only=True)
class TokenSequence:
    """A model that takes its image tokens as a sequence, with the position of each.

    They are put in token order together with everything that has a row for each of them.
    """

    tokens: str
    """The argument with the tokens, ``(B, N, C)``; the model returns as many."""
    ids: str
    """The argument with the position ids, ``(N, 3)`` or ``(1, N, 3)``: image number, row and
    column."""
    more: tuple[str, ...] = ()
    """Arguments with lists of tensors that have a row for each token in dimension 1."""
    joint: tuple[str, ...] = ()
    """Arguments with a tensor that has a row for each token in dimension 1, those of the text
    first."""
    text_first: bool = False
    """Whether the ids have rows of text tokens before those of the image tokens."""
    references: tuple[str, str] | None = None
    """Arguments with tokens of further images, and their ids; they are put in order by themselves,
    and the model returns none for them."""
    places: Callable[[Tensor], Tensor] = _as_they_are
    """Image number, row and column of each token, in whole numbers, of the ids, ``(N, 3)``."""
    enter: str
    """Path of the module that takes the tokens, in a graph that others captured."""
    leave: str
    """Path of the module that returns them."""
    positions: str
    """Path of the module that takes the ids of text and image."""


@dataclass(frozen=True)
class Grid:
    """A grid of image tokens in raster order: frame by frame, row by row."""

    rows: int
    columns: int
    frames: int = 1

    @property
    def tokens(self) -> int:
        """How many there are."""
        return self.frames * self.area

    @property
    def area(self) -> int:
        """Tokens of a frame."""
        return self.rows * self.columns


@dataclass(frozen=True, kw_only=True)
class Place:
    """A tensor at a border that has a row for each image token."""

    module: str = ""
    """Path of the module that takes or returns it; ``""`` is the model."""
    method: str = "forward"
    argument: str | None = None
    """Name of the argument that it is, or"""
    output: int | None = None
    """its place among the outputs."""
    dim: int = 1
    """Dimension of the rows. Behind them may be rows of other tokens."""
    last: bool = False
    """Whether those of other tokens are before them instead."""
    dims: int = 1
    """How many dimensions the rows are spread over, ``dim`` and those behind it."""
    ndim: int | None = None
    """Dimensions of the tensor, where one of others has no rows for tokens."""
    patches: bool = False
    """Whether the tensor is the image itself, ``(..., H, W)`` or ``(..., F, H, W)``, of which each
    patch becomes a token."""
    listed: bool = False
    """Whether it is a list or a tuple of such tensors, or a dictionary: one for each sample or
    block."""
    told: tuple[str, str] | None = None
    """An argument of the module that says how many tokens there are, and the model's argument that
    it is: where the model is told of fewer, the module is told of all of them, and its rows are
    picked."""


@dataclass(frozen=True, kw_only=True)
class Reading:
    """Arguments of a model that it takes or leaves, and that the values of another one tell."""

    argument: str
    """The other one, a tensor."""
    makes: Callable[[Tensor], Mapping[str, Any]]
    """The arguments, of that tensor."""


def _no_patch(config: Any) -> tuple[int, ...]:
    return 1, 1


def _never(call: Mapping[str, Any]) -> bool:
    return False


# Functions, since Dynamo does not trace `operator.itemgetter`.
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

    The image tokens are put in token order at places, all before the first block or behind the
    last: what has a row for each of them where it comes in, and what comes out.
    """

    grids: Callable[[Any, Mapping[str, Any]], tuple[Grid, ...]]
    """The grids of a call, ``(model, call)``: the output's first, then those of references."""
    enter: tuple[Place, ...]
    leave: tuple[Place, ...]
    patch: Callable[[Any], tuple[int, ...]] = _no_patch
    """The size of a token, in what the model takes, ``(H, W)`` or ``(F, H, W)``; of its config."""
    given_frames: Callable[[Any, Mapping[str, Any]], tuple[int, ...]] = _no_frames
    """Frames of the first grid that are given and not drawn, or may be, as far as the shapes of a
    call tell, ``(model, call)``; -1 is the last one. They stay as they are, and come before all
    others in token order."""
    reads_given: Callable[[Any, Mapping[str, Any]], tuple[bool, ...] | None] | None = None
    """Whether each frame of the first grid is given, as the values of a call tell, ``(model,
    call)``; None where they do not. Those that are given stay as they are too."""
    frames_apart: Callable[[Any, Mapping[str, Any]], bool] = _no
    """Whether each frame is put in order by itself in a call, ``(model, call)``, since the model
    makes something for each token of a frame where no place reaches it."""
    given_tokens: Callable[[Any, Mapping[str, Any]], int] = _no_tokens
    """How many tokens of no grid there are in a call, ``(model, call)``, which stay as they are."""
    given_last: bool = False
    """Whether they are behind those of the grids, and not before."""
    reading: Reading | None = None
    """What a call may leave to the values of a tensor."""

    def is_ordered(self, region: str) -> bool:
        """Whether tokens may have to be put in order for a kind of region.

        In stripes they stay as they are, unless some are given that are not the first.
        """
        return region == "tile" or self.reads_given is not None or self.given_last


def _first(model: Any, grids: tuple[Grid, ...]) -> int:
    return 1


@dataclass(frozen=True, kw_only=True, eq=False)
class References:
    """Images that a model edits, whose tokens stand behind those of the image that it draws.

    They carry no noise, and pipelines throw away what the model returns for them. Where their
    positions are told by a `TokenSequence`, each image number but the first is a reference.
    """

    tokens: str = "hidden_states"
    """The argument with all image tokens, ``(B, N, C)``."""
    drawn: Callable[[Any, tuple[Grid, ...]], int] = _first
    """Of the grids of a call, ``(model, grids)``: how many, from the first, are drawn."""
    shorter: Callable[[Mapping[str, Any], int, tuple[int, ...]], dict[str, Any]] | None = None
    """The arguments that say how many tokens there are, of a call in which references have so many,
    ``(call, drawn grids, tokens of each reference)``."""
    refused: tuple[str, ...] = ()
    """Arguments that speak of single tokens of references, or put them elsewhere."""
    example: Callable[[Mapping[str, Any]], dict[str, Any]]
    """A made-up call with one reference as large as the image, of one without."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Family:
    """A model class and the blocks in it."""

    name: str
    cls: str
    """Qualified name of the model's class."""
    title: str
    """What people call the models."""
    blocks: tuple[Block, ...]
    borders: tuple[Stage | TokenSequence | TokenGrids, ...]
    """Where tokens come into token order and leave it."""
    attention_kwargs: str | None = None
    """The model's argument with the attention kwargs, which reach every block; None where none
    does."""
    timestep: Callable[[Mapping[str, Any]], Any] = _timestep
    """The timestep of a call, one for each row of the batch or one for all."""
    time_rises: bool = False
    """Whether timesteps rise from noise to the image."""
    rows_change: Callable[[Mapping[str, Any]], bool] = _never
    """Whether tokens have rows in a call that change from step to step, as a timestep's of each
    token do, so that a plan that is kept needs new ones."""
    prompt: tuple[str, ...]
    """The model's arguments with the prompt's embeddings. The first tensor in those that are given
    tells one denoising run from another."""
    leaf_values: Mapping[str, LeafValue] = field(default_factory=dict)
    """By qualified class name, what a block's submodule returns where it is not tokens alone."""
    unmerged_by_default: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    """Blocks that stay unmerged unless ``skip`` says otherwise: of the list at a path, the first
    ``a`` of ``b``, and as large a share of a list of another length."""
    unmerged_because: str = ""
    never_merged: Mapping[str, str] = field(default_factory=dict)
    """Blocks that cannot merge, by a pattern on their paths, each with the reason."""
    regretted: str = ""
    """What merging at every step was measured to do to images, where that is worth a warning."""
    theta: float = 0.25
    """`toma_fx.Memory.theta` where none is given."""
    noise_level: Callable[[float, Any], float]
    """The noise level of a timestep, 1 for pure noise and 0 for the image, under a scheduler; the
    scheduler is None where it is not known."""
    run_levels: Callable[[Any, int, Mapping[str, Any]], list[float]]
    """Noise levels of a denoising run of some steps: of a scheduler, or the family's usual one when
    it is None, for a call of the model."""
    example_call: Callable[..., dict[str, Any]]
    """Keyword arguments of a call, ``(model, like, *, batch, height, width)``: sizes in pixels, the
    model's own when None; tensors with the device and dtype of ``like``."""
    sequence_lengths: Callable[[Mapping[str, Any]], set[int]]
    """Numbers of tokens in the sequences that attention sees in a call."""
    image: Callable[[Mapping[str, Any]], Tensor] = _hidden_states
    """The argument of a call that holds the image."""
    references: References | None = None
    """The images that the models edit, if there are such models."""
    reads_values: bool = False
    """Whether the model picks the words of a text by its mask, and so cannot run on tensors without
    data unless it is told which they are."""
    architectures: Mapping[str, Mapping[str, Any]]
    """Configurations of published models, by the names that the command line takes."""
    block_counts: Mapping[str, str] = field(default_factory=dict)
    """By the path of each list of blocks that merge, the field of the model's configuration that
    says how many they are: a number, or a list with an item for each."""

    def block_row(self, cls: type[nn.Module]) -> Block | None:
        """The row of a block class, or of the first class that it derives from."""
        names = [qualified_name(base) for base in cls.__mro__]
        return next((row for row in self.blocks if row.cls in names), None)

    def __reduce__(self) -> Any:
        # Rows hold functions, so a pickle holds the name.
        from toma_fx.families import load_family

        return load_family, (self.name,)


@dataclass(frozen=True, kw_only=True, eq=False)
class DerivedFamily(Family):
    """A family that no file states: `toma_fx.derive`."""

    def __reduce__(self) -> Any:
        return _rebuilt, (
            type(self),
            {each.name: getattr(self, each.name) for each in fields(self)},
        )

    def __str__(self) -> str:
        """What was derived: of each class of block, and of the order of tokens."""
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
    """The module and name of a class."""
    return f"{cls.__module__}.{cls.__qualname__}"


def grid_sizes(ids: Sequence[float], *, sort: bool) -> tuple[int, ...]:
    """Token counts of the grids in a sequence.

    Args:
        ids: the image number of each token.
        sort: whether token order brings the tokens of an image together; otherwise grids are runs
            of one number.
    """
    counts: list[tuple[float, int]] = []
    for number in sorted(ids) if sort else ids:
        if counts and counts[-1][0] == number:
            counts[-1] = number, counts[-1][1] + 1
        else:
            counts.append((number, 1))
    return tuple(count for _, count in counts)
