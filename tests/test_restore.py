"""`restore` takes the merging off and leaves all else: what users did to a model since `transform`.

A restored model draws, bit for bit, what a model draws that was never transformed and treated the
same way. And `transform` leaves the model that it is given as it was.
"""

import copy
import gc
import pickle
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.utils.prune as pruning
from accelerate import cpu_offload
from accelerate.hooks import remove_hook_from_submodules
from diffusers import FirstBlockCacheConfig, FluxTransformer2DModel, MagCacheConfig
from diffusers.hooks import LayerSkipConfig, apply_layer_skip
from diffusers.hooks.mag_cache import FLUX_MAG_RATIOS
from diffusers.models.attention_processor import AttnProcessor
from diffusers.models.transformers.transformer_flux import FluxAttnProcessor
from peft import LoraConfig
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter
from torchao import quantization as torchao

from tests.pipelines import tiny_flux_pipeline, tiny_sdxl_pipeline
from tests.test_model_checks import TestFlux as FluxChecks
from tests.test_model_checks import TestUNet as UNetChecks
from tests.tiny import (
    flux_inputs,
    smallest_flux,
    smallest_unet,
    tiny_sdxl_unet,
    unet_inputs,
)
from toma_fx import Schedule, restore, transform
from toma_fx.errors import InputError, ModelError

BUILD: dict[str, Callable[[], Any]] = {"unet": smallest_unet, "flux": smallest_flux}
SCHEDULED: dict[str, Any] = {"schedule": Schedule(select_every=3, weigh_every=2)}
FLOAT8 = {"storage_dtype": torch.float8_e4m3fn, "compute_dtype": torch.float32}

pytestmark = [
    pytest.mark.filterwarnings("ignore:Already found a .peft_config. attribute:UserWarning"),
    pytest.mark.filterwarnings("ignore:Adapter one was active which is now deleted:UserWarning"),
    # diffusers' Euler scheduler hands a tensor to NumPy in a way that NumPy 2 is about to change.
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),
]


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    torch._dynamo.reset()
    with torch.no_grad():
        yield


