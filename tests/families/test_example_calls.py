"""Made-up calls fit every variant of a model, with data and without."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers.models.attention_processor import IPAdapterAttnProcessor2_0
from diffusers.models.embeddings import (
    ImageProjection,
    IPAdapterFaceIDImageProjection,
    IPAdapterFaceIDPlusImageProjection,
    IPAdapterFullImageProjection,
    IPAdapterPlusImageProjection,
    MultiIPAdapterImageProjection,
)
from torch import nn
from torch.utils._pytree import tree_leaves, tree_map

from tests import test_model_checks
from tests.pipelines import tiny_flux_pipeline, tiny_sdxl_pipeline
from tests.tiny import TEXT_WIDTH, tiny_flux, tiny_sd_unet, tiny_sdxl_unet
from toma_fx.errors import ModelError
from toma_fx.families import flux, unet
from toma_fx.inputs import weightless

BATCH, HEIGHT, WIDTH = 2, 64, 128
UNTIMED: dict[str, Any] = {
    "addition_embed_type": None,
    "addition_time_embed_dim": None,
    "projection_class_embeddings_input_dim": None,
}
IMAGE = 24  # width of an image's embedding, unlike any other width here


def unet_call(model: Any, like: torch.Tensor | None = None, **size: Any) -> dict[str, Any]:
    size = {"batch": BATCH, "height": HEIGHT, "width": WIDTH, **size}
    return unet.example_call(model, torch.empty(0) if like is None else like, **size)


def flux_call(model: Any, like: torch.Tensor | None = None, **size: Any) -> dict[str, Any]:
    size = {"batch": BATCH, "height": HEIGHT, "width": WIDTH, **size}
    return flux.example_call(model, torch.empty(0) if like is None else like, **size)


def adapted(model: Any, *projections: nn.Module) -> Any:
    """With an IP-Adapter for each projection, as diffusers' loader leaves the model."""
    processors = {}
    for name, processor in model.attn_processors.items():
        if name.endswith("attn2.processor"):
            attention = model.get_submodule(name.removesuffix(".processor"))
            processor = IPAdapterAttnProcessor2_0(
                attention.inner_dim, TEXT_WIDTH, num_tokens=(4,) * len(projections)
            )
        processors[name] = processor
    if model.encoder_hid_proj is not None:
        model.text_encoder_hid_proj = model.encoder_hid_proj
    model.encoder_hid_proj = None
    model.set_attn_processor(processors)
    model.encoder_hid_proj = MultiIPAdapterImageProjection(projections)
    model.config.encoder_hid_dim_type = "ip_image_proj"
    return model


def plain(**changes: Any) -> Any:
    return tiny_sdxl_unet(**UNTIMED, **changes)


def kolors() -> Any:
    return tiny_sdxl_unet(encoder_hid_dim=48, encoder_hid_dim_type="text_proj")


def loaded(family: Any, model: Any) -> Any:
    family().ip_adapter(model)
    return model


def face_id_plus() -> Any:
    projection = IPAdapterFaceIDPlusImageProjection(16, TEXT_WIDTH, IMAGE, 20, heads=2, depth=1)
    projection.clip_embeds = torch.randn(BATCH, 3, 257, IMAGE)
    return adapted(tiny_sdxl_unet(), projection)


def replaced(model: Any, name: str, layer: nn.Module) -> Any:
    setattr(model, name, layer)
    return model


