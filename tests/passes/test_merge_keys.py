"""Keys and values merge in a block's graph, as the reference has it; exactly, for equal tokens."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0
from torch import fx, nn
from torch.nn import functional as F

from tests.keys_reference import merging_keys
from tests.passes.blocks import (
    NAMES,
    OPTIONS,
    assert_close,
    block_of,
    calls,
    check_values,
    expect_change,
    family_of,
    inputs_of,
    row_of,
    run,
)
from tests.reference import ReferenceOptions, split_regions
from tests.tiny import flux_inputs, smallest_flux, smallest_unet, tiny_sdxl_unet, unet_inputs
from toma_fx import MergeConfig, restore, trace, transform
from toma_fx.build import captured
from toma_fx.errors import CaptureError, ConfigError, InputError, ModelError
from toma_fx.passes.merge_keys import MergeKeys
from toma_fx.passes.pipeline import run_passes
from toma_fx.passes.plan_nodes import PlanOptions
from toma_fx.runtime import keys

EVERY_BLOCK = pytest.mark.parametrize("name", NAMES)
ATTENTION = {"unet": "attn1", "flux_double": "attn", "flux_single": "attn"}


@pytest.fixture(autouse=True)
def _no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


def opened(name: str, block: nn.Module) -> fx.GraphModule:
    return captured(block, family_of(block), None, (ATTENTION[name],))


def merge(name: str, block: nn.Module, options: PlanOptions = OPTIONS) -> fx.GraphModule:
    each = MergeKeys(flow=row_of(block).flow, attentions=(ATTENTION[name],), options=options)
    return run_passes(opened(name, block), (each,))


@EVERY_BLOCK
def test_an_opened_block_computes_what_it_did(name: str) -> None:
    block, inputs = block_of(name), inputs_of(name)
    assert_close(run(opened(name, block), inputs), run(block, inputs))


@EVERY_BLOCK
@pytest.mark.parametrize("merge_over", ["region", "image"])
@pytest.mark.parametrize("ratio", [0.25, 0.5, 0.75])
def test_a_block_against_the_reference(name: str, ratio: float, merge_over: str) -> None:
    block, inputs = block_of(name), inputs_of(name)
    options = PlanOptions(region_tokens=16, ratio=ratio, temperature=0.1, merge_over=merge_over)
    plain = ReferenceOptions(
        ratio=ratio, region="stripe", region_tokens=16, temperature=0.1, merge_over=merge_over
    )
    model = nn.ModuleDict({"blocks": nn.ModuleList([block])})
    with merging_keys(model, 0, [split_regions(8, 8, plain)], plain):
        expected = run(block, inputs)
    assert_close(run(merge(name, block, options), inputs), expected)


def test_a_whole_unet_against_the_reference() -> None:
    unet = tiny_sdxl_unet()
    inputs = unet_inputs(unet)
    options = ReferenceOptions(ratio=0.5, region="tile", region_tokens=16)

    def regions(tokens: int) -> list[Any]:
        side = int(tokens**0.5)
        return [split_regions(side, side, options)]

    with merging_keys(unet, 0, regions, options):
        expected = unet(**inputs).sample
    merged = transform(unet, placement="keys", region_tokens=16)(**inputs).sample
    assert (expected - unet(**inputs).sample).abs().max() > 1e-3
    torch.testing.assert_close(merged, expected, atol=2e-5, rtol=1e-4)


SIZES = (1, 2, 4, 9)
"""Of the clusters of equal tokens in a region of 16."""


@EVERY_BLOCK
@pytest.mark.parametrize("batch", [1, 2])
def test_equal_tokens_merge_without_any_change(name: str, batch: int) -> None:
    """The logarithm of a cluster's size makes it exact, whatever the sizes."""
    block, inputs = block_of(name), inputs_of(name, batch=batch)
    cluster = torch.repeat_interleave(torch.arange(len(SIZES)), torch.tensor(SIZES))
    first = torch.cat([cluster + 16 * region for region in range(4)])
    generator = torch.Generator().manual_seed(3)
    tokens = torch.randn(batch, 64, 32, generator=generator)
    inputs["hidden_states"] = tokens[:, first]
    if "image_rotary_emb" in inputs:  # equal tokens stand at one place
        text = len(inputs["image_rotary_emb"][0]) - 64
        places = torch.cat([torch.arange(text), text + first])
        inputs["image_rotary_emb"] = tuple(each[places] for each in inputs["image_rotary_emb"])
    options = PlanOptions(region_tokens=16, ratio=0.75)
    merged = merge(name, block, options)
    assert_close(run(merged, inputs), run(block, inputs))
    few = PlanOptions(region_tokens=16, ratio=0.9)
    assert (run(merge(name, block, few), inputs)[-1] - run(block, inputs)[-1]).abs().max() > 1e-4


