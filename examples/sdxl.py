"""SDXL with a memory or with merged tokens, from a prompt to a picture.

python examples/sdxl.py                                     # a small pipeline of this repository
python examples/sdxl.py --ratio 0.5                         # merge tokens at every step instead
python examples/sdxl.py --model stabilityai/stable-diffusion-xl-base-1.0 --compile
"""

import argparse
from pathlib import Path
from typing import Any

import diffusers
import torch

import toma_fx

SMALL = Path(__file__).parent / "small_models" / "sdxl"
PROMPT = "a large red circle left of a small blue square on a striped green ground under a blue sky"


def main(arguments: list[str] | None = None) -> None:
    """Draw one picture twice, untouched and with toma_fx, side by side."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--model", default=str(SMALL), help="folder or hub name of a pipeline")
    parser.add_argument("--prompt", default=PROMPT)
    parser.add_argument(
        "--ratio", type=float, help="share of tokens merged away at every step (none: a memory)"
    )
    parser.add_argument("--steps", type=int, default=25)
    parser.add_argument("--compile", action="store_true", help="compile the transformer blocks")
    parser.add_argument("--out", type=Path, default=Path("sdxl.png"))
    options = parser.parse_args(arguments)

    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    pipe: Any = diffusers.DiffusionPipeline.from_pretrained(options.model, torch_dtype=dtype)
    pipe.to(device)

    def draw() -> Any:
        generator = torch.Generator(device).manual_seed(0)
        return pipe(options.prompt, num_inference_steps=options.steps, generator=generator).images[
            0
        ]

    untouched = draw()
    if options.ratio is None:  # the advice for 20 steps and more
        config = toma_fx.MergeConfig(
            merge_below=0.8, memory=toma_fx.Memory(every=2, theta=0), skip=()
        )
    else:
        config = toma_fx.MergeConfig(ratio=options.ratio)
    toma_fx.transform(pipe, config)  # in place; toma_fx.restore(pipe) undoes it
    print(toma_fx.report(pipe))
    if options.compile:  # after transform
        pipe.unet.compile_repeated_blocks(fullgraph=True)
    faster = draw()
    diffusers.utils.make_image_grid([untouched, faster], rows=1, cols=2).save(options.out)
    print(f"wrote {options.out}: untouched, and with toma_fx")


if __name__ == "__main__":
    main()
