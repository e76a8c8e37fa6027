"""The policy that chooses a call's graphs: every run computes what it would compute alone."""

import copy
import functools
from collections import defaultdict
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.overrides import TorchFunctionMode

import toma_fx
from tests.tiny import TEXT_WIDTH, flux_inputs, smallest_flux, smallest_unet, unet_inputs
from toma_fx import Schedule
from toma_fx.errors import InputError
from toma_fx.policy import Always, BelowNoiseLevel, OnSchedule, policy_of
from toma_fx.runtime.plan import MERGED, REUSE, UNTOUCHED, WEIGH

FAMILIES = ("unet", "flux")
EVERY_FAMILY = pytest.mark.parametrize("family", FAMILIES)
SCHEDULE = Schedule(select_every=4, weigh_every=2)
GROUPS = 2
"""Groups of blocks in each of the two models."""
Calls = Iterator[tuple[str, dict[str, Any]]]
"""The name of a run, and the arguments of its next call."""


@pytest.fixture(autouse=True)
def _no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


@functools.cache
def model_of(family: str) -> Any:
    return (smallest_unet if family == "unet" else smallest_flux)()


def transformed(family: str, **options: Any) -> Any:
    return toma_fx.transform(
        model_of(family), **{"skip": (), "region_tokens": 16, "schedule": SCHEDULE, **options}
    )


def prompt_of(seed: int, batch: int = 1) -> Tensor:
    return torch.randn(batch, 6, TEXT_WIDTH, generator=torch.Generator().manual_seed(seed))


def call(family: str, step: int, prompt: Tensor, *, image: int = 0, **sizes: Any) -> dict[str, Any]:
    """The arguments of a call at a step of a run, each with an image of its own."""
    model = model_of(family)
    sizes = {"batch": len(prompt), "height": 8, "width": 8, "seed": 100 * image + step, **sizes}
    inputs = (unet_inputs if family == "unet" else flux_inputs)(model, **sizes)
    timestep = (
        torch.tensor(900 - 50 * step) if family == "unet" else torch.tensor([0.9 - step / 20])
    )
    inputs["timestep"] = timestep if family == "unet" else timestep.expand(len(prompt))
    return {**inputs, "encoder_hidden_states": prompt, "return_dict": False}


class Selections(TorchFunctionMode):
    """Counts how often destinations are selected."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func is torch.ops.toma.select.default
        return func(*args, **(kwargs or {}))


def two_prompts(family: str) -> Calls:
    """True guidance."""
    prompts = {"with": prompt_of(0), "without": prompt_of(1)}
    for step in range(6):
        for run, prompt in prompts.items():
            yield run, call(family, step, prompt)


def views(family: str) -> Calls:
    """Of one large image, each a call of its own with the same prompt and the same sizes."""
    prompt = prompt_of(0)
    for step in range(6):
        for view in range(3):
            yield f"view {view}", call(family, step, prompt, image=view)


def views_of_two_prompts(family: str) -> Calls:
    prompts = [prompt_of(0), prompt_of(1)]
    for step in range(5):
        for view in range(2):
            for index, prompt in enumerate(prompts):
                run = 2 * index + view
                yield f"run {run}", call(family, step, prompt, image=run)


def interrupted(family: str) -> Calls:
    """An image that is given up in the middle, and the next of the same prompt."""
    prompt = prompt_of(0)
    for step in range(3):
        yield "given up", call(family, step, prompt)
    for step in range(6):
        yield "next", call(family, step, prompt, image=1)


def sizes(family: str) -> Calls:
    prompt = prompt_of(0)
    for step in range(6):
        yield "square", call(family, step, prompt)
        yield "wide", call(family, step, prompt, image=1, width=16)


def batches(family: str) -> Calls:
    one = prompt_of(0)
    for step in range(6):
        yield "one", call(family, step, one)
        yield "two", call(family, step, one.expand(2, -1, -1), image=1)


def changed_in_place(family: str) -> Calls:
    """A buffer for the embeddings of whichever image is next, which starts at a lower timestep."""
    prompt = prompt_of(0)
    for step in range(3):
        yield "first", call(family, step, prompt)
    prompt.copy_(prompt_of(1))
    for step in range(3, 8):
        yield "second", call(family, step, prompt, image=1)


def made_anew(family: str) -> Calls:
    """Embeddings that are computed again for every step."""
    for step in range(6):
        yield "run", call(family, step, prompt_of(0))


SCENARIOS: list[Callable[[str], Calls]] = [
    two_prompts,
    views,
    views_of_two_prompts,
    interrupted,
    sizes,
    batches,
    changed_in_place,
    made_anew,
]


@EVERY_FAMILY
@pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda scenario: scenario.__name__)
@pytest.mark.parametrize("placement", ["block", "component"])
def test_each_run_computes_what_it_does_alone(
    family: str, scenario: Callable[[str], Calls], placement: str
) -> None:
    model = transformed(family, placement=placement)
    outputs: dict[str, list[Tensor]] = defaultdict(list)
    calls: dict[str, list[Any]] = defaultdict(list)
    with Selections() as selections:
        for run, inputs in scenario(family):
            outputs[run].append(model(**inputs)[0])
            calls[run].append(copy.deepcopy(inputs))
    # A run selects at its first step, and at every fourth after it.
    assert selections.count == GROUPS * sum(-(-len(made) // 4) for made in calls.values())
    for run, inputs_of_run in calls.items():
        alone = transformed(family, placement=placement)
        prompt = inputs_of_run[0]["encoder_hidden_states"]
        for inputs, output in zip(inputs_of_run, outputs[run], strict=True):
            expected = alone(**{**inputs, "encoder_hidden_states": prompt})[0]
            assert torch.equal(output, expected), run


@EVERY_FAMILY
def test_a_schedule_does_what_it_says(family: str) -> None:
    """Against the graphs alone: select, reuse, weigh, reuse, and from the start again."""
    model, always = transformed(family), transformed(family, schedule=Schedule())
    prompt = prompt_of(0)
    counts, outputs = [], []
    for step in range(8):
        with Selections() as selections:
            outputs.append(model(**call(family, step, prompt))[0])
        counts.append(selections.count)
    assert counts == [GROUPS, 0, 0, 0] * 2
    for step, output in enumerate(outputs):
        fresh = always(**call(family, step, prompt))[0]
        assert torch.equal(output, fresh) == (step % 4 == 0)


@EVERY_FAMILY
def test_a_repeated_timestep_makes_a_plan_and_goes_on(family: str) -> None:
    """As PNDM's second: the model is called twice, and only one of the calls goes on."""
    model, plain = transformed(family), transformed(family)
    always, prompt = transformed(family, schedule=Schedule()), prompt_of(0)
    outputs = {}
    for index, step in enumerate((0, 1, 1, 2, 3, 4)):
        inputs = call(family, step, prompt, image=index)
        outputs[index] = inputs, model(**inputs)[0]
    for index in (0, 1, 3, 4, 5):
        inputs, output = outputs[index]
        assert torch.equal(output, plain(**inputs)[0])
    inputs, output = outputs[2]
    assert torch.equal(output, always(**inputs)[0])


