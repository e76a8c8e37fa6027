"""Rows: ways to make a model smaller, or to compute the same differently."""

import copy
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
import torch.nn.functional as F
from accelerate import cpu_offload
from diffusers import FluxTransformer2DModel, GGUFQuantizationConfig
from diffusers.models.model_loading_utils import load_gguf_checkpoint
from diffusers.quantizers.gguf.utils import GGUFLinear, dequantize_gguf_tensor
from torch import Tensor, nn
from torchao import quantization as torchao

from tests.matrix.frame import Cell, difference, row
from tests.matrix.pictures import check, drawing, model_of, pipeline
from toma_fx import restore, transform
from toma_fx.errors import ModelError

# diffusers' Euler scheduler hands a tensor to NumPy in a way that NumPy 2 is about to change.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

SECTION = "Memory and speed"
DRAW = drawing()
ORDER = pytest.mark.parametrize("when", ["before", "after"])
CPU = torch.device("cpu")


def merged(family: str) -> Tensor:
    """What the pipeline draws with merged tokens and nothing else."""
    return DRAW(transform(pipeline(family)), 0)


# Offloading


@row("Model offload", section=SECTION, modes=("eager",), note="after `transform`")
def test_model_offload(cell: Cell) -> None:
    pipe = transform(pipeline(cell.family))
    pipe.enable_model_cpu_offload(device="cpu")
    for _ in range(2):
        cell.agree(DRAW(pipe, 0), merged(cell.family))


@row(
    "Sequential offload",
    section=SECTION,
    modes=("eager",),
    note="after `transform`; tested by accelerate's `cpu_offload` of the model",
    quick=(),
)
def test_sequential_offload(cell: Cell) -> None:
    pipe = transform(pipeline(cell.family))
    cpu_offload(model_of(pipe), CPU)
    assert any(each.is_meta for each in model_of(pipe).parameters())
    for _ in range(2):
        cell.agree(DRAW(pipe, 0), merged(cell.family))


@row("Offload enabled before `transform`", section=SECTION, modes=("eager",))
def test_offload_before(cell: Cell) -> None:
    pipe = pipeline(cell.family)
    pipe.enable_model_cpu_offload(device="cpu")
    with cell.refuses(ModelError, match=r"transform first.*pipe\.enable_model_cpu_offload"):
        transform(pipe)


@pytest.mark.parametrize("kind", ["block_level", "leaf_level"])
@row(
    "Group offload (`{kind}`)",
    section=SECTION,
    modes=("eager",),
    note="after `transform`; no stream",
    quick=(),
)
def test_group_offload(cell: Cell, kind: str) -> None:
    pipe = transform(pipeline(cell.family))
    groups = {"num_blocks_per_group": 1} if kind == "block_level" else {}
    model_of(pipe).enable_group_offload(onload_device=CPU, offload_type=kind, **groups)
    for _ in range(2):
        cell.agree(DRAW(pipe, 0), merged(cell.family))


@row("Group offload enabled before `transform`", section=SECTION, modes=("eager",))
def test_group_offload_before(cell: Cell) -> None:
    pipe = pipeline(cell.family)
    model_of(pipe).enable_group_offload(onload_device=CPU, offload_type="leaf_level")
    with cell.refuses(ModelError, match="transform first, then enable group offload"):
        transform(pipe)


# Smaller weights


@ORDER
@row(
    "Layerwise casting, enabled {when} `transform`",
    section=SECTION,
    modes=("eager",),
    note="casts the original too, which shares the weights; its hooks break graphs, merged or not",
    quick=(),
)
def test_layerwise_casting(cell: Cell, when: str) -> None:
    pipe, untouched = pipeline(cell.family), pipeline(cell.family)
    cast = {"storage_dtype": torch.float8_e4m3fn, "compute_dtype": torch.float32}
    reference = pipeline(cell.family)
    with torch.no_grad():
        for weight in _cast_weights(model_of(reference), **cast):
            weight.copy_(weight.to(torch.float8_e4m3fn))
    if when == "before":
        model_of(pipe).enable_layerwise_casting(**cast)
        transform(pipe)
    else:
        transform(pipe)
        model_of(pipe).enable_layerwise_casting(**cast)
    cell.apply(model_of(pipe))
    drawn = DRAW(pipe, 0)
    cell.agree(drawn, DRAW(transform(reference), 0))
    assert difference(drawn, merged(cell.family)) > 1e-3
    model_of(untouched).enable_layerwise_casting(**cast)
    cell.agree(DRAW(restore(pipe), 0), DRAW(untouched, 0))


