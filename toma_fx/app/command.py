"""``toma-fx app``: its options, and the server."""

import argparse
import os
import threading
from importlib.util import find_spec
from typing import Any

from toma_fx.choices import DTYPE_NAMES
from toma_fx.errors import ConfigError
from toma_fx.quiet import hush_libraries

SMALL = ("sdxl", "flux")
"""The repository's own pipelines, in the order of the page's list."""


def add_app(commands: Any) -> None:
    """Add the command to those of ``toma-fx``."""
    parser = commands.add_parser(
        "app",
        help="Show a page in the browser that draws an image untouched and merged, side by side.",
    )
    add = parser.add_argument
    add(
        "--model",
        nargs="+",
        metavar="NAME",
        help="folders or hub names of diffusers pipelines (default: the repository's small SDXL "
        "and Flux)",
    )
    add(
        "--dtype",
        choices=DTYPE_NAMES,
        help="dtype of the weights (default: bfloat16 on a GPU, float32 without one)",
    )
    add(
        "--host",
        default="127.0.0.1",
        help="address to listen at (default: 127.0.0.1, this machine alone)",
    )
    add("--port", type=int, help="port to listen at (default: the first free one from 7860)")
    parser.set_defaults(run=_app)


def _app(options: argparse.Namespace) -> None:
    if find_spec("gradio") is None:
        raise ConfigError("the app needs gradio, which is not here: pip install 'toma-fx[app]'")
    from toma_fx.hub import check_there

    models = options.model or _small_models()
    for each in models:
        check_there(each)
    hush_libraries()
    from toma_fx.app.compare import Studio
    from toma_fx.app.page import CSS, THEME, build_page

    page = build_page(Studio(models, dtype=options.dtype))
    try:
        _, url, _ = page.launch(
            server_name=options.host,
            server_port=options.port,
            share=False,
            ssr_mode=False,
            quiet=True,
            prevent_thread_lock=True,
            footer_links=[],
            theme=THEME,
            css=CSS,
        )
    except (OSError, OverflowError) as error:
        raise ConfigError(
            f"no page at host={options.host!r}, port={options.port!r}: {error}; "
            "give others: --host, --port"
        ) from error
    print(f"toma-fx app is at {url} until Ctrl+C", flush=True)
    try:
        threading.Event().wait()  # gradio's own wait takes Ctrl-C for itself
    finally:
        page.close(verbose=False)


def _small_models() -> list[str]:
    from toma_fx.lab.small_models import FOLDER

    found = [str(FOLDER / name) for name in SMALL if (FOLDER / name / "model_index.json").exists()]
    if not found:
        raise ConfigError(
            f"the small pipelines are in the repository, and {FOLDER} is not there; name one of "
            "yours: --model, a folder or hub name that diffusers can load"
        )
    here = os.getcwd()
    return [os.path.relpath(each, here) if each.startswith(here) else each for each in found]
