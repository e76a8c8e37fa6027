"""Families that are read off a call of a model: derivations and refusals."""

import inspect
import pickle
import re
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import toma_fx
from tests.tiny import flux_inputs, tiny_flux, tiny_sdxl_unet, unet_inputs
from tests.tiny_families import FAMILY_MODELS
from tests.tiny_more_families import MORE_FAMILIES
from toma_fx.errors import InputError, ModelError, TomaWarning
from toma_fx.families import family_of, knows
from toma_fx.families.rows import Family, TokenGrids
from toma_fx.passes.plan_nodes import Rows, TokenFlow

# Torch says once a process that a norm in float32 has a weight of another type.
pytestmark = pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight")

SIZE = {"height": 7, "width": 10}
"""In tokens: no number of tokens is then a width of a tiny model."""

ALL: dict[str, tuple[Callable[..., Any], Callable[..., dict[str, Any]]]] = {
    "Flux": (tiny_flux, flux_inputs),
    **{name: (row[0], row[1]) for name, row in FAMILY_MODELS.items()},
    **{name: (row[0], row[1]) for name, row in MORE_FAMILIES.items()},
}

DERIVED_ONLY = (
    "lumina-2",
    "auraflow",
    "bria",
    "ovis-image",
    "longcat-image",
    "cogview-4",
    "glm-image",
    "skyreels-v2",
    "kandinsky-5",
)
"""What falls out of the derivation."""

STATED_BY_HAND = {
    "Wan VACE": "returns 2 outputs of shape",
    "Wan VACE with a reference": "returns 2 outputs of shape",
}
"""Rows that a call does not tell, with what `derive` says of them."""


def example(name: str) -> tuple[nn.Module, dict[str, Any]]:
    """A tiny model, and a call of it in which all sizes differ."""
    build, inputs = ALL[name]
    model = build()
    takes = inspect.signature(inputs).parameters
    size = {key: value for key, value in SIZE.items() if key in takes}
    if name == "qwen-image-2.1":  # whose inputs are of one size
        size = {}
    return model, inputs(model, **size)


def drawn(output: Any) -> Tensor:
    """What a model drew."""
    if not isinstance(output, Tensor):
        output = output.sample if hasattr(output, "sample") else output[0]
    return torch.stack(output) if isinstance(output, list) else output


def derived(name: str) -> tuple[nn.Module, dict[str, Any], Family]:
    """As `example`, and what is derived."""
    model, inputs = example(name)
    return model, inputs, toma_fx.derive(model, inputs)


def said_of(flow: TokenFlow, given: dict[str, Any], tokens: int) -> dict[str, Any]:
    """What a row says of the arguments of a call that have a row for each of its tokens."""

    def has_rows(value: Any, row: Rows) -> bool:
        size = value.shape[row.dim] if isinstance(value, Tensor) else 0
        return size > tokens if row.joint and size != tokens else size == tokens

    rows = {
        (row.argument, item): (row.dim, row.joint)
        for row in flow.rows
        if given.get(row.argument) is not None
        for item in row.items or (None,)
        if has_rows(given[row.argument] if item is None else given[row.argument][item], row)
    }
    joint = any(row.joint for row in flow.rows) or flow.joint
    return {
        "tokens": flow.tokens,
        "output": flow.output,
        "rows": rows,
        "image first": flow.image_first if joint else None,
        "attention kwargs": flow.attention_kwargs,
    }


@pytest.mark.parametrize("name", [name for name in ALL if name not in STATED_BY_HAND])
def test_what_is_derived_is_what_the_files_state(name: str) -> None:
    model, inputs = example(name)
    if not knows(model) or name in REFUSED:
        pytest.skip("no file states it, or it is refused")
    family = toma_fx.derive(model, inputs)
    stated = {block.cls: block for block in family_of(model).blocks}
    ran = {f"{type(module).__module__}.{type(module).__qualname__}" for module in model.modules()}
    assert {block.cls for block in family.blocks} == stated.keys() & ran
    for block in family.blocks:
        given, tokens = block.examples(None), block.example_tokens
        expected = said_of(stated[block.cls].flow, given, tokens)
        assert said_of(block.flow, given, tokens) == expected, block.cls


REFUSED = {
    "hunyuan-video-i2v": "does not follow its image tokens when they change their order",
    "flux.3-edit": "does not follow its image tokens when they change their order",
    "ltx-2.3": "does not follow its image tokens when they change their order",
    "hidream-image": "does not follow its image tokens when they change their order",
    "mochi": "cannot run on merged tokens",
    "qwen-image-2.1": "cannot run on merged tokens",
    "sana": "the block mixes neighbours",
}
"""What a call does not tell, and what `derive` says: of tokens that are given and treated apart, of
two images in one sequence, of forwards that branch on values, of a convolution."""


@pytest.mark.filterwarnings("ignore")  # of forwards of diffusers on a CPU
@pytest.mark.parametrize(("name", "message"), {**REFUSED, **STATED_BY_HAND}.items())
def test_what_cannot_be_derived_says_why(name: str, message: str) -> None:
    model, inputs = example(name)
    with pytest.raises(ModelError, match=message):
        toma_fx.derive(model, inputs)


