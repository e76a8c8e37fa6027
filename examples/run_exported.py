"""A denoising loop over an exported model, with nothing but torch.

python examples/run_exported.py exported               # after examples/export.py
python examples/run_exported.py exported --package     # the AOTInductor package of --package
"""

import argparse
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor


def main(arguments: list[str] | None = None) -> Tensor:
    """Denoise one request; returns the latents, and saves them and the image beside the model."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--package", action="store_true", help="run what --package compiled")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)

    start = time.perf_counter()
    request = torch.load(options.folder / "request.pt")
    models = load(options.folder, request["variants"], package=options.package)
    print(f"loaded in {time.perf_counter() - start:.1f} s")
    with torch.no_grad():
        latents = denoise(models, request, options.seed)
        torch.save(latents, options.folder / "latents.pt")
        if (options.folder / "decoder.pt2").exists():
            decode = torch.export.load(options.folder / "decoder.pt2").module()
            _save(decode(latents), options.folder / "image.ppm")
    print(f"peak memory {_peak_memory()}")
    return latents


def load(folder: Path, variants: list[str], *, package: bool) -> dict[str, Any]:
    """The programs or packages by variant; a model that does the same at every step has one."""
    models: dict[str, Any] = {}
    for variant in variants or ["merged"]:
        name = f"model.{variant}" if variants else "model"
        if package:
            models[variant] = torch._inductor.aoti_load_package(str(folder / f"{name}.aoti.pt2"))
            continue
        models[variant] = torch.export.load(folder / f"{name}.pt2").module()
        # Every file holds all weights; the programs can do with one copy of them.
        first = next(iter(models.values()))
        models[variant].load_state_dict(first.state_dict(), assign=True)
    return models


def choose(request: dict[str, Any], step: int) -> str:
    """The variant that runs at a step: by the noise level, the memory or the schedule."""
    below = request["levels"] <= request["merge_below"]
    if not below[step]:
        return "untouched"
    if request["memory_every"] is not None:
        since = step - int(below.int().argmax())  # the first step below the level is full
        return "remember" if since % request["memory_every"] == 0 else "recall"
    if step % request["select_every"] == 0:
        return "merged"
    return "weigh" if step % request["weigh_every"] == 0 else "reuse"


def denoise(models: dict[str, Any], request: dict[str, Any], seed: int) -> Tensor:
    """Euler's method from noise to latents ``(1, ...)``, in float32.

    Args:
        models: exported programs or packages, by variant.
        request: the file of ``examples/export.py``: inputs, timesteps, noise levels, and the
            variant of each step.
        seed: of the noise.
    """
    inputs, sigmas = request["inputs"], request["sigmas"]
    kept: dict[str, Any] = {}  # of this request, and of no other
    full: list[int] = []  # the steps that remembered
    name, guidance = request["latents"], request["guidance"]
    like: Tensor = inputs[name]
    noise = torch.randn(like[:1].shape, generator=torch.Generator().manual_seed(seed))
    # diffusers' Euler starts from noise of this deviation; flow matching from noise as it is.
    latents = noise if request["flow"] else noise * (sigmas[0] ** 2 + 1) ** 0.5
    for step, timestep in enumerate(request["timesteps"]):
        start = time.perf_counter()
        sigma, next_sigma = sigmas[step], sigmas[step + 1]
        # Flow matching takes the noisy latents as they are, Euler scales them to variance 1.
        scale = 1.0 if request["flow"] else (sigma**2 + 1) ** -0.5
        inputs[name] = (latents * scale).expand(like.shape).to(like.dtype).contiguous()
        inputs["timestep"] = timestep.expand(inputs["timestep"].shape).to(inputs["timestep"])
        variant = choose(request, step)
        if variant == "recall":  # how far past the last full step, in units of the last two's
            first, last = full[-2:][0], full[-1]
            kept["ahead"] = torch.tensor((step - last) / max(last - first, 1))
        takes = variant in ("weigh", "reuse", "recall")
        update, *made = models[variant](**inputs, **(kept if takes else {}))
        if variant == "remember":
            plan, memory = made
            before = kept.get("memory", memory)
            kept = {"plan": plan, "memory": memory, "memory_before": before}
            full.append(step)
        elif made:
            kept = {"plan": made[0]}
        update = update.float()
        if guidance is not None:
            without, with_prompt = update.chunk(2)
            update = without + guidance * (with_prompt - without)
        latents = latents + (next_sigma - sigma) * update
        print(f"step {step}, {variant}: {time.perf_counter() - start:.2f} s")
    return latents


def _save(image: Tensor, path: Path) -> None:
    """Write an image ``(3, H, W)`` of 0..1; PPM needs no library."""
    pixels = (image.permute(1, 2, 0) * 255).round().to(torch.uint8)
    height, width, _ = pixels.shape
    path.write_bytes(b"P6 %d %d 255\n" % (width, height) + bytes(pixels.flatten().tolist()))
    print(f"wrote {path}")


def _peak_memory() -> str:
    """Peak memory of this process so far."""
    try:
        import resource
    except ImportError:
        return "unknown: this system does not say it to Python"
    return f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.1f} GiB"


if __name__ == "__main__":
    main()
