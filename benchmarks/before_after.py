"""The picture of the README: images of the small SDXL, untouched, merged, and with memory.

python -m benchmarks.before_after docs/images/before_after.png
"""

import argparse
from pathlib import Path

import diffusers
import torch
from matplotlib import pyplot

import toma_fx
from toma_fx import MergeConfig
from toma_fx.demo import ADVISED
from toma_fx.lab.small_models import FOLDER, PROMPTS

COLUMNS = {
    "untouched": None,
    "ratio=0.25": MergeConfig(ratio=0.25),
    "ratio=0.5": MergeConfig(ratio=0.5),
    "memory every 2, theta 0,\nbelow noise level 0.8": ADVISED,
}


def main() -> None:
    """Draw two prompts with each, and write the picture."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("file", type=Path)
    options = parser.parse_args()
    pipe = diffusers.DiffusionPipeline.from_pretrained(FOLDER / "sdxl")
    prompts = PROMPTS.read_text().splitlines()[:2]
    figure, axes = pyplot.subplots(
        len(prompts), len(COLUMNS), figsize=(9, 5), layout="constrained", squeeze=False
    )
    for column, (title, config) in enumerate(COLUMNS.items()):
        if config is not None:
            toma_fx.transform(pipe, config)
        seeds = [torch.Generator().manual_seed(seed) for seed in range(len(prompts))]
        images = pipe(
            prompts,
            num_inference_steps=25,
            guidance_scale=7.5,
            generator=seeds,
            output_type="np",
        ).images
        if config is not None:
            toma_fx.restore(pipe)
        for row, image in enumerate(images):
            axes[row, column].imshow(image, interpolation="bicubic")
            axes[row, column].set_axis_off()
        axes[0, column].set_title(title, fontsize=10)
    figure.savefig(options.file, dpi=110)


if __name__ == "__main__":
    main()
