"""A run with memory computes what the method, written a second time, computes."""

import functools
import itertools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import fields
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from tests import reference
from tests import tiny_families as families
from tests import tiny_more_families as more
from tests.choices import Choices
from tests.family_reference import Picture
from tests.memory_reference import Form, remembering
from tests.reference import ReferenceOptions
from tests.tiny import flux_inputs, tiny_flux, tiny_sdxl_unet, unet_inputs
from toma_fx import Memory, MergeConfig, transform

STEPS = 6
# As of tests.test_reference.
TOLERANCE = 2e-5


class Case(NamedTuple):
    """A model, a call of it, and what its image tokens show."""

    build: Callable[..., Any]
    inputs: Callable[..., dict[str, Any]]
    picture: Picture | None
    image: str = "hidden_states"
    time: str = "timestep"


IMAGE, WIDE = Picture([(1, 16, 16)]), Picture([(1, 16, 12)])
VIDEO, LONGER = Picture([(3, 8, 8)]), Picture([(5, 8, 12)])
GIVEN, LONGER_GIVEN = Picture([(3, 8, 8)], [0]), Picture([(5, 8, 12)], [0])


def _two(build: Callable[..., Any], **changes: Any) -> Callable[..., Any]:
    return functools.partial(build, num_layers=2, **changes)


_WAN_TI2V = functools.partial(families.wan_inputs, times="after the first frame")
_HUNYUAN = functools.partial(more.tiny_hunyuan_video, num_layers=2, num_single_layers=2)
_FROM_IMAGE = functools.partial(more.tiny_hunyuan_video_i2v, num_layers=1, num_single_layers=1)
CASES = {
    "sdxl": Case(tiny_sdxl_unet, unet_inputs, None, "sample"),
    "flux": Case(_two(tiny_flux, num_single_layers=2), flux_inputs, IMAGE),
    "sd3": Case(_two(more.tiny_sd3), more.sd3_inputs, IMAGE),
    "sd3.5": Case(_two(more.tiny_sd35), more.sd3_inputs, IMAGE),
    "pixart": Case(_two(more.tiny_pixart), more.pixart_inputs, IMAGE),
    "hunyuan-video": Case(_HUNYUAN, more.hunyuan_video_inputs, VIDEO),
    "hunyuan-video, from an image": Case(_FROM_IMAGE, more.hunyuan_video_inputs, GIVEN),
    "flux2": Case(_two(families.tiny_flux2), families.flux2_inputs, WIDE),
    "qwen": Case(_two(families.tiny_qwen_image), families.qwen_image_inputs, WIDE),
    "z-image": Case(_two(families.tiny_z_image), families.z_image_inputs, WIDE, "x", "t"),
    "krea-2": Case(_two(more.tiny_krea2), more.krea2_inputs, IMAGE),
    "wan": Case(_two(families.tiny_wan), families.wan_inputs, LONGER),
    "wan, a timestep per token": Case(_two(families.tiny_wan), _WAN_TI2V, LONGER_GIVEN),
    "vace": Case(
        _two(families.tiny_wan_vace, vace_layers=(0, 1)), families.wan_vace_inputs, LONGER
    ),
    "ltx-2": Case(_two(more.tiny_ltx2), more.ltx2_inputs, VIDEO),
    "ltx-2.3": Case(_two(more.tiny_ltx23), more.ltx2_inputs, VIDEO),
}


@functools.cache
def built(name: str) -> Any:
    """One model for all tests; nothing here may change it."""
    return CASES[name].build()


def run_of(name: str) -> Iterator[dict[str, Any]]:
    """The calls of a run, from noise to an image."""
    case, model = CASES[name], built(name)
    call = case.inputs(model)
    other = case.inputs(model, seed=1)[case.image]
    for step in range(STEPS):
        left = 1 - step / STEPS
        image = pytree.tree_map(lambda a, b, left=left: a + left * b, call[case.image], other)
        time = (call[case.time] * left).to(call[case.time].dtype)
        if case.time == "t":  # which rises
            time = 1 - left * call[case.time]
        lower = {n: time for n, value in call.items() if value is call[case.time]}
        yield {**call, case.image: image, **lower}


