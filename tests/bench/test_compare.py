"""Ratios, shares and rows of all contenders."""

from typing import Any

import pytest
import torch

from tests.tiny import tiny_flux, tiny_sdxl_unet
from toma_fx.bench.compare import compare, rows_of
from toma_fx.bench.contenders import COMPILED, EAGER, LOWER_BOUND, Setting, twin
from toma_fx.bench.levels import blocks, models
from toma_fx.bench.timing import Contender, Timing
from toma_fx.variants import merging

VARIANTS = tuple(merging({"preset": name}) for name in ("lower_bound", "default"))
SETTING = Setting(height=128, dtype=torch.float32, variants=VARIANTS, repeats=1, compiled=False)
BUILDERS = pytest.mark.parametrize("build", [tiny_sdxl_unet, tiny_flux])


def test_the_faster_untouched_model_is_the_baseline() -> None:
    given: list[tuple[str, float | None, tuple[float, ...]]] = [
        (EAGER, None, (9.0, 9.0, 9.0)),
        (COMPILED, None, (8.0, 4.0, 8.0)),
        (LOWER_BOUND, 0.5, (4.0, 4.0, 4.0)),
        ("ours", 0.5, (4.0, 5.0, 5.0)),
        ("ours", 0.75, (2.0, 2.0, 2.0)),
    ]
    contenders = [Contender(name=n, run=lambda: None, ratio=r) for n, r, _ in given]
    timings = [Timing(name=n, calls=calls, first_call=10.0) for n, _, calls in given]
    _, base, bound, half, most = rows_of(contenders, timings)
    assert base["baseline"] and base["times"] == 1.0
    assert bound["times"] == 2.0 and bound["kept"] == 1.0
    assert half["kept"] == (8 - 5) / (8 - 4)
    assert half["times"] == 8 / 5 and half["times_spread"] == [4 / 5, 2.0]
    assert most["kept"] is None  # there is no lower bound at its ratio


def test_a_failed_contender_keeps_its_row() -> None:
    contenders = [Contender(name=EAGER, run=lambda: None), Contender(name="x", run=lambda: None)]
    timings = [Timing(name=EAGER, calls=(1.0,)), Timing(name="x", calls=(), failure="why")]
    _, failed = rows_of(contenders, timings)
    assert failed["failure"] == "why"
    assert "seconds" not in failed


@BUILDERS
@pytest.mark.parametrize("level", [blocks, models])
def test_every_level_runs_every_contender(build: Any, level: Any) -> None:
    found = list(level(build(), SETTING))
    assert found
    for timed in found:
        rows = compare(timed, SETTING, title="tiny").rows
        assert [row["contender"] for row in rows] == [EAGER, "lower_bound", "default"]
        assert not any(row["failure"] for row in rows)


@BUILDERS
def test_a_model_level_call_is_the_transformed_models_forward(build: Any) -> None:
    model = build()
    (timed,) = models(model, SETTING)
    outputs: list[Any] = []
    with torch.no_grad():
        outputs = [each.run() for each in timed.contenders]
    untouched, bound, ours = (output.sample for output in outputs)
    assert not torch.allclose(untouched, bound)
    assert not torch.allclose(untouched, ours)


def test_contenders_share_every_tensor() -> None:
    model = tiny_sdxl_unet()
    theirs = {name: p.data_ptr() for name, p in model.named_parameters()}
    assert {name: p.data_ptr() for name, p in twin(model).named_parameters()} == theirs


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@BUILDERS
def test_peak_memory_of_merged_calls_is_compared_with_untouched(build: Any) -> None:
    (timed,) = models(build().cuda(), SETTING)
    rows = compare(timed, SETTING, title="tiny").rows
    assert rows[0]["peak_share"] == 1.0
    for row in rows:
        assert row["peak_bytes"] > 0
