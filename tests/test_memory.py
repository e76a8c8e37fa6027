"""Memory: the steps that are full, and runs that take nothing from one another."""

import copy
import pickle
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import chain, zip_longest
from threading import Barrier
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

import toma_fx
from tests.memory_runs import (
    build,
    calls_of,
    difference,
    draw,
    merging,
    output_of,
    same,
)
from toma_fx import Memory, transform
from toma_fx.errors import InputError
from toma_fx.runtime.plan import RECALL, REMEMBER

NAMES = ["unet", "flux", "z-image"]
every_model = pytest.mark.parametrize("name", NAMES)


@pytest.fixture(autouse=True)
def _no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


# Which steps are full


@every_model
@pytest.mark.parametrize(
    "options", [{"memory": Memory(every=1)}, {"ratio": 0, "memory": Memory()}], ids=str
)
def test_without_steps_between_or_merging_a_model_is_untouched(
    name: str, options: dict[str, Any]
) -> None:
    calls = calls_of(name)
    model = transform(build(name), **options)
    assert same(draw(model, calls), draw(build(name), calls))
    assert all(block.role is None for block in model.toma_recipe.blocks)
    assert same(draw(toma_fx.restore(model), calls), draw(build(name), calls))


@every_model
@pytest.mark.parametrize("every", [2, 3])
def test_every_so_many_steps_are_full(name: str, every: int) -> None:
    """In stripes, tokens stay in their order, so full steps are bit-identical."""
    calls = calls_of(name, 7)
    untouched = draw(build(name), calls)
    outputs = draw(merging(name, every=every, region="stripe"), calls)
    for step, (output, expected) in enumerate(zip(outputs, untouched, strict=True)):
        assert torch.equal(output, expected) == (step % every == 0), step


@every_model
@pytest.mark.parametrize("theta", [0.0, 1.0])
@pytest.mark.parametrize("changes", [{"extrapolate": False}, {}, {"control": False}], ids=str)
def test_a_step_that_changes_nothing_recalls_what_was(
    name: str, theta: float, changes: dict[str, Any]
) -> None:
    """Of the same tokens at the same level, but for the number of the timestep."""
    if (theta, changes) == (1.0, {"control": False}):
        pytest.skip("without a control, what merging leaves out is no part of the update")
    model, first = merging(name, theta=theta, **changes), calls_of(name)[0]
    expected = output_of(model, first)
    run = model.toma_state._runs[0]
    run.timestep = float("inf")  # as if the call were of a later step
    assert difference(output_of(model, first), expected) < 1e-5
    assert run.step == 1


@every_model
def test_the_family_says_how_far_merged_tokens_are_believed(name: str) -> None:
    calls = calls_of(name)
    model = merging(name, theta=None)
    theirs = model.toma_recipe.family.theta
    assert same(draw(model, calls), draw(merging(name, theta=theirs), calls))


@pytest.mark.parametrize("name", ["unet", "flux"])
def test_steps_above_a_level_are_untouched(name: str) -> None:
    """And they are no part of the run: the first below it is full."""
    calls = calls_of(name, 8)
    model = merging(name, region="stripe", merge_below=0.3)
    outputs, untouched = draw(model, calls), draw(build(name), calls)
    above = [step for step in range(8) if 0.5 * (1 - step / 8) > 0.3]
    assert above == [0, 1, 2, 3]
    for step, (output, expected) in enumerate(zip(outputs, untouched, strict=True)):
        full = step in above or (step - len(above)) % 2 == 0
        assert torch.equal(output, expected) == full, step
    later = draw(merging(name, region="stripe"), calls[len(above) :])
    assert same(outputs[len(above) :], later)


# What is kept


@every_model
@pytest.mark.parametrize(
    ("extrapolate", "control"), [(True, True), (True, False), (False, True), (False, False)]
)
def test_what_is_kept(name: str, extrapolate: bool, control: bool) -> None:
    model = merging(name, extrapolate=extrapolate, control=control)
    draw(model, calls_of(name, 3))
    (run,) = model.toma_state._runs
    assert set(run.kept.memory) == {block.path for block in model.toma_recipe.merged}
    for each in run.kept.memory.values():
        assert bool(each.merged) == control
        assert bool(each.earlier) == extrapolate
        image = next(i for i, u in enumerate(each.update) if u.shape[1] >= 32)
        if control:
            assert each.merged[image].shape[1] < each.update[image].shape[1]
    tensors = pytree.tree_leaves(run.kept)
    assert model.toma_state.nbytes() == sum(t.nbytes for t in tensors if isinstance(t, Tensor))
    assert not any(t.requires_grad for t in tensors if isinstance(t, Tensor))
    model._reset_stateful_cache()
    assert (len(model.toma_state), model.toma_state.nbytes()) == (0, 0)


