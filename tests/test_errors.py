"""Messages for things that cannot work: one line with the value and the way out."""

import copy
import functools
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
from diffusers import (
    AutoencoderKL,
    DDPMScheduler,
    FluxTransformer2DModel,
    UNet2DConditionModel,
)
from diffusers.models.transformers.transformer_flux import FluxAttnProcessor
from torch import Tensor, nn

from tests.tiny import (
    TEXT_TOKENS,
    TEXT_WIDTH,
    flux_inputs,
    lossless,
    tiny_flux,
    tiny_sdxl_unet,
    unet_inputs,
)
from toma_fx import MergeConfig, Schedule, TomaError, restore, transform
from toma_fx.errors import ConfigError, InputError, ModelError

KNOWN = ("UNet2DConditionModel", "FluxTransformer2DModel")
COMPONENT = {"placement": "component"}
STEPS = {"schedule": Schedule(select_every=10)}


@functools.cache
def unet() -> Any:
    """One model for all tests; nothing here may change it."""
    return tiny_sdxl_unet()


@functools.cache
def flux() -> Any:
    """One model for all tests; nothing here may change it."""
    return tiny_flux()


def compiled(how: Callable[..., Any]) -> Any:
    """A model compiled in one of diffusers' and PyTorch's ways; nothing runs."""
    model = copy.deepcopy(unet())
    result = how(model, backend="eager")
    return model if result is None else result


def patched() -> Any:
    """A model of which one block runs what somebody gave it."""
    model = copy.deepcopy(unet())
    block = model.down_blocks[1].attentions[0].transformer_blocks[0]
    block.forward = lambda hidden_states, *_, **__: hidden_states
    return model


def convolutions_only() -> UNet2DConditionModel:
    """A UNet without any attention."""
    return UNet2DConditionModel(
        block_out_channels=(8, 8),
        norm_num_groups=4,
        layers_per_block=1,
        down_block_types=("DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D"),
        mid_block_type=None,
    )


class Holder:
    """A pipeline, as far as ``transform`` looks at one."""

    def __init__(self, **parts: Any) -> None:
        vars(self).update(parts)