def output_of(model: Any, call: Mapping[str, Any]) -> Tensor:
    """All that a call gives, in one row for each sample."""
    outputs = [
        torch.stack(each) if isinstance(each, list) else each
        for each in model(**call, return_dict=False)
    ]
    return torch.cat([each.flatten(1) for each in outputs if each is not None], dim=1)


def difference(a: Tensor, b: Tensor) -> float:
    """Root mean square of ``a - b``, in standard deviations of ``b``."""
    return float((a - b).square().mean().sqrt() / b.std())


@pytest.fixture
def check(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    @torch.no_grad()
    def compare(name: str, form: Form, **options: Any) -> None:
        memory = Memory(**{each.name: getattr(form, each.name) for each in fields(form)})
        settings = {"ratio": 0.75, "region_tokens": 16, "skip": (), **options}
        config = MergeConfig(**settings, memory=memory)
        names = {each.name for each in fields(ReferenceOptions)} - {"skip", "options"}
        plain = ReferenceOptions(**{each: getattr(config, each) for each in names})
        model, calls = built(name), list(run_of(name))
        transformed = transform(model, config)
        with Choices() as choices:
            outputs = [output_of(transformed, call) for call in calls]
        assert bool(choices.made) == (form.theta > 0)  # or no plan is needed
        if choices.made:
            monkeypatch.setattr(reference, "select", choices.follow)
        second, steps = remembering(model, CASES[name].picture, plain, form)
        for step, (call, output) in enumerate(zip(calls, outputs, strict=True)):
            expected = output_of(second, call)
            assert difference(output, expected) < TOLERANCE, f"step {step}"
            away = difference(output, output_of(model, call))
            if steps.is_full:
                assert away < TOLERANCE, f"step {step}"
            else:
                assert away > 1e-4, f"step {step}"
        assert not choices.made

    return compare


FORMS = {
    "updates": {"extrapolate": False, "control": False},
    "changes": {"extrapolate": False},
    "expected": {},
    "expected, no control": {"control": False},
}


def _some(quick: set[tuple[Any, ...]], *rows: tuple[Any, ...]) -> list[Any]:
    """Parameters of a test; those that begin with none of ``quick`` are slow."""
    marks = [
        () if any(row[: len(each)] == each for each in quick) else (pytest.mark.slow,)
        for row in rows
    ]
    return [pytest.param(*row, marks=mark) for row, mark in zip(rows, marks, strict=True)]


@pytest.mark.parametrize(
    ("every", "theta", "form", "name"),
    _some(
        {(2, 0.25, "expected"), (2, 1.0, "updates", "flux"), (3, 0.0, "expected", "flux")},
        *itertools.product([2, 3], [0.0, 0.25, 1.0], FORMS, ["sdxl", "flux"]),
    ),
)
def test_every_form(
    check: Callable[..., None], every: int, theta: float, form: str, name: str
) -> None:
    check(name, Form(every=every, theta=theta, **FORMS[form]))


@pytest.mark.parametrize(
    ("form", "theta", "every", "name"),
    _some(
        {("expected", 0.25)},
        *(
            (*row, name)
            for row in [("expected", 0.25, 2), ("expected", 0.0, 2), ("updates", 1.0, 3)]
            for name in CASES
            if name not in ("sdxl", "flux")
        ),
    ),
)
def test_every_family(
    check: Callable[..., None], form: str, theta: float, every: int, name: str
) -> None:
    check(name, Form(every=every, theta=theta, **FORMS[form]))


@pytest.mark.parametrize(
    "options",
    [
        {"region": "stripe"},
        {"region": "image"},
        {"unmerge": "pinv"},
        {"merge_over": "image", "temperature": 0.1},
    ],
    ids=str,
)
def test_options(check: Callable[..., None], options: dict[str, Any]) -> None:
    check("flux", Form(every=2, theta=0.25), **options)
