"""From a pipeline to files: a merged SDXL or Flux model, and the tensors of a denoising loop.

    python examples/export.py                           # a small model with random weights
    python examples/export.py --model NAME --prompt "a red fox"         # a pipeline of yours
    python examples/export.py --model sdxl --package    # the real size, random weights
    python examples/export.py --merge-below 0.6         # a program for each side of a noise level
    python examples/export.py --select-every 10 --weigh-every 5    # a program for each kind of step
    python examples/export.py --ratio 0.9 --memory-every 2         # the same, with memory

Then ``python examples/run_exported.py exported``, which imports nothing but torch.
"""

import argparse
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import diffusers
import torch
from torch import Tensor, nn

import toma_fx
from toma_fx.arithmetic import first_call
from toma_fx.checkpoints import RANDOM, load_model
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
    parser.add_argument(
        "--model", help="folder or hub name of a Flux or SDXL pipeline; sdxl, flux: random weights"
    )
    parser.add_argument("--prompt", default="a lighthouse at dusk")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--guidance", type=float, default=3.5)
    parser.add_argument("--size", type=int, help="height and width in pixels (the model's own)")
    parser.add_argument("--ratio", type=float, default=0.5)
    parser.add_argument("--merge-below", type=float, default=1.0, help="noise level (1)")
    parser.add_argument("--select-every", type=int, default=1, help="steps between selections")
    parser.add_argument("--weigh-every", type=int, default=1, help="steps between weights")
    parser.add_argument("--memory-every", type=int, help="steps from one full step to the next")
    parser.add_argument(
        "--theta", type=float, help="with memory: share of the correction that is added"
    )
    parser.add_argument("--package", action="store_true", help="also compile with AOTInductor")
    parser.add_argument("--out", type=Path, default=Path("exported"))
    options = parser.parse_args(arguments)
    options.out.mkdir(parents=True, exist_ok=True)

    pipeline = options.model is not None and options.model not in RANDOM
    model, request, decoder = _pipeline(options) if pipeline else _random(options)
    merged = toma_fx.transform(
        model,
        ratio=options.ratio,
        merge_below=options.merge_below,
        schedule=toma_fx.Schedule(
            select_every=options.select_every, weigh_every=options.weigh_every
        ),
        memory=_memory(options),
    )
    with _measured("export and save"):
        made = toma_fx.export(merged, request["inputs"], path=options.out / "model.pt2")
    # A model that does the same at every step is one program, otherwise there are several.
    several = isinstance(made, dict)
    programs = {f"model.{variant}": each for variant, each in made.items()} if several else {}
    programs = programs or {"model": made}
    request["variants"] = sorted(made) if several else []
    for name in ("merge_below", "select_every", "weigh_every", "memory_every"):
        request[name] = getattr(options, name)
    torch.save(request, options.out / "request.pt")
    if decoder is not None:
        latents = torch.zeros(request["latents_shape"])
        torch.export.save(torch.export.export(decoder, (latents,)), options.out / "decoder.pt2")
    if options.package:
        for name, program in programs.items():
            with _measured(f"AOTInductor, {name}"):
                torch._inductor.aoti_compile_and_package(
                    program, package_path=str(options.out / f"{name}.aoti.pt2")
                )
    print("wrote", *sorted(str(path) for path in options.out.iterdir()))


def _memory(options: argparse.Namespace) -> toma_fx.Memory | None:
    if options.memory_every is None:
        return None
    return toma_fx.Memory(every=options.memory_every, theta=options.theta)


@contextmanager
def _measured(name: str) -> Iterator[None]:
    start = time.perf_counter()
    yield
    print(f"{name}: {time.perf_counter() - start:.1f} s, peak memory {_peak_memory()}")


def _pipeline(options: argparse.Namespace) -> tuple[nn.Module, dict[str, Any], nn.Module]:
    """The denoising model of a pipeline, a request as the pipeline makes it, and the decoder."""
    pipe = diffusers.DiffusionPipeline.from_pretrained(options.model)
    flux = hasattr(pipe, "transformer")
    if not flux:  # the loop's sampler; Flux has it already
        pipe.scheduler = diffusers.EulerDiscreteScheduler.from_config(pipe.scheduler.config)
    model = pipe.transformer if flux else pipe.unet
    call = first_call(
        model,
        lambda: pipe(
            options.prompt,
            num_inference_steps=options.steps,
            guidance_scale=options.guidance,
            height=options.size,
            width=options.size,
        ),
    )
    inputs = {**dict(zip(("sample", "timestep"), call.args, strict=False)), **call.kwargs}
    inputs = {name: value for name, value in inputs.items() if isinstance(value, Tensor | dict)}
    request = _request(inputs, pipe.scheduler, flux)
    # A UNet sees every image twice, without and with the prompt; Flux takes guidance as an input.
    doubled = not flux and inputs["sample"].shape[0] == 2
    request["guidance"] = options.guidance if doubled else None
    request["latents_shape"] = (1, *inputs[request["latents"]].shape[1:])
    size = options.size or pipe.default_sample_size * pipe.vae_scale_factor
    return model, request, _Decoder(pipe, size)


class _Decoder(nn.Module):
    """Decodes the denoising model's latents ``(1, ...)`` to an image ``(3, H, W)``, 0..1."""

    def __init__(self, pipe: Any, size: int) -> None:
        super().__init__()
        self.vae, self.pipe, self.size = pipe.vae, [pipe], size

    def forward(self, latents: Tensor) -> Tensor:
        (pipe,), config = self.pipe, self.vae.config
        if hasattr(pipe, "transformer"):
            latents = pipe._unpack_latents(latents, self.size, self.size, pipe.vae_scale_factor)
        latents = latents / config.scaling_factor + (config.shift_factor or 0.0)
        (image,) = self.vae.decode(latents, return_dict=False)
        pixels: Tensor = (image[0] / 2 + 0.5).clamp(0, 1)
        return pixels


def _random(options: argparse.Namespace) -> tuple[nn.Module, dict[str, Any], None]:
    """A model with random weights, and a request of random tensors."""
    if options.model is None:
        torch.manual_seed(0)
        model: nn.Module = diffusers.FluxTransformer2DModel(**SMALL).eval().requires_grad_(False)
    else:
        model = load_model(options.model)
    size = 256 if options.model is None and options.size is None else options.size
    flux = isinstance(model, diffusers.FluxTransformer2DModel)
    scheduler: Any = (
        diffusers.FlowMatchEulerDiscreteScheduler() if flux else diffusers.EulerDiscreteScheduler()
    )
    scheduler.set_timesteps(options.steps)
    return model, _request(random_inputs(model, height=size), scheduler, flux), None


def _request(inputs: dict[str, Any], scheduler: Any, flux: bool) -> dict[str, Any]:
    return {
        "inputs": inputs,
        "latents": "hidden_states" if flux else "sample",
        "flow": flux,
        "guidance": None,
        "timesteps": scheduler.timesteps / 1000 if flux else scheduler.timesteps,
        "levels": scheduler.timesteps / 1000,
        "sigmas": scheduler.sigmas,
    }


def _peak_memory() -> str:
    """Peak memory of this process so far."""
    try:
        import resource
    except ImportError:
        return "unknown: this system does not say it to Python"
    return f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.1f} GiB"


if __name__ == "__main__":
    main()
