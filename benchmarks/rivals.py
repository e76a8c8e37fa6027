"""Rivals: the tomesd package, and Python files that add others; and their time beside ours.

    python -m benchmarks.rivals sdxl --rival tomesd todo path/to/another.py

A rival's file defines ``apply(pipeline, ratio)``, which changes a diffusers pipeline in place and
returns a function that undoes the change; ``NAME`` is the name in tables, the file's own when left
out. ``examples/rivals/`` holds two.
"""

import argparse
import functools
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from hashlib import sha256
from importlib import import_module, metadata
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

import diffusers
import torch
from torch import nn

from benchmarks.options import command_options
from benchmarks.real_size import RealSize
from toma_fx.arithmetic import Call, count
from toma_fx.bench.cli import add_timing
from toma_fx.bench.command import setting_of, show
from toma_fx.bench.compare import compare
from toma_fx.bench.contenders import Setting, load, twin
from toma_fx.bench.levels import models
from toma_fx.bench.timing import Contender
from toma_fx.errors import ConfigError, ModelError
from toma_fx.lab import contenders as lab
from toma_fx.transform import model_of
from toma_fx.variants import FewerSteps, Merging, parse_variant

RIVALS = Path(__file__).resolve().parents[1] / "examples" / "rivals"
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


@dataclass(frozen=True, kw_only=True)
class Rival:
    """Another way to save arithmetic, from a Python file or package."""

    name: str
    apply: Callable[[Any, float], Callable[[], None]]
    """Changes a pipeline in place for a ratio, and returns a function that undoes the change. It is
    called before every image, so that no image depends on those before it."""
    source: str
    """Fingerprint of the code: images of other code are not mixed with these."""

    def contender(self, pipeline: Any, ratio: float, steps: int, call: Call) -> lab.Contender:
        """The rival at one ratio, as `toma_fx.lab.contenders.contend` asks for it."""
        untouched = count(model_of(pipeline), call)
        with self.changed(pipeline, ratio):  # on real tensors: a rival may look at their values
            operations = count(model_of(pipeline), call, data=True)
        return lab.Contender(
            variant=self.name,
            ratio=ratio,
            steps=steps,
            arithmetic=operations / untouched,
            identity=f"{self.name} {self.source}",
            changed=lambda: self.changed(pipeline, ratio),
        )

    def real_share(self, ratio: float, real: RealSize) -> float:
        """The arithmetic of the real UNet's call, relative to untouched (lower is cheaper).

        Args:
            ratio: of the rival.
            real: the real model's call.
        """
        unet, inputs = real.model, real.inputs()
        call = Call((inputs.pop("sample"),), inputs)  # by position, where rivals' hooks look
        untouched = count(unet, call)
        with self.changed(BarePipeline(unet=unet), ratio):
            # The tensors have no data, and the rival's hooks must be there when the call is made.
            return count(unet, call, data=True) / untouched

    @contextmanager
    def changed(self, pipeline: Any, ratio: float) -> Iterator[None]:
        """The pipeline changed for a ratio, and as it was after."""
        undo = self.apply(pipeline, ratio)
        try:
            yield
        finally:
            undo()


def named_variant(text: str) -> Merging | FewerSteps | Rival:
    """A variant as written on the command line: tomesd, a rival of the repository, or a preset.

    Args:
        text: ``"tomesd"``, the name of a file in ``examples/rivals/``, or as `parse_variant` takes.

    Raises:
        ConfigError: when there is no such variant.
    """
    known = text == TOMESD or (RIVALS / f"{text}.py").exists()
    return named_rival(text) if known else parse_variant(text)


def named_rival(name: str) -> Rival:
    """The tomesd package, or a rival of the repository by the name of its file.

    Raises:
        ConfigError: when there is no such rival.
    """
    return tomesd() if name == TOMESD else load_rival(RIVALS / f"{name}.py")


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
            "--variant"
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


def _repeated(model: Any) -> Iterator[nn.Module]:
    """The blocks for ``compile_repeated_blocks``, by any name that a rival gave their class."""
    for module in model.modules():
        if any(cls.__name__ in model._repeated_blocks for cls in type(module).__mro__):
            yield module


class BarePipeline(diffusers.DiffusionPipeline):  # type: ignore[misc]
    """A pipeline that holds only a denoising model, because rivals expect to change a pipeline."""

    def __init__(self, **model: nn.Module) -> None:
        super().__init__()
        self.register_modules(**model)


def rival_contenders(
    rivals: Sequence[Rival],
    model: nn.Module,
    setting: Setting,
    call: Callable[[nn.Module], object],
) -> Iterator[Contender]:
    """Rivals as they are, and compiled where they can be; graph breaks are allowed.

    Args:
        rivals: in the order of the table.
        model: an untouched model, which stays untouched.
        setting: ratios, and whether to compile.
        call: a function that calls a given model.
    """
    part = "unet" if isinstance(model, diffusers.UNet2DConditionModel) else "transformer"
    undo: list[Any] = []  # held, because a context that is collected closes itself

    def runner(rival: Rival, ratio: float, compiled: bool) -> Callable[[], object]:
        @functools.cache
        def changed() -> nn.Module:
            copied = twin(model)
            undo.append(rival.apply(BarePipeline(**{part: copied}), ratio))
            if compiled:
                for block in _repeated(copied):
                    block.compile(dynamic=False)
            return copied

        return lambda: call(changed())

    for ratio in setting.ratios:
        for rival in rivals:
            for compiled in (False, True) if setting.compiled else (False,):
                yield Contender(
                    name=f"{rival.name}, {'compiled' if compiled else 'eager'}",
                    run=runner(rival, ratio, compiled),
                    ratio=ratio,
                    compiled=compiled,
                    optional=True,
                )


def main(arguments: Sequence[str] | None = None) -> None:
    """Time one forward of a model with the rivals, beside ours."""
    parser = argparse.ArgumentParser(description="Time rivals beside merging, one forward each.")
    parser.add_argument("model", help="sdxl, or a folder or hub name")
    parser.add_argument("--rival", nargs="+", default=[TOMESD], help="tomesd, todo, tofu or a file")
    add_timing(parser)
    options = command_options(parser, "benchmarks.rivals", arguments)
    setting = setting_of(options)
    found = [
        tomesd() if name == TOMESD else load_rival(name if "." in name else RIVALS / f"{name}.py")
        for name in options.rival
    ]
    model = load(setting)
    rivals = functools.partial(rival_contenders, found, model, setting)
    tables = (
        compare(timed, setting, title=setting.label)
        for timed in models(model, setting, rivals=rivals)
    )
    show(tables, options)


if __name__ == "__main__":
    main()
