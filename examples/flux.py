"""Flux with a memory, which is what keeps its images.

python examples/flux.py                                       # a small pipeline of this repository
python examples/flux.py --model black-forest-labs/FLUX.1-dev --every 3 --offload
"""

import argparse
from pathlib import Path
from typing import Any

import diffusers
import torch

import toma_fx

SMALL = Path(__file__).parent / "small_models" / "flux"
PROMPT = "a small yellow square on a grainy purple ground under a pink sky"


def main(arguments: list[str] | None = None) -> None:
    """Draw one picture."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--model", default=str(SMALL), help="folder or hub name of a pipeline")
    parser.add_argument("--prompt", default=PROMPT)
    parser.add_argument(
        "--every", type=int, default=2, help="steps from one full step to the next (2)"
    )
    parser.add_argument("--steps", type=int, default=28)
    parser.add_argument("--size", type=int, help="height and width in pixels (the model's own)")
    parser.add_argument("--offload", action="store_true", help="keep on the GPU only what runs")
    parser.add_argument("--out", type=Path, default=Path("flux.png"))
    options = parser.parse_args(arguments)

    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    pipe: Any = diffusers.DiffusionPipeline.from_pretrained(options.model, torch_dtype=dtype)
    memory = toma_fx.Memory(every=options.every, theta=0)
    toma_fx.transform(pipe, merge_below=0.8, memory=memory, skip=())
    print(toma_fx.report(pipe, steps=options.steps))  # what it saves, and what it keeps in memory
    if options.offload:  # after transform
        pipe.enable_model_cpu_offload()
    else:
        pipe.to(device)
    size = options.size or (128 if options.model == str(SMALL) else None)
    picture = pipe(
        options.prompt,
        num_inference_steps=options.steps,
        height=size,
        width=size,
        max_sequence_length=min(512, pipe.tokenizer_2.model_max_length),
        generator=torch.Generator().manual_seed(0),
    ).images[0]
    picture.save(options.out)
    print(f"wrote {options.out}")


if __name__ == "__main__":
    main()
