"""The families of models: a file each, with all that toma_fx knows of them.

A family is looked up by the qualified name of a model's class, and its file is imported on a match;
whoever holds a model has imported diffusers already. A new family is a file, and a line here.
"""

from collections.abc import Iterable
from importlib import import_module
from typing import TYPE_CHECKING, Any

from toma_fx.errors import ModelError

if TYPE_CHECKING:
    from torch import nn

    from toma_fx.families.rows import Block, Family

MODELS = {
    "diffusers.models.unets.unet_2d_condition.UNet2DConditionModel": "unet",
    "diffusers.models.transformers.transformer_flux.FluxTransformer2DModel": "flux",
}
"""The file of a model's family, by the qualified name of the model's class."""

ARCHITECTURES = {"sdxl": "unet", "flux": "flux"}
"""The file of a family, by the names of published models that the command line takes."""


def load_family(name: str) -> "Family":
    """The family in the file of that name."""
    family: Family = import_module(f"toma_fx.families.{name}").FAMILY
    return family


def all_families() -> "list[Family]":
    """Every family; whoever asks has a reason to import them all."""
    return [load_family(file) for file in dict.fromkeys(MODELS.values())]


def load_block(cls: str) -> "Block":
    """The row of the block class with this qualified name."""
    return next(row for family in all_families() for row in family.blocks if row.cls == cls)


def find_family(names: Iterable[str]) -> "Family | None":
    """The family of the first qualified class name that has one, if any."""
    files = (MODELS[name] for name in names if name in MODELS)
    file = next(files, None)
    return None if file is None else load_family(file)


def knows(model: object) -> bool:
    """Whether an object is a model of a known family."""
    return any(_name(cls) in MODELS for cls in type(model).__mro__)


def family_of(model: "nn.Module") -> "Family":
    """The family of a model.

    Raises:
        ModelError: when the model is of no known family.
    """
    family = find_family(map(_name, type(model).__mro__))
    if family is not None:
        return family
    known = ", ".join(name.rpartition(".")[2] for name in MODELS)
    raise ModelError(
        f"{type(model).__name__} is not a model that toma_fx knows; it knows {known}. Pass one of "
        "them, or add a file for yours to toma_fx/families, as the README says"
    )


def _name(cls: Any) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"
