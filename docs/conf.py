"""How Sphinx makes the site of the documentation: ``make docs``."""

import re
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import toma_fx  # noqa: E402

project = "toma_fx"
version = release = toma_fx.__version__
extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx_copybutton",
]
html_theme = "furo"
html_title = f"toma_fx {release}"
exclude_patterns = ["_build"]

myst_enable_extensions = ["colon_fence"]
myst_heading_anchors = 4
myst_links_external_new_tab = True

# Docstrings are Google's, and their single backquotes name objects.
default_role = "any"
autodoc_member_order = "bysource"
autodoc_typehints = "description"
napoleon_use_rtype = False
# Torch is not described here, and parts of the package that are not public are named in prose.
nitpicky = False
suppress_warnings = ["ref.any"]


def setup(app: Any) -> None:
    """Called by Sphinx."""
    app.connect("missing-reference", _as_code)
    app.connect("source-read", _name_files)


def _name_files(app: Any, page: str, source: list[str]) -> None:
    """Links to files of the repository, which the site does not hold, become names of files."""

    def named(link: re.Match[str]) -> str:
        text, file = link.groups()
        return f"{text} (`{file}`)" if (ROOT / file).exists() else link[0]

    source[0] = re.sub(r"\[([^\]]+)\]\(\.\./([^)#]+)(?:#[^)]*)?\)", named, source[0])


def _as_code(app: Any, env: Any, node: Any, content: Any) -> Any:
    """A name that the site does not describe stays what it is, as code."""
    return content if node.get("reftype") == "any" else None
