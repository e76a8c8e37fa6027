"""Whether prompts decide what a small pipeline draws: a judge looks at its pictures.

    python -m examples.small_models.check examples/small_models/sdxl --sheet sheet.png

The judge is a small classifier, trained here, once, on true pictures. It is asked what it sees in
samples for prompts of things that training showed and of things that it never showed; for scale, in
true pictures that went through the VAE, and in samples that were made for other prompts.
"""

import argparse
import math
import textwrap
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from diffusers import DiffusionPipeline
from PIL import Image, ImageDraw
from tabulate import tabulate
from torch import Tensor, nn
from tqdm import tqdm

from examples.small_models import pictures
from examples.small_models.losses import to_pixels
from examples.small_models.pictures import Scene, Thing, caption, draw, scene_of
from examples.small_models.text import PROMPT_TOKENS

CALL: dict[str, dict[str, Any]] = {
    "StableDiffusionXLPipeline": {"num_inference_steps": 25, "guidance_scale": 3.0},
    "FluxPipeline": {
        "num_inference_steps": 25,
        "negative_prompt": "",
        "true_cfg_scale": 2.0,
        "max_sequence_length": PROMPT_TOKENS,
    },
}
"""How each pipeline is called to give its best pictures, besides the size."""

UNSEEN = 20_000_000  # scenes from this index on were neither trained nor judged on

QUESTIONS: dict[str, tuple[tuple[str, ...], Callable[[Scene], str]]] = {
    "layout": (tuple(pictures.LAYOUTS), lambda scene: scene.layout),
    "size": (pictures.SIZES, lambda scene: scene.first.size),
    "colour": (tuple(pictures.COLOURS), lambda scene: scene.first.colour),
    "shape": (tuple(pictures.SHAPES), lambda scene: scene.first.shape),
    "second size": (pictures.SIZES, lambda scene: _second(scene).size),
    "second colour": (tuple(pictures.COLOURS), lambda scene: _second(scene).colour),
    "second shape": (tuple(pictures.SHAPES), lambda scene: _second(scene).shape),
    "texture": (pictures.TEXTURES, lambda scene: scene.texture),
    "ground": (tuple(pictures.GROUNDS), lambda scene: scene.ground),
    "sky": (tuple(pictures.SKIES), lambda scene: scene.sky),
}
"""What is asked of a picture: the possible answers, and the right one, or "" for none."""


class Judge(nn.Module):
    """Answers all questions about pictures ``(N, 3, 128, 128)`` from -1 to 1."""

    def __init__(self) -> None:
        super().__init__()
        widths = (3, 32, 48, 96, 128)
        layers: list[nn.Module] = []
        for before, after in pairwise(widths):
            layers += [nn.Conv2d(before, after, 3, stride=2, padding=1), nn.GroupNorm(8, after)]
            layers += [nn.SiLU()]
        answers = sum(len(possible) for possible, _ in QUESTIONS.values())
        self.layers = nn.Sequential(
            *layers, nn.Flatten(), nn.Linear(128 * 64, 256), nn.SiLU(), nn.Linear(256, answers)
        )

    def forward(self, pixels: Tensor) -> Tensor:
        return self.layers(pixels)  # type: ignore[no-any-return]


def right_answers(scenes: list[Scene]) -> Tensor:
    """The number of each question's right answer, ``(scenes, questions)``; -1 for none."""
    rows = []
    for scene in scenes:
        answers = [(possible, right(scene)) for possible, right in QUESTIONS.values()]
        rows.append([possible.index(right) if right else -1 for possible, right in answers])
    return torch.tensor(rows)


def train_judge(path: Path, count: int = 8_000, epochs: int = 4, batch: int = 32) -> Judge:
    """The judge, trained on pictures of all things, also on those that the pipelines never saw."""
    torch.manual_seed(0)
    judge = Judge()
    if path.exists():
        judge.load_state_dict(torch.load(path, weights_only=True))
        return judge.eval()
    scenes = [scene_of(index, held_out=index % 2 == 1) for index in range(count)]
    drawn = np.stack([draw(scene, index) for index, scene in enumerate(tqdm(scenes, "pictures"))])
    answers = right_answers(scenes)
    optimizer = torch.optim.AdamW(judge.parameters(), lr=1e-3, weight_decay=0.05)
    order = torch.cat([torch.randperm(count) for _ in range(epochs)]).split(batch)
    for step, chosen in enumerate(tqdm(order, "judge", mininterval=5)):
        for group in optimizer.param_groups:
            group["lr"] = 1e-3 * (1 + math.cos(math.pi * step / len(order))) / 2
        pixels = to_pixels(drawn[chosen.numpy()])
        logits = judge(pixels + 0.05 * torch.randn_like(pixels)).split(_sizes(), dim=1)
        losses = [
            F.cross_entropy(one, right, ignore_index=-1)
            for one, right in zip(logits, answers[chosen].unbind(1), strict=True)
        ]
        optimizer.zero_grad()
        torch.stack(losses).sum().backward()
        optimizer.step()
    torch.save(judge.state_dict(), path)
    return judge.eval()


