"""A denoising loop over an exported model, with nothing but torch.

python examples/run_exported.py exported               # after examples/export.py
python examples/run_exported.py exported --package     # the AOTInductor package of --package
"""

import argparse
import resource
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
    parser.add_argument("--package", action="store_true", help="run model.aoti.pt2")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)

    start = time.perf_counter()
    if options.package:
        model: Any = torch._inductor.aoti_load_package(str(options.folder / "model.aoti.pt2"))
    else:
        model = torch.export.load(options.folder / "model.pt2").module()
    print(f"loaded in {time.perf_counter() - start:.1f} s")
    with torch.no_grad():
        latents = denoise(model, torch.load(options.folder / "request.pt"), options.seed)
        torch.save(latents, options.folder / "latents.pt")
        if (options.folder / "decoder.pt2").exists():
            decode = torch.export.load(options.folder / "decoder.pt2").module()
            _save(decode(latents), options.folder / "image.ppm")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(f"peak memory {peak:.1f} GiB")
    return latents


def denoise(model: Any, request: dict[str, Any], seed: int) -> Tensor:
    """Euler's method from noise to latents ``(1, ...)``, in float32.

    Args:
        model: the exported program or package.
        request: what ``examples/export.py`` wrote: inputs, timesteps, noise levels and, with a
            schedule, the state in which this request, and no other, keeps its plans.
        seed: of the noise.
    """
    inputs, state, sigmas = request["inputs"], request["state"], request["sigmas"]
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
        if state is None:
            (update,) = model(**inputs)
        else:
            update, state = model(state=state, **inputs)
        update = update.float()
        if guidance is not None:
            without, with_prompt = update.chunk(2)
            update = without + guidance * (with_prompt - without)
        latents = latents + (next_sigma - sigma) * update
        print(f"step {step}: {time.perf_counter() - start:.2f} s")
    return latents


def _save(image: Tensor, path: Path) -> None:
    """Write an image ``(3, H, W)`` of 0..1; PPM needs no library."""
    pixels = (image.permute(1, 2, 0) * 255).round().to(torch.uint8)
    height, width, _ = pixels.shape
    path.write_bytes(b"P6 %d %d 255\n" % (width, height) + bytes(pixels.flatten().tolist()))
    print(f"wrote {path}")


if __name__ == "__main__":
    main()
