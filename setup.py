"""The readme that a package index shows: README.md, whose links lead to files beside it there.

All else is in pyproject.toml. With a "Repository" among its URLs the links lead there; without one
only their text stays, and pictures are left out.
"""

import re
import tomllib
from pathlib import Path

from setuptools import setup

ROOT = Path(__file__).parent


def for_the_index(readme: str, repository: str | None) -> str:
    """The readme without a relative link.

    Args:
        readme: Markdown.
        repository: address of the web page under which files of the main branch are shown, as
            ``{repository}/blob/main/FILE``; ``None`` when there is none.
    """

    def replaced(link: re.Match[str]) -> str:
        picture, text, target = link.groups()
        if re.match(r"[a-z]+:|#", target):
            return link[0]
        if repository is None:
            return "" if picture else text
        return f"{picture}[{text}]({repository}/{'raw' if picture else 'blob'}/main/{target})"

    return re.sub(r"(!?)\[([^\]]*)\]\(([^)]+)\)", replaced, readme)


def main() -> None:
    """Called by setuptools."""
    urls = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]["urls"]
    readme = (ROOT / "README.md").read_text("utf-8")
    setup(
        long_description=for_the_index(readme, urls.get("Repository")),
        long_description_content_type="text/markdown",
    )


if __name__ == "__main__":
    main()