@pytest.fixture(params=BUILD)
def family(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


def inputs_of(model: Any, step: int = 0) -> dict[str, Any]:
    """A call, in the dtype that the model computes in: one later in the run for a later step."""
    if isinstance(model, FluxTransformer2DModel):
        call = flux_inputs(model, height=8, width=8, seed=step)
    else:
        call = unet_inputs(model, height=16, width=16, seed=step)
    call["encoder_hidden_states"] = torch.ones_like(call["encoder_hidden_states"])
    return {**call, "timestep": call["timestep"] * (1 - step / 10)}


def run(model: Any, steps: int = 4) -> Tensor:
    """What a model returns in the steps of a run."""
    outputs = []
    for step in range(steps):
        call = inputs_of(model, step)
        if isinstance(model, FluxTransformer2DModel):  # as its pipelines do
            with model.cache_context("cond"):
                outputs.append(model(**call).sample)
        else:
            outputs.append(model(**call).sample)
    if isinstance(model, FluxTransformer2DModel):
        model._reset_stateful_cache()
    return torch.stack(outputs)


def add_lora(model: Any, name: str = "one", seed: int = 0) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        config = LoraConfig(
            r=2, target_modules=["to_q", "to_v", "to_out.0"], init_lora_weights=False
        )
        model.add_adapter(config, adapter_name=name)
    model.eval()


def several_adapters(model: Any) -> None:
    add_lora(model, "one", 1)
    add_lora(model, "two", 2)
    model.set_adapters(["one", "two"], [0.7, 0.4])


def fuse_lora(model: Any) -> None:
    add_lora(model)
    model.fuse_lora()


def fuse_and_drop_lora(model: Any) -> None:
    fuse_lora(model)
    model.unload_lora()


def fuse_and_unfuse_lora(model: Any) -> None:
    fuse_lora(model)
    model.unfuse_lora()
    model.unload_lora()


def load_and_unload_lora(model: Any) -> None:
    add_lora(model)
    run(model)
    model.unload_lora()


def delete_one_of_two_adapters(model: Any) -> None:
    several_adapters(model)
    model.delete_adapters(["one"])


def disable_lora(model: Any) -> None:
    add_lora(model)
    model.disable_lora()


def assign_weights(model: Any) -> None:
    state = {name: 0.9 * value for name, value in model.state_dict().items()}
    model.load_state_dict(state, assign=True)


def change_weights(model: Any) -> None:
    for parameter in model.parameters():
        parameter.mul_(0.9)


def block_linears(model: nn.Module) -> dict[str, nn.Linear]:
    return {
        path: module
        for path, module in model.named_modules()
        if isinstance(module, nn.Linear) and "transformer_blocks" in path
    }


def quantize(model: Any) -> None:
    names = set(block_linears(model))
    torchao.quantize_(model, torchao.Int8WeightOnlyConfig(), lambda _, name: name in names)


def prune(model: Any) -> None:
    for layer in block_linears(model).values():
        pruning.l1_unstructured(layer, "weight", amount=0.3)


def first_linear(model: nn.Module) -> nn.Linear:
    return next(iter(block_linears(model).values()))


def add_hook(model: Any) -> None:
    first_linear(model).register_forward_hook(lambda module, args, output: 0.5 * output)


def add_hook_to_the_model(model: Any) -> None:
    def doubled(module: nn.Module, args: Any, output: Any) -> Any:
        output.sample = 2 * output.sample
        return output

    model.register_forward_hook(doubled)


def set_processor(model: Any) -> None:
    flux = isinstance(model, FluxTransformer2DModel)
    model.set_attn_processor(FluxAttnProcessor() if flux else AttnProcessor())


def fuse_and_unfuse_projections(model: Any) -> None:
    model.fuse_qkv_projections()
    model.unfuse_qkv_projections()


def skip_a_block(model: Any) -> None:
    paths = [path for path, _ in model.named_modules() if path.endswith("transformer_blocks")]
    apply_layer_skip(model, LayerSkipConfig(indices=[1], fqn=paths[-1]))


def exchange_a_layer(model: Any) -> None:
    path, layer = next(iter(block_linears(model).items()))
    other = nn.Linear(layer.in_features, layer.out_features, layer.bias is not None)
    for parameter in other.parameters():
        nn.init.constant_(parameter, 0.01)
    model.set_submodule(path, other)


def checkpoint_gradients(model: Any) -> None:
    model.enable_gradient_checkpointing()
    model.train()


BEFORE_OR_AFTER: dict[str, Callable[[Any], Any]] = {
    "nothing": lambda model: None,
    "LoRA": add_lora,
    "LoRA, fused": fuse_lora,
    "LoRA, fused for good": fuse_and_drop_lora,
    "LoRA, fused and unfused": fuse_and_unfuse_lora,
    "LoRA, unloaded": load_and_unload_lora,
    "LoRA, disabled": disable_lora,
    "two adapters": several_adapters,
    "two adapters, one deleted": delete_one_of_two_adapters,
    "torchao int8": quantize,
    "layerwise casting": lambda model: model.enable_layerwise_casting(**FLOAT8),
    "float64": lambda model: model.to(torch.float64),
    "float16": lambda model: model.half(),
    "channels last": lambda model: model.to(memory_format=torch.channels_last),
    "weights assigned": assign_weights,
    "weights changed": change_weights,
    "pruned": prune,
    "a layer exchanged": exchange_a_layer,
    "gradient checkpointing": checkpoint_gradients,
    "a hook on a layer": add_hook,
    "a hook on the model": add_hook_to_the_model,
    "other processors": set_processor,
    "fused projections": lambda model: model.fuse_qkv_projections(),
    "unfused projections": fuse_and_unfuse_projections,
    "frozen": lambda model: model.requires_grad_(False),
}
AFTER: dict[str, Callable[[Any], Any]] = {
    "offloaded": lambda model: cpu_offload(model, torch.device("cpu")),
    "group offload": lambda model: model.enable_group_offload(
        torch.device("cpu"), offload_type="leaf_level"
    ),
}
UNET = {
    "FreeU": lambda model: model.enable_freeu(s1=0.9, s2=0.2, b1=1.3, b2=1.4),
    "FreeU, disabled": lambda model: (
        model.enable_freeu(s1=0.9, s2=0.2, b1=1.3, b2=1.4),
        model.disable_freeu(),
    ),
    "a skipped block": skip_a_block,
    "sliced attention": lambda model: model.set_attention_slice("max"),
}
FLUX = {
    "first-block cache": lambda model: model.enable_cache(FirstBlockCacheConfig(threshold=1.5)),
    "MagCache": lambda model: model.enable_cache(
        MagCacheConfig(
            threshold=1.0, max_skip_steps=2, num_inference_steps=8, mag_ratios=FLUX_MAG_RATIOS
        )
    ),
    "a cache, disabled": lambda model: (
        model.enable_cache(FirstBlockCacheConfig(threshold=1.5)),
        model.disable_cache(),
    ),
}
OF_FAMILY: dict[str, dict[str, Callable[[Any], Any]]] = {"unet": UNET, "flux": FLUX}
TREATMENTS = {family: {**BEFORE_OR_AFTER, **AFTER, **OF_FAMILY[family]} for family in BUILD}
CHANGES_NOTHING = {
    "nothing",
    "LoRA, unloaded",
    "LoRA, disabled",
    "gradient checkpointing",
    "frozen",
    "FreeU, disabled",
    "a cache, disabled",
    *AFTER,
}
"""Treatments after which a model draws the same, bit for bit."""


ROUNDS = {
    "LoRA, fused and unfused",
    "channels last",
    "float64",
    "other processors",
    "fused projections",
    "unfused projections",
    "sliced attention",
}
"""Treatments after which a model draws the same but for rounding."""


def looks(model: nn.Module) -> dict[str, Any]:
    """What is on each module of a model, and its class."""

    def names(module: nn.Module) -> set[str]:
        registry = vars(module).get("_diffusers_hook")
        # What hooks leave when they are gone.
        left = set() if registry is None or registry.hooks else {"_diffusers_hook", "forward"}
        return {*vars(module)} - left

    return {path: (type(module), names(module)) for path, module in model.named_modules()}


def check_restored(model: Any, reference: Any, expected: Tensor) -> None:
    """The model looks and draws like one that was never transformed."""
    assert torch.equal(run(model), expected)
    assert looks(model) == looks(reference)
    assert list(model.state_dict()) == list(reference.state_dict())
    assert model.training == reference.training
    assert type(model).__module__.startswith("diffusers.")


@pytest.mark.parametrize(
    ("family", "name"), [(family, name) for family in TREATMENTS for name in TREATMENTS[family]]
)
def test_what_was_done_since_stays(family: str, name: str) -> None:
    treat, options = TREATMENTS[family][name], {} if name == "MagCache" else SCHEDULED
    reference = BUILD[family]()
    untouched = run(reference)
    treat(reference)
    expected = run(reference)
    assert expected.isfinite().all()
    if name in CHANGES_NOTHING:
        assert torch.equal(expected, untouched)
    elif name not in ROUNDS:
        assert not torch.allclose(expected.float(), untouched, rtol=1e-4, atol=1e-4)
    model = transform(BUILD[family](), skip=(), **options)
    run(model)  # so that it has all that a call leaves on it
    treat(model)
    assert not torch.equal(run(model), expected)
    assert restore(model) is model
    check_restored(model, reference, expected)


@pytest.mark.parametrize(
    ("family", "name"),
    [
        (family, name)
        for family in TREATMENTS
        for name in TREATMENTS[family]
        if name not in AFTER and name not in BEFORE_OR_AFTER
    ]
    + [("unet", name) for name in BEFORE_OR_AFTER]
    + [("flux", "LoRA"), ("flux", "layerwise casting")],
)
def test_what_was_done_before_stays(family: str, name: str) -> None:
    original = BUILD[family]()
    TREATMENTS[family][name](original)
    expected, before = run(original), looks(original)
    model = transform(original, skip=())
    assert not torch.equal(run(model), expected)
    assert restore(model) is model
    check_restored(model, original, expected)
    assert looks(original) == before


def load_ip_adapter(checks: Any, model: Any) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        checks.ip_adapter(model)


@pytest.mark.parametrize("unloaded", [False, True], ids=["loaded", "unloaded"])
def test_an_ip_adapter_stays(unloaded: bool) -> None:
    checks = UNetChecks()
    pipes = [tiny_sdxl_pipeline(), transform(tiny_sdxl_pipeline())]
    drawn = []
    for pipe in pipes:
        load_ip_adapter(checks, pipe.unet)
        if unloaded:
            pipe.unload_ip_adapter()
        if pipe is pipes[1]:
            restore(pipe)
        embeds = {} if unloaded else checks.image_embeds()
        drawn.append(pipe.unet(**{**checks.inputs(), **embeds}).sample)
    assert torch.equal(*drawn)
    assert looks(pipes[0].unet) == looks(pipes[1].unet)
    assert torch.equal(drawn[0], tiny_sdxl_unet()(**checks.inputs()).sample) == unloaded


def test_an_ip_adapter_that_comes_to_a_transformed_flux_is_there_when_it_is_restored() -> None:
    """Merged blocks were captured without it, and say so; `restore` is their way out."""
    checks = FluxChecks()
    model, reference = transform(checks.untouched()), checks.untouched()
    for each in (model, reference):
        load_ip_adapter(checks, each)
    call = {**checks.inputs(), **checks.image_embeds()}
    with pytest.raises(InputError, match=r"toma_fx.restore, load, transform again"):
        model(**call)
    assert torch.equal(restore(model)(**call).sample, reference(**call).sample)
    again = transform(model)(**call).sample
    assert torch.equal(again, transform(reference)(**call).sample)


# Compiled


@pytest.mark.parametrize("way", ["compile", "compile_repeated_blocks"])
def test_compiled_code_goes_with_the_merging(family: str, way: str) -> None:
    expected = run(BUILD[family]())
    model = transform(BUILD[family](), skip=(), **SCHEDULED)
    frames = CompileCounter()
    getattr(model, way)(backend=frames, fullgraph=True)
    run(model)
    merged = frames.frame_count
    assert merged > 0
    restore(model)
    assert torch.equal(run(model), expected)
    assert frames.frame_count == merged
    again = transform(model, skip=(), ratio=0.25)  # which a compiled model would not let
    getattr(again, way)(backend=frames, fullgraph=True)
    assert torch.equal(run(again), run(transform(BUILD[family](), skip=(), ratio=0.25)))
    assert frames.frame_count > merged


def test_a_pipeline_holds_the_model_itself_after_what_torch_compile_made_of_it() -> None:
    pipe = tiny_flux_pipeline()
    before = looks(pipe.transformer)
    call = flux_inputs(pipe.transformer, height=8, width=8)
    expected = pipe.transformer(**call).sample
    model = transform(pipe, skip=()).transformer
    pipe.transformer = torch.compile(model, backend="eager")
    assert not torch.equal(pipe.transformer(**call).sample, expected)
    restore(pipe)
    assert pipe.transformer is model
    vars(model).pop("_is_torch_compile", None)  # torch's own mark on what it was handed
    assert looks(model) == before
    assert torch.equal(model(**call).sample, expected)


# Offloaded


def test_hooks_of_accelerate_can_be_removed_from_a_restored_model(family: str) -> None:
    expected = run(BUILD[family]())
    model = transform(BUILD[family](), skip=())
    cpu_offload(model, torch.device("cpu"))
    restore(model)
    assert all(each.is_meta for each in model.parameters())
    assert torch.equal(run(model), expected)
    remove_hook_from_submodules(model)
    assert not any(each.is_meta for each in model.parameters())
    assert torch.equal(run(model), expected)
    assert transform(model, ratio=0.25)


# Copies


@pytest.mark.parametrize(
    "duplicate",
    [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))],
    ids=["deepcopy", "pickle"],
)
def test_a_copy_is_restored_to_its_own_weights(family: str, duplicate: Callable[..., Any]) -> None:
    original = BUILD[family]()
    untouched, model = run(original), transform(original, skip=(), **SCHEDULED)
    merged = run(model)
    twin = duplicate(model)
    change_weights(twin)
    changed = BUILD[family]()
    change_weights(changed)
    assert torch.equal(run(model), merged)
    check_restored(restore(twin), changed, run(changed))
    assert torch.equal(run(model), merged)
    check_restored(restore(model), original, untouched)


