"""The promises of ``transform`` for any model: what stays, and what merging may depend on.

That merged blocks compute the method is checked in ``test_reference``. Most comparisons here run in
float64, where the blocks see tokens that agree to 1e-15 however a batch is cut or ordered; so no
choice between equally good destinations can turn on rounding, and any difference is a real one.
"""

import copy
import functools
import pickle
import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import FluxTransformer2DModel
from diffusers.models.attention_processor import AttnProcessor2_0
from diffusers.models.transformers.transformer_flux import FluxAttnProcessor
from peft import LoraConfig
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from tests.tiny import flux_inputs, lossless, tiny_flux, tiny_sdxl_unet, unet_inputs
from toma_fx import MergeConfig, Schedule, restore, transform
from toma_fx.config import PRESETS

SCHEDULED = {"schedule": Schedule(select_every=2, weigh_every=1)}
TEXT = 6
"""Text tokens of Flux's inputs."""


@functools.cache
def build(family: str, dtype: torch.dtype = torch.float32) -> Any:
    """One model for all tests: that no test can change it is the first promise."""
    return (tiny_sdxl_unet if family == "unet" else tiny_flux)().to(dtype)


def inputs_of(model: nn.Module, batch: int = 2, seed: int = 0, **size: int) -> dict[str, Any]:
    """A call's arguments; by default two stages of 64 and 16 tokens, or 64 tokens for Flux."""
    if isinstance(model, FluxTransformer2DModel):
        size = {"height": 8, "width": 8, **size}
        return flux_inputs(model, batch, **size, text=TEXT, seed=seed)
    return unet_inputs(model, batch, **{"height": 16, "width": 16, **size}, seed=seed)


def steps_of(model: nn.Module, count: int, **options: int) -> Iterator[dict[str, Any]]:
    """The calls of one denoising run, each with other tokens."""
    call = inputs_of(model, **options)
    tokens = "hidden_states" if "hidden_states" in call else "sample"
    for step in range(count):
        noise = inputs_of(model, **{**options, "seed": 100 + step})[tokens]
        time = call["timestep"] * (1 - step / (count + 1))
        yield {**call, tokens: call[tokens] + 0.3 * noise, "timestep": time}


def of_sample(call: Any, sample: int, batch: int) -> Any:
    """The arguments of one sample of a batch."""
    if isinstance(call, dict):
        return {name: of_sample(value, sample, batch) for name, value in call.items()}
    batched = isinstance(call, Tensor) and call.ndim > 0 and call.shape[0] == batch
    return call[sample : sample + 1] if batched else call


def difference(a: Tensor, b: Tensor) -> float:
    """Root mean square of ``a - b``, in standard deviations of ``b``."""
    return float((a - b).square().mean().sqrt() / b.std())


def blocks_of(model: nn.Module) -> list[nn.Module]:
    return [m for m in model.modules() if type(m).__name__.endswith("TransformerBlock")]


class Watch(TorchFunctionMode):
    """Counts the selections of destinations."""

    selections = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.selections += func is torch.ops.toma.select.default
        return func(*args, **(kwargs or {}))


def watch_tokens(model: nn.Module) -> dict[str, int]:
    """How many image tokens each block's first attention layer gets, from the next call on."""
    seen: dict[str, int] = {}

    def note(path: str, kwargs: dict[str, Any], args: tuple[Any, ...]) -> None:
        text = TEXT if path.startswith("single") else 0
        seen[path] = (args[0] if args else kwargs["hidden_states"]).shape[1] - text

    for path, module in model.named_modules():
        parent, _, name = path.rpartition(".")
        if name in ("attn", "attn1"):
            module.register_forward_pre_hook(
                lambda _, args, kwargs, parent=parent: note(parent, kwargs, args), with_kwargs=True
            )
    return seen


@pytest.fixture(autouse=True)
def _no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


@pytest.fixture(params=["unet", "flux"])
def model(request: pytest.FixtureRequest) -> Any:
    return build(request.param)


@pytest.fixture(params=["unet", "flux"])
def model64(request: pytest.FixtureRequest) -> Any:
    return build(request.param, torch.float64)


# What stays the same