def _cast_weights(model: Any, **cast: torch.dtype) -> list[nn.Parameter]:
    """The weights that casting would store in fewer bits."""
    probe = copy.deepcopy(model)
    probe.enable_layerwise_casting(**cast)
    stored = [name for name, p in probe.named_parameters() if p.dtype == cast["storage_dtype"]]
    assert len(stored) > 20
    return [model.get_parameter(name) for name in stored]


class PackedLinear(nn.Linear):
    """A linear layer with int8 weights, as quantisation libraries store them.

    As bitsandbytes' layers it is a subclass of `torch.nn.Linear` whose ``weight`` has another shape
    and dtype than ``out_features`` and ``in_features`` say, and no other layer can use.
    """

    def __init__(self, plain: nn.Linear) -> None:
        super().__init__(plain.in_features, plain.out_features, plain.bias is not None)
        self.scale = nn.Parameter(plain.weight.detach().abs().amax(1, keepdim=True) / 127)
        packed = (plain.weight.detach() / self.scale).round().to(torch.int8).reshape(-1, 1)
        self.weight = nn.Parameter(packed, requires_grad=False)
        self.bias = plain.bias

    def unpacked(self) -> Tensor:
        return self.weight.reshape(self.out_features, self.in_features) * self.scale

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.unpacked(), self.bias)


def block_linears(model: nn.Module) -> dict[str, nn.Linear]:
    """The linear layers of the blocks."""
    found = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and "transformer_blocks" in name
    }
    assert len(found) > 20
    return found


@row(
    "Quantised layers of other libraries",
    section=SECTION,
    note="by their interface: a `Linear` with a packed weight, as bitsandbytes has",
)
def test_packed_layers(cell: Cell) -> None:
    pipe, reference = pipeline(cell.family), pipeline(cell.family)
    for name, plain in block_linears(model_of(pipe)).items():
        packed = PackedLinear(plain)
        model_of(pipe).set_submodule(name, packed)
        model_of(reference).get_submodule(name).weight.data = packed.unpacked().detach()
    check(cell, pipe, DRAW)
    assert difference(DRAW(transform(pipe), 0), DRAW(transform(reference), 0)) < 1e-4
    assert difference(DRAW(pipe, 0), merged(cell.family)) > 1e-4


@row("torchao `Int8WeightOnlyConfig`", section=SECTION)
def test_torchao_weights(cell: Cell) -> None:
    pipe, reference = pipeline(cell.family), pipeline(cell.family)
    quantize(pipe, torchao.Int8WeightOnlyConfig())
    for name, quantized in block_linears(model_of(pipe)).items():
        model_of(reference).get_submodule(name).weight.data = quantized.weight.dequantize()
    check(cell, pipe, DRAW)
    assert difference(DRAW(transform(pipe), 0), DRAW(transform(reference), 0)) < 1e-4


@row("torchao `Int8DynamicActivationInt8WeightConfig`", section=SECTION, quick=())
def test_torchao_activations(cell: Cell) -> None:
    pipe = pipeline(cell.family)
    quantize(pipe, torchao.Int8DynamicActivationInt8WeightConfig())
    untouched = DRAW(pipe, 0)
    cell.apply(model_of(transform(pipe)))
    drawn = DRAW(pipe, 0)
    # Rounded activations turn rounding errors into steps, and tip choices of destinations, which is
    # ten times what rounding does alone. No image is equal to another; the merged one is nearest.
    assert difference(drawn, merged(cell.family)) < difference(drawn, untouched)
    assert difference(drawn, untouched) > 1e-2
    with cell.steady():
        DRAW(pipe, 1)
        assert torch.equal(DRAW(pipe, 0), drawn)