plus = IPAdapterPlusImageProjection(IMAGE, TEXT_WIDTH, 16, 1, 8, 2)
UNETS: dict[str, Callable[[], Any]] = {
    "SDXL": tiny_sdxl_unet,
    "SDXL refiner": lambda: tiny_sdxl_unet(projection_class_embeddings_input_dim=32 + 5 * 8),
    "SD": tiny_sd_unet,
    "Kolors": kolors,
    "Kolors, its type of projection unsaid": lambda: tiny_sdxl_unet(encoder_hid_dim=48),
    "inpainting": lambda: plain(in_channels=9),
    "edit": lambda: tiny_sdxl_unet(in_channels=8),
    "conv_in widened": lambda: replaced(plain(), "conv_in", nn.Conv2d(9, 16, 3, padding=1)),
    "x4 upscaler": lambda: plain(
        num_class_embeds=100, in_channels=7, only_cross_attention=(True, True, False)
    ),
    "only cross-attention": lambda: plain(only_cross_attention=True),
    "cross-attention widths, equal": lambda: plain(cross_attention_dim=(TEXT_WIDTH,) * 3),
    "AudioLDM": lambda: tiny_sdxl_unet(
        **UNTIMED | {"projection_class_embeddings_input_dim": 40},
        cross_attention_dim=[16, 32, 32],
        class_embed_type="simple_projection",
        class_embeddings_concat=True,
    ),
    "LCM": lambda: tiny_sdxl_unet(time_cond_proj_dim=20),
    "class labels: timestep": lambda: plain(class_embed_type="timestep"),
    "class labels: timestep, Fourier": lambda: plain(
        class_embed_type="timestep", time_embedding_type="fourier"
    ),
    "class labels: identity": lambda: plain(class_embed_type="identity"),
    "class labels: projection": lambda: tiny_sdxl_unet(
        **UNTIMED | {"projection_class_embeddings_input_dim": 40}, class_embed_type="projection"
    ),
    "class labels: simple projection": lambda: tiny_sdxl_unet(
        **UNTIMED | {"projection_class_embeddings_input_dim": 40},
        class_embed_type="simple_projection",
    ),
    "text added": lambda: tiny_sdxl_unet(
        **UNTIMED | {"addition_embed_type": "text"}, addition_embed_type_num_heads=4
    ),
    "text added, projected": lambda: tiny_sdxl_unet(
        **UNTIMED | {"addition_embed_type": "text"},
        addition_embed_type_num_heads=4,
        encoder_hid_dim=48,
    ),
    "Kandinsky 2.1": lambda: tiny_sdxl_unet(
        **UNTIMED | {"addition_embed_type": "text_image"},
        encoder_hid_dim=48,
        encoder_hid_dim_type="text_image_proj",
    ),
    "text and image projected": lambda: plain(
        encoder_hid_dim=48, encoder_hid_dim_type="text_image_proj"
    ),
    "text and image added": lambda: tiny_sdxl_unet(
        **UNTIMED | {"addition_embed_type": "text_image"}
    ),
    "Kandinsky 2.2": lambda: tiny_sdxl_unet(
        **UNTIMED | {"addition_embed_type": "image"},
        encoder_hid_dim=IMAGE,
        encoder_hid_dim_type="image_proj",
    ),
    "image projected": lambda: plain(encoder_hid_dim=IMAGE, encoder_hid_dim_type="image_proj"),
    "Kandinsky 2.2 with a hint": lambda: tiny_sdxl_unet(
        **UNTIMED | {"addition_embed_type": "image_hint"},
        encoder_hid_dim=IMAGE,
        encoder_hid_dim_type="image_proj",
        in_channels=8,
    ),
    "IP-Adapter": lambda: loaded(test_model_checks.TestUNet, tiny_sdxl_unet()),
    "Kolors with an IP-Adapter": lambda: loaded(test_model_checks.TestUNet, kolors()),
    "IP-Adapter Plus": lambda: adapted(tiny_sdxl_unet(), plus),
    "IP-Adapter Full": lambda: adapted(
        tiny_sdxl_unet(), IPAdapterFullImageProjection(IMAGE, TEXT_WIDTH)
    ),
    "IP-Adapter FaceID": lambda: adapted(
        tiny_sdxl_unet(), IPAdapterFaceIDImageProjection(IMAGE, TEXT_WIDTH, 2, 4)
    ),
    "IP-Adapter FaceID Plus": face_id_plus,
    "two IP-Adapters": lambda: adapted(tiny_sd_unet(), plus, ImageProjection(20, TEXT_WIDTH, 4)),
}