@pytest.mark.parametrize("preset", PRESETS)
def test_ratio_0_is_bit_identical(model: Any, preset: str) -> None:
    inputs = inputs_of(model)
    transformed = transform(model, MergeConfig.preset(preset, ratio=0))
    assert torch.equal(transformed(**inputs).sample, model(**inputs).sample)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_low_precision(model: Any, dtype: torch.dtype) -> None:
    model = copy.deepcopy(model).to(dtype)
    inputs = inputs_of(model)
    untouched = model(**inputs).sample
    assert torch.equal(transform(model, ratio=0)(**inputs).sample, untouched)
    for preset in ("default", "toma"):
        merged = transform(model, MergeConfig.preset(preset))(**inputs).sample
        assert merged.dtype == dtype
        assert merged.isfinite().all()
        assert not torch.equal(merged, untouched)


@pytest.mark.parametrize("preset", ["default", "toma"])
def test_original_is_left_alone_and_restored(model: Any, preset: str) -> None:
    inputs = inputs_of(model)
    classes = {path: type(module) for path, module in model.named_modules()}
    output = model(**inputs).sample
    transformed = transform(model, MergeConfig.preset(preset))
    assert not torch.equal(transformed(**inputs).sample, output)
    state, shared = model.state_dict(), transformed.state_dict()
    assert list(shared) == list(state)
    assert all(shared[name].data_ptr() == state[name].data_ptr() for name in state)
    assert restore(transformed) is transformed
    for each in (model, transformed):
        assert {path: type(module) for path, module in each.named_modules()} == classes
        assert torch.equal(each(**inputs).sample, output)


def test_everything_keeps_its_name_and_class(model: Any) -> None:
    transformed = transform(model)
    assert type(transformed).__name__ == type(model).__name__
    for (path, before), (now, after) in zip(
        model.named_modules(), transformed.named_modules(), strict=True
    ):
        assert now == path
        assert isinstance(after, type(before))
        assert type(after).__name__ == type(before).__name__


def test_hooks_fire(model: Any) -> None:
    model = copy.deepcopy(model)
    fired: list[str] = []
    paths = [f"{n}.{c}" for n, b in model.named_modules() if b in blocks_of(model) for c in _LAYERS]
    paths = [path for path in paths if path in dict(model.named_modules())]
    for path in paths:
        layer = model.get_submodule(path)
        layer.register_forward_hook(lambda *_, path=path: fired.append(f"before {path}"))
    transformed = transform(model)
    for path in paths:
        layer = transformed.get_submodule(path)
        layer.register_forward_hook(lambda *_, path=path: fired.append(f"after {path}"))
    transformed(**inputs_of(model))
    assert sorted(fired) == sorted(
        f"{when} {path}" for when in ("before", "after") for path in paths
    )


_LAYERS = ("norm1", "attn1", "attn2", "ff", "attn", "norm", "proj_mlp", "ff_context")


@pytest.mark.parametrize(
    ("family", "options", "count"),
    [
        ("unet", {"ratio": 0}, 1),
        ("unet", {"share": "block"}, 1),
        ("unet", {}, 2),
        ("unet", {"skip": ("mid_block.*",)}, 3),
        ("flux", {"ratio": 0}, 2),
        ("flux", {"share": "block"}, 2),
        ("flux", {}, 4),
        ("flux", {"skip": ("transformer_blocks.0",)}, 4),
        ("flux", {"skip": ("single_transformer_blocks.1",)}, 5),
    ],
)
def test_one_class_for_each_structure_and_role(
    family: str, options: dict[str, Any], count: int
) -> None:
    assert len({type(block) for block in blocks_of(transform(build(family), **options))}) == count


def test_models_share_classes(model: Any) -> None:
    one, other = transform(model), transform(model)
    assert list(map(type, one.modules())) == list(map(type, other.modules()))


@pytest.mark.parametrize("selector", ["facility_location", "random", "grid", "fixed"])
def test_global_random_state_is_untouched(model: Any, selector: str) -> None:
    def states() -> tuple[Any, ...]:
        return torch.get_rng_state().tolist(), random.getstate(), str(np.random.get_state())  # noqa: NPY002

    before = states()
    transform(model, selector=selector)(**inputs_of(model))
    assert states() == before