# Runs


def in_turn(model: Any, *runs: list[dict[str, Any]]) -> list[list[Tensor]]:
    """The outputs of runs that take turns, step by step."""
    outputs: list[list[Tensor]] = [[] for _ in runs]
    for step in zip_longest(*runs):
        for index, call in enumerate(step):
            if call is not None:
                outputs[index].append(output_of(model, call))
    return outputs


RUNS: dict[str, Callable[[str], list[list[dict[str, Any]]]]] = {
    "prompts": lambda name: [calls_of(name), calls_of(name, seed=7, text=1)],
    "sizes": lambda name: [calls_of(name), calls_of(name, height=16)],
    "batches": lambda name: [calls_of(name), calls_of(name, batch=3)],
    "lengths": lambda name: [calls_of(name), calls_of(name, 3, text=1)],
    "two images of one prompt": lambda name: [calls_of(name), calls_of(name, seed=7)],
    "three": lambda name: [calls_of(name, seed=i, text=i) for i in range(3)],
}


@every_model
@pytest.mark.parametrize("kind", RUNS)
def test_runs_that_take_turns_get_what_each_gets_alone(name: str, kind: str) -> None:
    runs = RUNS[kind](name)
    outputs = in_turn(merging(name), *runs)
    for run, output in zip(runs, outputs, strict=True):
        assert same(output, draw(merging(name), run))


@every_model
def test_runs_in_threads_get_what_each_gets_alone(name: str) -> None:
    runs = [calls_of(name, seed=seed) for seed in range(3)]
    model, together = merging(name), Barrier(3)

    def drawn(run: list[dict[str, Any]]) -> list[Tensor]:
        outputs = []
        for call in run:
            together.wait()
            outputs += draw(model, [call])
        return outputs

    with ThreadPoolExecutor(3) as pool:
        outputs = list(pool.map(drawn, runs))
    for run, output in zip(runs, outputs, strict=True):
        assert same(output, draw(merging(name), run))


@every_model
@pytest.mark.parametrize("steps", [1, 2, 3])
def test_an_interrupted_run_leaves_nothing_to_the_next(name: str, steps: int) -> None:
    model = merging(name)
    draw(model, calls_of(name, seed=3)[:steps])
    assert same(draw(model, calls_of(name)), draw(merging(name), calls_of(name)))


@every_model
def test_images_one_after_another_are_alike(name: str) -> None:
    model, calls = merging(name), calls_of(name)
    first = draw(model, calls)
    assert same(draw(model, calls), first)
    model._reset_stateful_cache()
    assert same(draw(model, calls), first)


def test_rows_at_different_timesteps_are_refused() -> None:
    call = calls_of("flux")[0]
    apart = {**call, "timestep": torch.tensor([0.5, 0.25])}
    with pytest.raises(InputError, match=r"0\.25 to 0\.5, but Memory\(.*memory=None") as caught:
        output_of(merging("flux"), apart)
    assert "call the model once for each" in str(caught.value)
    output_of(merging("flux", every=1), apart)
    output_of(transform(build("flux"), memory=None), apart)
    for row in range(2):  # the other way out
        output_of(
            merging("flux"),
            {
                name: value[row : row + 1]
                if isinstance(value, Tensor) and not name.endswith("_ids")
                else value
                for name, value in apart.items()
            },
        )


# Copies


@pytest.mark.parametrize(
    "duplicate", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))]
)
@every_model
def test_a_copy_begins_its_own_runs(name: str, duplicate: Callable[[Any], Any]) -> None:
    model, calls = merging(name), calls_of(name)
    expected = draw(merging(name), calls)
    begun = draw(model, calls[:3])
    twin = duplicate(model)
    assert len(twin.toma_state) == 0
    assert twin.toma_recipe.config == model.toma_recipe.config
    assert same(draw(twin, calls), expected)
    assert same([*begun, *draw(model, calls[3:])], expected)


@every_model
def test_restored_it_is_the_untouched_model(name: str) -> None:
    model, calls = merging(name), calls_of(name)
    draw(model, calls[:3])
    restored = toma_fx.restore(model)
    assert same(draw(restored, calls), draw(build(name), calls))
    assert not any("toma_path" in vars(module) for module in restored.modules())
    assert restored.state_dict().keys() == build(name).state_dict().keys()


def test_the_variants_of_a_recipe() -> None:
    recipe = merging("unet").toma_recipe
    variants = set(chain(*(recipe.variants(block) for block in recipe.merged)))
    assert variants == {REMEMBER, RECALL}
    assert f"{REMEMBER}, {RECALL}" in str(recipe)
