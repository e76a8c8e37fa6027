"""The checks that diffusers publishes for its models, on transformed ones of both families."""

from typing import Any, ClassVar

import pytest
import torch
from diffusers.models.attention_processor import AttnProcessor2_0, IPAdapterAttnProcessor2_0
from diffusers.models.embeddings import ImageProjection
from diffusers.models.transformers.transformer_flux import (
    FluxAttnProcessor,
    FluxIPAdapterAttnProcessor,
)

from tests.checks.adapters import Adapters
from tests.checks.attention import AttentionLayers, embeds
from tests.checks.calls import Calls, Saving
from tests.checks.compiling import Compiling
from tests.checks.memory import Memory
from tests.checks.training import Training
from tests.tiny import (
    TEXT_WIDTH,
    flux_inputs,
    smallest_flux,
    smallest_unet,
    tiny_flux,
    tiny_sdxl_unet,
    unet_inputs,
)
from toma_fx import TomaError


def image_projection() -> dict[str, torch.Tensor]:
    """The weights of an IP-Adapter's projection of image embeddings, by the names of its file."""
    state = ImageProjection(
        image_embed_dim=TEXT_WIDTH, cross_attention_dim=TEXT_WIDTH, num_image_text_embeds=4
    ).state_dict()
    names = {"image_embeds": "proj", "norm": "norm"}
    return {
        f"{names[module]}.{kind}": tensor
        for name, tensor in state.items()
        for module, _, kind in [name.partition(".")]
    }


class AllChecks(Calls, Saving, Training, AttentionLayers, Memory, Adapters):
    """Every check but those of compiled models."""


class TestUNet(AllChecks):
    attention_kwargs = "cross_attention_kwargs"
    main_input = "sample"
    checkpointed: ClassVar = {
        "CrossAttnDownBlock2D",
        "CrossAttnUpBlock2D",
        "DownBlock2D",
        "Transformer2DModel",
        "UNetMidBlock2DCrossAttn",
        "UpBlock2D",
    }

    processor = AttnProcessor2_0

    def untouched(self) -> Any:
        return tiny_sdxl_unet()

    def inputs(self, **size: int) -> dict[str, Any]:
        return unet_inputs(tiny_sdxl_unet(), **{"height": 16, "width": 16, **size})

    def ip_adapter(self, model: Any) -> None:
        layers: dict[str, torch.Tensor] = {}
        key = 1  # the adapter's file counts every attention layer, and holds every second
        for name in model.attn_processors:
            if name.endswith("attn2.processor"):
                attention = model.get_submodule(name.removesuffix(".processor"))
                state = IPAdapterAttnProcessor2_0(attention.inner_dim, TEXT_WIDTH).state_dict()
                for part in ("to_k_ip", "to_v_ip"):
                    layers[f"{key}.{part}.weight"] = state[f"{part}.0.weight"]
                key += 2
        model._load_ip_adapter_weights([{"image_proj": image_projection(), "ip_adapter": layers}])

    def image_embeds(self) -> dict[str, Any]:
        added = self.inputs()["added_cond_kwargs"]
        return {"added_cond_kwargs": {**added, "image_embeds": [embeds(TEXT_WIDTH)]}}

    def test_forward_chunking_is_refused_not_ignored(self) -> None:
        model = self.merged()
        with pytest.raises(TomaError, match=r"pieces of 2 .*BasicTransformerBlock.*leave it out"):
            model.mid_block.attentions[0].transformer_blocks[0].set_chunk_feed_forward(2, 1)
        model.mid_block.attentions[0].transformer_blocks[0].set_chunk_feed_forward(None)
        chunked = self.untouched()
        chunked.mid_block.attentions[0].transformer_blocks[0].set_chunk_feed_forward(2, 1)
        with pytest.raises(TomaError, match=r"turn it off, e.g. block.set_chunk_feed_forward"):
            self.merged(chunked)


class TestFlux(AllChecks):
    attention_kwargs = "joint_attention_kwargs"
    main_input = "hidden_states"
    checkpointed: ClassVar = {"FluxTransformer2DModel"}
    processor = FluxAttnProcessor

    def untouched(self) -> Any:
        return tiny_flux()

    def inputs(self, **size: int) -> dict[str, Any]:
        return flux_inputs(tiny_flux(), **{"height": 8, "width": 8, **size})

    def ip_adapter(self, model: Any) -> None:
        layers: dict[str, torch.Tensor] = {}
        for key, _ in enumerate(model.transformer_blocks):
            state = FluxIPAdapterAttnProcessor(model.inner_dim, TEXT_WIDTH).state_dict()
            for part in ("to_k_ip", "to_v_ip"):
                for kind in ("weight", "bias"):
                    layers[f"{key}.{part}.{kind}"] = state[f"{part}.0.{kind}"]
        model._load_ip_adapter_weights([{"image_proj": image_projection(), "ip_adapter": layers}])

    def image_embeds(self) -> dict[str, Any]:
        return {"joint_attention_kwargs": {"ip_adapter_image_embeds": [embeds(TEXT_WIDTH)]}}

    def test_position_ids_with_a_batch_dimension(self) -> None:
        model, inputs = self.merged(), self.inputs()
        inputs |= {name: inputs[name][None] for name in ("img_ids", "txt_ids")}
        with torch.no_grad():
            assert torch.equal(model(**inputs).sample, self.run(model))


class TestCompiledUNet(Compiling):
    def untouched(self) -> Any:
        return smallest_unet()

    def inputs(self, **size: int) -> dict[str, Any]:
        return unet_inputs(smallest_unet(), **{"height": 16, "width": 16, **size})


class TestCompiledFlux(Compiling):
    def untouched(self) -> Any:
        return smallest_flux()

    def inputs(self, **size: int) -> dict[str, Any]:
        return flux_inputs(smallest_flux(), **{"height": 8, "width": 8, **size})