def quantize(pipe: Any, config: Any) -> None:
    """Quantise the blocks of a pipeline's model by torchao, and assert that it changes an image."""
    before = DRAW(pipe, 0)
    names = set(block_linears(model_of(pipe)))
    torchao.quantize_(model_of(pipe), config, lambda module, name: name in names)
    assert all(type(m.weight.data) is not Tensor for m in block_linears(model_of(pipe)).values())
    assert difference(DRAW(pipe, 0), before) > 1e-4


@row(
    "GGUF file",
    section=SECTION,
    families=("flux",),
    note="Q8_0, by `from_single_file`; compiled by inductor, since aot_eager fails on such layers, "
    "merged or not",
)
def test_gguf(cell: Cell, tmp_path: Path) -> None:
    cell.backend = "inductor"
    pipe, reference = pipeline(cell.family), pipeline(cell.family)
    file = tmp_path / "flux.gguf"
    names = {f"{name}.weight" for name in block_linears(model_of(pipe))}
    write_gguf(file, model_of(pipe).state_dict(), names)
    model_of(pipe).save_config(tmp_path)
    state = load_gguf_checkpoint(str(file))
    for name in names:
        unpacked = dequantize_gguf_tensor(state[name]).float()
        model_of(reference).get_parameter(name).data = unpacked.as_subclass(Tensor)
    pipe.transformer = FluxTransformer2DModel.from_single_file(
        str(file),
        config=str(tmp_path),
        quantization_config=GGUFQuantizationConfig(compute_dtype=torch.float32),
    )
    assert isinstance(pipe.transformer.transformer_blocks[0].attn.to_q, GGUFLinear)
    check(cell, pipe, DRAW)
    assert difference(DRAW(transform(pipe), 0), DRAW(transform(reference), 0)) < 1e-4
    assert difference(DRAW(pipe, 0), merged(cell.family)) > 1e-4


def write_gguf(path: Path, state: dict[str, Tensor], quantized: set[str]) -> None:
    """A GGUF file of a state dict, some of it in Q8_0."""
    writer = gguf.GGUFWriter(path, "flux")
    for name, value in state.items():
        kind = gguf.GGMLQuantizationType.Q8_0 if name in quantized else None
        array = value.numpy()
        packed = array if kind is None else gguf.quants.quantize(array, kind)
        writer.add_tensor(name, packed, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


# Other ways to compute the same


@row("VAE tiling and slicing", section=SECTION, modes=("eager",))
def test_vae_tiling(cell: Cell) -> None:
    pipe = pipeline(cell.family)
    pipe.vae.enable_tiling()
    pipe.vae.enable_slicing()
    check(cell, pipe, drawing(output_type="pt", num_images_per_prompt=2))


@ORDER
@row("`fuse_qkv_projections` {when} `transform`", section=SECTION, quick=())
def test_fused_projections(cell: Cell, when: str) -> None:
    pipe = pipeline(cell.family)
    expected = merged(cell.family)
    if when == "before":
        model_of(pipe).fuse_qkv_projections()
    transform(pipe)
    if when == "after":
        model_of(pipe).fuse_qkv_projections()
    cell.apply(model_of(pipe))
    assert "Fused" in type(next(iter(model_of(pipe).attn_processors.values()))).__name__ or any(
        module.fused_projections for module in model_of(pipe).modules() if hasattr(module, "to_qkv")
    )
    assert difference(DRAW(pipe, 0), expected) < 1e-4
    if when == "after":
        model_of(pipe).unfuse_qkv_projections()
        assert difference(DRAW(pipe, 0), expected) < 1e-4


@pytest.mark.usefixtures("backend_as_it_was")
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile:UserWarning")
@pytest.mark.parametrize("name", ["native", "_native_math", "flex"])
@row("Attention backend `{name}`", section=SECTION, families=("flux",))
def test_attention_backend(cell: Cell, name: str) -> None:
    expected = merged(cell.family)
    pipe = transform(pipeline(cell.family))
    model_of(pipe).set_attention_backend(name)
    cell.apply(model_of(pipe))
    assert difference(DRAW(pipe, 0), expected) < 1e-4
