"""Signs of life: a command says at least every ten seconds how far it is."""

import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

SECONDS = 10.0
"""Between two lines where standard error is no terminal."""


@contextmanager
def progress(what: str, total: int | None = None, unit: str = "") -> Iterator[Any]:
    """A bar on standard error, refreshed while one step of it takes long.

    On a terminal it is there at once, and gone at the end. Elsewhere, as in a log, it is first
    printed after ten seconds, and then as often.

    Args:
        what: is done.
        total: number of steps; without it, the bar shows the time alone.
        unit: name of a step.
    """
    from tqdm import tqdm

    here = sys.stderr.isatty()
    # In a log the last line stays, so that the next thing begins a line of its own.
    how: dict[str, Any] = {"desc": what, "total": total, "unit": unit, "leave": not here}
    how |= {"mininterval": 0.1} if here else {"mininterval": SECONDS, "delay": SECONDS}
    if total is None:
        how["bar_format"] = "{desc}: {elapsed}"
    ended = threading.Event()
    with tqdm(file=sys.stderr, **how) as bar:

        def refresh() -> None:
            while not ended.wait(1.0 if here else SECONDS):
                bar.refresh()

        thread = threading.Thread(target=refresh, daemon=True)
        thread.start()
        try:
            yield bar
        finally:
            ended.set()
            thread.join()
