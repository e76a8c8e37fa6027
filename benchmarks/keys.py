"""CPU seconds of one block, eager: untouched, merged as a whole, and with merged keys.

``python -m benchmarks.keys wan 1560 4680 9360 --repeats 2``
"""

import argparse
import time
from collections.abc import Callable
from typing import Any

import torch
from diffusers import UNet2DConditionModel, WanTransformer3DModel
from torch import nn

from toma_fx import transform

WAYS: dict[str, dict[str, Any]] = {
    "untouched": {"ratio": 0},
    **{
        f"{placement}, {ratio}": {"ratio": ratio, "placement": placement}
        for ratio in (0.5, 0.75)
        for placement in ("block", "keys")
    },
}


def wan() -> tuple[nn.Module, str, Callable[[int], dict[str, Any]]]:
    """Wan 2.1 1.3B with one block, the path of the block, and its call for a number of tokens."""
    config = {"num_attention_heads": 12, "attention_head_dim": 128, "ffn_dim": 8960}
    model = WanTransformer3DModel(**config, num_layers=1).bfloat16()

    def call(tokens: int) -> dict[str, Any]:
        rotary = torch.randn(1, tokens, 1, 128)
        return {
            "hidden_states": torch.randn(1, tokens, 1536).bfloat16(),
            "encoder_hidden_states": torch.randn(1, 512, 1536).bfloat16(),
            "temb": torch.randn(1, 6, 1536),
            "rotary_emb": (rotary, rotary),
        }

    return model, "blocks.0", call


def sdxl() -> tuple[nn.Module, str, Callable[[int], dict[str, Any]]]:
    """The finest level of SDXL's UNet that has attention, 640 wide."""
    model = UNet2DConditionModel(
        block_out_channels=(320, 640),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        mid_block_type=None,
        layers_per_block=1,
        attention_head_dim=(5, 10),
        cross_attention_dim=2048,
        use_linear_projection=True,
    ).bfloat16()

    def call(tokens: int) -> dict[str, Any]:
        return {
            "hidden_states": torch.randn(1, tokens, 640).bfloat16(),
            "encoder_hidden_states": torch.randn(1, 77, 2048).bfloat16(),
        }

    return model, "down_blocks.1.attentions.0.transformer_blocks.0", call


def main() -> None:
    """Time every way in turn, so that all of them meet the same neighbours on the machine."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", choices=("wan", "sdxl"))
    parser.add_argument("tokens", type=int, nargs="+")
    parser.add_argument("--repeats", type=int, default=2)
    options = parser.parse_args()
    torch.manual_seed(0)
    model, path, call = {"wan": wan, "sdxl": sdxl}[options.model]()
    blocks = {way: transform(model, skip=(), **o).get_submodule(path) for way, o in WAYS.items()}
    for tokens in options.tokens:
        inputs = call(tokens)
        for _ in range(options.repeats):
            seconds = {}
            for way, block in blocks.items():
                start = time.process_time()
                with torch.no_grad():
                    block(**inputs)
                seconds[way] = time.process_time() - start
            first = seconds["untouched"]
            said = ", ".join(f"{w} {s:.2f} s ({first / s:.2f})" for w, s in seconds.items())
            print(f"{options.model}, {tokens} tokens: {said}", flush=True)


if __name__ == "__main__":
    main()
