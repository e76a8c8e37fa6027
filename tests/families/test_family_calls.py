"""Made-up calls of the newer families fit diffusers' own models."""

from collections.abc import Callable, Mapping
from importlib import import_module
from itertools import pairwise
from typing import Any

import diffusers
import pytest
import torch
from torch.utils._pytree import tree_leaves, tree_map

from tests.families.image_models import IMAGES, PUBLISHED_IMAGES
from tests.families.model_rows import Published
from tests.families.video_models import PUBLISHED_VIDEOS, VIDEOS
from toma_fx.errors import InputError, ModelError
from toma_fx.families import noise
from toma_fx.families.example_tensors import check_frames

pytestmark = [
    # numpy, of how diffusers hands it a tensor.
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),
    # diffusers, of its own import in Chroma.
    pytest.mark.filterwarnings("ignore:.FluxPosEmbed. is deprecated:FutureWarning"),
]

TINY = {**IMAGES, **VIDEOS}


def family(file: str) -> Any:
    return import_module(f"toma_fx.families.{file}")


def build(cls: str, config: Mapping[str, Any], device: str = "cpu") -> Any:
    with torch.random.fork_rng(devices=[]), torch.device(device):
        torch.manual_seed(0)
        return getattr(diffusers, cls)(**config).eval()


def shapes(value: Any) -> Any:
    return tree_map(lambda leaf: (leaf.shape, leaf.dtype), value)


def run(model: Any, call: Mapping[str, Any], parts: int = 0) -> Any:
    """The output of a model, or the first ``parts`` of several."""
    with torch.no_grad():
        outputs = model(**call, return_dict=False)
    return outputs[:parts] if parts else outputs[0]


@pytest.mark.parametrize("name", TINY)
def test_a_made_up_call_fits_the_model(name: str) -> None:
    tiny = TINY[name]
    module = family(tiny.file)
    model = build(tiny.cls, tiny.config)
    call = module.example_call(model, torch.empty(0), batch=2, **tiny.size)
    assert set(tiny.present) <= set(call)
    assert not set(tiny.absent) & set(call)
    output = run(model, call, parts=len(tiny.parts))
    assert all(bool(leaf.isfinite().all()) for leaf in tree_leaves(output))
    if tiny.parts:
        assert shapes(list(output)) == shapes([call[name] for name in tiny.parts])
    elif tiny.output:
        assert shapes(output) == shapes(call[tiny.output])
    assert module._sequence_lengths(call) == tiny.lengths
    assert module.FAMILY.image(call).shape[0] == 2


@pytest.mark.parametrize("name", TINY)
def test_calls_are_alike_and_match_without_data(name: str) -> None:
    tiny = TINY[name]
    module = family(tiny.file)
    model = build(tiny.cls, tiny.config, "meta")
    like = torch.empty(0, dtype=torch.bfloat16, device="meta")
    call = module.example_call(model, like, batch=1, **tiny.size)
    real = module.example_call(model, like.new_empty(0, device="cpu"), batch=1, **tiny.size)
    again = module.example_call(model, like.new_empty(0, device="cpu"), batch=1, **tiny.size)
    tensors = [leaf for leaf in tree_leaves(call) if isinstance(leaf, torch.Tensor)]
    assert all(leaf.is_meta for leaf in tensors)
    assert facts(call) == facts(real)
    assert all(map(same, tree_leaves(real), tree_leaves(again)))


def facts(call: Mapping[str, Any]) -> Any:
    def of(leaf: Any) -> Any:
        return (leaf.shape, leaf.dtype) if isinstance(leaf, torch.Tensor) else leaf

    return tree_map(of, dict(call))


def same(one: Any, other: Any) -> bool:
    return torch.equal(one, other) if isinstance(one, torch.Tensor) else one == other


def published() -> list[Any]:
    return [
        pytest.param(row, name, id=name)
        for row in [*PUBLISHED_IMAGES, *PUBLISHED_VIDEOS]
        for name in family(row.file).FAMILY.architectures
    ]


