"""Rows: adapters that are loaded into a pipeline beside its model."""

import copy
from inspect import signature
from typing import Any

import pytest
import torch
from diffusers import (
    ControlNetModel,
    FluxControlNetModel,
    FluxControlNetPipeline,
    StableDiffusionXLAdapterPipeline,
    StableDiffusionXLControlNetPipeline,
    StableDiffusionXLPAGPipeline,
    T2IAdapter,
)
from diffusers.models.attention_processor import AttnProcessor2_0
from diffusers.models.controlnets.controlnet_flux import FluxMultiControlNetModel
from diffusers.models.transformers.transformer_flux import FluxAttnProcessor
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from torch import Tensor

from tests.matrix.frame import Cell, difference, row
from tests.matrix.pictures import (
    Draw,
    check,
    converted,
    drawing,
    holding,
    model_of,
    part_of,
    picture,
    pipeline,
)
from tests.tiny import TEXT_WIDTH, liven, tiny_sdxl_unet, unet_inputs
from toma_fx import restore, transform
from toma_fx.errors import InputError, TomaWarning

# diffusers' Euler scheduler hands a tensor to NumPy in a way that NumPy 2 is about to change.
pytestmark = [
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:`FluxPosEmbed` is deprecated:FutureWarning"),  # its own use
]

SECTION = "Adapters"
DRAW = drawing()
ORDER = pytest.mark.parametrize("when", ["before", "after"])


def alive(model: Any, seed: int = 1) -> Any:
    """A network whose zero-initialised parts do something."""
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        liven(model)
    return model.eval()


def acts(pipe: Any, draw: Draw, without: Draw) -> None:
    """Assert that what a call adds is seen in an image with merged tokens."""
    with holding(pipe, transform(model_of(pipe))):
        assert difference(draw(pipe, 0), without(pipe, 0)) > 1e-2


# LoRA


def lora(pipe: Any, seed: int, rank: int = 2) -> dict[str, Tensor]:
    """A LoRA's file for the pipeline, as training leaves it."""
    model = copy.deepcopy(model_of(pipe))
    layers = ["to_q", "to_v", "to_out.0", "ff.net.2", "proj_mlp"]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model.add_adapter(LoraConfig(r=rank, target_modules=layers, init_lora_weights=False))
    state = get_peft_model_state_dict(model)
    return {f"{part_of(pipe)}.{name}": 0.5 * value for name, value in state.items()}


def kwargs_name(cell: Cell) -> str:
    return "cross_attention_kwargs" if cell.family == "sdxl" else "joint_attention_kwargs"


def fused(family: str, *loras: tuple[int, float]) -> Any:
    """A transformed pipeline whose weights hold the LoRAs of the seeds, each with its scale."""
    pipe = pipeline(family)
    files = [(lora(pipe, seed), scale) for seed, scale in loras]
    for file, scale in files:
        pipe.load_lora_weights(file)
        pipe.fuse_lora(lora_scale=scale)
        pipe.unload_lora_weights()
    return transform(pipe)


def with_lora(cell: Cell, when: str) -> Any:
    """A transformed pipeline in the cell's mode, with a LoRA that came before or after."""
    pipe = pipeline(cell.family)
    file = lora(pipe, seed=1)
    if when == "before":
        pipe.load_lora_weights(file)
    transform(pipe)
    if when == "after":
        pipe.load_lora_weights(file)
    cell.apply(model_of(pipe))
    return pipe


@ORDER
@row("LoRA loaded {when} `transform`", section=SECTION)
def test_lora(cell: Cell, when: str) -> None:
    bare = DRAW(transform(pipeline(cell.family)), 0)
    pipe = with_lora(cell, when)
    drawn = DRAW(pipe, 0)
    assert difference(drawn, bare) > 1e-2
    assert difference(drawn, DRAW(fused(cell.family, (1, 1.0)), 0)) < 1e-4
    with cell.steady():
        assert difference(DRAW(pipe, 1), drawn) > 1e-2
        cell.agree(DRAW(pipe, 0), drawn)


@pytest.mark.filterwarnings("ignore:Already found a `peft_config`")  # a second LoRA is meant
@row("Several LoRAs, each with its weight (`set_adapters`)", section=SECTION, quick=())
def test_several_loras(cell: Cell) -> None:
    pipe = transform(pipeline(cell.family))
    for name, seed in (("a", 1), ("b", 2)):
        pipe.load_lora_weights(lora(pipe, seed), adapter_name=name)
    cell.apply(model_of(pipe))
    for scales in ([0.5, 0.8], [1.0, -0.5]):
        pipe.set_adapters(["a", "b"], scales)
        expected = DRAW(fused(cell.family, (1, scales[0]), (2, scales[1])), 0)
        assert difference(DRAW(pipe, 0), expected) < 1e-4
    pipe.set_adapters("b")
    assert difference(DRAW(pipe, 0), DRAW(fused(cell.family, (2, 1.0)), 0)) < 1e-4


