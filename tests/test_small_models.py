"""The small trained models: their pictures, their training at a tiny size, and their files."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from PIL import Image
from torch import Tensor, nn

from examples.small_models.architecture import KINDS, Kind, pipeline, vae
from examples.small_models.check import contact_sheet, sample, through_vae
from examples.small_models.judge import (
    FEATURES,
    accuracies,
    features,
    load_judge,
    shares,
    spoil,
    train,
    true_pictures,
)
from examples.small_models.losses import (
    Loss,
    flux_loss,
    sdxl_loss,
    to_pixels,
    tokens_of,
    vae_loss,
)
from examples.small_models.pictures import (
    DETAILED_SIZE,
    LAYOUTS,
    PAIRS,
    caption,
    draw,
    is_held_out,
    parse,
    scene_of,
    words,
)
from examples.small_models.text import PROMPT_TOKENS, clip_tokenizer, t5_tokenizer
from examples.small_models.train import dataset, encode, fit, main, psnr, scale_latents

FOLDER = Path(__file__).parent.parent / "examples" / "small_models"
PICTURES = np.stack([draw(scene_of(index), index) for index in range(8)])


def test_pictures_depend_on_their_index_alone(tmp_path: Path) -> None:
    written = dataset(tmp_path, 8, detailed=False)
    assert np.array_equal(written, PICTURES)
    assert np.array_equal(dataset(tmp_path, 4, detailed=False), PICTURES[:4])
    assert len(np.unique(PICTURES.reshape(8, -1), axis=0)) == 8
    with pytest.raises(ValueError, match="8 pictures, not 9"):
        dataset(tmp_path, 9, detailed=False)


def test_detail_changes_a_picture_but_not_its_scene(tmp_path: Path) -> None:
    detailed = dataset(tmp_path, 8, detailed=True)
    assert np.array_equal(detailed, true_pictures(8, detailed=True, start=0))
    for fine, plain in zip(detailed, PICTURES, strict=True):
        small = np.asarray(Image.fromarray(fine).resize((128, 128), Image.Resampling.BOX))
        gap = np.abs(small.astype(int) - plain.astype(int)).mean(-1)
        assert np.median(gap) < 30  # the same colours in the same places
        assert (gap > 40).mean() > 0.02  # and something that the plain picture does not show


def test_captions_say_the_scene_and_only_known_words() -> None:
    seen = set()
    for index in range(400):
        scene = scene_of(index, held_out=index % 4 == 0)
        text = caption(scene)
        assert parse(text) == scene
        assert set(text.split()) <= set(words())
        seen |= {scene.layout}
    assert seen == set(LAYOUTS)
    for text in ("a fox", "a large red circle on a plain green ground under a green sea"):
        with pytest.raises(ValueError, match="not a caption"):
            parse(text)


def test_training_lacks_the_held_out_things() -> None:
    for index in range(400):
        scene = scene_of(index)
        assert not is_held_out(scene.first)
        assert (scene.second is None) == (scene.layout not in PAIRS)
        assert scene.second is None or not is_held_out(scene.second)
        assert is_held_out(scene_of(index, held_out=True).first)


def test_mirror_images_are_mirrored() -> None:
    scene = next(s for s in map(scene_of, range(400)) if s.layout == "mirror" and s.sky == "pink")
    picture = draw(scene, 0)[:50]  # above the ground, whose texture is not
    assert np.array_equal(picture, picture[:, ::-1])


def test_tokenizers_know_each_word() -> None:
    clip, t5 = clip_tokenizer(), t5_tokenizer()
    for word in words():
        assert len(clip(word).input_ids) == 3
        assert len(t5(word).input_ids) == 2
    for tokenizer in (clip, t5):
        text = caption(scene_of(7))
        ids = tokenizer(text).input_ids
        assert tokenizer.decode(ids, skip_special_tokens=True) == text
        longest = max(len(tokenizer(caption(scene_of(i))).input_ids) for i in range(200))
        assert longest <= PROMPT_TOKENS


def _diffusion(kind: Kind) -> tuple[nn.ModuleDict, Loss]:
    pipe = pipeline(kind, tiny=True)
    names = ["unet" if kind == "sdxl" else "transformer", "text_encoder", "text_encoder_2"]
    parts = nn.ModuleDict({name: getattr(pipe, name) for name in names})
    latents = scale_latents(pipe.vae, encode(pipe.vae, PICTURES))
    assert latents.float().square().mean().item() == pytest.approx(1, abs=0.02)
    tokens = tokens_of(pipe, [caption(scene_of(index)) for index in range(8)])
    make = sdxl_loss if kind == "sdxl" else flux_loss
    return parts, make(parts, pipe, latents, tokens, 2)


def _vae(kind: Kind) -> tuple[nn.Module, Loss]:
    torch.manual_seed(0)
    model = vae(kind, tiny=True)
    return model, vae_loss(model, PICTURES, 2, 64)


def _interrupted(loss: Loss, step: int) -> Loss:
    def interrupted(now: int) -> Tensor:
        if now == step:
            raise KeyboardInterrupt
        return loss(now)

    return interrupted


@pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight:UserWarning")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("stage", [_vae, _diffusion])
def test_training_lowers_the_loss_and_goes_on_where_it_stopped(
    stage: Any, kind: Kind, tmp_path: Path
) -> None:
    model, loss = stage(kind)
    before = loss(0).item()
    whole, state = fit(model, loss, tmp_path / "whole.pt", rate=2e-3, steps=6)
    assert state.step == 6
    assert loss(0).item() < before

    model, loss = stage(kind)

    with pytest.raises(KeyboardInterrupt):
        fit(
            model,
            _interrupted(loss, step=3),
            tmp_path / "parts.pt",
            rate=2e-3,
            steps=6,
            save_every=0,
        )
    model, loss = stage(kind)
    parts, _ = fit(model, loss, tmp_path / "parts.pt", rate=2e-3, steps=6)
    torch.testing.assert_close(parts.state_dict(), whole.state_dict(), rtol=0, atol=0)


@pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight:UserWarning")
@pytest.mark.parametrize("kind", KINDS)
def test_a_trained_pipeline_can_be_trained_on(kind: Kind, tmp_path: Path) -> None:
    first = pipeline(kind, tiny=True, seed=3)
    first.save_pretrained(tmp_path / "first")
    (tmp_path / "first/training.json").write_text(json.dumps({"vae": {"steps": 7}}))
    words = f"diffusion --kind {kind} --steps 1 --batch 2 --pictures 4 --start {tmp_path}/first"
    main([*words.split(), "--work", str(tmp_path), "--output", str(tmp_path / "second")])
    second = DiffusionPipeline.from_pretrained(tmp_path / "second", dtype=torch.float32)
    part = "unet" if kind == "sdxl" else "transformer"
    for name in ("vae", part):
        for key, value in getattr(first, name).state_dict().items():
            # One step of warm-up, and of float16, away.
            after = getattr(second, name).state_dict()[key]
            torch.testing.assert_close(after, value, atol=2e-3, rtol=2e-3, msg=f"{name}.{key}")
    record = json.loads((tmp_path / "second/training.json").read_text())
    assert (record["vae"], record["diffusion"]["steps"]) == ({"steps": 7}, 1)


def test_training_by_minutes_ends(tmp_path: Path) -> None:
    model = nn.Linear(1, 1)
    checkpoint = tmp_path / "x.pt"
    _, state = fit(model, lambda _: model.weight.norm(), checkpoint, rate=0.1, minutes=0.01)
    assert state.seconds >= 0.6
    assert len(state.losses) == state.step // 50


def test_the_judge_counts_right_answers(tmp_path: Path) -> None:
    scenes = [scene_of(index) for index in range(8)]
    judge = train(tmp_path, 4, 2, 2, tmp_path / "judge.safetensors")
    found = accuracies(judge, PICTURES, scenes)
    assert all(0 <= share <= 1 for share in found.values())
    again = load_judge(tmp_path / "judge.safetensors")
    assert accuracies(again, PICTURES, scenes) == found
    assert features(judge, PICTURES).shape == (8, FEATURES)
    with pytest.raises(FileNotFoundError, match="judge"):
        load_judge(tmp_path / "none.safetensors")
    assert contact_sheet(PICTURES, [caption(scene) for scene in scenes]).width == 8 * 152


def test_the_shipped_judge_sees_what_true_pictures_show() -> None:
    """And not in pictures of other scenes, nor in noise."""
    judge = load_judge()
    for detailed in (False, True):
        start = 30_000_000
        drawn = true_pictures(48, detailed=detailed, start=start)
        scenes = [scene_of(index) for index in range(start, start + 48)]
        assert shares(judge, drawn, scenes).mean() > 0.85
        assert shares(judge, np.roll(drawn, 1, axis=0), scenes).mean() < 0.5
    noise = np.random.default_rng(0).integers(0, 255, drawn.shape).astype(np.uint8)
    assert shares(judge, noise, scenes).mean() < 0.5


def test_spoiled_pictures_are_softer_and_noisier() -> None:
    pixels = to_pixels(PICTURES)
    spoiled, degrees = spoil(pixels, torch.Generator().manual_seed(0))
    for one, before, (soft, noise) in zip(spoiled, pixels, degrees.tolist(), strict=True):
        assert torch.equal(one, before) == (soft == noise == 0)


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # diffusers' own
@pytest.mark.parametrize("kind", KINDS)
def test_shipped_pipelines_draw(kind: Kind) -> None:
    folder = FOLDER / kind
    assert sum(file.stat().st_size for file in folder.rglob("*")) < 20e6
    assert "Apache-2.0" in (folder / "README.md").read_text()
    record = json.loads((folder / "training.json").read_text())
    assert record["diffusion"]["steps"] > 1000

    pipe = DiffusionPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    prompts = [caption(scene_of(index)) for index in range(3)]
    drawn = sample(pipe, prompts, batch=2, num_inference_steps=2)
    size = pipe.vae.config.sample_size
    assert drawn.shape == (3, size, size, 3)
    assert (drawn.std((0, 1, 2)) > 5).all()
    true = true_pictures(8, detailed=size == DETAILED_SIZE, start=20_000_000)
    assert psnr(pipe.vae, true) > 28
    assert through_vae(pipe, true).shape == true.shape


@pytest.mark.parametrize("kind", ["sdxl", "flux", "kontext", "wan"])
def test_shipped_models_name_no_folder_of_the_machine_that_made_them(kind: str) -> None:
    for file in (FOLDER / kind).rglob("*.json"):
        path = json.loads(file.read_text()).get("_name_or_path", "")
        assert not Path(path).is_absolute(), file