def wide_flux() -> Any:
    model = tiny_flux()
    return replaced(model, "x_embedder", nn.Linear(32, model.x_embedder.out_features))


FLUXES: dict[str, Callable[[], Any]] = {
    "dev": tiny_flux,
    "schnell": lambda: tiny_flux(guidance=False),
    "Fill": lambda: tiny_flux(in_channels=96, out_channels=16),
    "Control LoRA": wide_flux,
    "IP-Adapter": lambda: loaded(test_model_checks.TestFlux, tiny_flux()),
}


@torch.no_grad()
def check(model: Any, call: Callable[..., dict[str, Any]], shape: tuple[int, ...]) -> None:
    before = torch.get_rng_state()
    output = model(**call(model)).sample
    assert output.shape == shape and output.isfinite().all()
    assert torch.equal(before, torch.get_rng_state())
    skeleton = weightless(model)
    output = skeleton(**call(skeleton, torch.empty(0, device="meta"))).sample
    assert output.shape == shape and output.is_meta


@pytest.mark.parametrize("name", UNETS)
def test_unet(name: str) -> None:
    check(UNETS[name](), unet_call, (BATCH, 4, HEIGHT // 8, WIDTH // 8))


@pytest.mark.parametrize("name", FLUXES)
def test_flux(name: str) -> None:
    check(FLUXES[name](), flux_call, (BATCH, HEIGHT // 16 * WIDTH // 16, 16))


def compare_with_pipeline(pipe: Any, model: Any, call: Any, **options: Any) -> None:
    """Names, shapes and dtypes; text tokens aside, of which the tiny pipelines have few."""
    calls: list[dict[str, Any]] = []

    def record(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = {**dict(zip(("sample", "timestep"), args, strict=False)), **kwargs}
        calls.append({name: each for name, each in given.items() if each is not None})

    model.register_forward_pre_hook(record, with_kwargs=True)
    size = {"height": HEIGHT, "width": WIDTH}
    pipe("a", **size, num_inference_steps=1, output_type="latent", **options)
    (theirs,), ours = calls, call(model)
    assert {*ours} == {*theirs} - {"return_dict"}
    for name in ours:
        if name in ("encoder_hidden_states", "txt_ids"):
            assert ours[name].dtype == theirs[name].dtype
            assert ours[name].shape[-1] == theirs[name].shape[-1]
        else:
            assert kinds(ours[name]) == kinds(theirs[name]), name


def kinds(value: Any) -> Any:
    return tree_map(lambda tensor: (tensor.shape, tensor.dtype), value)


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # diffusers' own
def test_a_unet_is_called_as_by_its_pipeline() -> None:
    pipe = tiny_sdxl_pipeline()
    unet = loaded(test_model_checks.TestUNet, pipe.unet)
    embeds = torch.randn(2, 1, TEXT_WIDTH)  # with the prompt and without, as everything in the call
    compare_with_pipeline(pipe, unet, unet_call, ip_adapter_image_embeds=[embeds])


def test_flux_is_called_as_by_its_pipeline() -> None:
    pipe = tiny_flux_pipeline()
    flux = loaded(test_model_checks.TestFlux, pipe.transformer)
    embeds = [torch.randn(1, 1, TEXT_WIDTH)]
    compare_with_pipeline(
        pipe,
        flux,
        flux_call,
        num_images_per_prompt=BATCH,
        ip_adapter_image_embeds=embeds,
        negative_ip_adapter_image_embeds=embeds,
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_values_are_the_same_in_every_call_and_differ_within_one(dtype: torch.dtype) -> None:
    like = torch.empty(0, dtype=dtype)
    for call, model in ((unet_call, tiny_sdxl_unet()), (flux_call, tiny_flux())):
        one, two = call(model, like), call(model, like)
        for this, that in zip(tree_leaves(one), tree_leaves(two), strict=True):
            assert torch.equal(this, that)
        text = one["encoder_hidden_states"]
        assert text.dtype == dtype and not torch.equal(text[0], text[1])


def test_text_is_what_the_model_attends_to() -> None:
    text = {name: unet_call(UNETS[name]())["encoder_hidden_states"] for name in UNETS}
    absent = {name for name, each in text.items() if each is None}
    assert absent == {"AudioLDM", "Kandinsky 2.2", "Kandinsky 2.2 with a hint", "image projected"}
    assert text["SDXL"].shape == (BATCH, 77, TEXT_WIDTH)
    for name in ("Kolors", "Kolors, its type of projection unsaid", "Kolors with an IP-Adapter"):
        assert text[name].shape == (BATCH, 256, 48)


def test_size_ids_of_sdxl_and_of_its_refiner() -> None:
    base, refiner = (
        unet_call(UNETS[name]())["added_cond_kwargs"] for name in ("SDXL", "SDXL refiner")
    )
    assert base["time_ids"].tolist() == [[64, 128, 0, 0, 64, 128]] * BATCH
    assert refiner["time_ids"].tolist() == [[64, 128, 0, 0, 6]] * BATCH
    assert base["text_embeds"].shape == refiner["text_embeds"].shape == (BATCH, TEXT_WIDTH)


def test_image_embeddings_are_one_each_adapter() -> None:
    embeds = unet_call(UNETS["two IP-Adapters"]())["added_cond_kwargs"]["image_embeds"]
    assert [tuple(each.shape) for each in embeds] == [(BATCH, 1, 257, IMAGE), (BATCH, 1, 20)]


def test_an_adapter_that_is_unloaded_takes_nothing() -> None:
    flux, unet = FLUXES["IP-Adapter"](), UNETS["IP-Adapter"]()
    flux.encoder_hid_proj = unet.encoder_hid_proj = None
    unet.config.encoder_hid_dim_type = None
    assert "joint_attention_kwargs" not in flux_call(flux)
    assert "image_embeds" not in unet_call(unet)["added_cond_kwargs"]


@pytest.mark.parametrize(
    ("sample_size", "given", "latents"),
    [
        (32, {}, (32, 32)),
        (32, {"height": 64}, (8, 8)),
        (32, {"width": 64}, (32, 8)),
        ((16, 24), {}, (16, 24)),
        ([16, 24], {"height": 64}, (8, 8)),
        ([16, 24], {"width": 64}, (16, 8)),
        (None, {"height": 64}, (8, 8)),
        (None, {"height": 64, "width": 128}, (8, 16)),
    ],
)
def test_sizes_of_a_unet(sample_size: Any, given: Any, latents: tuple[int, int]) -> None:
    size = {"height": None, "width": None, **given}
    model = tiny_sdxl_unet(sample_size=sample_size)
    assert unet_call(model, **size)["sample"].shape[2:] == latents


@pytest.mark.parametrize(
    ("given", "tokens"), [({}, 64 * 64), ({"height": 64}, 16), ({"width": 64}, 64 * 4)]
)
def test_sizes_of_flux(given: Any, tokens: int) -> None:
    call = flux_call(tiny_flux(), **{"height": None, "width": None, **given})
    assert call["hidden_states"].shape[1] == len(call["img_ids"]) == tokens


@pytest.mark.parametrize("width", [None, 64])
def test_a_size_that_the_config_does_not_give_is_asked_for(width: int | None) -> None:
    with pytest.raises(ModelError, match="pass height and width"):
        unet_call(tiny_sdxl_unet(sample_size=None), height=None, width=width)


@pytest.mark.parametrize(
    ("call", "model", "works"), [(unet_call, tiny_sdxl_unet, 96), (flux_call, tiny_flux, 96)]
)
def test_a_size_that_no_token_fits_is_refused_with_one_that_does(
    call: Any, model: Any, works: int
) -> None:
    model = model()
    with pytest.raises(ModelError, match=f"100 x 128 pixels .* such as {works} x 128"):
        call(model, height=100, width=128)
    with pytest.raises(ModelError, match="such as"):
        call(model, height=0, width=128)
    call(model, height=works, width=128)
