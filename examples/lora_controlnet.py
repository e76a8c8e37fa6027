r"""SDXL with a LoRA, a ControlNet and merged tokens together.

python examples/lora_controlnet.py            # a small pipeline, untrained LoRA and ControlNet
python examples/lora_controlnet.py --model stabilityai/stable-diffusion-xl-base-1.0 \
        --lora NAME --controlnet diffusers/controlnet-canny-sdxl-1.0 --image edges.png
"""

import argparse
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers.utils import load_image, make_image_grid
from peft import LoraConfig
from PIL import Image, ImageDraw

import toma_fx

SMALL = Path(__file__).parent / "small_models" / "sdxl"
CHANNELS = (16, 32, 96, 256)
PROMPT = "a large red circle left of a small blue square on a striped green ground under a blue sky"


def main(arguments: list[str] | None = None) -> None:
    """Draw with each strength of the LoRA; transform comes once, and the LoRA changes after it."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--model", default=str(SMALL), help="folder or hub name of a pipeline")
    parser.add_argument("--lora", help="as load_lora_weights takes it; random weights if left out")
    parser.add_argument("--controlnet", help="folder or hub name; a copy of the UNet if left out")
    parser.add_argument("--image", help="for the ControlNet; a circle if left out")
    parser.add_argument("--prompt", default=PROMPT)
    parser.add_argument("--scales", type=float, nargs="+", default=[0.0, 0.5, 1.0])
    parser.add_argument("--ratio", type=float, default=0.5)
    parser.add_argument("--steps", type=int, default=25)
    parser.add_argument("--out", type=Path, default=Path("lora_controlnet.png"))
    options = parser.parse_args(arguments)

    device = "cuda" if torch.cuda.is_available() else "cpu"
    base: Any = diffusers.DiffusionPipeline.from_pretrained(options.model)
    controlnet: Any = (
        diffusers.ControlNetModel.from_unet(
            base.unet,  # with as many halvings of the image as its latents have
            conditioning_embedding_out_channels=CHANNELS[: len(base.vae.config.block_out_channels)],
        )
        if options.controlnet is None
        else diffusers.ControlNetModel.from_pretrained(options.controlnet)
    )
    pipe: Any = diffusers.StableDiffusionXLControlNetPipeline.from_pipe(base, controlnet=controlnet)
    pipe.to(device, torch.bfloat16 if device == "cuda" else torch.float32)
    toma_fx.transform(pipe, ratio=options.ratio)  # the UNet; a ControlNet stays as it is
    if options.lora is None:
        torch.manual_seed(0)
        layers = ["to_q", "to_k", "to_v", "to_out.0"]
        pipe.unet.add_adapter(LoraConfig(target_modules=layers, init_lora_weights=False))
    else:
        pipe.load_lora_weights(options.lora)
    size = base.default_sample_size * base.vae_scale_factor
    image = _circle(size) if options.image is None else load_image(options.image)
    pictures = [
        pipe(
            options.prompt,
            image=image.resize((size, size)),
            num_inference_steps=options.steps,
            cross_attention_kwargs={"scale": scale},
            generator=torch.Generator(device).manual_seed(0),
        ).images[0]
        for scale in options.scales
    ]
    make_image_grid(pictures, rows=1, cols=len(pictures)).save(options.out)
    print(f"wrote {options.out}: LoRA scales {', '.join(map(str, options.scales))}")


def _circle(size: int) -> Image.Image:
    image = Image.new("RGB", (size, size))
    ImageDraw.Draw(image).ellipse((size // 4, size // 4, 3 * size // 4, 3 * size // 4), "white")
    return image


if __name__ == "__main__":
    main()