@pytest.mark.parametrize("name", DERIVED_ONLY)
def test_a_model_that_no_file_knows(name: str) -> None:
    """Untouched at ratio 0, merged otherwise, and the given model as it was."""
    model, inputs, family = derived(name)
    assert not knows(model)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore", TomaWarning)
        expected = drawn(model(**inputs))
        untouched = toma_fx.transform(model, family=family, ratio=0)
        assert torch.equal(drawn(untouched(**inputs)), expected)
        merged = toma_fx.transform(model, family=family, ratio=0.5, region_tokens=14)
        found = drawn(merged(**inputs))
        assert torch.equal(drawn(model(**inputs)), expected)
        assert torch.equal(drawn(pickle.loads(pickle.dumps(merged))(**inputs)), found)
        assert torch.equal(drawn(toma_fx.restore(merged)(**inputs)), expected)
    assert found.isfinite().all()
    assert (found - expected).std() > 1e-3 * expected.std()


UNCOMPILED = ("lumina-2", "glm-image")
"""Whose own forward branches on values, so that no graph holds it whole."""


@pytest.mark.parametrize("name", [name for name in DERIVED_ONLY if name not in UNCOMPILED])
def test_a_derived_model_is_one_graph(name: str) -> None:
    model, inputs, family = derived(name)
    merged = toma_fx.transform(model, family=family, ratio=0.5, region="stripe")
    torch._dynamo.reset()
    with torch.no_grad():
        expected = drawn(merged(**inputs))
        compiled = torch.compile(merged, fullgraph=True, backend="aot_eager")
        found = drawn(compiled(**inputs))
        with torch._dynamo.config.patch(error_on_recompile=True):
            compiled(**inputs)
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()


@pytest.mark.parametrize("name", UNCOMPILED)
def test_a_derived_model_is_compiled_block_by_block(name: str) -> None:
    model, inputs, family = derived(name)
    merged = toma_fx.transform(model, family=family, ratio=0.5, region="stripe")
    torch._dynamo.reset()
    with torch.no_grad():
        expected = drawn(merged(**inputs))
        merged.compile_repeated_blocks(fullgraph=True, backend="aot_eager")  # type: ignore[operator]
        found = drawn(merged(**inputs))
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_token_order_is_found_where_the_image_is_a_grid() -> None:
    *_, family = derived("auraflow")
    (border,) = family.borders
    assert isinstance(border, TokenGrids)
    assert [place.module for place in border.enter] == ["pos_embed"]


def test_without_an_order_regions_are_stripes_and_it_is_said() -> None:
    model, _, family = derived("kandinsky-5")
    with pytest.warns(TomaWarning, match="regions are stripes and not tiles"):
        merged = toma_fx.transform(model, family=family)
    assert merged.toma_recipe.config.region == "stripe"  # type: ignore[union-attr]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", "merging without memory")
        toma_fx.transform(model, family=family, region="stripe")


def test_a_derived_family_is_printed() -> None:
    *_, family = derived("lumina-2")
    assert "in one sequence, before it" in str(family)
    assert "image_rotary_emb with text" in str(family)
    assert "context_refiner.*: its tokens are not the image's" in str(family)


def test_equal_sizes_are_told() -> None:
    build, inputs = ALL["FLUX.2"]
    model = build()
    call = inputs(model, height=16, width=12)  # 192 tokens, and a modulation 192 wide
    with pytest.raises(ModelError, match="sizes of the example are equal by"):
        toma_fx.derive(model, call)


def test_an_image_that_no_block_sees() -> None:
    model, inputs = example("bria")
    with pytest.raises(
        ModelError, match=re.escape("takes tokens (B, N, D) that change with 'timestep'")
    ):
        toma_fx.derive(model, inputs, image="timestep")
    with pytest.raises(ModelError, match="image='picture' is no argument of the example"):
        toma_fx.derive(model, inputs, image="picture")


def test_what_a_derived_family_does_not_know() -> None:
    model, inputs, family = derived("bria")
    merged = toma_fx.transform(model, family=family, merge_below=0.5, region="stripe")
    with pytest.raises(InputError, match="a derived family does not know the noise level"):
        merged(**inputs)
    with pytest.raises(ModelError, match="cannot make up a call"):
        toma_fx.report(toma_fx.transform(model, family=family, region="stripe"))
    report = toma_fx.report(toma_fx.transform(model, family=family, region="stripe"), inputs=inputs)
    assert 0 < report.saved < 1


def test_the_given_model_keeps_its_forwards() -> None:
    model, *_ = derived("longcat-image")
    assert not any("forward" in vars(module) for module in model.modules())
    assert not any(module._forward_hooks for module in model.modules())


def test_a_unet_has_stages_that_a_call_does_not_tell() -> None:
    unet = tiny_sdxl_unet()
    with pytest.raises(ModelError, match="cannot be called with blocks that pass their tokens"):
        toma_fx.derive(unet, unet_inputs(unet))