@pytest.mark.parametrize("dim", [1, 2])
@pytest.mark.parametrize("width", [8, 15, 20, 64])
@pytest.mark.parametrize("after", [0, 3])
def test_sizes_are_added_to_logits(dim: int, width: int, after: int) -> None:
    generator = torch.Generator().manual_seed(0)
    query, key, value = (
        torch.randn(2, 3, count, width, generator=generator) for count in (11, 10, 10)
    )
    sizes = torch.rand(2, 5, generator=generator) * 9 + 0.1
    bias = torch.zeros(2, 10)
    bias[:, 5 - after : 10 - after] = sizes.log()
    expected = F.scaled_dot_product_attention(query, key, value, bias[:, None, None], scale=0.3)
    q, k, v = (x.transpose(1, 2) if dim == 1 else x for x in (query, key, value))
    wide = keys.with_sizes(q, k, v, sizes.log(), 0.3, dim, after)
    assert {each.shape[-1] % keys.CHANNELS for each in wide} == {0}
    q, k, v = (x.transpose(1, 2) if dim == 1 else x for x in wide)
    result = F.scaled_dot_product_attention(q, k, v, scale=0.3)
    torch.testing.assert_close(result[..., :width], expected)
    assert not result[..., width:].any()


@EVERY_BLOCK
def test_what_is_changed(name: str) -> None:
    before, after = opened(name, block_of(name)), merge(name, block_of(name))
    new = calls(after) - calls(before)
    assert {each: new[each] for each in new if each.startswith("toma.")} == {
        "toma.select": 1,
        "toma.weigh": 1,
        "toma.log_sizes": 1,
        "toma.merge_heads": 2,
        "toma.with_sizes": 1,
    }
    expect_change(before, after, f"merge_keys.{name}")


@EVERY_BLOCK
def test_example_values_are_true(name: str) -> None:
    block = block_of(name, torch.float16)
    check_values(merge(name, block))


class _Custom(AttnProcessor2_0):  # type: ignore[misc]
    any_tokens = True


def test_what_cannot_be_rewritten_is_refused() -> None:
    unet = smallest_unet()
    unet.down_blocks[0].attentions[0].transformer_blocks[0].attn1.set_processor(_Custom())
    with pytest.raises(CaptureError, match=r"attn1 has a .*_Custom.* only diffusers' own"):
        transform(unet, placement="keys")
    block = smallest_unet().down_blocks[0].attentions[0].transformer_blocks[0]
    block.attn1.set_processor(AttnProcessor())  # attention of its own, by baddbmm
    with pytest.raises(CaptureError, match=r"does what one graph cannot hold|does not attend"):
        merge("unet", block)


def test_what_comes_after_transform_is_refused_at_the_call() -> None:
    unet = smallest_unet()
    inputs = unet_inputs(unet)
    merged = transform(unet, placement="keys")
    attention = merged.down_blocks[0].attentions[0].transformer_blocks[0].attn1
    attention.set_processor(AttnProcessor())
    with pytest.raises(InputError, match="AttnProcessor after the model was transformed"):
        merged(**inputs)
    attention.set_processor(AttnProcessor2_0())
    merged(**inputs)
    handle = attention.register_forward_hook(lambda *_: None)
    with pytest.raises(InputError, match="attn1 has a hook"):
        merged(**inputs)
    handle.remove()
    mask = torch.ones(2, 1024)
    with pytest.raises(InputError, match="masks single image tokens"):
        merged(**inputs, attention_mask=mask)
    assert torch.equal(restore(merged)(**inputs).sample, unet(**inputs).sample)


def test_a_cache_of_attention_is_refused() -> None:
    from diffusers import PyramidAttentionBroadcastConfig

    flux = transform(smallest_flux(), placement="keys", skip=())
    config = PyramidAttentionBroadcastConfig(
        spatial_attention_block_skip_range=2,
        spatial_attention_timestep_skip_range=(100, 800),
        current_timestep_callback=lambda: 500,
    )
    with pytest.raises(ModelError, match="would not run: with placement='keys'"):
        flux.enable_cache(config)


def test_a_graph_of_others_is_refused() -> None:
    unet = smallest_unet()
    with pytest.raises(ModelError, match="placement='keys' rewrites the attention of live models"):
        transform(trace(unet, unet_inputs(unet)), placement="keys")


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"components": ("self_attention",)}, "merges the keys and values of self-attention"),
        ({"unmerge": "pinv"}, "tokens by the transpose"),
    ],
)
def test_options_without_a_meaning(option: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        MergeConfig(placement="keys", **option)


@pytest.mark.usefixtures("backend_as_it_was")
def test_another_backend_counts_after_transform() -> None:
    flux = transform(smallest_flux(), placement="keys", skip=())
    inputs = flux_inputs(flux)
    expected = flux(**inputs).sample
    flux.set_attention_backend("_native_math")
    torch.testing.assert_close(flux(**inputs).sample, expected)
    flux.set_attention_backend("_native_efficient")  # which is of GPUs alone
    with pytest.raises(RuntimeError, match="backend"):
        flux(**inputs)


def test_lora_reaches_the_layers_of_an_opened_attention() -> None:
    from peft import LoraConfig

    flux, inputs = smallest_flux(), flux_inputs(smallest_flux())
    lora = LoraConfig(r=4, target_modules=["to_q", "to_k"], init_lora_weights=False)
    after = transform(flux, placement="keys", skip=(), region_tokens=16)
    without = after(**inputs).sample
    after.add_adapter(lora)
    flux.add_adapter(lora)
    flux.load_state_dict(after.state_dict())
    before = transform(flux, placement="keys", skip=(), region_tokens=16)
    torch.testing.assert_close(before(**inputs).sample, after(**inputs).sample)
    assert (after(**inputs).sample - without).abs().max() > 0.01