@EVERY_FAMILY
def test_threads_take_turns(family: str) -> None:
    """With one prompt, at timesteps that cross each other."""
    model, prompt = transformed(family), prompt_of(0)
    alone = [transformed(family) for _ in range(2)]
    steps = [(0, None), (1, None), (2, 0), (3, 1), (4, 2), (None, 3), (None, 4)]
    with ThreadPoolExecutor(1) as one, ThreadPoolExecutor(1) as two:
        for pair in steps:
            for image, (pool, step) in enumerate(zip((one, two), pair, strict=True)):
                if step is None:
                    continue
                inputs = call(family, step, prompt, image=image)
                output = pool.submit(_without_gradients, model, inputs).result()
                assert torch.equal(output, alone[image](**inputs)[0])


def _without_gradients(model: Any, inputs: dict[str, Any]) -> Tensor:
    with torch.no_grad():  # which is a setting of the thread
        output: Tensor = model(**inputs)[0]
        return output


@EVERY_FAMILY
def test_plans_made_in_inference_mode_serve_other_calls(family: str) -> None:
    model, plain, prompt = transformed(family), transformed(family), prompt_of(0)
    modes = [torch.inference_mode, torch.no_grad, torch.enable_grad, torch.inference_mode]
    for step, mode in enumerate(modes):
        inputs = call(family, step, prompt)
        with Selections() as selections, mode():
            output = model(**inputs)[0]
        assert selections.count == (GROUPS if step == 0 else 0)
        assert torch.equal(output.detach().clone(), plain(**inputs)[0])


@EVERY_FAMILY
def test_an_image_ends_where_its_pipeline_says(family: str) -> None:
    model, prompt = transformed(family), prompt_of(0)
    always = transformed(family, schedule=Schedule())
    model(**call(family, 0, prompt))
    assert len(model.toma_state) == 1
    assert model.toma_state.nbytes() > 0
    model._reset_stateful_cache()
    assert (len(model.toma_state), model.toma_state.nbytes()) == (0, 0)
    # The next image of the prompt starts where it likes, as image to image does.
    inputs = call(family, 5, prompt)
    assert torch.equal(model(**inputs)[0], always(**inputs)[0])


@EVERY_FAMILY
def test_a_copy_in_the_middle_of_a_run_has_no_plans_and_disturbs_none(family: str) -> None:
    model, plain, prompt = transformed(family), transformed(family), prompt_of(0)
    always = transformed(family, schedule=Schedule())
    for step in range(3):
        inputs = call(family, step, prompt)
        assert torch.equal(model(**inputs)[0], plain(**inputs)[0])
        twin = copy.deepcopy(model)
        assert torch.equal(twin(**inputs)[0], always(**inputs)[0])


def rows_at(family: str, steps: tuple[int, ...]) -> dict[str, Any]:
    """A batch whose rows are at different steps."""
    inputs = call(family, 0, torch.cat([prompt_of(row) for row in range(len(steps))]))
    made = [call(family, step, prompt_of(0))["timestep"].reshape(()) for step in steps]
    return {**inputs, "timestep": torch.stack(made)}