# How to make the mistake, the class of error, and what its message must say.
MISTAKES: dict[str, tuple[Callable[[], Any], type[TomaError], tuple[str, ...]]] = {
    "bad value": (
        lambda: transform(unet(), ratio=1.5),
        ConfigError,
        ("ratio=1.5", "in [0, 1)", "such as 0.5"),
    ),
    "unknown option": (
        lambda: transform(unet(), rato=0.5),
        ConfigError,
        ("rato=0.5", "choose from", "ratio"),
    ),
    "unknown choice": (
        lambda: transform(unet(), region="hexagon"),
        ConfigError,
        ("region='hexagon'", "'tile'", "'stripe'", "'image'"),
    ),
    "config and options": (
        lambda: transform(unet(), MergeConfig(), ratio=0.4, region="stripe"),
        ConfigError,
        ("ratio, region", "a config and", "put them into the config"),
    ),
    "unknown model": (
        lambda: transform(nn.Linear(2, 2)),
        ModelError,
        ("Linear", "not a model that toma_fx knows", *KNOWN),
    ),
    "subclass of a known model": (
        lambda: transform(type("Faster", (FluxTransformer2DModel,), {})(**dict(flux().config))),
        ModelError,
        ("Faster", "subclass of diffusers' FluxTransformer2DModel", "a model of that class"),
    ),
    "unknown diffusers model": (
        lambda: transform(AutoencoderKL(block_out_channels=(4,), norm_num_groups=2)),
        ModelError,
        ("AutoencoderKL", "not a model that toma_fx knows", *KNOWN),
    ),
    "neither model nor pipeline": (
        lambda: transform("stable-diffusion-xl"),
        ModelError,
        ("str", "neither a torch module nor a pipeline", *KNOWN, "pass the model"),
    ),
    "pipeline without a model": (
        lambda: transform(Holder(scheduler=DDPMScheduler(), unet=None)),
        ModelError,
        ("Holder", "neither a torch module nor a pipeline", *KNOWN, "pass the model"),
    ),
    "pipeline with another model": (
        lambda: transform(Holder(transformer=nn.Linear(2, 2))),
        ModelError,
        ("Holder", "that toma_fx knows", *KNOWN, "pass the model"),
    ),
    "a forward of its own": (
        lambda: transform(patched()),
        ModelError,
        ("down_blocks.1.attentions.0.transformer_blocks.0", "of its own", "del module.forward"),
    ),
    "compiled by torch": (
        lambda: transform(compiled(torch.compile)),
        ModelError,
        ("compiled", "transform first"),
    ),
    "compiled in place": (
        lambda: transform(compiled(UNet2DConditionModel.compile)),
        ModelError,
        ("UNet2DConditionModel", "compiled", "transform first"),
    ),
    "compiled block by block": (
        lambda: transform(compiled(UNet2DConditionModel.compile_repeated_blocks)),
        ModelError,
        ("UNet2DConditionModel", "compiled", "transform first"),
    ),
    "transformed twice": (
        lambda: transform(transform(unet(), ratio=0.25), ratio=0.5),
        ModelError,
        ("UNet2DConditionModel", "already", "ratio=0.25", "toma_fx.restore(model)"),
    ),
    "everything skipped": (
        lambda: transform(flux(), skip=("*",)),
        ModelError,
        ("nothing to merge", "FluxTransformer2DModel", "skip='*'", "Pass skip=()"),
    ),
    "skip that matches nothing": (
        lambda: transform(unet(), skip=("mid_block.*", "mid_blocks.*", "attn1")),
        ModelError,
        ("skip=['mid_blocks.*', 'attn1']", "matches no block", "down_blocks.1.attentions.0."),
    ),
    "no transformer block": (
        lambda: transform(convolutions_only()),
        ModelError,
        ("nothing to merge", "UNet2DConditionModel", "no transformer block"),
    ),
    "restore of an untouched model": (
        lambda: restore(unet()),
        ModelError,
        ("UNet2DConditionModel", "not transformed", "toma_fx.transform first"),
    ),
    "restore of an untouched pipeline": (
        lambda: restore(Holder(unet=unet())),
        ModelError,
        ("UNet2DConditionModel", "not transformed", "toma_fx.transform first"),
    ),
}


@pytest.fixture(autouse=True)
def _no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


def check(mistake: Callable[[], Any], kind: type[TomaError], said: tuple[str, ...]) -> None:
    """The mistake raises its kind of error, in one line that says all this."""
    with pytest.raises(TomaError) as caught:
        mistake()
    message = str(caught.value)
    assert type(caught.value) is kind
    assert "\n" not in message
    for words in said:
        assert words in message


@pytest.mark.parametrize("name", MISTAKES)
def test_mistake_is_explained(name: str) -> None:
    check(*MISTAKES[name])


def test_a_mistake_leaves_a_pipeline_as_it_was() -> None:
    pipeline: Any = Holder(unet=unet())
    with pytest.raises(ModelError):
        transform(pipeline, skip=("nothing",))
    assert pipeline.unet is unet()


# Inputs that merged tokens cannot carry


def unet_call(**options: Any) -> Callable[..., Any]:
    """A call of a transformed UNet, with arguments added."""
    model = transform(unet(), **options)
    return lambda **added: model(**unet_inputs(unet(), height=16, width=16), **added).sample


def flux_call(**options: Any) -> Callable[..., Any]:
    """A call of a transformed Flux, with arguments added."""
    model = transform(flux(), **options)
    return lambda **added: model(**flux_inputs(flux(), height=8, width=8), **added).sample


CALLS = {"unet": unet_call, "flux": flux_call}
ATTENTION_KWARGS = {"unet": "cross_attention_kwargs", "flux": "joint_attention_kwargs"}


@pytest.mark.parametrize("options", [{}, COMPONENT], ids=["block", "component"])
@pytest.mark.parametrize("family", CALLS)
def test_attention_kwargs_of_single_tokens_are_refused(
    family: str, options: dict[str, Any]
) -> None:
    call = CALLS[family](**options)
    for key in ("ip_adapter_masks", "attention_mask"):
        kwargs = {ATTENTION_KWARGS[family]: {key: torch.ones(1, 1, 8, 8)}}
        said = (repr(key), "merged tokens", "leave it out", "untransformed model")
        check(partial(call, **kwargs), InputError, said)


