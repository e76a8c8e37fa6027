"""Checks of a command's options that come before anything is loaded, drawn or timed."""

import argparse
import os
from pathlib import Path

from toma_fx.errors import ConfigError
from toma_fx.option_values import count


def check_counts(options: argparse.Namespace, *names: str) -> None:
    """Refuse counts below 1; a name may hold several, or None.

    Raises:
        ConfigError: for the first of them.
    """
    for name in names:
        given = getattr(options, name, None)
        for number in given if isinstance(given, list) else [given]:
            if number is not None:
                count(name, number, 1)


def check_out(out: Path | None, *, folder: bool) -> None:
    """Refuse a file or folder that could not be written, before work whose result would be lost.

    Args:
        out: the value of ``--out``, which need not be there.
        folder: whether it names a folder, and not a file.

    Raises:
        ConfigError: when it is of the other kind, or cannot be written.
    """
    if out is None:
        return
    kinds = ("file", "folder") if folder else ("folder", "file")
    if out.exists() and out.is_dir() != folder:
        raise ConfigError(f"out={str(out)!r} is a {kinds[0]}; name a {kinds[1]}")
    path = out.absolute()
    there = next(each for each in (path, *path.parents) if each.exists())
    if there != path and not there.is_dir():
        raise ConfigError(f"out={str(out)!r} cannot be made, since {str(there)!r} is a file")
    if not os.access(there, os.W_OK):
        raise ConfigError(f"out={str(out)!r} cannot be written: {str(there)!r} allows no writing")
