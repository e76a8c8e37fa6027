"""Rows: the newer families, each by a pipeline of it."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.families.lives import adapt
from tests.family_pipelines import FAMILY_PIPELINES
from tests.matrix.frame import Cell, difference, row
from tests.more_family_pipelines import MORE_PIPELINES, tiny_sd3_pipeline
from tests.tiny_more_families import tiny_sd35
from toma_fx import export, restore, transform
from toma_fx.arithmetic import first_call
from toma_fx.transform import pipeline_models

pytestmark = [
    # numpy, of how diffusers hands it a tensor.
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),
    # diffusers, of its own import in Chroma.
    pytest.mark.filterwarnings("ignore:.FluxPosEmbed. is deprecated:FutureWarning"),
    # peft, of models that diffusers gives no adapters of its own.
    pytest.mark.filterwarnings("ignore:Already found a .peft_config. attribute:UserWarning"),
]

SECTION = "Newer families"
Row = tuple[Callable[[], Any], Callable[[], dict[str, Any]]]


def sd35_pipeline() -> Any:
    """Stable Diffusion 3.5, whose transformer alone differs."""
    pipe = tiny_sd3_pipeline()
    pipe.register_modules(transformer=tiny_sd35())
    return pipe


MORE = {
    "Stable Diffusion 3": "sd3",
    "Chroma": "chroma",
    "HunyuanVideo": "hunyuan-video",
    "HunyuanVideo 1.5": "hunyuan-video-1.5",
    "HunyuanImage 2.1": "hunyuan-image",
    "LTX-Video": "ltx",
    "LTX-2": "ltx-2",
    "CogVideoX": "cogvideox",
    "Krea 2": "krea-2",
    "Cosmos (Anima)": "anima",
    "FLUX.3": "flux.3",
    "PixArt-Sigma": "pixart",
}
"""Of some, older diffusers have no pipeline."""
ROWS: dict[str, Row] = {
    "FLUX.2": FAMILY_PIPELINES["FLUX.2"],
    "FLUX.2, edit": FAMILY_PIPELINES["FLUX.2 edit"],
    "Qwen-Image": FAMILY_PIPELINES["Qwen-Image"],
    "Qwen-Image-Edit": FAMILY_PIPELINES["Qwen-Image-Edit 2511"],
    "Z-Image": FAMILY_PIPELINES["Z-Image"],
    "Wan 2.1": FAMILY_PIPELINES["Wan 2.1"],
    "Wan 2.1, from the first and last image": FAMILY_PIPELINES["Wan 2.1 FLF2V"],
    "Wan 2.2, two models": FAMILY_PIPELINES["Wan 2.2"],
    "Wan 2.1 VACE": FAMILY_PIPELINES["Wan VACE"],
    "Stable Diffusion 3.5": (sd35_pipeline, MORE_PIPELINES["sd3"][1]),
    **{title: MORE_PIPELINES[name] for title, name in MORE.items() if name in MORE_PIPELINES},
}
BRANCHING = ("HunyuanVideo 1.5", "HunyuanImage 2.1")
"""Whose forward branches on values, merged or not, so that no graph holds the whole model."""
EACH = pytest.mark.parametrize("name", ROWS)


def drawn(pipe: Any, name: str) -> Tensor:
    """The latents that a pipeline draws."""
    output = pipe(**ROWS[name][1]())
    image = output if isinstance(output, Tensor) else output[0]
    return image if isinstance(image, Tensor) else torch.as_tensor(image)


def pipeline(name: str) -> Any:
    """A quiet pipeline of a row."""
    pipe = ROWS[name][0]()
    pipe.set_progress_bar_config(disable=True)
    return pipe


def check_drawn(cell: Cell, name: str) -> None:
    """Assert that a merged pipeline draws in a mode what it draws eagerly, and is restored."""
    pipe = pipeline(name)
    untouched = drawn(pipe, name)
    transform(pipe, ratio=0.5)
    expected = drawn(pipe, name)
    assert difference(expected, untouched) > 1e-3
    for model in pipeline_models(pipe).values():
        cell.apply(model)
    first = drawn(pipe, name)
    cell.agree(first, expected)
    with cell.steady():
        cell.agree(drawn(pipe, name), first)
    restore(pipe)
    assert torch.equal(drawn(pipe, name), untouched)


@pytest.mark.parametrize("name", [name for name in ROWS if name not in BRANCHING])
@row("{name}", section=SECTION, families=("",), quick=())
def test_drawn(cell: Cell, name: str) -> None:
    check_drawn(cell, name)


@pytest.mark.parametrize("name", [name for name in ROWS if name in BRANCHING])
@row(
    "{name}",
    section=SECTION,
    families=("",),
    modes=("eager", "regional"),
    quick=(),
    note="the model branches on values, merged or not, so its blocks compile and not the whole",
)
def test_drawn_block_by_block(cell: Cell, name: str) -> None:
    check_drawn(cell, name)


@EACH
@row("{name}", section=SECTION, families=("",), modes=("lora",), quick=())
def test_lora_before_and_after(cell: Cell, name: str) -> None:
    images = []
    ways: list[list[Callable[[Any], Any]]]
    ways = [[adapt_all, transform], [transform, adapt_all], [transform]]
    for steps in ways:
        pipe = pipeline(name)
        for step in steps:
            step(pipe)
        images.append(drawn(pipe, name))
    before, after, without = images
    cell.agree(after, before)
    assert difference(after, without) > 1e-3


def adapt_all(pipe: Any) -> None:
    """Load a LoRA into the denoising models of a pipeline."""
    for model in pipeline_models(pipe).values():
        adapt(model)


@EACH
@row("{name}", section=SECTION, families=("",), modes=("offload",), quick=())
def test_group_offload(cell: Cell, name: str) -> None:
    pipe = transform(pipeline(name))
    expected = drawn(pipe, name)
    models: list[Any] = [*pipeline_models(pipe).values()]
    for model in models:
        model.enable_group_offload("cpu", offload_type="block_level", num_blocks_per_group=1)
    cell.agree(drawn(pipe, name), expected)


@pytest.mark.parametrize("name", [name for name in ROWS if name not in BRANCHING])
@row("{name}", section=SECTION, families=("",), modes=("export",), quick=())
def test_exported(cell: Cell, name: str) -> None:
    pipe = transform(pipeline(name))
    model: Any = next(iter(pipeline_models(pipe).values()))
    call = first_call(model, lambda: drawn(pipe, name))
    named = model.toma_named(call.args, call.kwargs)
    inputs = {k: v for k, v in named.items() if v is not None and k != "return_dict"}
    with torch.no_grad():
        expected = model(**inputs, return_dict=False)[0]
        got = export(model, inputs).module()(**inputs)[0]
    for one, other in zip(*map(listed, (got, expected)), strict=True):
        assert difference(one, other) < 1e-4


def listed(images: Any) -> list[Tensor]:
    """Images as a list, as Z-Image gives them."""
    return images if isinstance(images, list) else [images]
