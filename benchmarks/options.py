"""Code that the command lines of the benchmarks share."""

import argparse
import shlex
import sys
from collections.abc import Sequence

from toma_fx.quiet import hush_libraries


def command_options(
    parser: argparse.ArgumentParser, module: str, arguments: Sequence[str] | None
) -> argparse.Namespace:
    """Parsed options; their ``command`` holds the words that run the benchmark again.

    Args:
        parser: parser of all options but ``command``.
        module: name of the module that runs.
        arguments: words of the command line; those of the process when left out.
    """
    options = parser.parse_args(arguments)
    given = sys.argv[1:] if arguments is None else arguments
    options.command = shlex.join(["python", "-m", module, *given])
    hush_libraries()
    return options
