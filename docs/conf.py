"""How Sphinx makes the site of the documentation: ``make docs``."""

import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

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
suppress_warnings = ["ref.any", "myst.xref_missing"]


def setup(app: Any) -> None:
    """Called by Sphinx."""
    app.connect("missing-reference", _as_code)


def _as_code(app: Any, env: Any, node: Any, content: Any) -> Any:
    """A name that the site does not describe stays what it is, as code."""
    return content if node.get("reftype") == "any" else None
