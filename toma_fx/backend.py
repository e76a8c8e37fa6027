"""A `torch.compile` backend that merges tokens in the graph that Dynamo captured.

Usage::

    compiled = torch.compile(model, backend=toma_fx.backend(ratio=0.5))

The model itself stays unchanged. The whole model must become one graph that contains its blocks, so
use ``fullgraph=True``. If blocks are compiled one by one (``compile_repeated_blocks``), use
`toma_fx.transform` on the model instead.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import fx

from toma_fx.config import MergeConfig, build_config
from toma_fx.errors import ConfigError
from toma_fx.transform import transform

Inner = Callable[..., Any]
"""A backend: takes a graph module and its example inputs, and returns a callable that runs it."""


@dataclass(frozen=True)
class Backend:
    """Merges tokens in a graph and passes it to another backend.

    Attributes:
        config: the options.
        inner: the backend that gets the graph; Inductor if None.
    """

    config: MergeConfig
    inner: Inner | None = None

    def __call__(
        self, gm: fx.GraphModule, example_inputs: Sequence[Any], **options: Any
    ) -> Callable[..., Any]:
        """Return a callable that runs the graph with merged tokens; Dynamo calls this."""
        inner = _inductor() if self.inner is None else self.inner
        compiled: Callable[..., Any] = inner(transform(gm, self.config), example_inputs, **options)
        return compiled


def _inductor() -> Inner:
    from torch._inductor.compile_fx import compile_fx  # importing it takes seconds

    return compile_fx


def backend(
    config: MergeConfig | None = None, *, inner: Inner | None = None, **options: Any
) -> Backend:
    """Make a backend for `torch.compile` that merges tokens.

    Args:
        config: the options; ``MergeConfig()`` if omitted. Its schedule must be 1/1.
        inner: the backend that compiles the merged graph; Inductor if omitted.
        **options: fields of `MergeConfig`, in place of ``config``.

    Raises:
        ConfigError: when an option is unknown or has an invalid value.
    """
    if config is not None and options:
        raise ConfigError(
            f"backend got both a config and the options {', '.join(options)}; put them into the "
            "config: dataclasses.replace(config, ...)"
        )
    return Backend(build_config(**options) if config is None else config, inner)
