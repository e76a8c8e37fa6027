"""A denoising loop over an exported model, with nothing but torch.

python examples/run_exported.py exported               # after examples/export.py
python examples/run_exported.py exported --package     # the AOTInductor package of --package
"""

import argparse
from pathlib import Path
from typing import Any

import torch


def main(arguments: list[str] | None = None) -> torch.Tensor:
    """Denoise one request; returns the latents and saves them beside the model."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--package", action="store_true", help="run model.aoti.pt2")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)

    request = torch.load(options.folder / "request.pt")
    if options.package:
        model: Any = torch._inductor.aoti_load_package(str(options.folder / "model.aoti.pt2"))
    else:
        model = torch.export.load(options.folder / "model.pt2").module()
    inputs, state, sigmas = request["inputs"], request["state"], request["sigmas"]
    name = request["latents"]
    generator = torch.Generator().manual_seed(options.seed)
    latents: torch.Tensor = torch.randn(inputs[name].shape, generator=generator) * sigmas[0]

    with torch.no_grad():
        for step, timestep in enumerate(request["timesteps"]):
            sigma, next_sigma = sigmas[step], sigmas[step + 1]
            # Flow matching takes the noisy latents as they are, Euler scales them to variance 1.
            scale = 1.0 if request["flow"] else (sigma**2 + 1) ** -0.5
            inputs[name] = (latents * scale).to(inputs[name].dtype)
            inputs["timestep"] = timestep.expand(inputs["timestep"].shape).to(inputs["timestep"])
            if state is None:
                (update,) = model(**inputs)
            else:  # the plans of this request; another request has a state of its own
                update, state = model(state=state, **inputs)
            latents = latents + (next_sigma - sigma) * update.float()

    torch.save(latents, options.folder / "latents.pt")
    print(f"{len(request['timesteps'])} steps, latents {tuple(latents.shape)}", latents.std())
    return latents


if __name__ == "__main__":
    main()
