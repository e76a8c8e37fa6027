"""A judge looks at the pictures of a small pipeline: do the prompts decide them?

    python -m examples.small_models.check examples/small_models/sdxl --sheet sheet.png

The judge of `examples.small_models.judge` is asked what it sees in samples for prompts of things
that training showed and of things that it never showed; for scale, in true pictures that went
through the VAE, and in samples that were made for other prompts. Of clips it sees three frames.
"""

import argparse
import math
import textwrap
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from diffusers import DiffusionPipeline
from PIL import Image, ImageDraw
from tabulate import tabulate
from tqdm import tqdm

from examples.small_models.judge import accuracies, load_judge
from examples.small_models.losses import clip_pixels, to_pixels
from examples.small_models.pictures import DETAILED_SIZE, caption, draw, scene_of
from examples.small_models.text import PROMPT_TOKENS
from examples.small_models.videos import CLIP_SIZE, FRAMES, draw_clip, looked_at

CALL: dict[str, dict[str, Any]] = {
    "StableDiffusionXLPipeline": {"num_inference_steps": 25, "guidance_scale": 7.5},
    "FluxPipeline": {
        "num_inference_steps": 25,
        "negative_prompt": "",
        "true_cfg_scale": 2.0,
        "max_sequence_length": PROMPT_TOKENS,
    },
    "WanPipeline": {
        "num_inference_steps": 25,
        "guidance_scale": 5.0,
        "num_frames": FRAMES,
        "max_sequence_length": PROMPT_TOKENS,
    },
}
"""Arguments with which each pipeline gives its best pictures, besides the size."""

UNSEEN = 20_000_000  # scenes from this index on were neither trained nor judged on


def sample(pipe: Any, prompts: list[str], batch: int = 8, **changes: Any) -> npt.NDArray[np.uint8]:
    """One picture for each prompt, ``(prompts, size, size, 3)``; the n-th always from seed n.

    Of Wan one clip, ``(prompts, 17, size, size, 3)``.
    """
    size = size_of(pipe)
    call = {"height": size, "width": size, **CALL[type(pipe).__name__], **changes}
    drawn = []
    for start in tqdm(range(0, len(prompts), batch), "samples", mininterval=5):
        part = prompts[start : start + batch]
        seeds = [torch.Generator().manual_seed(start + offset) for offset in range(len(part))]
        if "negative_prompt" in call:  # Flux wants as many as there are prompts
            call["negative_prompt"] = [""] * len(part)
        drawn.append(drawn_by(pipe(part, generator=seeds, output_type="np", **call)))
    return np.concatenate(drawn)


def size_of(pipe: Any) -> int:
    """Pixels along a side of what a small pipeline draws; a VAE of clips does not say it."""
    return int(getattr(pipe.vae.config, "sample_size", CLIP_SIZE))


def drawn_by(output: Any) -> npt.NDArray[np.uint8]:
    """What a pipeline's output of ``output_type="np"`` shows, in bytes: pictures or clips."""
    shown = output.frames if hasattr(output, "frames") else output.images
    return np.asarray(shown * 255 + 0.5, np.uint8)


@torch.no_grad()
def through_vae(pipe: Any, drawn: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    """Pictures or clips after encoding and decoding: the best that a diffusion model could do."""
    of_clips = drawn.ndim == 5
    parts = []
    for part in np.array_split(drawn, len(drawn) // 16 + 1):
        pixels = (clip_pixels(part) if of_clips else to_pixels(part)).to(pipe.vae.dtype)
        decoded = pipe.vae.decode(pipe.vae.encode(pixels).latent_dist.mean).sample
        if of_clips:
            parts.append(pipe.video_processor.postprocess_video(decoded, output_type="np"))
        else:
            parts.append(pipe.image_processor.postprocess(decoded, output_type="np"))
    return np.asarray(np.concatenate(parts) * 255 + 0.5, np.uint8)


def contact_sheet(
    drawn: npt.NDArray[np.uint8], captions: list[str], columns: int = 8
) -> Image.Image:
    """Pictures in rows, each above its caption."""
    size = drawn.shape[1]
    width, height = size + 24, size + 58
    rows = math.ceil(len(drawn) / columns)
    sheet = Image.new("RGB", (width * columns, height * rows), "white")
    write = ImageDraw.Draw(sheet)
    for index, (picture, text) in enumerate(zip(drawn, captions, strict=True)):
        left, top = width * (index % columns) + 12, height * (index // columns)
        sheet.paste(Image.fromarray(picture), (left, top))
        write.multiline_text(
            (left, top + size + 2), textwrap.fill(text, size // 5 + 1), "black", font_size=10
        )
    return sheet


def clip_sheet(drawn: npt.NDArray[np.uint8], captions: list[str]) -> Image.Image:
    """Clips, one a row: every fourth frame, above the caption."""
    shown = drawn[:, ::4]
    count, frames, size = shown.shape[:3]
    sheet = Image.new("RGB", (size * frames, (size + 20) * count), "white")
    write = ImageDraw.Draw(sheet)
    for row, (clip, text) in enumerate(zip(shown, captions, strict=True)):
        top = (size + 20) * row
        sheet.paste(Image.fromarray(np.concatenate([*clip], axis=1)), (0, top))
        write.text((2, top + size + 2), text, "black", font_size=10)
    return sheet


def main(arguments: list[str] | None = None) -> None:
    """Judge one pipeline, and save some of its pictures."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="a trained pipeline")
    parser.add_argument("--count", type=int, default=64, help="number of prompts of each sort")
    parser.add_argument("--sheet", type=Path, help="where to put a contact sheet (PNG)")
    options = parser.parse_args(arguments)
    pipe = DiffusionPipeline.from_pretrained(options.folder)
    pipe.set_progress_bar_config(disable=True)
    judge, size = load_judge(), size_of(pipe)
    of_clips = hasattr(pipe, "video_processor")
    indices = range(UNSEEN, UNSEEN + options.count)
    columns: dict[str, dict[str, float]] = {}
    drawn = {}
    for name, held_out in (("seen in training", False), ("never seen", True)):
        scenes = [scene_of(index, held_out=held_out) for index in indices]
        detailed = size == DETAILED_SIZE
        true = np.stack(
            [
                draw_clip(s, i) if of_clips else draw(s, i, size=size, detailed=detailed)
                for i, s in enumerate(scenes)
            ]
        )
        drawn[name] = sample(pipe, [caption(scene) for scene in scenes])
        for column, seen in (
            (name, drawn[name]),
            (f"{name}: true, through VAE", through_vae(pipe, true)),
            (f"{name}: others' prompts", np.roll(drawn[name], 1, 0)),
        ):
            columns[column] = accuracies(judge, *looked_at(seen, scenes))
    table = [[row, *(column[row] for column in columns.values())] for row in columns[name]]
    print(tabulate(table, headers=["", *columns], floatfmt=".1%", tablefmt="github"))
    if options.sheet:
        scenes = [scene_of(index, held_out=True) for index in indices][:32]
        make = clip_sheet if of_clips else contact_sheet
        make(drawn[name][:32], [caption(scene) for scene in scenes]).save(options.sheet)


if __name__ == "__main__":
    main()
