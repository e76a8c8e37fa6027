"""Train the small Wan: first its VAE, then the transformer together with its text encoder.

    python -m examples.small_models.train_videos vae --minutes 30 --batch 2
    python -m examples.small_models.train_videos diffusion --minutes 40 --frames 1 --batch 8
        --clips 12000 --output first
    python -m examples.small_models.train_videos diffusion --minutes 60 --start first
        --output small_wan

As Wan itself, the transformer first learns from single frames, whose steps are quicker. The same
command goes on where it was stopped; latents and checkpoints lie in ``--work``.
"""

import argparse
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKLWan, DiffusionPipeline
from torch import Tensor, nn
from tqdm import tqdm

from examples.small_models.architecture import video_pipeline, video_vae
from examples.small_models.losses import Loss, autocast, clip_pixels, vae_error, wan_loss
from examples.small_models.pictures import caption, scene_of
from examples.small_models.text import PROMPT_TOKENS
from examples.small_models.train import UNSEEN, fit, length_of, record_of
from examples.small_models.videos import CLIP_SIZE, FRAMES, Clip, clips_of

PARTS = ("transformer", "text_encoder")


def clip_vae_loss(model: Any, clips: int, batch: int, crop: int, frames: int) -> Loss:
    """As `losses.vae_loss`, of parts of clips; each step draws its own.

    Args:
        model: the VAE.
        clips: how many there are to choose from.
        batch: parts of a step.
        crop: pixels along a part's side.
        frames: of a part, one more than a multiple of 4.
    """

    def loss(step: int) -> Tensor:
        generator = torch.Generator().manual_seed(step)
        chosen = torch.randint(clips, (batch,), generator=generator).tolist()
        corners = torch.randint(CLIP_SIZE - crop + 1, (batch, 2), generator=generator).tolist()
        first = int(torch.randint(FRAMES - frames + 1, (1,), generator=generator))
        drawn = clips_of(chosen, first + frames)[:, first:]
        crops = [
            clip[:, top : top + crop, left : left + crop]
            for clip, (top, left) in zip(drawn, corners, strict=True)
        ]
        pixels = clip_pixels(np.stack(crops)).to(model.device)
        return vae_error(model, pixels, generator)

    return loss


@torch.no_grad()
def note_statistics(model: Any, clips: Clip) -> float:
    """Notes in the VAE its latents' mean and deviation, and says its PSNR on the clips, in dB."""
    latents, errors = [], []
    for clip in clips:
        pixels = clip_pixels(clip[None]).to(model.device)
        latents.append(model.encode(pixels).latent_dist.mean)
        errors.append(((model.decode(latents[-1]).sample - pixels) / 2).square().mean().item())
    each = torch.cat(latents).transpose(0, 1).flatten(1)
    model.register_to_config(
        latents_mean=each.mean(1).tolist(), latents_std=each.std(1).clamp(min=1e-4).tolist()
    )
    return -10 * math.log10(sum(errors) / len(errors))


@torch.no_grad()
def latents_of(model: Any, path: Path, count: int, frames: int) -> Tensor:
    """Latents ``(count, 16, 1 + frames // 4, 24, 24)`` in the VAE's scale; made once, then read.

    Raises:
        ValueError: for a file of fewer.
    """
    if not path.exists():
        made = []
        for start in tqdm(range(0, count, 4), "latents", mininterval=10):
            indices = range(start, min(start + 4, count))
            pixels = clip_pixels(clips_of(indices, frames)).to(model.device)
            with autocast(model.device):
                made.append(model.encode(pixels).latent_dist.mean.half().cpu())
        torch.save(torch.cat(made), path)
    found = torch.load(path, weights_only=True, mmap=True)[:count].float()
    if len(found) < count:
        raise ValueError(f"{path} has {len(found)} clips, not {count}; remove it")
    mean, deviation = (
        torch.tensor(each).view(-1, 1, 1, 1)
        for each in (model.config.latents_mean, model.config.latents_std)
    )
    scaled: Tensor = ((found - mean) / deviation).half()
    return scaled


