"""The base class of every check of a transformed model."""

from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from toma_fx import transform


class Base:
    """A family fills these in; the mix-ins beside this one are the checks.

    The checks are those that diffusers publishes for its models. Where one compares a model with
    itself, a merged model is compared with itself; where loading makes an untouched model again,
    that is transformed like the first.
    """

    attention_kwargs: str
    """The argument with the attention kwargs."""
    main_input: str
    """The argument that the output has the shape of."""
    options: ClassVar[dict[str, Any]] = {}
    """Of `toma_fx.transform`."""

    def untouched(self) -> Any:
        """A new small model in evaluation mode; the same weights every time."""
        raise NotImplementedError

    def inputs(self, **size: int) -> dict[str, Any]:
        """Keyword arguments of a call."""
        raise NotImplementedError

    def merged(self, model: Any = None) -> Any:
        """A transformed model: of the given one, or of a new one."""
        return transform(self.untouched() if model is None else model, **self.options)

    def run(self, model: Any, **added: Any) -> Tensor:
        """The output of a call without gradients."""
        with torch.no_grad():
            output: Tensor = model(**{**self.inputs(), **added}).sample
        return output

    def same(self, model: Any, expected: Tensor) -> None:
        """The model gives this output."""
        torch.testing.assert_close(self.run(model), expected, rtol=1e-5, atol=1e-5)

    def reload(self, model: Any, folder: Path, **options: Any) -> Any:
        """The untouched model that is loaded from a folder."""
        return type(self.untouched()).from_pretrained(folder, **options).eval()


def cast(inputs: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    """The inputs with every floating tensor in another dtype."""

    def to_dtype(value: Any) -> Any:
        floating = isinstance(value, Tensor) and value.is_floating_point()
        return value.to(dtype) if floating else value

    cast_inputs: dict[str, Any] = tree_map(to_dtype, inputs)
    return cast_inputs


def changed(output: Tensor, other: Tensor) -> bool:
    """Whether two outputs differ by more than rounding."""
    return not torch.allclose(output, other, rtol=1e-3, atol=1e-3)


def parameters(model: nn.Module) -> dict[str, Tensor]:
    """Copies of a model's parameters."""
    return {name: each.detach().clone() for name, each in model.named_parameters()}
