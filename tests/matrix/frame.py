"""The matrix: uses of diffusers, each with real pipelines, in every mode that they run.

A row is an ordinary test. `row` runs it once for each family and mode, a cell of the table, and the
test gets the `Cell` as its argument. The newer families have a line each, whose cells are uses::

    @row("Image-to-image", section="Pipelines")
    def test_image_to_image(cell: Cell) -> None:
        model = cell.apply(transform(unet))     # eager, compiled, or compiled block by block
        with cell.steady():                     # compiled code serves this call too
            cell.agree(model(**inputs).sample, expected)

A cell *works* when its tests pass, and is *refused* when what a user tries meets a clear error,
which a test says with ``with cell.refuses(InputError, match=...)``. A row may have parameters of
its own; a cell is what the worst of them is. ``pytest tests/matrix --matrix-table FILE`` writes the
table.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import pytest
import torch
from torch import Tensor, nn

Test = TypeVar("Test", bound=Callable[..., Any])
Module = TypeVar("Module", bound=nn.Module)

FAMILIES = {"sdxl": "SDXL", "flux": "Flux"}
"""With the headings of the table."""
MODES = {"eager": "eager", "compile": "torch.compile", "regional": "regional compile"}
"""As they are, `model.compile` and diffusers' `model.compile_repeated_blocks`."""
CELLS = {(f, m): f"{FAMILIES[f]}, {MODES[m]}" for f in FAMILIES for m in MODES}
"""The cells of a line, by family and mode, with the headings of their columns."""
USES = {**MODES, "lora": "LoRA", "offload": "group offload", "export": "`toma_fx.export`"}
"""What is tried with each of the newer families, whose lines name the family."""
SECTIONS = {
    "Pipelines": CELLS,
    "Adapters": CELLS,
    "Memory and speed": CELLS,
    "Life of a model": CELLS,
    "More than one machine": CELLS,
    "Newer families": {("", use): heading for use, heading in USES.items()},
}
"""The parts of the table, with the cells of their lines."""
TOLERANCE = 1e-4
"""What compiling may change, in standard deviations; merging itself changes more than 1e-2."""


class Cell:
    """What a row's test runs in.

    Attributes:
        family: ``"sdxl"`` or ``"flux"``; ``""`` where the line names the family.
        mode: ``"eager"``, ``"compile"`` or ``"regional"``, or another use.
        backend: what compiles, in the compiled modes.
        refusals: the messages of the errors that `refuses` saw.
    """

    def __init__(self, family: str, mode: str, backend: str) -> None:
        self.family = family
        self.mode = mode
        self.backend = backend
        self.refusals: list[str] = []

    def apply(self, model: Module) -> Module:
        """Run a transformed model in this mode from now on; returns it."""
        if self.mode == "compile":
            model.compile(fullgraph=True, backend=self.backend)
        elif self.mode == "regional":
            blocks: Any = model
            blocks.compile_repeated_blocks(fullgraph=True, backend=self.backend)
        return model

    @contextlib.contextmanager
    def steady(self) -> Iterator[None]:
        """Within it, anything that compiles again is an error."""
        with torch._dynamo.config.patch(error_on_recompile=True):
            yield

    def agree(self, got: Tensor, expected: Tensor) -> None:
        """Assert equality: of every bit in eager mode, within rounding in the others."""
        assert got.shape == expected.shape
        assert got.isfinite().all()
        if self.mode == "eager":
            assert torch.equal(got, expected)
        else:
            assert difference(got, expected) < TOLERANCE

    @contextlib.contextmanager
    def refuses(self, error: type[Exception], match: str) -> Iterator[None]:
        """Assert that what is tried meets an error of one line, which the table then shows.

        Args:
            error: its class.
            match: a pattern that says what to do, searched in the message.
        """
        with pytest.raises(error, match=match) as caught:
            yield
        message = str(caught.value)
        assert "\n" not in message
        self.refusals.append(message)


def row(
    title: str,
    *,
    section: str,
    families: Sequence[str] = tuple(FAMILIES),
    modes: Sequence[str] = tuple(MODES),
    quick: Sequence[str] = ("eager",),
    note: str = "",
) -> Callable[[Test], Test]:
    """Make a test a row of the matrix.

    Args:
        title: what users do; ``{name}`` stands for a parameter of the test, whose values then are
            rows of their own.
        section: the part of the table.
        families: for which it exists; in the others it is not applicable.
        modes: in which it means anything; the others are not applicable.
        quick: modes that `make test` runs too; the others are marked ``matrix_full``.
        note: what a user should know when it works.
    """
    cells = [
        pytest.param(
            (family, mode),
            id=f"{family}-{mode}".removeprefix("-"),
            marks=() if mode in quick else (pytest.mark.matrix_full,),
        )
        for family in families
        for mode in modes
    ]

    described = pytest.mark.matrix(title=title, section=section, note=note)
    in_cells = pytest.mark.parametrize("cell", cells, indirect=True)
    return lambda test: described(in_cells(test))


def difference(a: Tensor, b: Tensor) -> float:
    """Root mean square of ``a - b``, in standard deviations of ``b``."""
    a, b = a.double(), b.double()
    return float((a - b).square().mean().sqrt() / b.std())
