"""One image for each line of a file, by as many processes as there are.

python examples/generate.py --prompts prompts.txt --out images
accelerate launch --num_processes 8 examples/generate.py --prompts prompts.txt --out images
accelerate launch --num_machines 2 --machine_rank 0 --main_process_ip HOST ...   # and rank 1

Each process loads the pipeline once and draws its share; nothing passes between them. Images that
are there already are not drawn again, so a run that was broken off can be repeated.
"""

import argparse
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState

import toma_fx
from toma_fx.checkpoints import load_pipeline
from toma_fx.transform import model_of


def main(arguments: list[str] | None = None) -> list[Path]:
    """Draw this process's share of the images; returns their files."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--model", default="stabilityai/stable-diffusion-xl-base-1.0")
    parser.add_argument("--prompts", type=Path, required=True, help="a file, a prompt on each line")
    parser.add_argument("--out", type=Path, required=True, help="folder for 0.png, 1.png, ...")
    parser.add_argument("--ratio", type=float, help="merge at every step (none: a memory)")
    parser.add_argument("--steps", type=int, default=25)
    parser.add_argument("--size", type=int, default=1024)
    parser.add_argument("--dtype", default="float32", help="float32, bfloat16 or float16")
    parser.add_argument("--compile", action="store_true", help="compile the repeated blocks")
    options = parser.parse_args(arguments)

    state = PartialState()
    pipeline = load_pipeline(options.model, dtype=options.dtype, device=state.device)
    if options.ratio is None:  # the advice for 20 steps and more
        memory = toma_fx.Memory(every=2, theta=0)
        toma_fx.transform(pipeline, merge_below=0.8, memory=memory, skip=())
    else:
        toma_fx.transform(pipeline, ratio=options.ratio)
    if options.compile:
        denoiser: Any = model_of(pipeline)
        denoiser.compile_repeated_blocks(fullgraph=True)
    options.out.mkdir(parents=True, exist_ok=True)
    prompts = enumerate(options.prompts.read_text().splitlines())
    wanted = [(line, prompt) for line, prompt in prompts if prompt.strip()]
    drawn = []
    with state.split_between_processes(wanted) as mine:
        for line, prompt in mine:
            file = options.out / f"{line}.png"
            if file.exists():
                continue
            image = pipeline(
                prompt,
                num_inference_steps=options.steps,
                height=options.size,
                width=options.size,
                # The seed is the line, so that an image does not depend on who draws it.
                generator=torch.Generator().manual_seed(line),
            ).images[0]
            image.save(file)
            drawn.append(file)
    return drawn


if __name__ == "__main__":
    main()