def row_of(inputs: dict[str, Any], rows: list[int]) -> dict[str, Any]:
    """The same call for some of its rows."""
    batch = len(inputs["encoder_hidden_states"])
    return {
        name: value[rows]
        if isinstance(value, Tensor) and value.ndim and len(value) == batch and "ids" not in name
        else value
        for name, value in inputs.items()
    }


@EVERY_FAMILY
def test_rows_on_both_sides_of_the_level(family: str) -> None:
    inputs = rows_at(family, (0, 12, 2, 10))  # levels of 0.9, 0.3, 0.8 and 0.4
    # In stripes, so that tokens keep their order and an untouched call its last bit.
    options: dict[str, Any] = {"schedule": Schedule(), "region": "stripe"}
    model, always = transformed(family, **options, merge_below=0.5), transformed(family, **options)
    message = (
        r"from 0\.3\d* to 0\.9\d*, on both sides of merge_below=0\.5, .* call the model once for "
        r"the rows of each side, or transform with merge_below=1"
    )
    with pytest.raises(InputError, match=message):
        model(**inputs)
    # Each side as the model of one variant does it.
    high, low = row_of(inputs, [0, 2]), row_of(inputs, [1, 3])
    assert torch.equal(model(**high)[0], model_of(family)(**high)[0])
    assert torch.equal(model(**low)[0], always(**low)[0])
    assert always(**inputs)[0].shape[0] == 4


@EVERY_FAMILY
def test_rows_at_different_timesteps_under_a_schedule(family: str) -> None:
    inputs = rows_at(family, (0, 3))
    model = transformed(family)
    message = r"timesteps from .* to .*, but Schedule\(.* call the model once for each, or"
    with pytest.raises(InputError, match=message):
        model(**inputs)
    always = transformed(family, schedule=Schedule())
    for row in ([0], [1]):
        part = row_of(inputs, row)
        assert torch.equal(model(**part)[0], always(**part)[0])
    assert always(**inputs)[0].shape[0] == 2
    # Rows at one timestep are one run.
    assert model(**rows_at(family, (1, 1)))[0].shape[0] == 2


@EVERY_FAMILY
@pytest.mark.parametrize("region", ["stripe", "tile"])
def test_merging_begins_where_the_noise_is_low(family: str, region: str) -> None:
    options: dict[str, Any] = {"schedule": Schedule(), "region": region}
    model, always = transformed(family, **options, merge_below=0.62), transformed(family, **options)
    prompt = prompt_of(0)
    for step in (0, 5, 6, 7, 3):  # levels of 0.9, 0.65, 0.6, 0.55 and 0.75
        inputs = call(family, step, prompt)
        output = model(**inputs)[0]
        if step >= 6:
            assert torch.equal(output, always(**inputs)[0])
        elif region == "stripe":
            assert torch.equal(output, model_of(family)(**inputs)[0])
        else:  # attention sums over tokens in another order
            torch.testing.assert_close(output, model_of(family)(**inputs)[0], rtol=1e-4, atol=1e-5)
    assert len(model.toma_state) == 0


@EVERY_FAMILY
def test_compiled_policies_have_a_graph_for_each_variant(family: str) -> None:
    """Whatever the step, the run and the prompt."""
    cases: list[tuple[dict[str, Any], int]] = [
        ({}, 3),
        ({"schedule": Schedule(), "merge_below": 0.7}, 2),
        ({"schedule": Schedule()}, 1),
    ]
    for options, variants in cases:
        torch._dynamo.reset()
        eager, model = transformed(family, **options), transformed(family, **options)
        frames = CompileCounterWithBackend("eager")
        compiled: Any = torch.compile(model, backend=frames, fullgraph=True)
        for run, inputs in [*two_prompts(family), *interrupted(family)]:
            expected = eager(**inputs)[0]
            torch.testing.assert_close(compiled(**inputs)[0], expected, rtol=1e-5, atol=1e-5), run
        assert frames.frame_count == variants


@pytest.mark.parametrize(
    ("options", "policy", "shares"),
    [
        ({}, Always, {MERGED: 1.0}),
        ({"merge_below": 0.5}, BelowNoiseLevel, {MERGED: 0.5, UNTOUCHED: 0.5}),
        ({"schedule": SCHEDULE}, OnSchedule, {MERGED: 0.25, WEIGH: 0.25, REUSE: 0.5}),
        (
            {"schedule": Schedule(select_every=8)},
            OnSchedule,
            {MERGED: 0.125, WEIGH: 0.875, REUSE: 0.0},
        ),
    ],
)
def test_the_share_of_each_variant_in_a_run(
    options: dict[str, Any], policy: type, shares: dict[str, float]
) -> None:
    found = policy_of(toma_fx.MergeConfig(**options))
    assert isinstance(found, policy)
    assert set(found.variants) == shares.keys()
    levels = [0.95, 0.9, 0.8, 0.7, 0.5, 0.4, 0.2, 0.1]
    assert found.shares(levels) == pytest.approx(shares)
