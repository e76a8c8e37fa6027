"""Families of models: one file each, with all that toma_fx knows about them.

A family is looked up by the qualified name of a model's class, and its file is imported on a match;
by then the model's owner has imported diffusers already. A new family needs a file and a line here.
"""

from collections.abc import Iterable
from importlib import import_module
from typing import TYPE_CHECKING, Any

from toma_fx.errors import ModelError

if TYPE_CHECKING:
    from torch import nn

    from toma_fx.families.rows import Block, Family

_HUNYUAN = "diffusers.models.transformers.transformer_hunyuan"

MODELS = {
    "diffusers.models.unets.unet_2d_condition.UNet2DConditionModel": "unet",
    "diffusers.models.transformers.transformer_flux.FluxTransformer2DModel": "flux",
    "diffusers.models.transformers.transformer_flux2.Flux2Transformer2DModel": "flux2",
    "diffusers.models.transformers.transformer_qwenimage.QwenImageTransformer2DModel": "qwen_image",
    "diffusers.models.transformers.transformer_z_image.ZImageTransformer2DModel": "z_image",
    "diffusers.models.transformers.transformer_wan.WanTransformer3DModel": "wan",
    "diffusers.models.transformers.transformer_wan_vace.WanVACETransformer3DModel": "wan_vace",
    "diffusers.models.transformers.transformer_sd3.SD3Transformer2DModel": "sd3",
    "diffusers.models.transformers.transformer_chroma.ChromaTransformer2DModel": "chroma",
    f"{_HUNYUAN}_video.HunyuanVideoTransformer3DModel": "hunyuan_video",
    f"{_HUNYUAN}_video15.HunyuanVideo15Transformer3DModel": "hunyuan_video15",
    f"{_HUNYUAN}image.HunyuanImageTransformer2DModel": "hunyuan_image",
    "diffusers.models.transformers.pixart_transformer_2d.PixArtTransformer2DModel": "pixart",
    "diffusers.models.transformers.transformer_ltx.LTXVideoTransformer3DModel": "ltx",
    "diffusers.models.transformers.cogvideox_transformer_3d.CogVideoXTransformer3DModel": (
        "cogvideox"
    ),
    "diffusers.models.transformers.transformer_ltx2.LTX2VideoTransformer3DModel": "ltx2",
    "diffusers.models.transformers.transformer_krea2.Krea2Transformer2DModel": "krea2",
    "diffusers.models.transformers.transformer_cosmos.CosmosTransformer3DModel": "cosmos",
    "diffusers.models.transformers.transformer_flux3.Flux3Transformer2DModel": "flux3",
}
"""File of a model's family, by the qualified name of the model's class."""


def load_family(name: str) -> "Family":
    """Return the family in the file of that name."""
    family: Family = import_module(f"toma_fx.families.{name}").FAMILY
    return family


def all_families() -> "list[Family]":
    """Return every family; this imports them all."""
    return [load_family(file) for file in dict.fromkeys(MODELS.values())]


def load_block(family: str, cls: str) -> "Block":
    """Return a family's row for a block class; other families may have the same class."""
    return next(row for row in load_family(family).blocks if row.cls == cls)


def find_family(names: Iterable[str]) -> "Family | None":
    """Return the family of the first class name that has one; None if none has."""
    files = (MODELS[name] for name in names if name in MODELS)
    file = next(files, None)
    return None if file is None else load_family(file)


def knows(model: object) -> bool:
    """Return whether an object is a model of a known family."""
    return any(_name(cls) in MODELS for cls in type(model).__mro__)


def family_of(model: "nn.Module") -> "Family":
    """Return the family of a model; for a transformed model, that of its recipe.

    Raises:
        ModelError: when the model's family is unknown.
    """
    recipe = getattr(model, "toma_recipe", None)
    if recipe is not None:
        given: Family = recipe.family
        return given
    family = find_family(map(_name, type(model).__mro__))
    if family is not None:
        return family
    known = ", ".join(name.rpartition(".")[2] for name in MODELS)
    raise ModelError(
        f"{type(model).__name__} is not a model that toma_fx knows; it knows {known}. Pass one of "
        "them, or add a file for yours to toma_fx/families, as CONTRIBUTING.md says"
    )


def _name(cls: Any) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"
