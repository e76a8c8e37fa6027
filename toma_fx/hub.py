"""Whether a model that is named can be there, before anything of it is loaded."""

import threading
import urllib.error
import urllib.request
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from toma_fx.closest import did_you_mean
from toma_fx.errors import ModelError

PATIENCE = 4.0
"""Seconds that the hub may take for a first answer."""


def check_there(name: str, known: Iterable[str] = ()) -> None:
    """Refuse a model that cannot be loaded, before torch is imported, which takes seconds.

    Args:
        name: a folder, ``owner/name`` on the hub, or one of ``known``.
        known: other names that are taken here, one of which could have been meant.

    Raises:
        ModelError: as `find` raises it.
    """
    known = tuple(known)
    if name not in known:
        find(name, known)


def _check_name(name: str, known: Iterable[str]) -> None:
    if name.count("/") != 1 or name.startswith((".", "/", "~")) or name.endswith("/"):
        raise ModelError(
            f"no model could be loaded from {name!r}: there is no such folder, and names on the "
            f"hub are OWNER/NAME{did_you_mean(name, known)}"
        )


def find(name: str, known: Iterable[str] = ()) -> dict[str, Any]:
    """Look for a model, and say how ``from_pretrained`` shall be called.

    diffusers asks a hub that cannot be reached again and again for more than a minute. Here it is
    asked once, for a few seconds, and files that were loaded before are used in its place.

    Args:
        name: a folder, or ``owner/name`` on the hub.
        known: other names that could have been meant.

    Returns:
        Keyword arguments of ``from_pretrained``.

    Raises:
        ModelError: when there is no such folder and the name is none of a hub, or the hub cannot be
            reached and nothing of the model is on this machine.
    """
    if Path(name).is_dir():
        return {"local_files_only": True}
    _check_name(name, known)
    from huggingface_hub import constants, try_to_load_from_cache

    if constants.HF_HUB_OFFLINE:
        why = "HF_HUB_OFFLINE is set"
    elif reason := _unreachable(constants.ENDPOINT):
        why = f"the hub, {constants.ENDPOINT}, cannot be reached: {reason}"
    else:
        return {}
    files = ("model_index.json", "config.json")
    if any(isinstance(try_to_load_from_cache(name, file), str) for file in files):
        return {"local_files_only": True}
    raise ModelError(
        f"no model could be loaded from {name!r}: there is no such folder, nothing of it was "
        f"loaded before, and {why}{did_you_mean(name, known)}"
    )


def first_line(error: Exception) -> str:
    """The first line of an error."""
    lines = (line.strip() for line in str(error).splitlines())
    return next(filter(None, lines), type(error).__name__)


def _unreachable(endpoint: str) -> str:
    """Why the hub gives no answer in time; empty when it gives one, whatever it says."""
    found: list[str] = [f"no answer within {PATIENCE:g} seconds"]

    def ask() -> None:
        request = urllib.request.Request(endpoint, method="HEAD")
        try:
            urllib.request.urlopen(request, timeout=PATIENCE).close()
            found.append("")
        except urllib.error.HTTPError:
            found.append("")  # which is an answer
        except urllib.error.URLError as error:
            found.append(str(getattr(error.reason, "strerror", None) or error.reason))
        except (OSError, ValueError) as error:
            found.append(str(error))

    # Names are resolved by the system, which keeps to no time limit of ours.
    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(PATIENCE)
    return found[-1]
