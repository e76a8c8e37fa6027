"""Teach the small Flux to edit, as Flux Kontext does: from a picture and a prompt to another.

    python -m examples.small_models.train_edits --minutes 40 --output small_kontext

Only its transformer learns; VAE and text encoders stay the small Flux's. The same command goes on
where it was stopped. ``--output`` gets the transformer and the losses.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import FluxPipeline
from torch import Tensor, nn
from tqdm import tqdm

from examples.small_models.edits import draw_edit, edit_of
from examples.small_models.losses import autocast, edit_loss, tokens_of
from examples.small_models.train import encode, fit, record_of

FOLDER = Path(__file__).parent
RATE = 8e-4


def latents_of(pipe: Any, path: Path, count: int) -> tuple[Tensor, Tensor]:
    """Latents of the pictures before and after, in the VAE's scale; made once, then read."""
    if not path.exists():
        pairs = [draw_edit(edit_of(i), i) for i in tqdm(range(count), "pairs", mininterval=5)]
        made = [encode(pipe.vae, np.stack(pictures)) for pictures in zip(*pairs, strict=True)]
        torch.save(made, path)
    config = pipe.vae.config
    before, after = (
        (each.float() - config.shift_factor) * config.scaling_factor
        for each in torch.load(path, weights_only=True)
    )
    return before[:count], after[:count]


@torch.no_grad()
def text_of(pipe: Any, prompts: list[str]) -> list[Tensor]:
    """Pooled vectors and states of the prompts and, in the last row, of the empty one."""
    clip, t5 = tokens_of(pipe, prompts)
    made = []
    for encoder, ids, name in (
        (pipe.text_encoder, clip, "pooler_output"),
        (pipe.text_encoder_2, t5, "last_hidden_state"),
    ):
        with autocast(encoder.device):
            parts = [encoder(each.to(encoder.device))[name] for each in ids.split(256)]
        made.append(torch.cat(parts).float().cpu())
    return made


def main(arguments: list[str] | None = None) -> None:
    """Train, and save."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    length = parser.add_mutually_exclusive_group(required=True)
    length.add_argument("--minutes", type=float, help="how long in all")
    length.add_argument("--steps", type=int, help="how many steps in all")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--pictures", type=int, default=6000, help="pairs")
    parser.add_argument("--work", type=Path, default=Path("small_models_work"))
    parser.add_argument("--start", type=Path, default=FOLDER / "flux", help="a Flux pipeline")
    parser.add_argument("--output", type=Path, required=True)
    options = parser.parse_args(arguments)
    options.work.mkdir(parents=True, exist_ok=True)
    options.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")

    pipe = FluxPipeline.from_pretrained(options.start, dtype=torch.float32)
    pipe.to(options.device)
    latents = latents_of(pipe, options.work / "latents_edits.pt", options.pictures)
    text = text_of(pipe, [edit_of(index).prompt for index in range(options.pictures)])
    parts = nn.ModuleDict({"transformer": pipe.transformer})
    trained, state = fit(
        parts,
        edit_loss(parts, pipe, latents, text, options.batch),
        options.work / "edits.pt",
        rate=RATE,
        steps=options.steps,
        minutes=options.minutes,
    )
    trained.get_submodule("transformer").half().save_pretrained(options.output / "transformer")  # type: ignore[operator]
    record = record_of(state, options, trained)
    (options.output / "training.json").write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