# What transform leaves alone


def everything(model: nn.Module) -> dict[str, Any]:
    """All that each module of a model holds, by identity."""

    def frozen(value: Any) -> Any:
        if isinstance(value, dict):
            return type(value), [(name, frozen(each)) for name, each in value.items()]
        if isinstance(value, str | int | float | tuple | None):
            return value
        return id(value)

    held = {path: (type(m), frozen(vars(m))) for path, m in model.named_modules()}
    tensors = {name: (id(t), t.data_ptr(), t._version) for name, t in model.state_dict().items()}
    return held | {"": (held[""], [(name, at[1:]) for name, at in tensors.items()])}


@pytest.mark.parametrize(
    "name", ["nothing", "LoRA", "layerwise casting", "a hook on a layer", "pruned"]
)
def test_the_given_model_is_never_changed(family: str, name: str) -> None:
    original = BUILD[family]()
    BEFORE_OR_AFTER[name](original)
    expected, before = run(original), everything(original)
    model = transform(original, skip=())
    assert everything(original) == before
    merged = run(model)
    other = transform(original, ratio=0.25, region="stripe", placement="component", skip=())
    restore(model)
    run(model)
    third = transform(original, skip=())
    if name not in ("layerwise casting", "pruned"):  # hooks that store and make weights
        assert everything(original) == before
    assert torch.equal(run(third), merged)
    assert not torch.equal(run(other), merged)
    assert torch.equal(run(original), expected)
    with pytest.raises(ModelError, match="was not transformed"):
        restore(original)


