"""Train a small pipeline: first its VAE, then the diffusion model together with its text encoders.

    python -m examples.small_models.train vae --kind sdxl --minutes 24
    python -m examples.small_models.train vae --kind sdxl --minutes 32 --crop 128 --batch 2
    python -m examples.small_models.train diffusion --kind sdxl --minutes 60 --output small_sdxl

    python -m examples.small_models.train vae --kind sdxl --detailed --start small_sdxl ...

``--start FOLDER`` goes on from a trained pipeline, with its VAE or a later one in ``--work``.
``--detailed`` trains on pictures of 256 x 256 pixels with detail that no caption names. The same
command goes on where it was stopped; more minutes, or fewer, may be asked for then. Pictures,
latents and checkpoints lie in ``--work``. Each step takes its random numbers from its own number,
so that an interruption changes nothing.
"""

import argparse
import copy
import json
import math
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from diffusers import AutoencoderKL, DiffusionPipeline
from torch import Tensor, nn
from tqdm import tqdm

from examples.small_models.architecture import KINDS, Kind, pipeline, vae
from examples.small_models.losses import (
    Loss,
    autocast,
    flux_loss,
    sdxl_loss,
    to_pixels,
    tokens_of,
    vae_loss,
)
from examples.small_models.pictures import DETAILED_SIZE, SIZE, caption, draw, scene_of

UNSEEN = 10_000_000  # scenes from this index on are never trained on
LONGEST_STEP = 20.0  # seconds; a step that took longer was a pause, which is not training time
RATE = {"vae": 2e-3, "diffusion": 8e-4}
WARMUP_STEPS = 100
DECAY = 0.3  # the share of a training, its last, in which the rate goes down


@dataclass(kw_only=True)
class State:
    """How far a training is."""

    step: int = 0
    seconds: float = 0.0
    losses: list[tuple[int, float]] = field(default_factory=list)
    """After each 50 steps, their mean loss."""


def fit(
    model: nn.Module,
    loss: Loss,
    checkpoint: Path,
    *,
    rate: float,
    steps: int | None = None,
    minutes: float | None = None,
    save_every: float = 120.0,
) -> tuple[nn.Module, State]:
    """Train to a number of steps or minutes, from the checkpoint if there is one.

    Args:
        model: Holds what is trained; ``loss`` uses it.
        loss: The loss of a step, which depends on the step's number alone.
        checkpoint: Written now and then and at the end.
        rate: the learning rate after warm-up; in the end a cosine takes it to 0.
        steps: How many steps in all, or
        minutes: how long in all.
        save_every: Seconds between two checkpoints.

    Returns:
        The mean of the weights over the last steps (EMA), as a copy of the model, and the state.
    """
    average = copy.deepcopy(model).requires_grad_(False)
    optimizers = _optimizers(model)
    state, recent = State(), []
    if checkpoint.exists():
        saved = torch.load(checkpoint, weights_only=True)
        model.load_state_dict(saved["model"])
        average.load_state_dict(saved["average"])
        for optimizer, stored in zip(optimizers, saved["optimizers"], strict=True):
            optimizer.load_state_dict(stored)
        state, recent = State(**saved["state"]), saved["recent"]

    def save() -> None:
        content = {
            "model": model.state_dict(),
            "average": average.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in optimizers],
            "state": vars(state),
            "recent": recent,
        }
        partial = checkpoint.with_suffix(".partial")
        torch.save(content, partial)
        partial.replace(checkpoint)

    def progress() -> float:
        return state.step / steps if steps else state.seconds / (60 * (minutes or 0) + 1e-9)

    last_save = time.monotonic()
    model.train()
    with tqdm(total=steps, initial=state.step, desc=checkpoint.stem, mininterval=10) as bar:
        while (done := progress()) < 1:
            start = time.monotonic()
            value = loss(state.step)
            _step(model, optimizers, value, rate * _rate_at(state.step, done))
            _follow(average, model, state.step)
            state.step += 1
            state.seconds += min(time.monotonic() - start, LONGEST_STEP)
            recent.append(value.item())
            if state.step % 50 == 0:
                state.losses.append((state.step, round(sum(recent) / len(recent), 5)))
                recent.clear()
            bar.set_postfix(loss=f"{value.item():.4f}", done=f"{done:.0%}", refresh=False)
            bar.update()
            if time.monotonic() - last_save > save_every:
                save()
                last_save = time.monotonic()
    save()
    return average.eval(), state


