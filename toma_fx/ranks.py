"""Ranks of context parallelism that share an image: the tokens that each rank holds.

Diffusers splits the image tokens, in any order, into runs of nearly equal length. By then they are
in token order, so each rank holds a compact part of the image and merges its own tokens. Diffusers
may split arguments that have a row per token before the model sees them; here the split waits until
the rows are in token order.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from toma_fx.calls import Arguments
from toma_fx.errors import InputError, ModelError
from toma_fx.families.rows import Family
from toma_fx.recipe import Recipe
from toma_fx.runtime import regions

RANKS_HOOK = "cp_input---"
"""Diffusers' name for the hook that splits the arguments of the model itself."""


class Ranks:
    """The ranks that share a model, including the rank of this process.

    Args:
        config: config of diffusers' context parallelism, already set up.
        arguments: arguments of the model with a row per token, and how to split each.
    """

    def __init__(self, config: Any, arguments: Mapping[str, Any]) -> None:
        self.rank: int = config._flattened_mesh.get_local_rank()
        self.count: int = config._flattened_mesh.size()
        self.uneven: bool = config.ulysses_anything or config.ring_anything
        self.arguments = dict(arguments)
        self._config = config

    def hook(self) -> Any:
        """Return diffusers' hook that splits those arguments before the model's forward."""
        from diffusers.hooks.context_parallel import ContextParallelSplitHook

        return ContextParallelSplitHook(self.arguments, self._config)

    def split(self, call: Arguments) -> Arguments:
        """Return a call with this rank's rows of the arguments that have a row per token."""
        given = [name for name in self.arguments if call.get(name) is not None]
        if not given:
            return call
        hook = self.hook()
        mine = {name: hook._prepare_cp_input(call[name], self.arguments[name]) for name in given}
        return {**call, **mine}


class Part(NamedTuple):
    """Image tokens of a rank."""

    unmerged: int
    """Number of tokens at the start that stay unmerged."""
    segments: tuple[int, ...]
    """Tokens of each segment after those."""

    def kept(self, region_tokens: int, ratio: float) -> int:
        """Return the number of tokens after merging."""
        return self.unmerged + regions.kept(regions.layout(self.segments, region_tokens, ratio))


def parts(unmerged: int, segments: Sequence[int], count: int) -> list[Part]:
    """Return the part of an image that each rank holds.

    Args:
        unmerged: number of image tokens at the start that stay unmerged.
        segments: tokens of each segment after those.
        count: number of ranks.

    >>> parts(0, [4, 8], 2), parts(4, [8], 2)
    ([Part(unmerged=0, segments=(4, 2)), Part(unmerged=0, segments=(6,))], \
[Part(unmerged=4, segments=(2,)), Part(unmerged=0, segments=(6,))])
    """
    short, longer = divmod(unmerged + sum(segments), count)
    made, start = [], 0
    for rank in range(count):
        end = start + short + (rank < longer)
        made.append(_part(unmerged, segments, start, end))
        start = end
    return made


def _part(unmerged: int, segments: Sequence[int], start: int, end: int) -> Part:
    pieces, first = [], 0
    for tokens in (unmerged, *segments):
        pieces.append(max(0, min(end, first + tokens) - max(start, first)))
        first += tokens
    return Part(pieces[0], tuple(each for each in pieces[1:] if each))


def part_of(unmerged: int, segments: Sequence[int], ranks: Ranks, recipe: Recipe) -> Part:
    """Return the part of an image that this rank holds.

    Raises:
        InputError: when ranks would hold different numbers of tokens, while their attention takes
            only equal numbers.
    """
    each = parts(unmerged, segments, ranks.count)
    if ranks.uneven:
        return each[ranks.rank]
    for ratio in {block.ratio for block in recipe.merged}:
        kept = [part.kept(recipe.config.region_tokens, ratio) for part in each]
        if len(set(kept)) > 1:
            raise InputError(
                f"after merging, the ranks hold {', '.join(map(str, kept))} tokens of this image, "
                "but their attention takes equal numbers; allow any number: "
                f"ContextParallelConfig(ulysses_degree={ranks.count}, ulysses_anything=True)"
            )
    return each[ranks.rank]


def check_family(family: Family) -> None:
    """Refuse ranks for a model if a rank cannot know how many text tokens it holds.

    Raises:
        ModelError: when image and text are one sequence in the model's blocks.
    """
    if any(block.flow.joint for block in family.blocks):
        raise ModelError(
            f"blocks of {family.title} hold image and text in one sequence, and how many tokens of "
            "each a rank of context parallelism has is not known; use tensor parallelism "
            "(TensorParallelConfig), or let the ranks share the model without merging: "
            "toma_fx.restore(model)"
        )
