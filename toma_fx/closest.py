"""The name that someone may have meant."""

from collections.abc import Iterable
from difflib import get_close_matches


def did_you_mean(word: object, names: Iterable[str]) -> str:
    """The end of a message about a name that there is not; empty when none is like it.

    >>> did_you_mean("stipe", ["tile", "stripe"]), did_you_mean("x", ["tile"])
    ('; did you mean stripe?', '')
    """
    found = get_close_matches(str(word), list(names), n=1)
    return f"; did you mean {found[0]}?" if found else ""
