"""Less of what the libraries print."""

from typing import Any


def hush_libraries() -> None:
    """Leave out the progress of loading, and what transformers says of packages it does without."""
    import diffusers
    import transformers

    for library in (diffusers, transformers):
        log: Any = library.utils.logging
        log.disable_progress_bar()
    log.set_verbosity_error()
