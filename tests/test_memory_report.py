"""The report of a model with memory: the bytes that a run keeps, and its arithmetic."""

from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import toma_fx
from tests.memory_runs import calls_of, merging

NAMES = ("unet", "flux", "wan", "z-image")
FORMS: dict[str, dict[str, Any]] = {
    "form 3": {},
    "nothing run between": {"theta": 0.0},
    "form 2": {"extrapolate": False},
    "form 1": {"extrapolate": False, "control": False},
}


def run(model: Any, calls: list[dict[str, Any]]) -> int:
    """The operations of a run."""
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        for call in calls:
            model(**call, return_dict=False)
    return int(counter.get_total_flops())


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", NAMES)
def test_arithmetic_and_what_is_kept_are_those_of_a_run(name: str, form: str) -> None:
    model, calls = merging(name, **FORMS[form]), calls_of(name)
    operations = run(model, calls)
    report = toma_fx.report(model, steps=len(calls), inputs=calls[0])
    assert report.flops_after == pytest.approx(operations / len(calls), rel=0.01)
    assert report.kept_bytes == model.toma_state.nbytes() > 0
    assert report.theta == FORMS[form].get("theta", 0.5)
    assert report.shares == {"remember": 3 / 5, "recall": 2 / 5}


def test_what_it_says() -> None:
    model = merging("unet", merge_below=0.5)
    text = str(toma_fx.report(model, steps=20, inputs=calls_of("unet")[0]))
    assert "merges below a noise level of 0.5: 10 of 20 steps" in text
    assert "made at full steps" in text
    assert "memory: 5 of 20 steps are full, those between add 0.5 of the correction" in text


@pytest.mark.parametrize(("ratio", "pays"), [(0.9, True), (0.1, False)])
def test_it_says_when_a_memory_saves_next_to_nothing(ratio: float, pays: bool) -> None:
    report = toma_fx.report(merging("unet", ratio=ratio), inputs=calls_of("unet")[0])
    assert (report.speedup > 1.05) == pays
    assert ("needs a high ratio" in str(report)) != pays