@torch.no_grad()
def accuracies(judge: Judge, drawn: npt.NDArray[np.uint8], scenes: list[Scene]) -> dict[str, float]:
    """Each question's share of right answers, and of pictures in which all answers are right."""
    right = right_answers(scenes)
    logits = torch.cat(
        [judge(to_pixels(part)) for part in np.array_split(drawn, len(drawn) // 32 + 1)]
    )
    answers = torch.stack([one.argmax(1) for one in logits.split(_sizes(), dim=1)], dim=1)
    asked, hit = right >= 0, answers == right
    shares = (hit & asked).sum(0) / asked.sum(0)
    everything = (hit | ~asked).all(1).float().mean()
    return {**dict(zip(QUESTIONS, shares.tolist(), strict=True)), "everything": everything.item()}


def sample(pipe: Any, prompts: list[str], batch: int = 8, **changes: Any) -> npt.NDArray[np.uint8]:
    """One picture for each prompt, ``(prompts, 128, 128, 3)``; the n-th always from seed n."""
    call = {"height": 128, "width": 128, **CALL[type(pipe).__name__], **changes}
    drawn = []
    for start in tqdm(range(0, len(prompts), batch), "samples", mininterval=5):
        part = prompts[start : start + batch]
        seeds = [torch.Generator().manual_seed(start + offset) for offset in range(len(part))]
        if "negative_prompt" in call:  # Flux wants as many as there are prompts
            call["negative_prompt"] = [""] * len(part)
        drawn += pipe(part, generator=seeds, **call).images
    return np.stack([np.asarray(picture) for picture in drawn])


@torch.no_grad()
def through_vae(pipe: Any, drawn: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    """Pictures after encoding and decoding: the best that a diffusion model could do."""
    parts = []
    for part in np.array_split(drawn, len(drawn) // 16 + 1):
        pixels = to_pixels(part).to(pipe.vae.dtype)
        decoded = pipe.vae.decode(pipe.vae.encode(pixels).latent_dist.mean).sample
        parts.append(pipe.image_processor.postprocess(decoded, output_type="np"))
    return np.asarray(np.concatenate(parts) * 255 + 0.5, np.uint8)


def contact_sheet(
    drawn: npt.NDArray[np.uint8], captions: list[str], columns: int = 8
) -> Image.Image:
    """Pictures in rows, each above its caption."""
    width, height = pictures.SIZE + 24, pictures.SIZE + 58
    rows = math.ceil(len(drawn) / columns)
    sheet = Image.new("RGB", (width * columns, height * rows), "white")
    write = ImageDraw.Draw(sheet)
    for index, (picture, text) in enumerate(zip(drawn, captions, strict=True)):
        left, top = width * (index % columns) + 12, height * (index // columns)
        sheet.paste(Image.fromarray(picture), (left, top))
        write.multiline_text((left, top + 130), textwrap.fill(text, 26), "black", font_size=10)
    return sheet


def _second(scene: Scene) -> Thing:
    return scene.second or Thing(size="", colour="", shape="")


def _sizes() -> list[int]:
    return [len(possible) for possible, _ in QUESTIONS.values()]


def main(arguments: list[str] | None = None) -> None:
    """Judge one pipeline, and draw some of what it draws."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="a trained pipeline")
    parser.add_argument("--count", type=int, default=64, help="prompts of each sort")
    parser.add_argument("--work", type=Path, default=Path("small_models_work"))
    parser.add_argument("--sheet", type=Path, help="where to put a contact sheet (PNG)")
    options = parser.parse_args(arguments)
    options.work.mkdir(parents=True, exist_ok=True)
    pipe = DiffusionPipeline.from_pretrained(options.folder)
    pipe.set_progress_bar_config(disable=True)
    judge = train_judge(options.work / "judge.pt")
    indices = range(UNSEEN, UNSEEN + options.count)
    columns: dict[str, dict[str, float]] = {}
    drawn = {}
    for name, held_out in (("seen in training", False), ("never seen", True)):
        scenes = [scene_of(index, held_out=held_out) for index in indices]
        true = np.stack([draw(scene, index) for index, scene in enumerate(scenes)])
        drawn[name] = sample(pipe, [caption(scene) for scene in scenes])
        columns[name] = accuracies(judge, drawn[name], scenes)
        columns[f"{name}: true, through VAE"] = accuracies(judge, through_vae(pipe, true), scenes)
        columns[f"{name}: others' prompts"] = accuracies(judge, np.roll(drawn[name], 1, 0), scenes)
    table = [[row, *(column[row] for column in columns.values())] for row in columns[name]]
    print(tabulate(table, headers=["", *columns], floatfmt=".1%", tablefmt="github"))
    if options.sheet:
        scenes = [scene_of(index, held_out=True) for index in indices][:32]
        contact_sheet(drawn[name][:32], [caption(scene) for scene in scenes]).save(options.sheet)


if __name__ == "__main__":
    main()
