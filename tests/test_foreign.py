"""Code of others in a model: it works on, or is refused or warned of by name, with a way out.

Each way out that a message names is followed here.
"""

import copy
import functools
import gc
import math
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.utils.prune as pruning
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.attention_processor import AttnProcessor2_0
from diffusers.models.transformers.transformer_flux import FluxAttnProcessor
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

import toma_fx
from tests.tiny import flux_inputs, lossless, smallest_flux, smallest_unet, tiny_flux, unet_inputs
from toma_fx import TomaWarning, restore, transform
from toma_fx.errors import InputError, ModelError

BUILD: dict[str, Callable[[], Any]] = {"unet": smallest_unet, "flux": smallest_flux}
BLOCKS = {"unet": "mid_block.attentions.0.transformer_blocks", "flux": "single_transformer_blocks"}
"""A list of two blocks that share a plan."""
ATTENTION = {"unet": "attn1", "flux": "attn"}
FIRST = {"unet": "down_blocks.0.attentions.0.transformer_blocks.0", "flux": "transformer_blocks.0"}
"""The block that sees what no other block has changed."""


@pytest.fixture(autouse=True)
def _no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


@pytest.fixture(params=BUILD)
def family(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


def inputs_of(model: Any) -> dict[str, Any]:
    if "Flux" in type(model).__name__:
        return flux_inputs(model, height=8, width=8)
    return unet_inputs(model, height=16, width=16)


def run(model: Any, **added: Any) -> Tensor:
    sample: Tensor = model(**{**inputs_of(model), **added}).sample
    return sample


def merged(family: str, **options: Any) -> Tensor:
    return run(transform(BUILD[family](), **options))


def wrap(module: Any, calls: list[str]) -> None:
    """A forward of somebody's own, which notes that it ran and runs the one that was there."""
    before = module.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        calls.append(type(module).__name__)
        return before(*args, **kwargs)

    module.forward = forward


def places(family: str) -> dict[str, str]:
    """Paths at which people put closures, by what they are."""
    block = f"{BLOCKS[family]}.0"
    found = {"model": "", "block": block, "attention": f"{block}.{ATTENTION[family]}"}
    if family == "unet":
        found |= {"up block": "up_blocks.0", "stage": "mid_block.attentions.0"}
    return found


PLACES = [(family, place) for family in BUILD for place in places(family)]


# Forwards of others


@pytest.mark.parametrize(("family", "place"), PLACES)
def test_a_forward_on_the_given_model_is_refused_and_may_come_after(
    family: str, place: str
) -> None:
    calls: list[str] = []
    path = places(family)[place]
    model = BUILD[family]()
    module: Any = model.get_submodule(path)
    wrap(module, calls)
    untouched = run(model)
    with pytest.raises(ModelError, match=r"take it off, del module\.forward, transform") as caught:
        transform(model)
    assert (path or "the model") in str(caught.value)
    assert torch.equal(run(model), untouched)  # the given model is as it was
    # The way out.
    del module.forward
    result = transform(model)
    now: Any = result.get_submodule(path)
    wrap(now, calls)
    if place in ("block", "attention"):  # it would run on merged tokens
        now.forward.any_tokens = True
    calls.clear()
    assert torch.equal(run(result), merged(family))
    assert len(calls) == 1


@pytest.mark.parametrize("family", BUILD)
@pytest.mark.parametrize("place", ["block", "attention"])
def test_a_forward_that_runs_on_merged_tokens_is_refused_at_the_call(
    family: str, place: str
) -> None:
    block, path = f"{BLOCKS[family]}.0", places(family)[place]
    calls: list[str] = []
    model = transform(BUILD[family]())
    for used in range(2):
        module: Any = model.get_submodule(path)
        wrap(module, calls)
        with pytest.raises(InputError, match="runs on merged tokens") as caught:
            run(model)
        assert caught.match(rf"skip=\('{block}',\) and region='stripe'")
        assert path in str(caught.value)
        # First way out.
        del module.forward
        assert torch.equal(run(model), merged(family)), used
    # Second way out: its block sees all tokens, in the order of the image.
    options: dict[str, Any] = {"skip": (block,), "region": "stripe"}
    model = transform(BUILD[family](), **options)
    wrap(model.get_submodule(path), calls)
    calls.clear()
    assert torch.equal(run(model), merged(family, **options))
    assert len(calls) == 1
    # Third way out.
    model = transform(BUILD[family]())
    wrap(module := model.get_submodule(path), calls)
    module.forward.any_tokens = True
    assert torch.equal(run(model), merged(family))
    assert len(calls) == 2


def test_layers_that_are_exchanged_later_are_watched_too(family: str) -> None:
    model = transform(BUILD[family]())
    run(model)
    path = f"{BLOCKS[family]}.0.{ATTENTION[family]}.to_q"
    layer = model.get_submodule(path)
    model.set_submodule(path, copy.deepcopy(layer))
    del layer
    gc.collect()
    wrap(model.get_submodule(path), [])
    with pytest.raises(InputError, match=f"{path} has a forward of its own"):
        run(model)


def hyper_tile(attention: Any, side: int) -> None:
    """As HyperTile: attention in tiles of the image, which takes tokens for its grid."""
    before = attention.forward

    def forward(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        batch, tokens, width = hidden_states.shape
        edge = math.isqrt(tokens)
        grid = hidden_states.reshape(batch, edge // side, side, edge // side, side, width)
        tiles = grid.transpose(2, 3).reshape(-1, side * side, width)
        output = before(tiles, *args, **kwargs)
        grid = output.reshape(batch, edge // side, edge // side, side, side, width)
        image: Tensor = grid.transpose(2, 3).reshape(batch, tokens, width)
        return image

    attention.forward = forward


def test_attention_in_tiles_of_the_image() -> None:
    path = FIRST["unet"]
    patched = smallest_unet()
    hyper_tile(patched.get_submodule(path).attn1, 8)
    with pytest.raises(ModelError, match=r"attn1 has a forward of its own.*transform, and put it"):
        transform(patched)
    model = transform(smallest_unet())
    hyper_tile(model.get_submodule(path).attn1, 8)
    with pytest.raises(InputError, match="not the image grid"):
        run(model)
    # With its block left out, it does what it does in the untouched model, whose later blocks
    # merge as ever.
    skip: dict[str, Any] = {"skip": (path,), "region": "stripe"}
    model = transform(smallest_unet(), **skip)
    features: dict[str, list[Tensor]] = {"merged": [], "untouched": []}
    for name, each in (("merged", model), ("untouched", smallest_unet())):
        hyper_tile(each.get_submodule(path).attn1, 8)
        each.get_submodule(path).register_forward_hook(
            lambda module, args, output, name=name: features[name].append(output)
        )
        run(each)
    assert torch.equal(features["merged"][0], features["untouched"][0])
    assert not torch.equal(run(model), run(transform(smallest_unet(), **skip)))


# Classes of others


class Plain(BasicTransformerBlock):  # type: ignore[misc]
    """A subclass that adds nothing to the forward."""

    def described(self) -> str:
        return f"{self.dim} wide"


class Doubling(BasicTransformerBlock):  # type: ignore[misc]
    """A subclass with a forward of its own, which hands all on."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return 2 * super().forward(*args, **kwargs)


class Keyword(BasicTransformerBlock):  # type: ignore[misc]
    """A subclass that takes the arguments in its own order."""

    def forward(
        self, hidden_states: Tensor, cross_attention_kwargs: Any = None, **kwargs: Any
    ) -> Any:
        assert "toma" not in (cross_attention_kwargs or {})
        kwargs["cross_attention_kwargs"] = cross_attention_kwargs
        return 2 * super().forward(hidden_states, **kwargs)


def swap(model: Any, path: str, cls: type[Any]) -> Any:
    """Give a block another class, as patches do."""
    model.get_submodule(path).__class__ = cls
    return model


def test_a_subclass_without_a_forward_of_its_own_merges() -> None:
    path = f"{BLOCKS['unet']}.0"
    original = swap(smallest_unet(), path, Plain)
    model = transform(original)
    assert torch.equal(run(model), merged("unet"))
    assert model.get_submodule(path).described() == "16 wide"
    assert isinstance(model.get_submodule(path), Plain)
    assert type(restore(model).get_submodule(path)) is Plain
    assert type(original.get_submodule(path)) is Plain


@pytest.mark.parametrize("cls", [Doubling, Keyword])
def test_a_subclass_with_a_forward_of_its_own_is_refused_or_skipped(cls: type[Any]) -> None:
    path = f"{BLOCKS['unet']}.0"
    model = swap(smallest_unet(), path, cls)
    said = rf"{path} is a .*{cls.__name__}, .* restore the block's class, or leave it out"
    with pytest.raises(ModelError, match=said):
        transform(model)
    # The ways out: it runs as in the untouched model, on tokens of an image that is merged before.
    for region in ("stripe", "tile"):
        skipped = transform(model, skip=(path,), region=region)
        plain = transform(smallest_unet(), skip=(path,), region=region)
        handle = plain.get_submodule(path).register_forward_hook(lambda m, args, output: 2 * output)
        handle_any(plain.get_submodule(path))
        assert torch.equal(run(skipped), run(plain))
        handle.remove()
    assert torch.equal(run(restore(skipped)), run(model))
    swap(model, path, BasicTransformerBlock)
    assert torch.equal(run(transform(model)), merged("unet"))


def handle_any(module: nn.Module) -> None:
    """Say of the hooks on a module that they work on any tokens."""
    for hook in module._forward_hooks.values():
        hook.any_tokens = True  # type: ignore[attr-defined]


def test_a_class_that_is_swapped_later_runs_around_the_merged_forward() -> None:
    path = f"{BLOCKS['unet']}.0"
    model = transform(smallest_unet())
    block = model.get_submodule(path)
    installed = type(block)

    class Noting(installed):  # type: ignore[misc, valid-type]
        calls = 0

        def forward(self, *args: Any, **kwargs: Any) -> Any:
            type(self).calls += 1
            return super().forward(*args, **kwargs)

    block.__class__ = Noting
    assert torch.equal(run(model), merged("unet"))
    assert Noting.calls == 1


@pytest.mark.filterwarnings("ignore:.*use_reentrant parameter:UserWarning")
def test_checkpoint_wrappers_of_torch_change_nothing(family: str) -> None:
    def gradients(model: Any) -> dict[str, Tensor]:
        model.train().double()
        call = {
            name: value.double()
            if isinstance(value, Tensor) and value.is_floating_point()
            else value
            for name, value in inputs_of(model).items()
        }
        with torch.enable_grad():
            model(**call).sample.square().mean().backward()
        return {
            name.replace("_checkpoint_wrapped_module.", ""): parameter.grad
            for name, parameter in model.named_parameters()
        }

    plain, wrapped = BUILD[family](), BUILD[family]()
    for path in [p for p, m in wrapped.named_modules() if type(m).__name__.endswith("merBlock")]:
        wrapped.set_submodule(path, checkpoint_wrapper(wrapped.get_submodule(path)))
    ways: list[dict[str, Any]] = [{}, {"placement": "component"}, {"share": "block"}]
    for options in ways:
        models = [transform(each, skip=(), **options) for each in (plain, wrapped)]
        assert torch.equal(run(models[0]), run(models[1]))
        recipes = [
            [
                (block.path, block.group, block.role, block.ratio)
                for block in each.toma_recipe.blocks
            ]
            for each in models
        ]
        assert recipes[0] == recipes[1]
    models = [transform(each, skip=()) for each in (plain, wrapped)]
    expected, got = map(gradients, models)
    assert got.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(got[name], expected[name], msg=name)
    assert torch.equal(run(restore(models[1])), run(wrapped))


# Hooks


class Recorder:
    """A user's object that listens to a model."""

    def __init__(self) -> None:
        self.seen: list[Tensor] = []

    def note(self, module: nn.Module, args: Any, output: Any) -> None:
        self.seen.append(output if isinstance(output, Tensor) else output[-1])

    def note_as(self, name: str, module: nn.Module, args: Any, output: Any) -> None:
        self.note(module, args, output)


@pytest.mark.parametrize("partial", [False, True])
def test_hooks_reach_the_users_object(family: str, partial: bool) -> None:
    """A deep copy would write into a copy of the object, of which its owner knows nothing."""
    model, recorder = BUILD[family](), Recorder()
    layer = model.get_submodule(f"{BLOCKS[family]}.0.{ATTENTION[family]}.to_q")
    hook = functools.partial(recorder.note_as, "queries") if partial else recorder.note
    layer.register_forward_hook(hook)
    result = transform(model)
    run(result)
    (merged_queries,) = recorder.seen
    run(copy.deepcopy(result))  # as any copy of a module, it has a copy of its own
    assert len(recorder.seen) == 1
    run(model)
    assert recorder.seen[1].shape[1] > merged_queries.shape[1]


class Counting(nn.Linear):
    """A layer that counts its own calls by a hook, as some layers of others do."""

    def __init__(self, plain: nn.Linear) -> None:
        super().__init__(plain.in_features, plain.out_features, plain.bias is not None)
        self.load_state_dict(plain.state_dict())
        self.calls = 0
        self.register_forward_hook(self.count)
        self.register_forward_hook(functools.partial(Counting.count_of, self))

    def count(self, module: nn.Module, args: Any, output: Any) -> None:
        self.calls += 1

    def count_of(self, module: nn.Module, args: Any, output: Any) -> None:
        self.calls += 1


def test_hooks_of_a_layer_follow_it_to_the_copy(family: str) -> None:
    model = BUILD[family]()
    path = f"{BLOCKS[family]}.0.{ATTENTION[family]}.to_q"
    model.set_submodule(path, Counting(model.get_submodule(path)))
    result = transform(model)
    run(result)
    assert result.get_submodule(path).calls == 2
    assert model.get_submodule(path).calls == 0


def test_hooks_on_the_given_model_stay_its_own_afterwards(family: str) -> None:
    model = BUILD[family]()
    result, recorder = transform(model), Recorder()
    model.get_submodule(f"{BLOCKS[family]}.0.{ATTENTION[family]}.to_q").register_forward_hook(
        recorder.note
    )
    run(result)
    assert recorder.seen == []


def test_pruned_layers_merge_as_their_weights_say(family: str) -> None:
    pruned, expected = BUILD[family](), BUILD[family]()
    for model in (pruned, expected):
        for path, layer in model.named_modules():
            if isinstance(layer, nn.Linear) and "transformer_blocks" in path:
                pruning.l1_unstructured(layer, "weight", amount=0.4)
                if model is expected:
                    pruning.remove(layer, "weight")
    result = transform(pruned)
    assert torch.equal(run(result), run(transform(expected)))
    assert not torch.equal(run(result), merged(family))
    # Masks can be changed on the transformed model, and made final.
    for path, layer in result.named_modules():
        if isinstance(layer, nn.Linear) and "transformer_blocks" in path:
            pruning.remove(layer, "weight")
    assert torch.equal(run(result), run(transform(expected)))


@pytest.mark.parametrize("where", ["before", "after"])
def test_a_hook_on_a_block_is_warned_of_once_a_call(family: str, where: str) -> None:
    model, recorder = BUILD[family](), Recorder()
    if where == "after":
        model = transform(model)
    model.get_submodule(FIRST[family]).register_forward_hook(recorder.note)
    if where == "before":
        model = transform(model)
    with pytest.warns(TomaWarning, match=f"a hook on {FIRST[family]} sees image tokens in token"):
        run(model)
    # The ways out that it names.
    hook = lambda module, args, output: recorder.note(module, args, output)  # noqa: E731
    block = model.get_submodule(FIRST[family])
    block._forward_hooks.clear()
    block.register_forward_hook(hook)
    hook.any_tokens = True  # type: ignore[attr-defined]
    run(model)
    stripe = transform(BUILD[family](), region="stripe")
    stripe.get_submodule(FIRST[family]).register_forward_hook(recorder.note)
    run(stripe)
    assert len(recorder.seen) == 3


@pytest.mark.parametrize("how", ["skipped", "every token kept"])
def test_token_order_brings_features_into_the_order_of_the_image(family: str, how: str) -> None:
    """Those of the first block, which sees what the untouched model's sees."""
    path = FIRST[family]
    maps: list[Tensor] = []
    orders: list[Tensor | None] = []

    def keep(module: nn.Module, args: Any, output: Any) -> None:
        tokens, order = output if isinstance(output, Tensor) else output[-1], toma_fx.token_order()
        orders.append(order)
        maps.append(tokens if order is None else tokens[:, order.argsort()])

    keep.any_tokens = True  # type: ignore[attr-defined]
    untouched = BUILD[family]()
    untouched.get_submodule(path).register_forward_hook(keep)
    run(untouched)
    assert orders == [None]
    kept = how == "every token kept"
    others: dict[str, Any] = {"skip": (path,)} if not kept else {}
    config = lossless(skip=()) if kept else None
    model = transform(BUILD[family](), config, **others)
    model.get_submodule(path).register_forward_hook(keep)
    run(model)
    order = orders[1]
    assert order is not None
    assert sorted(order.tolist()) == list(range(len(order)))
    assert order.tolist() != list(range(len(order)))
    torch.testing.assert_close(maps[1], maps[0], rtol=1e-3, atol=1e-3)
    assert not torch.allclose(maps[1][:, order], maps[0], rtol=1e-2, atol=1e-2)
    assert toma_fx.token_order() is None  # outside of a call


def test_token_order_says_where_it_does_not_work() -> None:
    with pytest.raises(Exception, match="token_order works only in eager code"):
        torch.compile(lambda x: (toma_fx.token_order(), x + 1), backend="eager", fullgraph=True)(
            torch.ones(1)
        )


# Attention processors


def own_processor(family: str) -> type[Any]:
    base: Any = AttnProcessor2_0 if family == "unet" else FluxAttnProcessor

    class Recording(base):  # type: ignore[misc]
        """Records a map of the attention, as tools that edit or explain images do."""

        def __call__(self, attn: Any, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
            self.tokens = hidden_states.shape[1]
            return super().__call__(attn, hidden_states, *args, **kwargs)

    return Recording


SAID = "the attention processor .*Recording of .* runs on merged tokens"


def test_processors_of_others_are_warned_of_until_they_say_any_tokens(family: str) -> None:
    cls = own_processor(family)
    original = BUILD[family]()
    original.set_attn_processor(cls())
    with pytest.warns(TomaWarning, match=SAID):
        model = transform(original)
    with pytest.warns(TomaWarning, match=r"silence this by Recording\.any_tokens = True"):
        got = run(model)
    assert torch.equal(got, merged(family))
    later = transform(BUILD[family]())
    later.set_attn_processor(cls())
    with pytest.warns(TomaWarning, match=SAID):
        run(later)
    # On the object, or on its class; a warning would be an error here.
    processor = cls()
    processor.any_tokens = True
    later.set_attn_processor(processor)
    run(later)
    cls.any_tokens = True
    assert torch.equal(run(transform(original)), got)


def test_a_recorder_of_maps_in_a_block_that_is_left_out_sees_the_image(family: str) -> None:
    """The other way out that the warning names: skip, and stripes."""
    cls, path = own_processor(family), FIRST[family]
    recorded = []
    left_out: dict[str, Any] = {"skip": (path,), "region": "stripe"}
    for options in (None, left_out):
        model = BUILD[family]()
        processor = cls()
        model.get_submodule(f"{path}.{ATTENTION[family]}").set_processor(processor)
        model = model if options is None else transform(model, **options)
        run(model)
        attention = model.get_submodule(f"{path}.{ATTENTION[family]}")
        recorded.append(attention.processor.tokens)
    assert recorded[0] == recorded[1] == (256 if family == "unet" else 64)


# Masks


def masked_processor() -> type[Any]:
    class Masked(AttnProcessor2_0):  # type: ignore[misc]
        """Self-attention under a mask of the user's, over all tokens of a layer of its size."""

        any_tokens = True

        def __call__(
            self,
            attn: Any,
            hidden_states: Tensor,
            encoder_hidden_states: Tensor | None = None,
            *args: Any,
            image_mask: Tensor | None = None,
            **kwargs: Any,
        ) -> Any:
            if image_mask is not None and encoder_hidden_states is None:
                batch, tokens, _ = hidden_states.shape
                fits = tokens == image_mask.shape[-1]
                kwargs["attention_mask"] = image_mask.repeat(batch, 1, 1) if fits else None
            return super().__call__(attn, hidden_states, encoder_hidden_states, *args, **kwargs)

    return Masked


def test_square_masks_over_all_tokens_are_refused_unless_attention_sees_them_all() -> None:
    tokens = 256
    mask = torch.full((1, tokens, tokens), -100.0)
    mask[:, :, : tokens // 2] = 0  # everything looks at the upper half of the image
    added = {"cross_attention_kwargs": {"image_mask": mask}}
    original = smallest_unet()
    original.set_attn_processor(masked_processor()())
    untouched = run(original, **added)
    assert not torch.allclose(untouched, run(original), rtol=1e-2, atol=1e-2)
    mlp: dict[str, Any] = {"placement": "component", "components": ("mlp",)}
    ways: list[dict[str, Any]] = [{}, {"region": "stripe"}, mlp]
    for options in ways:
        model = transform(original, **options)
        with pytest.raises(InputError, match=r"'image_mask' of shape \(1, 256, 256\)"):
            run(model, **added)
        assert run(model).isfinite().all()  # the first way out
    # The second: attention runs on all tokens, in the order of the image.
    alone = transform(original, lossless(**mlp, region="stripe"))
    torch.testing.assert_close(run(alone, **added), untouched, rtol=1e-3, atol=1e-3)
    run(transform(original, **mlp, region="stripe"), **added)
    # Masks of any other size are no concern of merging's.
    run(transform(original), cross_attention_kwargs={"image_mask": torch.zeros(1, 7, 7)})


def test_square_masks_of_flux_count_text_too() -> None:
    model = transform(tiny_flux())
    for tokens in (64, 64 + 6):
        kwargs = {"some_mask": torch.zeros(1, tokens, tokens)}
        with pytest.raises(InputError, match=rf"'some_mask' of shape \(1, {tokens}, {tokens}\)"):
            run(model, joint_attention_kwargs=kwargs)


def test_masks_of_single_tokens_are_refused_where_tokens_are_in_tile_order() -> None:
    """A mask speaks of the image row by row, also where its component is not merged."""
    options: dict[str, Any] = {
        "placement": "component",
        "components": ("self_attention", "mlp"),
        "skip": ("mid_block.*",),  # whose tokens are fewer
    }
    mask = torch.zeros(2, 256, 7)
    mask[:, :128, 3:] = -100.0
    with pytest.raises(InputError, match=r"encoder_attention_mask .* and region='stripe'"):
        run(transform(smallest_unet(), **options), encoder_attention_mask=mask)


def test_no_warning_without_reason(family: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", "merging without memory")  # of which Flux always warns
        model = transform(BUILD[family]())
        model.get_submodule(f"{FIRST[family]}.{ATTENTION[family]}").register_forward_hook(
            lambda module, args, output: None
        )
        run(model)