def test_models_can_be_transformed_again_and_again(family: str) -> None:
    model = BUILD[family]()
    untouched, looked = run(model), looks(model)
    first = [run(transform(model, skip=(), ratio=ratio)) for ratio in (0.5, 0.25)]
    for _ in range(3):
        for ratio, expected in zip((0.5, 0.25), first, strict=True):
            model = transform(model, skip=(), ratio=ratio)
            assert torch.equal(run(model), expected)
            assert torch.equal(run(restore(model)), untouched)
            assert looks(model) == looked


def test_a_model_that_merges_nothing_is_restored_too(family: str) -> None:
    original = BUILD[family]()
    model = transform(original, ratio=0)
    add_lora(model)
    reference = BUILD[family]()
    add_lora(reference)
    check_restored(restore(model), reference, run(reference))


# Memory


def exchange_layers(model: nn.Module) -> None:
    """Exchange each linear layer for one with smaller weights, as bitsandbytes does."""

    class Small(nn.Module):
        def __init__(self, full: nn.Linear) -> None:
            super().__init__()
            self.out_features = full.out_features
            packed = full.weight.detach().to(torch.float8_e4m3fn)
            self.packed = nn.Parameter(packed, requires_grad=False)
            self.bias = full.bias

        def forward(self, tokens: Tensor) -> Tensor:
            return nn.functional.linear(tokens, self.packed.float(), self.bias)

    for path, layer in block_linears(model).items():
        model.set_submodule(path, Small(layer))