@pytest.mark.parametrize(("row", "name"), published())
def test_a_published_model_takes_its_call_at_its_native_size(row: Published, name: str) -> None:
    module = family(row.file)
    config = module.FAMILY.architectures[name]
    model = build(row.cls, {**config, **row.cut}, "meta")
    like = torch.empty(0, device="meta")
    call = module.FAMILY.example_call(model, like, batch=1, height=None, width=None)
    if name in row.shape:
        assert tuple(module.FAMILY.image(call).shape) == row.shape[name]
    if not row.runs:
        return
    output = run(model, call)
    if row.output:
        assert shapes(output) == shapes(call[row.output])


FLOW: dict[str, Callable[[], Any]] = {
    "flow matching": diffusers.FlowMatchEulerDiscreteScheduler,
    "shifted": lambda: diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
    "shifted by size": lambda: diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
    "UniPC": lambda: diffusers.UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
    ),
}
EVEN: dict[str, Any] = {"sigmas": noise.even_sigmas(6)}
COUNT: dict[str, Any] = {"num_inference_steps": 6}
TIMES: dict[str, tuple[str, Callable[[float], float], dict[str, Any]]] = {
    "FLUX.2 dev": ("timestep", lambda t: t / 1000, EVEN),
    "Qwen-Image": ("timestep", lambda t: t / 1000, EVEN),
    "Qwen-Image-Layered": ("timestep", lambda t: t / 1000, EVEN),
    "Z-Image": ("t", lambda t: (1000 - t) / 1000, EVEN),
    "Wan": ("timestep", lambda t: t, COUNT),
    "Wan 2.2 5B": ("timestep", lambda t: t, COUNT),
    "SD3": ("timestep", lambda t: t, COUNT),
    "Chroma": ("timestep", lambda t: t / 1000, EVEN),
    "HunyuanVideo": ("timestep", lambda t: t, EVEN),
    "HunyuanVideo 1.5": ("timestep", lambda t: t, EVEN),
    "HunyuanImage": ("timestep", lambda t: t, EVEN),
    "LTX-Video": ("timestep", lambda t: t, EVEN),
    "LTX-2": ("timestep", lambda t: t, EVEN),
    "Krea 2": ("timestep", lambda t: t / 1000, EVEN),
    "FLUX.3": ("timestep", lambda t: t / 1000, EVEN),
}
"""By model, the argument with the timestep, what its pipeline makes of the scheduler's, and how it
sets them for 6 steps."""


def tiny_call(name: str) -> Any:
    tiny = TINY[name]
    like = torch.empty(0, device="meta")
    model = build(tiny.cls, tiny.config, "meta")
    return family(tiny.file).example_call(model, like, batch=1, **tiny.size)


def takes(name: str, scheduler: str) -> bool:
    """Whether a family's pipeline runs with a scheduler: some give it no shift."""
    unshifted = ("wan", "hunyuan_video", "hunyuan_video15", "hunyuan_image", "flux3")
    return not (TINY[name].file in unshifted and scheduler == "shifted by size")


@pytest.mark.parametrize(
    ("name", "scheduler"),
    [(name, each) for name in TIMES for each in (None, *FLOW) if each is None or takes(name, each)],
)
def test_runs_go_from_noise_to_the_image(name: str, scheduler: str | None) -> None:
    module = family(TINY[name].file)
    made = None if scheduler is None else FLOW[scheduler]()
    levels = module._run_levels(made, 8, tiny_call(name))
    assert len(levels) == 8
    assert levels[0] > 0.9
    assert all(0 < below < above <= 1 for above, below in pairwise(levels))


@pytest.mark.parametrize("name", TIMES)
def test_a_run_has_the_levels_of_its_timesteps(name: str) -> None:
    module = family(TINY[name].file)
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    levels = module._run_levels(scheduler, 6, tiny_call(name))
    assert scheduler.timesteps.shape[0] == 1000  # untouched
    _, passed, plan = TIMES[name]
    scheduler.set_timesteps(**plan)
    each = [module._noise_level(passed(float(t)), scheduler) for t in scheduler.timesteps]
    assert levels == pytest.approx(each)


