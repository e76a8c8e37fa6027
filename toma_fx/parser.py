"""A parser of command lines that says mistakes in one line, and what may have been meant."""

import argparse
import re
from collections.abc import Sequence
from typing import Any

from toma_fx.closest import did_you_mean

OPTION = re.compile(r"(?<=\s)--[\w-]+")
CHOICE = re.compile(r"invalid choice: '([^']*)' \(choose from (.*)\)$")


class Parser(argparse.ArgumentParser):
    """Options are written out in full, and a mistake ends with status 2 and one line."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**{"allow_abbrev": False, **options})

    def parse_known_args(  # type: ignore[override]
        self, args: Sequence[str] | None = None, namespace: argparse.Namespace | None = None
    ) -> tuple[argparse.Namespace, list[str]]:
        """As argparse does; the command that does not know an option is the one that says so."""
        found, rest = super().parse_known_args(args, namespace)
        if rest:
            word = rest[0].partition("=")[0]
            known = OPTION.findall(self.format_help()) if word.startswith("-") else []
            kind = "option" if word.startswith("-") else "argument"
            self.error(f"unknown {kind} {rest[0]}{did_you_mean(word, known)}")
        return found, rest

    def error(self, message: str) -> Any:
        """End with one line."""
        if found := CHOICE.search(message):
            choices = re.findall(r"'([^']*)'|([^', ]+)", found[2])
            message += did_you_mean(found[1], ["".join(each) for each in choices])
        self.exit(2, f"{self.prog}: {message} (see {self.prog} --help)\n")
