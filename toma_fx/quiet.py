"""Suppression of messages from the libraries."""

from typing import Any


def hush_libraries() -> None:
    """Turn off progress bars of loading, and transformers' notes on packages that are missing."""
    import diffusers
    import transformers

    for library in (diffusers, transformers):
        log: Any = library.utils.logging
        log.disable_progress_bar()
    log.set_verbosity_error()