@row("LoRA scale in the attention kwargs", section=SECTION, quick=())
def test_lora_scale(cell: Cell) -> None:
    pipe = transform(pipeline(cell.family))
    bare = DRAW(pipe, 0)
    pipe.load_lora_weights(lora(pipe, seed=1))
    cell.apply(model_of(pipe))
    for scale in (0.3, 0.7):
        drawn = drawing(**{kwargs_name(cell): {"scale": scale}})(pipe, 0)
        assert difference(drawn, DRAW(fused(cell.family, (1, scale)), 0)) < 1e-4
    cell.agree(drawing(**{kwargs_name(cell): {"scale": 0.0}})(pipe, 0), bare)


@ORDER
@row(
    "LoRA loaded {when} `transform`: fused, unfused, disabled, unloaded", section=SECTION, quick=()
)
def test_lora_fused_and_unloaded(cell: Cell, when: str) -> None:
    bare = DRAW(transform(pipeline(cell.family)), 0)
    pipe = with_lora(cell, when)
    loaded = DRAW(pipe, 0)
    assert difference(loaded, bare) > 1e-2
    for change, expected in (
        (pipe.fuse_lora, loaded),
        (pipe.unfuse_lora, loaded),
        (pipe.disable_lora, bare),
        (pipe.enable_lora, loaded),
        (pipe.unload_lora_weights, bare),
    ):
        change()
        assert difference(DRAW(pipe, 0), expected) < 1e-4, change


@row("LoRA fused into the transformed model, then `restore`", section=SECTION)
def test_lora_fused_and_restored(cell: Cell) -> None:
    pipe, untouched = pipeline(cell.family), pipeline(cell.family)
    for each in (transform(pipe), untouched):
        each.load_lora_weights(lora(untouched, seed=1))
        each.fuse_lora()
        each.unload_lora_weights()
    cell.apply(model_of(pipe))
    merged = DRAW(pipe, 0)
    model = model_of(pipe)
    assert model_of(restore(pipe)) is model
    expected = DRAW(untouched, 0)
    assert difference(merged, expected) > 1e-2
    cell.agree(DRAW(pipe, 0), expected)
    assert difference(expected, DRAW(pipeline(cell.family), 0)) > 1e-2


@row("LoRA hot-swapped (`enable_lora_hotswap`)", section=SECTION)
def test_lora_hotswap(cell: Cell) -> None:
    pipe = transform(pipeline(cell.family))
    pipe.enable_lora_hotswap(target_rank=4)
    pipe.load_lora_weights(lora(pipe, seed=1), adapter_name="only")
    other = lora(pipeline(cell.family), seed=2, rank=4)
    cell.apply(model_of(pipe))
    first = DRAW(pipe, 0)
    with cell.steady():
        pipe.load_lora_weights(other, adapter_name="only", hotswap=True)
        second = DRAW(pipe, 0)
    assert difference(second, first) > 1e-2
    fresh = transform(pipeline(cell.family))
    fresh.load_lora_weights(other)
    assert difference(second, DRAW(fresh, 0)) < 1e-4


@row("Textual inversion", section=SECTION, families=("sdxl",))
def test_textual_inversion(cell: Cell) -> None:
    pipe = pipeline(cell.family)
    width = pipe.text_encoder.config.hidden_size
    learned = {"<new>": torch.randn(width, generator=torch.Generator().manual_seed(0))}
    encoder = {"text_encoder": pipe.text_encoder, "tokenizer": pipe.tokenizer}
    pipe.load_textual_inversion(learned, token="<new>", **encoder)
    check(cell, pipe, drawing(prompt="a <new>"))
    acts(pipe, drawing(prompt="a <new>"), drawing(prompt="a"))


# What gives the model a picture to follow