def _optimizers(model: nn.Module) -> list[torch.optim.Optimizer]:
    """Muon for the matrices between a model's first and last layers, AdamW for all else.

    Side by side from the same weights on the same batches, Muon's loss on Flux was a tenth lower
    after 200 steps, at a fifth more time for each.
    """
    inner: list[nn.Parameter] = []
    outer: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        edge = "embed" in name or name == "transformer.proj_out.weight"
        (outer if edge or parameter.ndim != 2 else inner).append(parameter)
    found: list[torch.optim.Optimizer] = []
    if outer:
        found.append(torch.optim.AdamW(outer, betas=(0.9, 0.99), weight_decay=0.01, fused=True))
    if inner:
        found.append(torch.optim.Muon(inner, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"))
    return found


def _step(
    model: nn.Module, optimizers: list[torch.optim.Optimizer], loss: Tensor, rate: float
) -> None:
    model.zero_grad()
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()


@torch.no_grad()
def _follow(average: nn.Module, model: nn.Module, step: int) -> None:
    """The exponential moving average of the weights, over fewer steps in the beginning."""
    share = max(0.001, 1 - (1 + step) / (10 + step))
    for mean, weight in zip(average.parameters(), model.parameters(), strict=True):
        mean.lerp_(weight, share)


def _rate_at(step: int, done: float) -> float:
    """The learning rate relative to its highest: a warm-up, and a cosine to 0 in the end."""
    down = max(0.0, 1 - (1 - done) / DECAY)
    return min(1.0, (step + 1) / WARMUP_STEPS) * 0.5 * (1 + math.cos(math.pi * down))


@torch.no_grad()
def encode(model: Any, pictures: npt.NDArray[np.uint8], batch: int = 32) -> Tensor:
    """The latents' means, ``(pictures, channels, height / 4, width / 4)``, in float16."""
    parts = []
    for start in tqdm(range(0, len(pictures), batch), desc="latents", mininterval=5):
        pixels = to_pixels(np.array(pictures[start : start + batch])).to(model.device)
        with autocast(model.device):
            parts.append(model.encode(pixels).latent_dist.mean.half().cpu())
    return torch.cat(parts)


def scale_latents(model: Any, latents: Tensor) -> Tensor:
    """Notes in the VAE how its latents get a variance of 1 (Flux: and a mean of 0), and does it."""
    sample = latents[:2000].float()
    shift = sample.mean().item() if model.config.shift_factor is not None else 0.0
    scale = 1 / (sample - shift).square().mean().sqrt().item()
    if model.config.shift_factor is not None:
        model.register_to_config(shift_factor=shift)
    model.register_to_config(scaling_factor=scale)
    return ((latents.float() - shift) * scale).half()


@torch.no_grad()
def psnr(model: Any, pictures: npt.NDArray[np.uint8]) -> float:
    """Of pictures that went through the VAE, in dB: 10 log10(1 / mean squared error)."""
    pixels = to_pixels(pictures).to(model.device)
    decoded = model.decode(model.encode(pixels).latent_dist.mean).sample.clamp(-1, 1)
    return -10 * math.log10(((decoded - pixels) / 2).square().mean().item())


def dataset(work: Path, count: int, *, detailed: bool) -> npt.NDArray[np.uint8]:
    """The training pictures, ``(count, size, size, 3)``, drawn once and then read from a file."""
    path = work / ("detailed_pictures.npy" if detailed else "pictures.npy")
    size = DETAILED_SIZE if detailed else SIZE
    if not path.exists():
        partial = path.with_suffix(".partial")
        shape = (count, size, size, 3)
        array = np.lib.format.open_memmap(partial, mode="w+", dtype=np.uint8, shape=shape)
        for index in tqdm(range(count), desc="pictures", mininterval=5):
            array[index] = draw(scene_of(index), index, size=size, detailed=detailed)
        array.flush()
        partial.rename(path)
    pictures: npt.NDArray[np.uint8] = np.load(path, mmap_mode="r")
    if len(pictures) < count:
        raise ValueError(f"{path} has {len(pictures)} pictures, not {count}; remove it")
    return pictures[:count]


def train_vae(kind: Kind, options: argparse.Namespace) -> None:
    """Train the VAE and note how well it does on pictures that it was not trained on."""
    model = vae(kind)
    if options.start is not None:
        model = AutoencoderKL.from_pretrained(options.start / "vae", torch_dtype=torch.float32)
    model.to(options.device)
    pictures = dataset(options.work, options.pictures, detailed=options.detailed)
    size = pictures.shape[1]
    model.register_to_config(sample_size=size)
    loss = vae_loss(model, pictures, options.batch, options.crop)
    average, state = fit(model, loss, options.work / f"vae_{kind}.pt", **length_of(options, "vae"))
    unseen = np.stack(
        [
            draw(scene_of(index), index, size=size, detailed=options.detailed)
            for index in range(UNSEEN, UNSEEN + 64)
        ]
    )
    record = record_of(state, options, average) | {"psnr_db": round(psnr(average, unseen), 2)}
    torch.save(average.state_dict(), options.work / f"vae_{kind}_final.pt")
    (options.work / f"vae_{kind}.json").write_text(json.dumps(record))
    print(kind, "VAE:", record["psnr_db"], "dB after", state.step, "steps")


def train_diffusion(kind: Kind, options: argparse.Namespace) -> None:
    """Train the diffusion model and its text encoders, and save the whole pipeline."""
    stored = options.work / f"vae_{kind}_final.pt"
    if options.start is None:
        pipe = pipeline(kind)
    else:
        pipe = DiffusionPipeline.from_pretrained(options.start, dtype=torch.float32)
    if options.start is None or stored.exists():
        pipe.vae.load_state_dict(torch.load(stored, weights_only=True))
        vae_record = json.loads((options.work / f"vae_{kind}.json").read_text())
    else:
        vae_record = json.loads((options.start / "training.json").read_text())["vae"]
    if kind == "sdxl":
        pipe.register_modules(
            scheduler=type(pipe.scheduler).from_config(
                pipe.scheduler.config, prediction_type=options.prediction
            )
        )
    if options.detailed:
        pipe.vae.register_to_config(sample_size=DETAILED_SIZE)
        name = "unet" if kind == "sdxl" else "transformer"
        getattr(pipe, name).register_to_config(sample_size=DETAILED_SIZE // 4)
    pipe.vae.to(options.device).eval()
    stored = options.work / f"latents_{kind}.pt"
    if not stored.exists():
        pictures = dataset(options.work, options.pictures, detailed=options.detailed)
        torch.save(encode(pipe.vae, pictures), stored)
    latents = scale_latents(pipe.vae, torch.load(stored, weights_only=True, mmap=True))
    captions = [caption(scene_of(index)) for index in range(len(latents))]
    names = ["unet" if kind == "sdxl" else "transformer", "text_encoder", "text_encoder_2"]
    parts = nn.ModuleDict({name: getattr(pipe, name) for name in names}).to(options.device)
    make = sdxl_loss if kind == "sdxl" else flux_loss
    loss = make(parts, pipe, latents, tokens_of(pipe, captions), options.batch)
    checkpoint = options.work / f"diffusion_{kind}.pt"
    trained, state = fit(parts, loss, checkpoint, **length_of(options, "diffusion"))
    for name in names:
        setattr(pipe, name, trained.get_submodule(name))
    # Text encoders stay in float32: transformers loads a file as it is, but diffusers in float32,
    # and a pipeline loaded without a dtype would have both.
    pipe.vae.half()
    getattr(pipe, names[0]).half()
    pipe.save_pretrained(options.output)
    record = {"vae": vae_record, "diffusion": record_of(state, options, trained)}
    (options.output / "training.json").write_text(json.dumps(record, indent=1) + "\n")


def length_of(options: argparse.Namespace, stage: str) -> dict[str, Any]:
    """Arguments of `fit`: the rate of a stage, and the length that was asked for."""
    return {"rate": RATE[stage], "steps": options.steps, "minutes": options.minutes}


def record_of(state: State, options: argparse.Namespace, model: nn.Module) -> dict[str, Any]:
    """What a card says of a training."""
    cuda = options.device.type == "cuda"
    return {
        "pictures": options.pictures,
        "batch": options.batch,
        "steps": state.step,
        "seconds": round(state.seconds),
        "hardware": torch.cuda.get_device_name()
        if cuda
        else f"{torch.get_num_threads()} CPU thread",
        "torch": torch.__version__,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "losses": state.losses,
    }


def main(arguments: list[str] | None = None) -> None:
    """Train one stage of one pipeline."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("stage", choices=("vae", "diffusion"))
    parser.add_argument("--kind", choices=KINDS, required=True)
    length = parser.add_mutually_exclusive_group(required=True)
    length.add_argument("--minutes", type=float, help="how long in all")
    length.add_argument("--steps", type=int, help="how many steps in all")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--crop", type=int, default=64, help="pixels that the VAE sees at once")
    parser.add_argument("--pictures", type=int, default=16_000)
    parser.add_argument("--work", type=Path, default=Path("small_models_work"))
    parser.add_argument(
        "--detailed", action="store_true", help="pictures of 256 x 256 pixels with fine detail"
    )
    parser.add_argument(
        "--prediction",
        choices=("v_prediction", "epsilon"),
        default="v_prediction",
        help="of SDXL's UNet: the velocity or the noise (v_prediction)",
    )
    parser.add_argument("--start", type=Path, help="a trained pipeline's folder to go on from")
    parser.add_argument("--output", type=Path, help="the trained pipeline's folder")
    options = parser.parse_args(arguments)
    options.work.mkdir(parents=True, exist_ok=True)
    options.output = options.output or options.work / options.kind
    options.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    stage = train_vae if options.stage == "vae" else train_diffusion
    stage(options.kind, options)


if __name__ == "__main__":
    main()
