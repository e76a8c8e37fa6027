"""Models for reports and timing: a user's checkpoint, or a real architecture at real size.

Time does not depend on the weights, so random weights suffice if there is no checkpoint.
"""

from importlib import import_module
from typing import Any

import psutil
import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from toma_fx.errors import ModelError
from toma_fx.families import MODELS, all_families
from toma_fx.hub import find, first_line

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
"""Dtypes by their names on the command line."""

FAMILIES = {name: family for family in all_families() for name in family.architectures}
"""Family of each published model with a known architecture, by the model's name."""

RANDOM = tuple(FAMILIES)
"""Names of those models, which can have random weights."""


def model_class(name: str) -> tuple[Any, dict[str, Any]]:
    """Return the class of a published model and its configuration.

    Args:
        name: one of `RANDOM`.
    """
    family = FAMILIES[name]
    module, _, cls = family.cls.rpartition(".")
    return getattr(import_module(module), cls), dict(family.architectures[name])


def load_model(
    name: str, *, dtype: torch.dtype = torch.bfloat16, device: str = "cpu", **changes: Any
) -> nn.Module:
    """Load a denoising model for inference.

    Args:
        name: ``"sdxl"``, ``"flux"`` or another of `RANDOM` for random weights; otherwise a folder
            or hub name of a pipeline or its model, as ``from_pretrained`` takes it.
        dtype: dtype of the weights.
        device: device of the weights.
        **changes: changes of the configuration, for random weights only, such as ``num_layers=3``.

    Raises:
        ModelError: when there is neither a pipeline nor a model under that name.
    """
    import diffusers  # imported here because it takes seconds

    if name in RANDOM:
        cls, config = model_class(name)
        return random_weights(cls, {**config, **changes}, dtype, device)
    where = _located(name)
    try:
        model: nn.Module = diffusers.AutoModel.from_pretrained(name, torch_dtype=dtype, **where)
    except (OSError, ValueError) as error:
        raise ModelError(
            f"no model could be loaded from {name!r}: {first_line(error)}; give the name of a "
            "published model such as sdxl, or a folder or hub name of a diffusers pipeline or model"
        ) from error
    return model.to(device).eval().requires_grad_(False)


def load_pipeline(name: str, *, dtype: str = "float32", device: Any = None) -> Any:
    """A diffusers pipeline, ready to draw.

    Args:
        name: hub name, or folder as ``save_pretrained`` writes it.
        dtype: of the weights.
        device: the GPU when there is one, when left out.

    Raises:
        ModelError: when there is no pipeline under that name.
    """
    import diffusers  # which takes seconds

    how = find(name)
    try:
        pipeline = diffusers.DiffusionPipeline.from_pretrained(name, dtype=DTYPES[dtype], **how)
    except (OSError, ValueError) as error:
        raise ModelError(
            f"no pipeline could be loaded from {name!r}: {first_line(error)}; give a folder with a "
            "model_index.json, or the hub name of a diffusers pipeline"
        ) from error
    pipeline.set_progress_bar_config(disable=True)
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    return pipeline.to(device)


def _located(name: str) -> dict[str, Any]:
    """Return how ``from_pretrained`` finds a model, which may be a part of a pipeline."""
    import diffusers

    how = find(name, RANDOM)
    try:
        index = diffusers.DiffusionPipeline.load_config(name, **how)
        return {**how, "subfolder": next(part for part, cls in index.items() if _is_known(cls))}
    except (OSError, StopIteration):
        return how


def _saved_class(name: str) -> tuple[Any, dict[str, Any]] | None:
    """Return the class of a saved model and its configuration; None where they do not say it all.

    They do not where the weights are quantised, or where the class is none of diffusers.
    """
    import diffusers

    class ModelConfig(diffusers.ConfigMixin):  # type: ignore[misc]
        config_name = "config.json"

    try:
        config: dict[str, Any] = ModelConfig.load_config(name, **_located(name))
    except OSError:
        return None
    cls = getattr(diffusers, config.get("_class_name", ""), None)
    return None if cls is None or "quantization_config" in config else (cls, config)


def _is_known(entry: Any) -> bool:
    """Return whether an entry of a pipeline's index, (library, class), is a known model."""
    known = {name.rpartition(".")[2] for name in MODELS}
    return isinstance(entry, list | tuple) and len(entry) == 2 and entry[1] in known


def architecture(name: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    """Return a model without weights, on the meta device, for transforming and reporting.

    Of a saved model only the configuration is read, unless its weights are quantised: then
    `load_model` loads it.

    Args:
        name: as `load_model` takes it.
        dtype: of its parameters, except those that its class keeps in float32.

    Raises:
        ModelError: when there is neither a pipeline nor a model under that name.
    """
    found = model_class(name) if name in RANDOM else _saved_class(name)
    if found is None:
        return load_model(name, dtype=dtype)
    cls, config = found
    with torch.device("meta"):
        model: nn.Module = cls.from_config(config)
    in_float32 = {*(cls._keep_in_fp32_modules or ())}  # as from_pretrained leaves them
    for name, tensor in model.state_dict(keep_vars=True).items():
        if tensor.is_floating_point() and in_float32.isdisjoint(name.split(".")):
            tensor.data = tensor.data.to(dtype)
    return model


def random_weights(
    cls: Any, config: dict[str, Any], dtype: torch.dtype, device: str = "cpu"
) -> nn.Module:
    """Return a model with weights that keep activations finite; takes seconds at any size."""
    with _NothingEmpty():
        model: nn.Module = cls(**config)
    for module in model.modules():  # not model.to(dtype), which warns about pretrained weights
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, buffer.to(device))
        for name, parameter in module.named_parameters(recurse=False):
            empty = torch.empty_like(parameter, dtype=dtype, device=device)
            setattr(module, name, nn.Parameter(empty, requires_grad=False))
    pool = torch.randn(2**22, generator=torch.Generator().manual_seed(0)).to(device, dtype)
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1:
            parameter.fill_(1.0 if name.endswith("weight") else 0.0)
            continue
        scale = 0.5 * parameter[0].numel() ** -0.5
        flat, scaled = parameter.view(-1), pool * scale
        for start in range(0, flat.numel(), pool.numel()):
            piece = flat[start : start + pool.numel()]
            piece.copy_(scaled[: piece.numel()])
    return model.eval()


class _NothingEmpty(TorchFunctionMode):
    """Puts tensors made by `torch.empty` (weights, not tables of positions) on the meta device."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        more = {"device": "meta"} if func is torch.empty else {}
        return func(*args, **{**(kwargs or {}), **more})


def available_memory() -> int:
    """Return the memory available to a new model, in bytes."""
    return int(psutil.virtual_memory().available)
