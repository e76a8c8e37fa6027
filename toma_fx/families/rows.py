"""What a family says of its models: the types of the rows in each family's file.

Classes are named by their qualified names, so that a table of families needs no model's import.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from toma_fx.passes.plan_nodes import TokenFlow
from toma_fx.passes.sites import Site

LeafValue = Callable[..., Any]
"""Takes a submodule and the arguments of its call; gives an example of what it returns."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Block:
    """How one class of transformer block treats its tokens."""

    cls: str
    """Qualified name of the class."""
    sites: tuple[Site, ...]
    """What can be merged; the sites of one component before those of several."""
    flow: TokenFlow
    """Where tokens are, by the names of the block's arguments."""
    examples: Callable[[Any], dict[str, Any]]
    """Example arguments of a block, on the meta device. They decide the graph's branches."""
    masks: tuple[tuple[str, str], ...] = ()
    """Each attention mask argument, and the component that it goes to."""
    refused: tuple[str, ...] = ()
    """Attention kwargs that no merged block can carry."""
    refused_by_attention: tuple[str, ...] = ()
    """Attention kwargs that refer to single image tokens."""

    def __reduce__(self) -> Any:
        # Rows hold functions, so a pickle holds the name.
        from toma_fx.families import load_block

        return load_block, (self.cls,)


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
    enter: str
    """Path of the module that takes the tokens, in a graph that others captured."""
    leave: str
    """Path of the module that returns them."""
    positions: str
    """Path of the module that takes the ids of text and image."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Family:
    """A model class and the blocks in it."""

    name: str
    cls: str
    """Qualified name of the model's class."""
    title: str
    """What people call the models."""
    blocks: tuple[Block, ...]
    borders: tuple[Stage | TokenSequence, ...]
    """Where tokens come into token order and leave it."""
    attention_kwargs: str
    """The model's argument with the attention kwargs, which reach every block."""
    prompt: tuple[str, ...]
    """The model's arguments with the prompt's embeddings. The first tensor in those that are given
    tells one denoising run from another."""
    leaf_values: Mapping[str, LeafValue] = field(default_factory=dict)
    """By qualified class name, what a block's submodule returns where it is not tokens alone."""
    unmerged_by_default: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    """Blocks that stay unmerged unless ``skip`` says otherwise: of the list at a path, the first
    ``a`` of ``b``, and as large a share of a list of another length."""
    unmerged_because: str = ""
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
    image: Callable[[Mapping[str, Any]], Tensor]
    """The argument of a call that holds the image."""
    architectures: Mapping[str, Mapping[str, Any]]
    """Configurations of published models, by the names that the command line takes."""

    def block_row(self, cls: type[nn.Module]) -> Block | None:
        """The row of a block class, or of the first class that it derives from."""
        names = [qualified_name(base) for base in cls.__mro__]
        return next((row for row in self.blocks if row.cls in names), None)

    def __reduce__(self) -> Any:
        # Rows hold functions, so a pickle holds the name.
        from toma_fx.families import load_family

        return load_family, (self.name,)


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