# Copies


@pytest.mark.parametrize("preset", ["default", "toma"])
def test_copies_are_independent_of_each_other(model: Any, preset: str) -> None:
    transformed = transform(model, MergeConfig.preset(preset))
    images = [list(steps_of(model, 3, seed=seed)) for seed in range(3)]
    alone = [[transformed(**call).sample for call in image] for image in images]
    twins = [transformed, copy.deepcopy(transformed), pickle.loads(pickle.dumps(transformed))]
    for step in range(3):
        for twin, image, expected in zip(twins, images, alone, strict=True):
            assert torch.equal(twin(**image[step]).sample, expected[step])


# Batches and sizes


@pytest.mark.parametrize(
    "config",
    [*(MergeConfig.preset(name) for name in PRESETS), MergeConfig(**SCHEDULED)],  # type: ignore[arg-type]
    ids=[*PRESETS, "scheduled"],
)
def test_sample_is_as_it_would_be_alone(model64: Any, config: MergeConfig) -> None:
    batch = 2
    together = transform(model64, config)
    alone = [copy.deepcopy(together) for _ in range(batch)]
    for call in steps_of(model64, 3, batch=batch):
        samples = [each(**of_sample(call, i, batch)).sample for i, each in enumerate(alone)]
        assert difference(together(**call).sample, torch.cat(samples)) < 1e-12


# Half of SDXL's 72x56 and 76x52 latents, and grids of Flux that no square divides.
SIZES = [("unet", 36, 28), ("unet", 38, 26), ("flux", 13, 9), ("flux", 19, 4)]


@pytest.mark.parametrize(("family", "height", "width"), SIZES)
@pytest.mark.parametrize("preset", ["default", "toma", "toma_stripe"])
def test_any_size_is_merged(family: str, height: int, width: int, preset: str) -> None:
    model = build(family, torch.float64)
    inputs = inputs_of(model, batch=1, height=height, width=width)
    untouched = transform(model, ratio=0)
    merged = transform(model, MergeConfig.preset(preset))
    # Regions that divide all these token counts, since a padded one has no place for every token.
    moved = transform(model, lossless(preset, region_tokens=19))
    all_tokens, kept_tokens = watch_tokens(untouched), watch_tokens(merged)
    expected = untouched(**inputs).sample
    assert difference(moved(**inputs).sample, expected) < 1e-6
    assert difference(merged(**inputs).sample, expected) > 1e-2
    # Within what rounding half of a region's tokens to a whole number can change.
    for path, count in all_tokens.items():
        assert kept_tokens[path] / count == pytest.approx(0.5, abs=0.05)


@pytest.mark.parametrize("config", [{}, SCHEDULED], ids=["stateless", "scheduled"])
def test_shapes_in_turn_are_as_on_a_fresh_model(model: Any, config: dict[str, Any]) -> None:
    unused = transform(model, **config)
    used = copy.deepcopy(unused)
    for batch, height, width in ((2, 16, 12), (1, 8, 20), (2, 8, 20), (2, 16, 12)):
        fresh = copy.deepcopy(unused)
        for call in steps_of(model, 3, batch=batch, height=height, width=width):
            assert torch.equal(used(**call).sample, fresh(**call).sample)


# Which blocks, and who plans for them


@pytest.mark.parametrize("preset", ["default", "toma", "lower_bound"])
@pytest.mark.parametrize(("family", "groups", "blocks"), [("unet", 7, 11), ("flux", 2, 5)])
def test_blocks_of_a_group_share_one_selection(
    family: str, groups: int, blocks: int, preset: str
) -> None:
    for share, selections in (("group", groups), ("block", blocks)):
        config = MergeConfig.preset(preset, schedule=Schedule(), share=share)
        merged = transform(build(family), config)
        with Watch() as watch:
            merged(**inputs_of(merged))
        assert watch.selections == selections


