"""The cost of each variant at a ratio; its change of the pipeline ends with it."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler

import toma_fx
import toma_fx.families
import toma_fx.passes
import toma_fx.runtime
from benchmarks.rivals import load_rival
from tests.pipelines import tiny_flux_pipeline, tiny_sdxl_pipeline
from toma_fx.arithmetic import Call, count, first_call
from toma_fx.config import MergeConfig
from toma_fx.errors import TomaError
from toma_fx.lab.contenders import Contender, Variant, contend
from toma_fx.lab.draw import Task, draw
from toma_fx.lab.prompts import Prompt
from toma_fx.variants import parse_variant

STEPS = 20
TASK = Task(model="", prompts=(Prompt(text="a b"),), steps=STEPS, height=128, width=128)
TODO = Path(__file__).parents[2] / "examples" / "rivals" / "todo.py"


def find(pipeline: Any, variants: Sequence[Variant], ratios: list[float]) -> list[Contender]:
    return contend(pipeline, variants, ratios, STEPS, call_of(pipeline))


def call_of(pipeline: Any) -> Call:
    model = getattr(pipeline, "unet", None) or pipeline.transformer
    return first_call(model, lambda: draw(pipeline, TASK, TASK.prompts[0], 0))


def test_untouched_comes_first_and_then_every_variant_at_every_ratio() -> None:
    pipeline = tiny_sdxl_pipeline()
    names = ("toma:region=stripe", "steps", "steps=5")
    found = find(pipeline, [*map(parse_variant, names), load_rival(TODO)], [0.5])
    assert [(each.variant, each.ratio) for each in found] == [
        ("untouched", None),
        ("toma:region=stripe", 0.5),
        ("steps", 0.5),
        ("steps=5", None),
        ("todo", 0.5),
    ]
    assert len({each.folder for each in found}) == len(found)
    assert found[1].folder == "toma_region=stripe_r0.5"
    assert all(each.steps == STEPS for each in found if "steps" not in each.variant)


def test_arithmetic_is_relative_to_untouched() -> None:
    pipeline = tiny_flux_pipeline()
    call = call_of(pipeline)
    variants = [parse_variant("default"), parse_variant("steps"), parse_variant("steps=5")]
    untouched, merged, fewer, given = find(pipeline, variants, [0.5])
    config = MergeConfig(ratio=0.5)
    model = pipeline.transformer
    paid = count(toma_fx.transform(model, config), call) / count(model, call)
    assert untouched.arithmetic == 1 and untouched.steps == STEPS
    assert merged.arithmetic == pytest.approx(paid) and paid < 0.95
    assert fewer.steps == round(STEPS * paid) and fewer.arithmetic == fewer.steps / STEPS
    assert (given.steps, given.arithmetic) == (5, 0.25)


@pytest.mark.parametrize("build", [tiny_sdxl_pipeline, tiny_flux_pipeline])
def test_arithmetic_is_that_of_the_steps_that_merge(build: Any) -> None:
    pipeline = build()
    if build is tiny_flux_pipeline:
        pipeline.scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    names = ("default", "default:merge_below=0.5", "default:schedule=10/5")
    _, every, below, scheduled = find(pipeline, [*map(parse_variant, names)], [0.5])
    timesteps = pipeline.scheduler.timesteps.tolist()
    share = sum(timestep <= 500 for timestep in timesteps) / len(timesteps)
    assert 0.2 < share < 0.6
    assert 1 - below.arithmetic == pytest.approx(share * (1 - every.arithmetic))
    assert scheduled.arithmetic < every.arithmetic  # which plans at every step


def test_steps_alone_pay_for_the_default() -> None:
    pipeline = tiny_flux_pipeline()
    _, merged, after = find(pipeline, [parse_variant("default"), parse_variant("steps")], [0.5])
    (_, alone) = find(pipeline, [parse_variant("steps")], [0.5])
    assert alone.steps == after.steps == round(STEPS * merged.arithmetic)


def test_a_change_lasts_as_long_as_its_context() -> None:
    pipeline = tiny_sdxl_pipeline()
    original = pipeline.unet
    _, merged, todo = find(pipeline, [parse_variant("default"), load_rival(TODO)], [0.5])
    with merged.changed():
        assert hasattr(pipeline.unet, "toma_recipe")
    assert pipeline.unet is original and not hasattr(original, "toma_recipe")
    with pytest.raises(KeyboardInterrupt), merged.changed():
        raise KeyboardInterrupt
    assert pipeline.unet is original
    before = dict(original.attn_processors)
    with todo.changed():
        assert dict(original.attn_processors) != before
    assert dict(original.attn_processors) == before


def test_identity_tells_what_decides_the_images() -> None:
    pipeline = tiny_flux_pipeline()
    a, b = (find(pipeline, [parse_variant(name)], [0.5])[1] for name in ("toma", "toma_tile"))
    assert a.identity != b.identity
    assert a.identity.endswith(repr(MergeConfig.preset("toma", ratio=0.5)))
    assert f"torch {torch.__version__}" in a.identity


@pytest.mark.parametrize("package", [toma_fx.families, toma_fx.passes, toma_fx.runtime])
def test_images_of_other_code_are_others(
    package: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipeline, variants = tiny_flux_pipeline(), [parse_variant("toma"), parse_variant("steps=5")]
    before = [each.identity for each in find(pipeline, variants, [0.5])]
    for file in Path(package.__path__[0]).glob("*.py"):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    monkeypatch.setattr(package, "__path__", [str(tmp_path)])
    assert [each.identity for each in find(pipeline, variants, [0.5])] == before
    (tmp_path / "more.py").write_text("# changed")
    untouched, merged, fewer = (each.identity for each in find(pipeline, variants, [0.5]))
    assert (untouched, fewer) == (before[0], before[2])
    assert merged != before[1]


def test_a_ratio_out_of_range_is_named() -> None:
    with pytest.raises(TomaError, match=r"ratio=1\.5"):
        find(tiny_flux_pipeline(), [parse_variant("default")], [1.5])


def test_images_of_the_untouched_model_stay_the_same() -> None:
    pipeline = tiny_flux_pipeline()
    task = Task(model="", prompts=TASK.prompts, steps=2, height=128, width=128)
    before, _ = draw(pipeline, task, task.prompts[0], 0)
    _, merged = find(pipeline, [parse_variant("toma")], [0.75])
    with merged.changed():
        changed, _ = draw(pipeline, task, task.prompts[0], 0)
    after, _ = draw(pipeline, task, task.prompts[0], 0)
    assert before.tobytes() == after.tobytes() != changed.tobytes()
    assert torch.is_grad_enabled()
