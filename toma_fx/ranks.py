"""One image among the ranks of context parallelism: which of its tokens a rank holds.

Diffusers splits the image tokens into runs of nearly equal length, in whatever order they are.
They are in token order by then, so each rank holds a compact part of the image, and merges among
its own tokens. What a model takes with a row for each token, diffusers may split before the model
sees it; here that waits until the rows are in token order.
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
    """The ranks that share a model, and the one of this process.

    Args:
        config: of diffusers' context parallelism, set up.
        arguments: of the model that have a row for each token, with the way to split them.
    """

    def __init__(self, config: Any, arguments: Mapping[str, Any]) -> None:
        self.rank: int = config._flattened_mesh.get_local_rank()
        self.count: int = config._flattened_mesh.size()
        self.uneven: bool = config.ulysses_anything or config.ring_anything
        self.arguments = dict(arguments)
        self._config = config

    def hook(self) -> Any:
        """Diffusers' hook that splits those arguments, for a model that has them split outside."""
        from diffusers.hooks.context_parallel import ContextParallelSplitHook

        return ContextParallelSplitHook(self.arguments, self._config)

    def split(self, call: Arguments) -> Arguments:
        """A call with this rank's rows of what has one for each token."""
        given = [name for name in self.arguments if call.get(name) is not None]
        if not given:
            return call
        hook = self.hook()
        mine = {name: hook._prepare_cp_input(call[name], self.arguments[name]) for name in given}
        return {**call, **mine}


class Part(NamedTuple):
    """The image tokens of a rank."""

    unmerged: int
    """Tokens, from the first, that stay as they are."""
    segments: tuple[int, ...]
    """Tokens of each segment behind those."""

    def kept(self, region_tokens: int, ratio: float) -> int:
        """Tokens after merging."""
        return self.unmerged + regions.kept(regions.layout(self.segments, region_tokens, ratio))


def parts(unmerged: int, segments: Sequence[int], count: int) -> list[Part]:
    """What each rank holds of an image.

    Args:
        unmerged: image tokens, from the first, that stay as they are.
        segments: tokens of each segment behind those.
        count: of the ranks.

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
    """What this rank holds of an image.

    Raises:
        InputError: when ranks would be left with unlike numbers of tokens, and their attention
            takes only equal ones.
    """
    each = parts(unmerged, segments, ranks.count)
    if ranks.uneven:
        return each[ranks.rank]
    for ratio in {block.ratio for block in recipe.merged}:
        kept = [part.kept(recipe.config.region_tokens, ratio) for part in each]
        if len(set(kept)) > 1:
            raise InputError(
                f"merged, the ranks hold {', '.join(map(str, kept))} tokens of this image, and "
                "their attention takes equal numbers; let it take any: "
                f"ContextParallelConfig(ulysses_degree={ranks.count}, ulysses_anything=True)"
            )
    return each[ranks.rank]


def check_family(family: Family) -> None:
    """Refuse ranks for a model of which a rank does not know how many words it holds.

    Raises:
        ModelError: when image and text are one sequence in its blocks.
    """
    if any(block.flow.joint for block in family.blocks):
        raise ModelError(
            f"blocks of {family.title} hold image and text in one sequence, and how many of each a "
            "rank of context parallelism has is not known; use tensor parallelism "
            "(TensorParallelConfig), or let the ranks share the model without merging: "
            "toma_fx.restore(model)"
        )