@pytest.mark.parametrize("options", [{}, COMPONENT], ids=["block", "component"])
def test_masks_of_single_tokens_are_refused(options: dict[str, Any]) -> None:
    call = unet_call(**options)
    text = torch.zeros(2, 64, TEXT_TOKENS)
    said = ("encoder_attention_mask", "(2, 64, 7)", "single image tokens", "pass None")
    check(lambda: call(encoder_attention_mask=text), InputError, said)
    said = ("attention_mask", "(2, 64)", "single image tokens", "pass None")
    check(lambda: call(attention_mask=torch.ones(2, 64)), InputError, said)


MASKS = {
    "self_attention": ("attention_mask", (2, 1, 64)),
    "cross_attention": ("encoder_attention_mask", (2, 64, TEXT_TOKENS)),
}


@pytest.mark.parametrize("component", MASKS)
def test_masks_of_single_tokens_need_an_unmerged_component(component: str) -> None:
    name, shape = MASKS[component]
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randn(2, 64, 32, generator=generator)
    inputs = {
        "encoder_hidden_states": torch.randn(2, TEXT_TOKENS, TEXT_WIDTH, generator=generator),
        name: 5 * torch.randn(shape, generator=generator),
    }
    path = "down_blocks.1.attentions.0.transformer_blocks.0"

    def run(model: nn.Module) -> Tensor:
        output: Tensor = model.get_submodule(path)(tokens, **inputs)
        return output

    others: dict[str, Any] = {**COMPONENT, "components": set(MASKS) - {component} | {"mlp"}}
    assert not torch.allclose(run(transform(unet(), **others)), run(unet()), atol=1e-2)
    # With every token kept and standing for itself alone, merging changes nothing.
    moved = transform(unet(), lossless(**others))
    torch.testing.assert_close(run(moved), run(unet()), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("options", [{}, COMPONENT], ids=["block", "component"])
def test_mask_of_text_tokens_is_carried(options: dict[str, Any]) -> None:
    model = transform(unet(), **options)
    inputs = unet_inputs(unet(), height=16, width=16)
    mask = torch.tensor([[1, 1, 1, 1, 0, 0, 0], [1, 1, 1, 1, 1, 1, 0]])
    other_text = inputs["encoder_hidden_states"] + 5.0 * (1 - mask[:, :, None])

    def run(mask: Tensor | None) -> list[Tensor]:
        texts = (inputs["encoder_hidden_states"], other_text)
        calls = [{**inputs, "encoder_hidden_states": text} for text in texts]
        return [model(**call, encoder_attention_mask=mask).sample for call in calls]

    one, other = run(None)
    assert not torch.allclose(one, other, atol=1e-2)
    torch.testing.assert_close(*run(mask))


@pytest.mark.parametrize("kwargs", [None, {}], ids=str)
def test_block_on_its_own(kwargs: dict[str, Any] | None) -> None:
    tokens, text = torch.ones(1, 64, 32), torch.ones(1, TEXT_TOKENS, TEXT_WIDTH)

    def call(index: int, **options: Any) -> Tensor:
        blocks = transform(unet(), **options).mid_block.attentions[0].transformer_blocks
        output: Tensor = blocks[index](
            tokens, encoder_hidden_states=text, cross_attention_kwargs=kwargs
        )
        return output

    for output in (call(0), call(1, share="block"), call(0, **STEPS)):
        assert output.shape == tokens.shape
    said = ("group's first block", "call the whole model", "share='block'")
    check(lambda: call(1), InputError, said)


def test_rotary_values_go_only_to_processors_that_index_them_as_diffusers_does() -> None:
    class Own(FluxAttnProcessor):  # type: ignore[misc]
        any_tokens = True

        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            cos, _ = args[-1]
            return cos[None, None]

    model = transform(flux())
    model.set_attn_processor(Own())
    said = ("(None, None)", "[None, :, None, :]", "use one of diffusers' own processors")
    inputs = flux_inputs(flux(), height=8, width=8)
    check(lambda: model(**inputs), InputError, said)