@pytest.mark.parametrize("preset", ["default", "toma"])
def test_each_group_keeps_a_plan_of_its_own(model64: Any, preset: str) -> None:
    kept = Schedule(select_every=10, weigh_every=10)
    scheduled = transform(model64, MergeConfig.preset(preset, schedule=kept))
    stateless = transform(model64, MergeConfig.preset(preset, schedule=Schedule()))
    first = inputs_of(model64)
    # The same tokens a moment later, so that a kept plan is the plan that would be made anew.
    later = {**first, "timestep": first["timestep"].double() * (1 - 1e-9)}
    scheduled(**first)
    assert difference(scheduled(**later).sample, stateless(**later).sample) < 1e-6


def test_flux_spares_the_first_blocks() -> None:
    spared = {"transformer_blocks.0", "single_transformer_blocks.0"}
    small = transform(tiny_flux(num_layers=4, num_single_layers=8))
    assert {block.path for block in small.toma_recipe.unmerged} == spared
    assert len(small.toma_recipe.merged) == 10
    everywhere = transform(restore(small), skip=())
    assert not everywhere.toma_recipe.unmerged
    with torch.device("meta"):
        full_size = FluxTransformer2DModel()
    first = {f"{kind}transformer_blocks.{i}" for kind in ("", "single_") for i in range(5)}
    assert {block.path for block in transform(full_size).toma_recipe.unmerged} == first


@pytest.mark.parametrize(
    ("family", "skip", "merged"),
    [
        ("unet", ("mid_block.*", "down*"), ["up_blocks.0"] * 4 + ["up_blocks.1"] * 2),
        (
            "unet",
            ("*.transformer_blocks.1", "up*"),
            ["down_blocks.1", "down_blocks.2", "mid_block"],
        ),
        ("flux", ("transformer_blocks.*",), ["single_transformer_blocks"] * 3),
        ("flux", ("single_*.[02]", "transformer_blocks.0"), ["single", "transformer_blocks.1"]),
    ],
)
def test_skip_takes_patterns(family: str, skip: tuple[str, ...], merged: list[str]) -> None:
    model = build(family)
    untouched, transformed = transform(model, ratio=0), transform(model, skip=skip)
    all_tokens, tokens = watch_tokens(untouched), watch_tokens(transformed)
    untouched(**inputs_of(model))
    transformed(**inputs_of(model))
    changed = sorted(path for path in tokens if tokens[path] != all_tokens[path])
    assert changed == sorted(block.path for block in transformed.toma_recipe.merged)
    assert len(changed) == len(merged)
    assert all(map(str.startswith, changed, sorted(merged)))


# What else diffusers does with the models


@pytest.mark.parametrize("region", ["tile", "stripe"])
def test_controlnet_residuals_meet_their_tokens(region: str) -> None:
    model = build("flux", torch.float64)
    inputs = inputs_of(model)
    generator = torch.Generator().manual_seed(2)
    for kind, count in (("", 2), ("single_", 1)):
        shape = (count, *inputs["hidden_states"].shape[:2], model.inner_dim)
        residuals = torch.randn(shape, generator=generator, dtype=torch.float64)
        inputs[f"controlnet_{kind}block_samples"] = list(residuals)
    moved = transform(model, lossless(region=region))
    assert difference(moved(**inputs).sample, model(**inputs).sample) < 1e-6


@pytest.mark.parametrize("when", ["before", "after"])
def test_attention_kwargs_reach_every_processor(model: Any, when: str) -> None:
    flux = isinstance(model, FluxTransformer2DModel)
    notes: list[object] = []

    class Noting(FluxAttnProcessor if flux else AttnProcessor2_0):  # type: ignore[misc]
        any_tokens = True

        def __call__(self, *args: Any, note: object = None, **kwargs: Any) -> Any:
            notes.append(note)
            return super().__call__(*args, **kwargs)

    original = copy.deepcopy(model)
    if when == "before":
        original.set_attn_processor(Noting())
    transformed = transform(original)
    if when == "after":
        transformed.set_attn_processor(Noting())
    name = "joint_attention_kwargs" if flux else "cross_attention_kwargs"
    noted = transformed(**inputs_of(model), **{name: {"note": "a user's"}}).sample
    assert notes == ["a user's"] * len(model.attn_processors)
    assert torch.equal(noted, transform(model)(**inputs_of(model)).sample)


def add_lora(model: Any) -> Any:
    """Adds a LoRA that changes the output, as training leaves it."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False))
    return model
