"""Calibrations as small JSON files that can be shared: on disk, in a folder, or on the hub.

A file says of which model it is, by a hash of its architecture, and at which steps and guidance its
images were drawn. It holds numbers, names and options, and no code; all of it is checked when it is
read.
"""

import inspect
import json
import math
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from hashlib import sha256
from pathlib import Path
from typing import Any, ClassVar, Self

import toma_fx
from toma_fx.config import MergeConfig, build_config
from toma_fx.errors import ConfigError, ModelError
from toma_fx.transform import model_of

FORMAT = 1
"""Of the files. A file without a number is of the time before there was one."""


@dataclass(frozen=True, kw_only=True)
class Origin:
    """The model and the run that a calibration was made with."""

    name: str
    """Name of the calibration."""
    model: str
    """The class of the model, such as ``UNet2DConditionModel``."""
    source: str
    """The hub name of its pipeline, or the last part of its folder's; empty when it had neither."""
    hash: str
    """Of the model's architecture: see `architecture_hash`."""
    steps: int | None
    """Timesteps of the last image that was drawn; ``None`` when the pipeline does not say."""
    guidance: float | None
    """Its ``guidance_scale``, likewise."""
    toma_fx: str
    """The version that made it."""


def origin_of(pipeline: Any, name: str) -> Origin:
    """The origin of a calibration with a pipeline that has just drawn.

    Args:
        pipeline: of diffusers.
        name: what the calibration is called; where it is empty, as the model is.
    """
    model = model_of(pipeline)
    given = str(getattr(pipeline, "name_or_path", None) or "")
    # Not the path of a machine: of a folder only its name is told.
    source = re.split(r"[/\\]", given.rstrip("/\\"))[-1] if _is_path(given) else given
    steps, guidance = (
        getattr(pipeline, name, None) for name in ("num_timesteps", "guidance_scale")
    )
    return Origin(
        name=name or source or type(model).__name__,
        model=type(model).__name__,
        source=source,
        hash=architecture_hash(model),
        steps=steps if isinstance(steps, int) else None,
        guidance=float(guidance) if isinstance(guidance, int | float) else None,
        toma_fx=toma_fx.__version__,
    )


def architecture_hash(model: Any) -> str:
    """A hash of a model's class and of its configuration, where that differs from the class's own.

    So weights, adapters, dtypes and folders do not count, nor do options that a newer diffusers
    adds. Models that differ in it have other blocks, or blocks of another size.
    """
    signature = inspect.signature(type(model).__init__).parameters
    config = {
        name: value
        for name, value in model.config.items()
        if name in signature and _plain(value) != _plain(signature[name].default)
    }
    told = json.dumps([type(model).__name__, config], sort_keys=True, default=str)
    return sha256(told.encode()).hexdigest()[:16]


