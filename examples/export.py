"""From a pipeline to a file: a merged SDXL or Flux model, and what a denoising loop needs.

    python examples/export.py                           # a small model with random weights
    python examples/export.py --model NAME --prompt "a red fox"         # a pipeline of yours

Then ``python examples/run_exported.py exported``, which imports nothing but torch.
"""

import argparse
from pathlib import Path
from typing import Any

import diffusers
import torch

import toma_fx
from toma_fx.inputs import random_inputs

SMALL: dict[str, Any] = {
    "num_layers": 2,
    "num_single_layers": 4,
    "attention_head_dim": 16,
    "num_attention_heads": 4,
    "axes_dims_rope": (4, 6, 6),
    "joint_attention_dim": 32,
    "pooled_projection_dim": 32,
}


def main(arguments: list[str] | None = None) -> None:
    """Export a model, and the tensors of one request, into a folder."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--model", help="folder or hub name of a Flux or SDXL pipeline")
    parser.add_argument("--prompt", default="a lighthouse at dusk")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--size", type=int, help="height and width in pixels")
    parser.add_argument("--ratio", type=float, default=0.5)
    parser.add_argument("--select-every", type=int, default=1)
    parser.add_argument("--weigh-every", type=int, default=1)
    parser.add_argument("--package", action="store_true", help="also compile with AOTInductor")
    parser.add_argument("--output", type=Path, default=Path("exported"))
    options = parser.parse_args(arguments)
    options.output.mkdir(parents=True, exist_ok=True)

    model, request = _load(options)
    schedule = toma_fx.Schedule(select_every=options.select_every, weigh_every=options.weigh_every)
    merged = toma_fx.transform(model, ratio=options.ratio, schedule=schedule)
    print(toma_fx.report(merged, height=request.pop("pixels")))
    program = toma_fx.export(merged, request["inputs"], path=options.output / "model.pt2")
    torch.save(
        {**request, "state": program.example_inputs[1].get("state")}, options.output / "request.pt"
    )
    if options.package:
        torch._inductor.aoti_compile_and_package(
            program, package_path=str(options.output / "model.aoti.pt2")
        )
    print("wrote", *sorted(str(path) for path in options.output.iterdir()))


def _load(options: argparse.Namespace) -> tuple[torch.nn.Module, dict[str, Any]]:
    """The denoising model, and a request: its inputs, timesteps and noise levels."""
    if options.model is None:
        torch.manual_seed(0)
        model = diffusers.FluxTransformer2DModel(**SMALL).eval().requires_grad_(False)
        pixels = options.size or 256
        scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
        return model, _request(
            model, random_inputs(model, height=pixels), scheduler, options, pixels
        )
    pipe = diffusers.DiffusionPipeline.from_pretrained(options.model)
    model = pipe.transformer if hasattr(pipe, "transformer") else pipe.unet
    inputs = random_inputs(model, height=options.size)
    pixels = options.size or 1024
    with torch.no_grad():
        if hasattr(pipe, "transformer"):
            prompt, pooled, _ = pipe.encode_prompt(options.prompt, None)
            inputs |= {"encoder_hidden_states": prompt, "pooled_projections": pooled}
            inputs["txt_ids"] = torch.zeros(prompt.shape[1], 3, dtype=prompt.dtype)
        else:
            prompt, _, pooled, _ = pipe.encode_prompt(
                options.prompt, do_classifier_free_guidance=False
            )
            inputs["encoder_hidden_states"] = prompt
            inputs["added_cond_kwargs"]["text_embeds"] = pooled
            ids = [pixels, pixels, 0, 0, pixels, pixels]
            inputs["added_cond_kwargs"]["time_ids"] = torch.tensor([ids]).to(prompt)
    return model, _request(model, inputs, pipe.scheduler, options, pixels)


def _request(
    model: torch.nn.Module,
    inputs: dict[str, Any],
    scheduler: Any,
    options: argparse.Namespace,
    pixels: int,
) -> dict[str, Any]:
    flux = isinstance(model, diffusers.FluxTransformer2DModel)
    scheduler.set_timesteps(options.steps)
    return {
        "inputs": inputs,
        "latents": "hidden_states" if flux else "sample",
        "flow": flux,
        "timesteps": scheduler.timesteps / 1000 if flux else scheduler.timesteps,
        "sigmas": scheduler.sigmas,
        "pixels": pixels,
    }


if __name__ == "__main__":
    main()
