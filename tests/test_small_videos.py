"""The small Wan: its clips, its training at a tiny size, and how it is drawn and checked."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn

from examples.small_models.architecture import video_pipeline, video_vae
from examples.small_models.check import clip_sheet, sample, through_vae
from examples.small_models.losses import Loss, wan_loss
from examples.small_models.pictures import SIZE, caption, places, scene_of
from examples.small_models.train import fit
from examples.small_models.train_videos import (
    PARTS,
    clip_tokens,
    clip_vae_loss,
    latents_of,
    main,
    note_statistics,
)
from examples.small_models.videos import (
    CLIP_SIZE,
    FRAMES,
    LOOKED_AT,
    TOGETHER,
    clips_of,
    looked_at,
    swings_of,
)

pytestmark = pytest.mark.filterwarnings("ignore:Mismatch dtype between input:UserWarning")
WAN = Path(__file__).parent.parent / "examples" / "small_models" / "wan"
SHAPE = (FRAMES, CLIP_SIZE, CLIP_SIZE, 3)


def test_clips_depend_on_their_index_alone_and_move_smoothly() -> None:
    clips = clips_of(range(8))
    assert clips.shape == (8, *SHAPE)
    assert np.array_equal(clips_of(range(8)), clips)
    assert np.array_equal(clips_of(range(8), 3), clips[:, :3])
    steps = np.abs(np.diff(clips.astype(int), axis=1)).mean((2, 3, 4))
    assert (steps > 0.1).all()
    whole = np.abs(clips[:, 0].astype(int) - clips[:, -1]).mean((1, 2, 3))
    assert (steps.mean(1) < whole).all()  # it goes on, and does not tremble


def test_things_stay_inside_and_keep_their_layout() -> None:
    for index in range(200):
        scene = scene_of(index)
        things = places(scene, np.random.default_rng(index))
        swings = swings_of(scene, things, index)
        moved = [swing.at(frame) for swing in swings for frame in range(FRAMES)]
        assert max(np.hypot(*way) for way in moved) > 1
        for frame in range(FRAMES):
            at = [swing.at(frame) for swing in swings]
            for thing, (x, y) in zip(things, at, strict=True):
                for place, way in ((thing.x, x), (thing.y, y)):
                    edge = min(place + way, SIZE - place - way)
                    at_rest = min(place, SIZE - place)
                    assert edge >= min(1.15 * thing.radius, at_rest) - 1e-6
            if scene.layout in TOGETHER:
                assert len({(round(abs(x), 6), round(y, 6)) for x, y in at}) == 1
            elif len(things) == 2:
                dimension = 0 if scene.layout == "left of" else 1
                back, front = (
                    (thing.x, thing.y)[dimension] + way[dimension]
                    for thing, way in zip(things, at, strict=True)
                )
                assert front < back - 10


def test_a_judge_sees_some_frames() -> None:
    clips, scenes = clips_of(range(2)), [scene_of(0), scene_of(1)]
    pictures, each = looked_at(clips, scenes)
    assert np.array_equal(pictures[len(LOOKED_AT)], clips[1, 0])
    assert each == [scenes[0]] * 3 + [scenes[1]] * 3
    assert looked_at(pictures, each) == (pictures, each)


def _vae(_: Path) -> tuple[nn.Module, Loss]:
    torch.manual_seed(0)
    model = video_vae(tiny=True)
    return model, clip_vae_loss(model, 4, 2, 32, 5)


def _diffusion(work: Path) -> tuple[nn.Module, Loss]:
    pipe = video_pipeline(tiny=True)
    note_statistics(pipe.vae, clips_of(range(2)))
    latents = latents_of(pipe.vae, work / "latents.pt", 2, FRAMES)
    assert latents.shape == (2, 16, 5, 24, 24)
    assert latents.float().std().item() == pytest.approx(1, abs=0.05)
    tokens = clip_tokens(pipe, [caption(scene_of(index)) for index in range(2)])
    parts = nn.ModuleDict({name: getattr(pipe, name) for name in PARTS})
    return parts, wan_loss(parts, pipe, latents, tokens, 2)


@pytest.mark.parametrize("stage", [_vae, _diffusion])
def test_training_lowers_the_loss_and_goes_on_where_it_stopped(stage: Any, tmp_path: Path) -> None:
    model, loss = stage(tmp_path)
    before = loss(0).item()
    whole, state = fit(model, loss, tmp_path / "whole.pt", rate=2e-3, steps=4)
    assert state.step == 4
    assert loss(0).item() < before

    model, loss = stage(tmp_path)

    def interrupted(step: int) -> Tensor:
        if step == 2:
            raise KeyboardInterrupt
        made: Tensor = loss(step)
        return made

    part = tmp_path / "parts.pt"
    with pytest.raises(KeyboardInterrupt):
        fit(model, interrupted, part, rate=2e-3, steps=4, save_every=0)
    model, loss = stage(tmp_path)
    parts, _ = fit(model, loss, part, rate=2e-3, steps=4)
    torch.testing.assert_close(parts.state_dict(), whole.state_dict(), rtol=0, atol=0)


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # diffusers' own
def test_single_frames_come_first_and_the_pipeline_draws_clips(tmp_path: Path) -> None:
    video_pipeline(tiny=True).save_pretrained(tmp_path / "untrained")
    (tmp_path / "untrained/training.json").write_text(json.dumps({"vae": {"steps": 7}}))
    common = f"diffusion --steps 1 --batch 2 --clips 2 --work {tmp_path}"
    for folder, start, more in (
        ("first", "untrained", "--frames 1"),
        ("second", "first", ""),
    ):
        own = f"--start {tmp_path}/{start} --output {tmp_path}/{folder} {more}"
        main([*common.split(), *own.split()])
    record = json.loads((tmp_path / "second/training.json").read_text())
    assert [*record] == ["vae", "frames", "diffusion"]
    with pytest.raises(ValueError, match="2 clips, not 3"):
        latents_of(None, tmp_path / "latents_wan_1.pt", 3, 1)

    pipe = DiffusionPipeline.from_pretrained(tmp_path / "second")
    pipe.set_progress_bar_config(disable=True)
    prompts = [caption(scene_of(index)) for index in range(2)]
    drawn = sample(pipe, prompts, num_inference_steps=2)
    assert drawn.shape == (2, *SHAPE)
    assert np.array_equal(sample(pipe, prompts, num_inference_steps=2), drawn)
    through = through_vae(pipe, drawn)
    assert through.shape == drawn.shape
    assert clip_sheet(drawn, prompts).height == 2 * (CLIP_SIZE + 20)


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # diffusers' own
def test_the_shipped_wan_draws_moving_clips() -> None:
    assert sum(file.stat().st_size for file in WAN.rglob("*")) < 20e6
    assert "Apache-2.0" in (WAN / "README.md").read_text()
    assert json.loads((WAN / "training.json").read_text())["diffusion"]["steps"] >= 800
    pipe = DiffusionPipeline.from_pretrained(WAN)
    pipe.set_progress_bar_config(disable=True)
    drawn = sample(pipe, [caption(scene_of(0))], num_inference_steps=4)
    assert drawn.shape == (1, *SHAPE)
    assert drawn.std() > 20
    moved = np.abs(np.diff(drawn[0].astype(int), axis=0)).mean((1, 2, 3))
    assert (moved > 0.1).all()
    true = clips_of(range(20_000_000, 20_000_004))
    gap = (through_vae(pipe, true).astype(float) - true) / 255
    assert -10 * np.log10(np.square(gap).mean()) > 23
