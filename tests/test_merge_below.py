"""Merging below a noise level: the calls that merge, in every way of running a model."""

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import toma_fx
from tests.tiny import flux_inputs, smallest_flux, smallest_unet, unet_inputs
from toma_fx.config import MergeConfig
from toma_fx.errors import ConfigError, ModelError
from toma_fx.schedule import Schedule

HIGH, LOW = 0.9, 0.3
"""Noise levels on both sides of 0.6."""


class Case:
    """A model, and what it returns at a noise level: untouched, and merged."""

    def __init__(self, family: str) -> None:
        self.family = family
        unet = family == "sdxl"
        self.original: Any = smallest_unet() if unet else smallest_flux()
        self.inputs = unet_inputs(self.original) if unet else flux_inputs(self.original)

    def inputs_at(self, noise: float) -> dict[str, Any]:
        timestep = noise * (1000 if self.family == "sdxl" else 1)
        return {
            **self.inputs,
            "timestep": torch.full_like(torch.as_tensor(self.inputs["timestep"]).float(), timestep),
        }

    @torch.no_grad()
    def call(self, model: nn.Module, noise: float) -> Tensor:
        sample: Tensor = model(**self.inputs_at(noise)).sample
        return sample

    def transformed(self, **options: Any) -> Any:
        return toma_fx.transform(self.original, **{"skip": (), "merge_below": 0.6, **options})

    def check(self, model: nn.Module, **options: Any) -> None:
        """Untouched above the level, merged below it, whichever comes first."""
        merged = self.transformed(**options, merge_below=1.0)
        for noise, expected in ((HIGH, self.original), (LOW, merged), (HIGH, self.original)):
            torch.testing.assert_close(
                self.call(model, noise), self.call(expected, noise), atol=1e-5, rtol=1e-5
            )
        assert not torch.allclose(self.call(merged, LOW), self.call(self.original, LOW), atol=1e-3)


@pytest.fixture(params=["sdxl", "flux"])
def case(request: pytest.FixtureRequest) -> Case:
    return Case(request.param)


def test_noisy_steps_are_untouched_and_the_others_merge(case: Case) -> None:
    case.check(case.transformed())


def test_the_level_itself_merges(case: Case) -> None:
    at_level = case.transformed(merge_below=0.5)
    merged = case.transformed(merge_below=1.0)
    torch.testing.assert_close(case.call(at_level, 0.5), case.call(merged, 0.5))


def test_a_timestep_may_be_a_plain_number() -> None:
    case = Case("sdxl")
    inputs = case.inputs_at(LOW)
    model = case.transformed()
    with torch.no_grad():
        as_number = model(**{**inputs, "timestep": float(inputs["timestep"])}).sample
    torch.testing.assert_close(as_number, case.call(model, LOW))


@pytest.mark.parametrize("placement", ["block", "component"])
def test_compiled_as_a_whole_it_has_one_graph_for_each_kind_of_step(
    case: Case, placement: str
) -> None:
    model = case.transformed(placement=placement)
    model.compile(fullgraph=True, backend="aot_eager")
    torch._dynamo.utils.counters.clear()
    case.check(model, placement=placement)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2
    with torch._dynamo.config.patch(error_on_recompile=True):
        case.check(model, placement=placement)


def test_compiled_block_by_block_it_never_compiles_again(case: Case) -> None:
    model = case.transformed()
    model.compile_repeated_blocks(fullgraph=True, backend="aot_eager")
    case.check(model)
    with torch._dynamo.config.patch(error_on_recompile=True):
        case.check(model)


def test_gradient_checkpointing_passes_arguments_by_place(case: Case) -> None:
    case.original.enable_gradient_checkpointing()
    model = case.transformed().train()
    for noise, expected in ((HIGH, case.original), (LOW, case.transformed(merge_below=1.0))):
        got = model(**case.inputs_at(noise)).sample
        torch.testing.assert_close(got, expected.train()(**case.inputs_at(noise)).sample)


def test_copies_and_pickles_keep_the_level(case: Case) -> None:
    model = case.transformed()
    case.check(copy.deepcopy(model))
    case.check(pickle.loads(pickle.dumps(model)))


def test_one_graph_cannot_hold_both_and_says_what_to_do(case: Case) -> None:
    model = case.transformed()
    with pytest.raises(ModelError, match=r"merge_below=0\.6 .* model\.compile\(\).*toma_fx.export"):
        torch.export.export(model, (), case.inputs_at(LOW), strict=False)
    program = torch.export.export(case.original, (), case.inputs_at(LOW), strict=False)
    with pytest.raises(ModelError, match=r"merge_below=0.6 takes several graphs.*toma_fx.export"):
        toma_fx.transform(program, merge_below=0.6)


def test_a_trace_is_of_a_step_that_merges(case: Case) -> None:
    graph = toma_fx.trace(case.transformed(), case.inputs_at(HIGH)).graph
    assert graph.find_nodes(op="call_function", target=torch.ops.toma.merge.default)


def test_a_report_counts_the_steps_that_merge(case: Case) -> None:
    report = toma_fx.report(case.transformed(), height=128, steps=20)
    always = toma_fx.report(case.transformed(merge_below=1.0), height=128, steps=20)
    merging = round(report.shares["merged"] * 20)
    assert 0 < merging < 20
    assert report.saved == pytest.approx(always.saved * merging / 20, rel=1e-6)
    assert f"below a noise level of 0.6: {merging} of 20 steps" in str(report)


@pytest.mark.parametrize("value", [0, -0.1, 1.5, True, "0.6", float("nan")])
def test_values_that_are_no_noise_level(value: Any) -> None:
    with pytest.raises(ConfigError, match=r"merge_below=.* \(0, 1\]"):
        MergeConfig(merge_below=value)


def test_a_schedule_counts_every_step() -> None:
    with pytest.raises(ConfigError, match=r"merge_below=0\.6 cannot be combined"):
        MergeConfig(merge_below=0.6, schedule=Schedule(select_every=10, weigh_every=5))