def controlnets(family: str, count: int, modes: int | None = None) -> Any:
    """A pipeline with ControlNets, and what its call needs for them."""
    base = pipeline(family)
    if family == "sdxl":
        nets = [alive(ControlNetModel.from_unet(base.unet), seed) for seed in range(count)]
        net = nets[0] if count == 1 else nets
        return converted(StableDiffusionXLControlNetPipeline, family, controlnet=net)
    own = {**base.transformer.config, "num_layers": 1, "num_single_layers": 1, "num_mode": modes}
    taken = signature(FluxControlNetModel).parameters
    known = {name: value for name, value in own.items() if name in taken}
    nets = [alive(FluxControlNetModel(**known), seed) for seed in range(count)]
    net = nets[0] if count == 1 and modes is None else FluxMultiControlNetModel(nets)
    return converted(FluxControlNetPipeline, family, controlnet=net)


def check_controlnets(cell: Cell, pipe: Any, lists: int, **options: Any) -> None:
    """As `check`; and the ControlNets must be seen."""
    image = "image" if cell.family == "sdxl" else "control_image"
    pictures: Any = [picture(seed=seed) for seed in range(lists)] or picture()

    def draw(scale: float) -> Draw:
        scales: Any = [scale] * lists or scale
        return drawing(**{image: pictures, "controlnet_conditioning_scale": scales}, **options)

    check(cell, pipe, draw(0.2))
    acts(pipe, draw(0.2), draw(0.0))


@row("ControlNet", section=SECTION)
def test_controlnet(cell: Cell) -> None:
    check_controlnets(cell, controlnets(cell.family, 1), lists=0)


@row("Several ControlNets", section=SECTION, quick=())
def test_several_controlnets(cell: Cell) -> None:
    check_controlnets(cell, controlnets(cell.family, 2), lists=2)


@row("ControlNet with modes (union)", section=SECTION, families=("flux",), quick=())
def test_union_controlnet(cell: Cell) -> None:
    pipe = controlnets(cell.family, 1, modes=3)
    check_controlnets(cell, pipe, lists=2, control_mode=[0, 2])


@row("T2I-Adapter", section=SECTION, families=("sdxl",))
def test_t2i_adapter(cell: Cell) -> None:
    widths = [16, 32, 32, 32]
    adapter = alive(
        T2IAdapter(
            channels=widths, num_res_blocks=1, downscale_factor=16, adapter_type="full_adapter_xl"
        )
    )
    pipe = converted(StableDiffusionXLAdapterPipeline, cell.family, adapter=adapter)
    follow = [drawing(image=picture(), adapter_conditioning_scale=scale) for scale in (0.1, 0.0)]
    check(cell, pipe, follow[0])
    acts(pipe, *follow)


IMAGE_WIDTH = 24
IMAGE_TOKENS = 4


def ip_adapter(pipe: Any) -> dict[str, dict[str, Tensor]]:
    """An IP-Adapter's file for the pipeline."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        scale: float = shape[-1] ** -0.5
        return scale * torch.randn(*shape, generator=generator)

    projection = {
        "proj.weight": normal(IMAGE_TOKENS * TEXT_WIDTH, IMAGE_WIDTH),
        "proj.bias": normal(IMAGE_TOKENS * TEXT_WIDTH),
        "norm.weight": torch.ones(TEXT_WIDTH),
        "norm.bias": normal(TEXT_WIDTH),
    }
    layers: dict[str, Tensor] = {}
    model, flux = model_of(pipe), part_of(pipe) == "transformer"
    for place, name in enumerate(model.attn_processors):
        if name.startswith("single") or "attn1" in name:
            continue
        width = model.get_submodule(name.removesuffix(".processor")).to_q.out_features
        for layer in ("to_k_ip", "to_v_ip"):
            layers[f"{place}.{layer}.weight"] = normal(width, TEXT_WIDTH)
            if flux:
                layers[f"{place}.{layer}.bias"] = normal(width)
    return {"image_proj": projection, "ip_adapter": layers}


def load_ip_adapter(pipe: Any) -> Any:
    where: dict[str, dict[str, Any]] = {
        "unet": {"subfolder": "", "image_encoder_folder": None},
        "transformer": {"image_encoder_pretrained_model_name_or_path": None},
    }
    pipe.load_ip_adapter(ip_adapter(pipe), weight_name="", **where[part_of(pipe)])
    return pipe


def shown(cell: Cell, **options: Any) -> Draw:
    """A call with an image's embedding."""
    generator = torch.Generator().manual_seed(1)
    copies = 2 if cell.family == "sdxl" else 1  # without and with guidance
    embedding = torch.randn(copies, 1, IMAGE_WIDTH, generator=generator)
    if cell.family == "flux":  # which otherwise embeds a black image for a call without guidance
        options["negative_ip_adapter_image_embeds"] = [torch.zeros_like(embedding)]
    return drawing(ip_adapter_image_embeds=[embedding], **options)


