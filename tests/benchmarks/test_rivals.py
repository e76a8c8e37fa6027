"""Rivals change a pipeline while they are applied, and leave it as it was."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.real_size import RealSize
from benchmarks.rivals import Rival, load_rival, tomesd
from tests.pipelines import tiny_flux_pipeline, tiny_sdxl_pipeline
from tests.tiny import smooth_images, unet_inputs
from toma_fx.arithmetic import Call, count
from toma_fx.errors import ConfigError, ModelError

RIVALS = Path(__file__).parents[2] / "examples" / "rivals"


def load(name: str) -> Rival:
    return tomesd() if name == "tomesd" else load_rival(RIVALS / f"{name}.py")


@pytest.fixture(params=["todo", "tofu", "tomesd"])
def rival(request: pytest.FixtureRequest) -> Rival:
    return load(request.param)


@torch.no_grad()
def run(pipeline: Any, height: int = 32, width: int = 32) -> Tensor:
    inputs = unet_inputs(pipeline.unet, height=height, width=width)
    sample: Tensor = pipeline.unet(inputs.pop("sample"), inputs.pop("timestep"), **inputs).sample
    return sample


def changed(rival: Rival, pipeline: Any, ratio: float) -> tuple[Tensor, Callable[[], None]]:
    undo = rival.apply(pipeline, ratio)
    return run(pipeline), undo


def test_more_is_saved_and_lost_at_a_higher_ratio_and_all_is_undone(rival: Rival) -> None:
    pipeline = tiny_sdxl_pipeline()
    inputs = unet_inputs(pipeline.unet)
    call = Call((inputs.pop("sample"), inputs.pop("timestep")), inputs)
    before, operations = run(pipeline), count(pipeline.unet, call, data=True)
    state = torch.get_rng_state()
    distances, counts = [0.0], [operations]
    for ratio in (0.25, 0.75):
        sample, undo = changed(rival, pipeline, ratio)
        assert sample.isfinite().all()
        distances.append(float((sample - before).norm() / before.norm()))
        counts.append(count(pipeline.unet, call, data=True))
        undo()
        assert torch.equal(run(pipeline), before)
    assert distances == sorted(distances) and 0 < distances[1] < distances[2] < 1
    assert counts == sorted(counts, reverse=True) and len(set(counts)) == 3
    assert torch.equal(torch.get_rng_state(), state)


def test_the_real_models_share_falls_with_the_ratio(rival: Rival) -> None:
    low, high = (rival.real_share(ratio, RealSize("sdxl")) for ratio in (0.75, 0.25))
    assert 0.4 < low < high < 1


def test_an_image_does_not_depend_on_those_before(rival: Rival) -> None:
    pipeline = tiny_sdxl_pipeline()
    first, undo = changed(rival, pipeline, 0.5)
    run(pipeline)
    undo()
    torch.rand(3)
    again, undo = changed(rival, pipeline, 0.5)
    undo()
    assert torch.equal(first, again)


@pytest.mark.parametrize("size", [(16, 32), (24, 40)])
def test_images_need_not_be_square(rival: Rival, size: tuple[int, int]) -> None:
    pipeline = tiny_sdxl_pipeline()
    undo = rival.apply(pipeline, 0.5)
    assert run(pipeline, *size).shape[-2:] == size
    undo()


def test_flux_is_refused(rival: Rival) -> None:
    with pytest.raises(ModelError, match="FluxPipeline has none"):
        rival.apply(tiny_flux_pipeline(), 0.5)


@pytest.mark.parametrize("name", ["tofu", "tomesd"])
def test_more_than_three_quarters_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match=r"above 0\.75"):
        load(name).apply(tiny_sdxl_pipeline(), 0.8)


def test_todo_sees_the_nearest_keys() -> None:
    keys = load_rival(RIVALS / "todo.py").apply.__globals__["DownsampledKeys"]
    tokens = torch.arange(24.0).reshape(1, 24, 1)  # 4 x 6
    fewer = keys(None, 0.25, [4, 6])._fewer(tokens)
    assert fewer.flatten().tolist() == [7, 9, 11, 19, 21, 23]


def test_tofu_fuses_the_most_alike_and_keeps_their_norm() -> None:
    match = load_rival(RIVALS / "tofu.py").apply.__globals__["match"]
    tokens = torch.eye(4)[None].clone()  # a 2 x 2 grid: token 0 is the destination
    tokens[0, 2] = torch.tensor([3.0, 0.1, 0, 0])
    merging = match(tokens, 2, 0.25, prune=False)
    assert sorted(merging.kept[0].tolist()) == [0, 1, 3]
    fused = merging.fuse(tokens)
    place = int(merging.place[0, 0])
    assert int(merging.place[0, 2]) == place
    assert float(fused[0, place].norm()) == pytest.approx(float(tokens[0, 2].norm()))
    direction = (tokens[0, 0] + tokens[0, 2]) / (tokens[0, 0] + tokens[0, 2]).norm()
    torch.testing.assert_close(fused[0, place] / fused[0, place].norm(), direction)
    spread = merging.spread(fused)
    for token in (1, 3):
        torch.testing.assert_close(spread[0, token], tokens[0, token])
    pruned = match(tokens, 2, 0.25, prune=True).fuse(tokens)
    torch.testing.assert_close(pruned[0, place], tokens[0, 0])


def test_tofu_changes_smooth_tokens_little() -> None:
    match = load_rival(RIVALS / "tofu.py").apply.__globals__["match"]
    images = smooth_images((2, 8, 16, 16), torch.Generator().manual_seed(0))
    tokens = images.flatten(2).transpose(1, 2)
    fusion = match(tokens, 16, 0.25, prune=False)
    back = fusion.spread(fusion.fuse(tokens))
    assert float((back - tokens).norm() / tokens.norm()) < 0.2


def test_a_file_must_define_apply(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text("NAME = 'x'\n")
    with pytest.raises(ConfigError, match="must define apply"):
        load_rival(tmp_path / "mine.py")
    with pytest.raises(ConfigError, match="cannot be read"):
        load_rival(tmp_path / "none.py")


def test_other_code_is_another_rival(tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    file.write_text("def apply(pipeline, ratio): return lambda: None\n")
    first = load_rival(file)
    assert first.name == "mine"
    file.write_text("NAME = 'other'\ndef apply(pipeline, ratio): return lambda: 1\n")
    second = load_rival(file)
    assert second.name == "other" and second.source != first.source