@dataclass(frozen=True, kw_only=True)
class CalibrationFile:
    """Base of calibrations: they are saved, loaded, and checked against a model."""

    FILE: ClassVar[str]
    """The name of the file in a folder or repository."""

    base: MergeConfig
    """The options with which images were drawn, and that are not calibrated."""
    origin: Origin | None = None
    """The model and run of its making; ``None`` in one that an older toma_fx saved."""

    def save(self, file: str | Path) -> None:
        """Write it as JSON, for `load`."""
        Path(file).parent.mkdir(parents=True, exist_ok=True)
        content = {"kind": type(self).__name__, "format": FORMAT, **asdict(self)}
        Path(file).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")

    def save_pretrained(self, folder: str | Path) -> None:
        """Write it into a folder, for `from_pretrained`; ``hf upload`` takes the folder to the hub.

        Args:
            folder: is made where there is none. The file in it is named after the kind of
                calibration, ``calibration.json`` or ``theta.json``, so that it holds one of each.
        """
        self.save(Path(folder) / self.FILE)

    @classmethod
    def load(cls, file: str | Path) -> Self:
        """Read a file that `save` wrote.

        Raises:
            ConfigError: when there is no such file, or it holds something else.
        """
        try:
            return cls._from_json(Path(file).read_text(encoding="utf-8"))
        except FileNotFoundError:
            why = "there is no such file"
        except UnicodeDecodeError:
            why = "it is not text"
        except OSError as error:
            why = f"it cannot be read ({error.strerror})"
        except json.JSONDecodeError as error:
            why = f"it is not JSON ({error.msg} in line {error.lineno}, column {error.colno})"
        except (ForeignError, ConfigError) as error:
            why = str(error)
        raise ConfigError(
            f"{str(file)!r} is no calibration that toma_fx saved: {why}; give a file of "
            f"{cls.__name__}.save, or make one with toma_fx.{cls._MAKER}"
        )

    @classmethod
    def from_pretrained(
        cls,
        name: str | Path,
        *,
        model: Any = None,
        filename: str | None = None,
        revision: str | None = None,
        token: str | bool | None = None,
        cache_dir: str | Path | None = None,
        local_files_only: bool = False,
    ) -> Self:
        """Read the file that `save_pretrained` wrote, from a folder or a repository of the hub.

        Args:
            name: a folder, or a hub name such as ``"owner/name"``.
            model: a pipeline or model that it must fit; see `check`.
            filename: the file in it, where its name is not the one of `save_pretrained`.
            revision: of the repository: a branch, a tag or a commit.
            token: for a repository that is not public, as huggingface_hub takes it.
            cache_dir: where huggingface_hub keeps files, if not in its own place.
            local_files_only: take the file from there, and do not ask the hub.

        Raises:
            ConfigError: when there is no such folder, repository, revision or file, or the file is
                no calibration.
            ModelError: when it is one of another model.
        """
        filename = filename or cls.FILE
        if Path(name).is_dir():
            file = Path(name) / filename
        else:
            file = Path(
                _download(
                    str(name),
                    filename,
                    revision=revision,
                    token=token,
                    cache_dir=cache_dir,
                    local_files_only=local_files_only,
                )
            )
        found = cls.load(file)
        if model is not None:
            found.check(model)
        return found

    def check(self, model: Any) -> None:
        """Refuse a model that it was not made with.

        Models with the same class and architecture pass, whatever their weights are.

        Args:
            model: a pipeline of diffusers or a model, transformed or not.

        Raises:
            ModelError: when the architecture is another one, or the file does not say which.
        """
        denoiser = model_of(model)
        name, found = type(denoiser).__name__, architecture_hash(denoiser)
        if self.origin is None:
            raise ModelError(
                f"this calibration was saved by a toma_fx that noted no model, so it cannot be "
                f"checked against this {name}; leave the check out, or calibrate again with "
                f"toma_fx.{self._MAKER}"
            )
        if found != self.origin.hash:
            source = f" of {self.origin.source!r}" if self.origin.source else ""
            raise ModelError(
                f"the calibration {self.origin.name!r} was made with a {self.origin.model}{source} "
                f"of architecture {self.origin.hash}, and this {name} has architecture {found}; "
                f"take a calibration of this model, or make one with toma_fx.{self._MAKER}"
            )

    _MAKER: ClassVar[str]
    """The function that makes one."""

    @classmethod
    def _from_json(cls, text: str) -> Self:
        content = mapping("content", _parse(text))
        kind, version = content.pop("kind", cls.__name__), content.pop("format", FORMAT)
        if kind != cls.__name__:
            raise ForeignError(f"it holds a {kind}, and a {cls.__name__} was expected")
        if version != FORMAT:
            raise ForeignError(
                f"it has format {version}, and toma_fx {toma_fx.__version__} reads {FORMAT}"
            )
        origin = content.pop("origin", None)
        expected = [field.name for field in fields(cls) if field.name != "origin"]
        for name in expected:
            if name not in content:
                raise ForeignError(f"it lacks {name!r}")
        for name in content:
            if name not in expected:
                raise ForeignError(f"it holds {name!r}, which a {cls.__name__} does not have")
        base = build_config(**mapping("base", content.pop("base")))
        rest = cls._fields_of(content)
        return cls(base=base, origin=None if origin is None else _origin(origin), **rest)

    @classmethod
    def _fields_of(cls, content: dict[str, Any]) -> dict[str, Any]:
        """The fields beside ``base`` and ``origin``, checked."""
        raise NotImplementedError