@pytest.mark.parametrize("name", TIMES)
def test_the_made_up_timestep_is_in_the_middle(name: str) -> None:
    argument, *_ = TIMES[name]
    module, tiny = family(TINY[name].file), TINY[name]
    call = module.example_call(
        build(tiny.cls, tiny.config, "meta"), torch.empty(0), batch=2, **tiny.size
    )
    read = module.FAMILY.timestep
    assert read(call).shape == (2,)
    assert set(call) >= {argument}
    assert [module._noise_level(float(t), None) for t in read(call)] == [0.5, 0.5]


NOISE: dict[str, Callable[[], Any]] = {
    "ddim": lambda: diffusers.CogVideoXDDIMScheduler(timestep_spacing="trailing"),
    "dpm": diffusers.DPMSolverMultistepScheduler,
}


@pytest.mark.parametrize("name", ["CogVideoX", "PixArt-alpha"])
@pytest.mark.parametrize("scheduler", [None, *NOISE])
def test_runs_without_flow_matching_end_at_the_image(name: str, scheduler: str | None) -> None:
    module = family(TINY[name].file)
    made = None if scheduler is None else NOISE[scheduler]()
    levels = module._run_levels(made, 5, tiny_call(name))
    assert levels == pytest.approx([1, 0.8, 0.6, 0.4, 0.2], abs=2e-3)


def test_cosmos_reads_noise_of_all_its_schedulers() -> None:
    from toma_fx.families import cosmos

    first = diffusers.EDMEulerScheduler(
        sigma_max=80, sigma_schedule="karras", final_sigmas_type="sigma_min"
    )
    second = diffusers.FlowMatchEulerDiscreteScheduler(use_karras_sigmas=True)
    # As Cosmos 2's pipelines set it up.
    second.register_to_config(sigma_max=80.0, sigma_min=0.002, final_sigmas_type="sigma_min")
    levels = cosmos._run_levels(first, 5, tiny_call("Cosmos 1"))
    for scheduler in (second, None):
        again = cosmos._run_levels(scheduler, 5, tiny_call("Cosmos 2, text to image"))
        assert again == pytest.approx(levels, abs=1e-6)
    assert levels[0] == pytest.approx(80 / 81)
    first.set_timesteps(5)
    each = [cosmos._noise_level(float(t), first) for t in first.timesteps]
    assert levels == pytest.approx(each)
    newest = cosmos._run_levels(None, 5, tiny_call("Cosmos 2.5"))
    assert all(0 < below < above < 1 for above, below in pairwise(newest))
    assert cosmos._noise_level(newest[0], diffusers.UniPCMultistepScheduler()) == newest[0]


def test_flux2_shifts_as_its_pipeline_does() -> None:
    from diffusers.pipelines.flux2.pipeline_flux2 import compute_empirical_mu

    from toma_fx.families import flux2

    for tokens in (256, 4096, 8192):
        for steps in (4, 28, 50):
            assert flux2._shift(tokens, steps) == pytest.approx(compute_empirical_mu(tokens, steps))


@pytest.mark.parametrize("name", TINY)
def test_sizes_that_tokens_do_not_cover_are_refused(name: str) -> None:
    tiny = TINY[name]
    model = build(tiny.cls, tiny.config, "meta")
    with pytest.raises(ModelError, match="must be a multiple of"):
        family(tiny.file).example_call(
            model, torch.empty(0), batch=1, **{**tiny.size, "height": 33}
        )


def test_frames_that_latents_do_not_cover_are_refused() -> None:
    assert [check_frames(frames, 4) for frames in (1, 5, 81)] == [1, 2, 21]
    for frames in (0, 2, 80):
        with pytest.raises(ModelError, match="1 plus a multiple of 4 frames"):
            check_frames(frames, 4)


def test_a_timestep_of_another_model_is_refused() -> None:
    assert noise.level_of_clean_share(0.25, None) == 0.75
    with pytest.raises(InputError, match="is not a share of the image"):
        noise.level_of_clean_share(500, None)