def clip_tokens(pipe: Any, captions: list[str]) -> tuple[Tensor, Tensor]:
    """Numbers and a mask of the captions' tokens and, in the last row, of the empty one's."""
    made = pipe.tokenizer(
        [*captions, ""], padding="max_length", max_length=PROMPT_TOKENS, return_tensors="pt"
    )
    return made.input_ids, made.attention_mask


def train_vae(options: argparse.Namespace) -> None:
    """Train the VAE, and note how well it does on clips that it was not trained on."""
    model = video_vae().to(options.device)
    loss = clip_vae_loss(model, options.clips, options.batch, options.crop, options.frames)
    average, state = fit(model, loss, options.work / "vae_wan.pt", **length_of(options, "vae"))
    quality = note_statistics(average, clips_of(range(UNSEEN, UNSEEN + 32)))
    record = record_of(state, options, average) | {"psnr_db": round(quality, 2)}
    average.save_pretrained(options.work / "vae_wan")  # type: ignore[operator]
    (options.work / "vae_wan.json").write_text(json.dumps(record))
    print("VAE:", record["psnr_db"], "dB after", state.step, "steps")


def train_diffusion(options: argparse.Namespace) -> None:
    """Train the transformer and its text encoder, and save the whole pipeline."""
    if options.start is None:
        pipe: Any = video_pipeline()
        pipe.register_modules(vae=AutoencoderKLWan.from_pretrained(options.work / "vae_wan"))
        record = {"vae": json.loads((options.work / "vae_wan.json").read_text())}
    else:
        pipe = DiffusionPipeline.from_pretrained(options.start, dtype=torch.float32)
        record = json.loads((options.start / "training.json").read_text())
    pipe.vae.to(options.device).eval()
    stored = options.work / f"latents_wan_{options.frames}.pt"
    latents = latents_of(pipe.vae, stored, options.clips, options.frames)
    tokens = clip_tokens(pipe, [caption(scene_of(index)) for index in range(len(latents))])
    parts = nn.ModuleDict({name: getattr(pipe, name) for name in PARTS}).to(options.device)
    loss = wan_loss(parts, pipe, latents, tokens, options.batch)
    checkpoint = options.work / f"diffusion_wan_{options.frames}.pt"
    trained, state = fit(parts, loss, checkpoint, **length_of(options, "diffusion"))
    for name in PARTS:
        setattr(pipe, name, trained.get_submodule(name))
    # The text encoder stays in float32: transformers loads a file as it is, but diffusers in
    # float32, and a pipeline loaded without a dtype would have both.
    pipe.vae.half()
    pipe.transformer.half()
    pipe.save_pretrained(options.output)
    stage = "frames" if options.frames == 1 else "diffusion"
    record[stage] = record_of(state, options, trained)
    (options.output / "training.json").write_text(json.dumps(record, indent=1) + "\n")


def main(arguments: list[str] | None = None) -> None:
    """Train one stage."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("stage", choices=("vae", "diffusion"))
    length = parser.add_mutually_exclusive_group(required=True)
    length.add_argument("--minutes", type=float, help="how long in all")
    length.add_argument("--steps", type=int, help="how many steps in all")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--crop", type=int, default=64, help="pixels that the VAE sees at once")
    parser.add_argument(
        "--frames", type=int, help=f"of a clip (the VAE's parts have 9, other clips {FRAMES})"
    )
    parser.add_argument("--clips", type=int, default=3000, dest="pictures", metavar="CLIPS")
    parser.add_argument("--work", type=Path, default=Path("small_models_work"))
    parser.add_argument("--start", type=Path, help="a trained pipeline's folder to go on from")
    parser.add_argument("--output", type=Path, help="the trained pipeline's folder")
    options = parser.parse_args(arguments)
    options.clips = options.pictures
    options.frames = options.frames or (9 if options.stage == "vae" else FRAMES)
    options.work.mkdir(parents=True, exist_ok=True)
    options.output = options.output or options.work / "wan"
    options.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    stage = train_vae if options.stage == "vae" else train_diffusion
    stage(options)


if __name__ == "__main__":
    main()
