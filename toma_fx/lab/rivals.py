"""Rivals: the tomesd package, and Python files that add others (``--rival FILE``).

A rival's file defines ``apply(pipeline, ratio)``, which changes a diffusers pipeline in place and
returns a function that undoes the change; ``NAME`` is the name in tables, the file's own when left
out. ``examples/rivals/`` holds two.
"""

import sys
from collections.abc import Callable
from contextlib import ExitStack
from hashlib import sha256
from importlib import import_module, metadata
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

import torch

from toma_fx.errors import ConfigError, ModelError
from toma_fx.lab.variants import FewerSteps, Merging, Rival, parse_variant
from toma_fx.schedule import Schedule

RIVALS = Path(__file__).resolve().parents[2] / "examples" / "rivals"
"""Files of the repository; a wheel holds none."""
TOMESD = "tomesd"
TOMESD_OPTIONS: dict[str, Any] = {
    # Levels of the UNet that are merged, as the largest factor between the latents' side and a
    # level's. The package's own 1 leaves every SDXL block alone, because none is at the first.
    "max_downsample": 8,
    # All parts of a block, as toma_fx merges them. The package merges self-attention alone unless
    # told otherwise, which is about 15 % of SDXL's transformer arithmetic.
    "merge_attn": True,
    "merge_crossattn": True,
    "merge_mlp": True,
}
TOMESD_MOST = 0.75
"""One token of each 2 x 2 is always kept."""


def named_variant(text: str, *, schedule: Schedule | None = None) -> Merging | FewerSteps | Rival:
    """A variant as written on the command line: tomesd, a rival of the repository, or a preset.

    Args:
        text: ``"tomesd"``, the name of a file in ``examples/rivals/``, or as `parse_variant` takes.
        schedule: for every merging variant that does not name its own.

    Raises:
        ConfigError: when there is no such variant.
    """
    if text == TOMESD:
        return tomesd()
    file = RIVALS / f"{text}.py"
    return load_rival(file) if file.exists() else parse_variant(text, schedule=schedule)


def load_rival(path: str | Path) -> Rival:
    """A rival from a Python file.

    Raises:
        ConfigError: when there is no such file, or it defines no ``apply``.
    """
    path = Path(path)
    try:
        source = path.read_bytes()
    except OSError as error:
        raise ConfigError(f"rival={str(path)!r} cannot be read: {error.strerror}") from error
    # A module that can be found by name, which torch.compile looks for.
    name = f"toma_fx_rival_{path.stem}"
    spec = spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise ConfigError(f"rival={str(path)!r} must be a Python file, whose name ends with .py")
    module = sys.modules[name] = module_from_spec(spec)
    spec.loader.exec_module(module)
    defined = vars(module)
    if not callable(defined.get("apply")):
        raise ConfigError(
            f"rival={str(path)!r} must define apply(pipeline, ratio), which returns its undoing"
        )
    shown = str(defined.get("NAME", path.stem))
    return Rival(name=shown, apply=defined["apply"], source=sha256(source).hexdigest()[:16])


def tomesd() -> Rival:
    """Token merging for Stable Diffusion (Bolya and Hoffman, 2023), by its authors' package.

    Raises:
        ConfigError: when the package is not installed.
    """
    if find_spec(TOMESD) is None:
        raise ConfigError(f"variant={TOMESD!r} needs a package: pip install {TOMESD}")
    options = ", ".join(f"{name}={value}" for name, value in TOMESD_OPTIONS.items())
    source = f"{TOMESD} {metadata.version(TOMESD)} ({options})"
    return Rival(name=TOMESD, apply=_apply_tomesd, source=source)


def _apply_tomesd(pipeline: Any, ratio: float) -> Callable[[], None]:
    if not hasattr(pipeline, "unet"):
        raise ModelError(
            f"{TOMESD} merges in UNets, and {type(pipeline).__name__} has none; leave it out of "
            "--variants"
        )
    if ratio > TOMESD_MOST:
        raise ConfigError(f"ratio={ratio:g} is above {TOMESD_MOST}, the most that {TOMESD} merges")
    package: Any = import_module(TOMESD)
    stack = ExitStack()
    # It picks destinations at random and starts from the global state when an image begins. A
    # fixed state makes the same image each time; the caller's comes back at the end.
    stack.enter_context(torch.random.fork_rng())
    torch.manual_seed(0)
    package.apply_patch(pipeline, ratio=ratio, **TOMESD_OPTIONS)
    stack.callback(_remove_tomesd, package, pipeline)
    return stack.close


def _remove_tomesd(package: Any, pipeline: Any) -> None:
    package.remove_patch(pipeline)
    for module in pipeline.unet.modules():
        if hasattr(module, "_tome_info"):
            del module._tome_info  # holds the random state, which the next image must not reuse