def kind_of(file: Path) -> str:
    """The class of the calibration in a file; empty where none can be read."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return ""
    return str(content.get("kind", "")) if isinstance(content, dict) else ""


class ForeignError(ValueError):
    """The fault of a file, as the middle of a sentence."""


def mapping(name: str, value: object) -> dict[str, Any]:
    """A dictionary of a file; whatever else is refused, by its name in there."""
    if not isinstance(value, dict):
        raise ForeignError(f"its {name} must be a dictionary, not {json.dumps(value)[:40]}")
    return value


def numbers(name: str, value: object, keys: Mapping[str, Any] | None = None) -> dict[Any, Any]:
    """A dictionary with numbers as values: by numbers, or by ``keys`` when they are given."""
    given = mapping(name, value)
    if keys is not None and given.keys() != keys.keys():
        raise ForeignError(f"its {name} must be of {', '.join(keys)}, not of {', '.join(given)}")
    for each in given.values():
        if isinstance(each, bool) or not isinstance(each, int | float) or not math.isfinite(each):
            raise ForeignError(f"its {name} must be numbers, not {json.dumps(each)[:40]}")
    if keys is not None:
        return given
    try:
        return {float(key): each for key, each in given.items()}
    except ValueError as error:
        raise ForeignError(f"its {name} must be by numbers, not by {', '.join(given)}") from error


def strings(name: str, value: object) -> tuple[str, ...]:
    """A list of strings."""
    if not isinstance(value, list) or not all(isinstance(each, str) for each in value):
        raise ForeignError(f"its {name} must be a list of strings, not {json.dumps(value)[:40]}")
    return tuple(value)


def _parse(text: str) -> Any:
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ForeignError("it is nested deeper than any calibration") from error


def _origin(value: object) -> Origin:
    given = mapping("origin", value)
    kinds: dict[str, Any] = dict.fromkeys(("name", "model", "source", "hash", "toma_fx"), str)
    kinds |= {"steps": int | None, "guidance": int | float | None}
    for name, kind in kinds.items():
        if name not in given or not isinstance(given[name], kind):
            raise ForeignError(f"its origin lacks {name!r}, or holds there what it cannot be")
    return Origin(**{name: given[name] for name in kinds})


def _plain(value: object) -> str:
    """A value as JSON, in which a tuple is a list."""
    return json.dumps(value, sort_keys=True, default=str)


def _is_path(name: str) -> bool:
    return Path(name).exists() or re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name) is None


def _download(name: str, filename: str, **options: Any) -> str:
    """The path of a repository's file in huggingface_hub's cache.

    Raises:
        ConfigError: when there is none.
    """
    from huggingface_hub import errors, hf_hub_download  # which takes half a second

    revision = options["revision"] or "main"
    try:
        return str(hf_hub_download(name, filename, library_name="toma_fx", **options))
    except errors.HFValidationError as error:
        raise ConfigError(
            f"{name!r} is neither a folder here nor the name of a hub repository; give a folder "
            'that save_pretrained wrote, or a name such as "owner/name"'
        ) from error
    except errors.GatedRepoError as error:
        why, fix = "is given only to those who accept its terms", "accept them, and give token="
        raise _no_file(name, why, fix) from error
    except errors.RepositoryNotFoundError as error:
        why, fix = "is no hub repository that this token can see", "mend the name, or give token="
        raise _no_file(name, why, fix) from error
    except errors.RevisionNotFoundError as error:
        raise _no_file(name, f"has no revision {revision!r}", "give another revision=") from error
    except errors.LocalEntryNotFoundError as error:
        why = (
            f"is no folder here, huggingface_hub's cache has no {filename!r} of its revision "
            f"{revision!r}, and the hub was not asked or not reached"
        )
        fix = "leave out local_files_only and HF_HUB_OFFLINE, and see that the hub can be reached"
        raise _no_file(name, why, fix) from error
    except errors.EntryNotFoundError as error:
        raise _no_file(name, f"holds no {filename!r}", "give the file's filename=") from error
    except OSError as error:
        said = (str(error).splitlines() or [type(error).__name__])[0]
        raise _no_file(name, f"could not be read ({said})", "try again") from error


def _no_file(name: str, why: str, fix: str) -> ConfigError:
    return ConfigError(f"{name!r} {why}; {fix}, or give a folder that save_pretrained wrote")