@row("IP-Adapter loaded before `transform`", section=SECTION)
def test_ip_adapter(cell: Cell) -> None:
    pipe = load_ip_adapter(pipeline(cell.family))
    check(cell, pipe, shown(cell))
    transform(pipe)
    drawn = shown(cell)(pipe, 0)
    pipe.set_ip_adapter_scale(0.0)
    assert difference(drawn, shown(cell)(pipe, 0)) > 1e-2


@row("IP-Adapter loaded after `transform`", section=SECTION)
def test_ip_adapter_after(cell: Cell) -> None:
    pipe = load_ip_adapter(transform(pipeline(cell.family)))
    if cell.family == "flux":
        with cell.refuses(InputError, match="load or unload IP-Adapters first"):
            shown(cell)(pipe, 0)
        return
    before = load_ip_adapter(pipeline(cell.family))
    cell.apply(model_of(pipe))
    cell.agree(shown(cell)(pipe, 0), shown(cell)(transform(before), 0))
    pipe.unload_ip_adapter()
    cell.agree(DRAW(pipe, 0), DRAW(transform(pipeline(cell.family)), 0))


@row("IP-Adapter with masks", section=SECTION, families=("sdxl",), modes=("eager",))
def test_ip_adapter_masks(cell: Cell) -> None:
    pipe = transform(load_ip_adapter(pipeline(cell.family)))
    masks = {"ip_adapter_masks": [torch.ones(1, 1, 128, 128)]}
    with cell.refuses(InputError, match="'ip_adapter_masks'.*leave it out"):
        shown(cell, cross_attention_kwargs=masks)(pipe, 0)


# What changes how the model is run


@ORDER
@row("FreeU, enabled {when} `transform`", section=SECTION, families=("sdxl",))
def test_freeu(cell: Cell, when: str) -> None:
    scales = {"s1": 0.6, "s2": 0.4, "b1": 1.1, "b2": 1.2}
    pipe = pipeline(cell.family)
    bare = DRAW(transform(pipeline(cell.family)), 0)
    if when == "before":
        pipe.enable_freeu(**scales)
        check(cell, pipe, DRAW)
    transform(pipe)
    if when == "after":
        pipe.enable_freeu(**scales)
        reference = pipeline(cell.family)
        reference.enable_freeu(**scales)
        cell.apply(model_of(pipe))
        cell.agree(DRAW(pipe, 0), DRAW(transform(reference), 0))
    assert difference(DRAW(pipe, 0), bare) > 1e-2
    pipe.disable_freeu()
    cell.agree(DRAW(pipe, 0), bare)


@row("PAG (`StableDiffusionXLPAGPipeline`)", section=SECTION, families=("sdxl",))
def test_pag(cell: Cell) -> None:
    pipe = converted(StableDiffusionXLPAGPipeline, cell.family, pag_applied_layers="mid")
    check(cell, pipe, drawing(pag_scale=3.0))
    acts(pipe, drawing(pag_scale=3.0), drawing(pag_scale=0.0))


@row(
    "An attention processor of one's own",
    section=SECTION,
    note="a warning says that it sees merged tokens; `any_tokens = True` on its class silences it",
)
def test_own_processor(cell: Cell) -> None:
    base: Any = AttnProcessor2_0 if cell.family == "sdxl" else FluxAttnProcessor

    class Own(base):  # type: ignore[misc]
        """It computes the same."""

    expected = DRAW(transform(pipeline(cell.family)), 0)
    pipe = pipeline(cell.family)
    model_of(pipe).set_attn_processor(Own())
    with pytest.warns(TomaWarning, match="Own.*any_tokens = True"):
        transform(pipe)
    Own.any_tokens = True
    cell.apply(model_of(pipe))
    cell.agree(DRAW(pipe, 0), expected)
    with cell.steady():
        cell.agree(DRAW(pipe, 0), expected)


@row("GLIGEN", section=SECTION, families=("sdxl",), modes=("eager",))
def test_gligen(cell: Cell) -> None:
    unet = transform(tiny_sdxl_unet(attention_type="gated"))
    boxes = torch.tensor([[[0.1, 0.1, 0.5, 0.5]]]).expand(2, -1, -1)
    objects = {"boxes": boxes, "masks": torch.ones(2, 1)}
    objects["positive_embeddings"] = torch.randn(2, 1, TEXT_WIDTH)
    with cell.refuses(InputError, match="'gligen'.*untransformed model"):
        unet(**unet_inputs(unet), cross_attention_kwargs={"gligen": objects})
