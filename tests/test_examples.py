"""Each example runs at a small size, and its picture is one."""

import importlib.util
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import toma_fx
from examples import benchmark, export, flux, lora_controlnet, run_exported, sdxl
from tests.pipelines import tiny_flux_pipeline, tiny_sdxl_pipeline
from toma_fx import Memory, MergeConfig, Schedule

EXAMPLES = Path(__file__).parent.parent / "examples"
SMALL = EXAMPLES / "small_models"

pytestmark = [
    # diffusers' own Euler scheduler, and a ControlNet that is made from a UNet
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*:FutureWarning"),
]


def pictures(file: Path, count: int, side: int = 256) -> list[np.ndarray]:
    """The pictures of a file, from left to right."""
    strip = np.asarray(Image.open(file)).astype(int)
    assert strip.shape == (side, side * count, 3)
    parts = np.split(strip, count, axis=1)
    assert all(part.std() > 5 for part in parts)
    return parts


def test_sdxl(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for more, said in (([], "extrapolated"), (["--ratio", "0.5"], "ratio 0.5")):
        sdxl.main(["--steps", "4", *more, "--out", str(tmp_path / "a.png")])
        untouched, faster = pictures(tmp_path / "a.png", 2)
        assert (untouched != faster).any()
        assert said in capsys.readouterr().out


def test_flux(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flux.main(["--steps", "4", "--every", "3", "--out", str(tmp_path / "a.png")])
    pictures(tmp_path / "a.png", 1, side=128)
    assert "those between only extrapolate" in capsys.readouterr().out


def test_lora_and_controlnet(tmp_path: Path) -> None:
    output = str(tmp_path / "a.png")
    lora_controlnet.main(["--steps", "2", "--scales", "0", "1", "--out", output])
    without, adapted = pictures(tmp_path / "a.png", 2)
    assert (without != adapted).any()


def test_benchmark(capsys: pytest.CaptureFixture[str]) -> None:
    benchmark.main(["--steps", "1", "--repeats", "1", "--ratio", "0.5"])
    said = capsys.readouterr().out
    assert "untouched" in said
    assert "ratio 0.5" in said


VARIANTS = {
    "merge_below": (MergeConfig(merge_below=0.6), ["--merge-below", "0.6"]),
    "schedule": (
        MergeConfig(schedule=Schedule(select_every=3, weigh_every=2)),
        ["--select-every", "3", "--weigh-every", "2"],
    ),
    "memory": (
        MergeConfig(ratio=0.75, memory=Memory(every=2, theta=0.5)),
        ["--ratio", "0.75", "--memory-every", "2", "--theta", "0.5"],
    ),
    "memory below": (
        MergeConfig(ratio=0.75, merge_below=0.8, memory=Memory(every=2)),
        ["--ratio", "0.75", "--merge-below", "0.8", "--memory-every", "2"],
    ),
}


@pytest.mark.parametrize(
    ("build", "what"),
    [
        (tiny_flux_pipeline, "schedule"),
        (tiny_flux_pipeline, "memory"),
        pytest.param(tiny_sdxl_pipeline, "memory", marks=pytest.mark.slow),
        pytest.param(tiny_flux_pipeline, "memory below", marks=pytest.mark.slow),
        pytest.param(tiny_flux_pipeline, "merge_below", marks=pytest.mark.slow),
        pytest.param(tiny_sdxl_pipeline, "schedule", marks=pytest.mark.slow),
        pytest.param(tiny_sdxl_pipeline, "merge_below", marks=pytest.mark.slow),
    ],
)
def test_exported_variants_draw_what_the_pipeline_draws(
    build: Any, what: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config, options = VARIANTS[what]
    pipe = build()
    pipe.save_pretrained(tmp_path / "pipeline")
    folder = str(tmp_path / "exported")
    asked = ["--prompt", "abc", "--size", "128", "--steps", "4", *options]
    export.main(["--model", str(tmp_path / "pipeline"), "--out", folder, *asked])
    latents = run_exported.main([folder])
    said = capsys.readouterr().out
    assert len(set(re.findall(r"step \d, (\w+)", said))) > 1
    noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(0))
    toma_fx.transform(pipe, config)
    call = {"num_inference_steps": 4, "guidance_scale": 3.5, "height": 128, "width": 128}
    expected = pipe("abc", **call, latents=noise, output_type="latent").images
    assert (latents - expected).norm() < 1e-4 * expected.norm()


def comfyui() -> Any:
    """The nodes, imported as ComfyUI does: from a folder of any name."""
    file = EXAMPLES / "comfyui" / "__init__.py"
    spec = importlib.util.spec_from_file_location("custom_nodes.toma", file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run(node: Any, **inputs: Any) -> Any:
    """Run a node as ComfyUI does: by its declared function, with its declared inputs."""
    declared = node.INPUT_TYPES()["required"]
    assert set(inputs) <= set(declared)
    defaults = {n: rest[0]["default"] for n, (_, *rest) in declared.items() if n not in inputs}
    outputs = getattr(node(), node.FUNCTION)(**defaults, **inputs)
    assert len(outputs) == len(node.RETURN_TYPES)
    return outputs


@pytest.mark.parametrize("kind", ["sdxl", "flux"])
def test_comfyui_nodes(kind: str) -> None:
    module = comfyui()
    nodes = module.NODE_CLASS_MAPPINGS
    assert set(module.NODE_DISPLAY_NAME_MAPPINGS) == set(nodes)
    load, merge, draw = nodes.values()
    (pipe,) = run(load, name=str(SMALL / kind), dtype="float32")
    images = []
    for ratio in (0.25, 0.5):  # the graph runs again, and the loader's output is kept
        merged, report = run(merge, pipeline=pipe, ratio=ratio, memory_every=0, merge_below=1.0)
        assert f"ratio {ratio}" in report
        (image,) = run(draw, pipeline=merged, prompt="a red circle", steps=2, width=128, height=128)
        assert image.shape == (1, 128, 128, 3)
        assert image.dtype == torch.float32
        assert 0 <= image.min() < image.max() <= 1
        images.append(image)
    assert not torch.equal(*images)
    with pytest.raises(toma_fx.TomaError, match="not transformed"):
        toma_fx.restore(pipe)
