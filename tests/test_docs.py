"""The page for compiler people agrees with the code."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.tiny import flux_inputs, tiny_flux
from toma_fx import MergeConfig, transform
from toma_fx.build import recipe_of
from toma_fx.runtime.plan import CallScope

PAGE = Path(__file__).parent.parent / "docs" / "compiler.md"


def test_table_names_every_pass() -> None:
    import toma_fx.passes

    page = PAGE.read_text()
    modules = re.findall(r"^(\w+) {2,}\S", toma_fx.passes.__doc__ or "", re.MULTILINE)
    assert len(modules) == 11
    for module in [*modules, "order_tokens"]:
        name = module.title().replace("_", "")
        assert re.search(rf"^\| `({name}\(|{module}`)", page, re.MULTILINE), module


def test_printed_recipe_is_the_real_one() -> None:
    printed = str(recipe_of(tiny_flux(), MergeConfig(skip=(), merge_below=0.6))).splitlines()
    shown = [line.removeprefix("# ") for line in PAGE.read_text().splitlines()]
    start = shown.index(printed[0])
    end = shown.index("...", start)
    assert end - start > 4
    assert shown[start:end] == [line.rstrip() for line in printed[: end - start]]


def test_a_block_with_a_shared_plan_is_not_exported_alone() -> None:
    """The error that the page quotes, and the way out that it gives."""
    model = transform(tiny_flux(), skip=())
    block, call = model.transformer_blocks[1], {}

    def note(block: Any, args: Any, kwargs: dict[str, Any]) -> None:
        call.update(kwargs)

    note.any_tokens = True  # type: ignore[attr-defined]
    handle = block.register_forward_pre_hook(note, with_kwargs=True)
    with torch.no_grad():
        model(**flux_inputs(model))
    handle.remove()
    with pytest.raises(ValueError, match="Unsupported input type") as error:
        torch.export.export(block, (), call, strict=False)
    message = f"Unsupported input type {CallScope}"
    assert str(error.value).startswith(message)
    assert message in PAGE.read_text()
    assert "share='block'" in PAGE.read_text()