@pytest.mark.parametrize("way", [quantize, exchange_layers], ids=["in place", "other layers"])
def test_quantising_frees_the_full_weights(family: str, way: Callable[[Any], None]) -> None:
    model = transform(BUILD[family](), skip=(), **SCHEDULED)
    run(model)
    full = [weakref.ref(layer.weight) for layer in block_linears(model).values()]
    assert len(full) > 10
    way(model)
    run(model)
    gc.collect()
    assert [each for each in full if each() is not None] == []
    assert run(restore(model)).isfinite().all()


# What others put over it


def test_a_class_that_came_since_is_named_and_can_be_undone(family: str) -> None:
    for path in ("", transform(BUILD[family]()).toma_recipe.merged[0].module):
        model = transform(BUILD[family]())
        module = model.get_submodule(path)
        before = type(module)
        module.__class__ = type("Patched", (before,), {})
        with pytest.raises(ModelError, match=r"Patched .*; undo that first, then restore"):
            restore(model)
        module.__class__ = before
        assert torch.equal(run(restore(model)), run(BUILD[family]()))


def test_a_forward_that_came_since_is_named_and_can_be_taken_off(family: str) -> None:
    for path in ("", transform(BUILD[family]()).toma_recipe.merged[0].module):
        model = transform(BUILD[family]())
        module: Any = model.get_submodule(path)
        merged = module.forward
        module.forward = lambda *args, merged=merged, **kwargs: merged(*args, **kwargs)
        with pytest.raises(ModelError, match=r"take it off, del module\.forward, restore"):
            restore(model)
        del module.forward
        assert torch.equal(run(restore(model)), run(BUILD[family]()))
