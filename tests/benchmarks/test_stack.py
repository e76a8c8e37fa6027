"""Additions beside merging: they act and leave the others alone, or the table says why not."""

from typing import Any

import pytest
import torch

from benchmarks.stack import MERGED, Stack
from tests.tiny import tiny_flux, tiny_sdxl_unet
from toma_fx.bench.compare import compare
from toma_fx.bench.contenders import EAGER, Setting
from toma_fx.bench.levels import Timed
from toma_fx.config import MergeConfig

SETTING = Setting(height=128, dtype=torch.float32, repeats=1, compiled=False)


def rows_of(model: torch.nn.Module) -> dict[str, Any]:
    stack = Stack(model=model, setting=SETTING, config=MergeConfig(skip=()), room=None)
    timed = Timed(title="additions", contenders=stack.contenders())
    table = compare(timed, SETTING, title="tiny", extra={"error": stack.distances})
    return {row["contender"]: row for row in table.rows}


@pytest.mark.parametrize("build", [tiny_sdxl_unet, tiny_flux])
def test_fused_projections_change_nothing_and_merging_does(build: Any) -> None:
    rows = rows_of(build())
    assert rows[EAGER]["error"] is None
    assert rows["fused QKV projections"]["error"] < 1e-5
    merged, both = rows[MERGED]["error"], rows[f"fused QKV projections, {MERGED}"]["error"]
    assert merged > 1e-3
    assert both == pytest.approx(merged, rel=1e-2)


def test_what_cannot_run_says_why() -> None:
    rows = rows_of(tiny_sdxl_unet())
    cache = next(row for name, row in rows.items() if name.startswith("first-block cache"))
    assert "use --image" in cache["failure"]
    assert "know no backends" in rows["attention backend native"]["failure"]
    assert "nothing is compiled" in rows["torch.compile mode reduce-overhead"]["failure"]


def test_a_backend_that_fails_leaves_the_other_models_alone() -> None:
    rows = rows_of(tiny_flux())
    assert rows["attention backend native"]["error"] < 1e-5
    failed = rows["attention backend sage"]["failure"]
    assert "sageattention" in failed
    # Called after all backends were tried, with the backend that it always had.
    assert len(rows[EAGER]["calls"]) == 1
