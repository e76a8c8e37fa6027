"""Image sequences of several grids, as Kontext's, and sizes that regions do not divide."""

import copy
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
from diffusers import FluxTransformer2DModel
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter
from torch.overrides import TorchFunctionMode

import toma_fx
from tests.tiny import flux_inputs, lossless, smallest_flux, smallest_unet, tiny_flux, unet_inputs
from toma_fx import Schedule, transform
from toma_fx.runtime import regions

TEXT = 6
Size = tuple[int, int]
REGION = pytest.mark.parametrize("region", ["tile", "stripe"])
PRIME = [(20, 20), (9, 11)]
"""An image of 400 tokens and a reference of 99: 499 together, which nothing divides."""


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    torch._dynamo.reset()
    with torch.no_grad():
        yield


def kontext(
    model: FluxTransformer2DModel,
    sizes: Sequence[Size],
    numbers: Sequence[int] = (0, 1, 2),
    seed: int = 0,
    reference_seed: int | None = None,
) -> dict[str, Any]:
    """A call with an image and its references: their tokens in a row, told apart by their ids."""
    calls = []
    for place, ((height, width), number) in enumerate(zip(sizes, numbers, strict=False)):
        own = seed if place == 0 or reference_seed is None else reference_seed
        call = flux_inputs(model, height=height, width=width, text=TEXT, seed=own + 10 * place)
        call["img_ids"][:, 0] = number
        calls.append(call)
    return {
        **flux_inputs(model, height=8, width=8, text=TEXT, seed=seed),
        "hidden_states": torch.cat([call["hidden_states"] for call in calls], 1),
        "img_ids": torch.cat([call["img_ids"] for call in calls]),
    }


def run(model: nn.Module, call: dict[str, Any]) -> Tensor:
    sample: Tensor = model(**call).sample
    return sample


def difference(a: Tensor, b: Tensor) -> float:
    """Root mean square of ``a - b``, in standard deviations of ``b``."""
    return float((a - b).square().mean().sqrt() / b.std())


class Plans(TorchFunctionMode):
    """What planning gave: layouts, destinations and weights, in the order of the calls."""

    def __init__(self) -> None:
        super().__init__()
        self.layouts: list[list[int]] = []
        self.destinations: list[Tensor] = []
        self.weights: list[Tensor] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func is torch.ops.toma.select.default:
            self.layouts.append(list(args[1]))
            self.destinations.append(result)
        if func is torch.ops.toma.weigh.default:
            self.weights.append(result[0])
        return result


def planned(model: nn.Module, call: dict[str, Any]) -> Plans:
    plans = Plans()
    with plans:
        run(model, call)
    return plans


def count_tokens(model: Any) -> dict[str, int]:
    """Image tokens that layers inside each block get, from the next call on."""
    seen: dict[str, int] = {}

    def watch(path: str, layer: nn.Module, text: int) -> None:
        layer.register_forward_hook(
            lambda module, args, output: seen.__setitem__(path, args[0].shape[1] - text)
        )

    for index, block in enumerate(model.transformer_blocks):
        watch(f"transformer_blocks.{index}", block.attn.to_q, 0)
    for index, block in enumerate(model.single_transformer_blocks):
        watch(f"single_transformer_blocks.{index}", block.proj_mlp, TEXT)
    return seen


# Kontext


@REGION
@pytest.mark.parametrize("sizes", [PRIME, [(16, 16), (8, 8)], [(8, 8), (20, 12), (5, 7)]], ids=str)
def test_regions_never_mix_grids(region: str, sizes: list[Size]) -> None:
    """A reference changes nothing in the plan of the image, nor the image in the reference's."""
    model = transform(smallest_flux(), skip=(), region=region, region_tokens=16)
    one = planned(model, kontext(model, sizes))
    other_reference = planned(model, kontext(model, sizes, reference_seed=5))
    other_image = planned(model, kontext(model, sizes, seed=7, reference_seed=0))
    layout = one.layouts[0]
    assert layout[2::2] == [height * width for height, width in sizes]
    of_image = layout[3]  # regions of the first grid
    for kind in ("destinations", "weights"):
        # Of the first group, whose plan is of the tokens that came in.
        plans = (getattr(each, kind)[0] for each in (one, other_reference, other_image))
        mine, others, again = plans
        assert torch.equal(mine[:, :of_image], others[:, :of_image])
        assert not torch.equal(mine[:, of_image:], others[:, of_image:])
        assert torch.equal(mine[:, of_image:], again[:, of_image:])
        assert not torch.equal(mine[:, :of_image], again[:, :of_image])


@REGION
@pytest.mark.parametrize(
    "sizes", [[(16, 16), (8, 8)], [(16, 16)], [(8, 8), (16, 8), (8, 24)]], ids=str
)
def test_tokens_of_all_grids_come_back_to_their_places(region: str, sizes: list[Size]) -> None:
    model = tiny_flux().double()
    call = kontext(model, sizes)
    moved = transform(model, lossless(region=region, skip=()))
    assert difference(run(moved, call), run(model, call)) < 1e-6
    assert difference(run(transform(model, region=region, skip=()), call), run(model, call)) > 1e-2


@REGION
@pytest.mark.parametrize("ratio", [0.25, 0.5, 0.75])
@pytest.mark.parametrize(
    "sizes", [PRIME, [(13, 9), (8, 8)], [(19, 19)], [(13, 37), (3, 1)]], ids=str
)
def test_any_sizes_merge_the_share_that_was_asked_for(
    region: str, ratio: float, sizes: list[Size]
) -> None:
    model = transform(smallest_flux(), skip=(), region=region, ratio=ratio)
    call = kontext(model, sizes)
    tokens = call["hidden_states"].shape[1]
    seen = count_tokens(model)
    run(model, call)
    assert len(seen) == 3
    for kept in seen.values():
        assert kept / tokens == pytest.approx(1 - ratio, abs=0.05)


@REGION
def test_the_order_of_the_references_does_not_matter(region: str) -> None:
    model = transform(tiny_flux().double(), skip=(), region=region)
    sizes, counts = [(16, 16), (9, 7), (8, 12)], [256, 63, 96]
    call = kontext(model, sizes)
    output = run(model, call).split(counts, 1)
    ids, tokens = call["img_ids"].split(counts), call["hidden_states"].split(counts, 1)
    for order in ((0, 2, 1), (1, 0, 2), (2, 1, 0)):
        other = {
            **call,
            "img_ids": torch.cat([ids[place] for place in order]),
            "hidden_states": torch.cat([tokens[place] for place in order], 1),
        }
        got = run(model, other)
        assert difference(got, torch.cat([output[place] for place in order], 1)) < 1e-9


def test_tiles_find_grids_whose_tokens_are_mixed() -> None:
    model = transform(tiny_flux().double(), skip=())
    call = kontext(model, [(16, 16), (9, 7)])
    shuffled = torch.randperm(256 + 63, generator=torch.Generator().manual_seed(0))
    other = {
        **call,
        "img_ids": call["img_ids"][shuffled],
        "hidden_states": call["hidden_states"][:, shuffled],
    }
    assert difference(run(model, other), run(model, call)[:, shuffled]) < 1e-9


@REGION
def test_image_numbers_are_only_names(region: str) -> None:
    """Whatever number tells a reference apart, it is a grid of its own: 1 to 200 and beyond."""
    model = transform(smallest_flux(), skip=(), region=region, region_tokens=16)
    first = planned(model, kontext(model, PRIME))
    for number in (2, 3, 17, 100, 199, 200, 1000):
        plans = planned(model, kontext(model, PRIME, numbers=(0, number)))
        assert plans.layouts == first.layouts
        assert torch.equal(plans.destinations[0], first.destinations[0])


def test_two_hundred_references_at_once() -> None:
    model = transform(smallest_flux(), skip=(), region_tokens=4)
    call = kontext(model, [(4, 4)] * 201, numbers=range(201))
    plans = planned(model, call)
    assert plans.layouts[0][2::2] == [16] * 201
    changed = call["hidden_states"].clone()
    changed[:, 16 * 100 : 16 * 101] += 1
    others = planned(model, {**call, "hidden_states": changed})
    same = plans.destinations[0] == others.destinations[0]
    assert same[:, [region for region in range(4 * 201) if region // 4 != 100]].all()


@REGION
@pytest.mark.parametrize("way", ["torch.compile", "compile_repeated_blocks"])
def test_compiled_it_agrees(way: str, region: str) -> None:
    model = transform(smallest_flux(), skip=(), region=region)
    compiled: Any = copy.deepcopy(model)
    if way == "torch.compile":
        compiled = torch.compile(compiled, backend="eager", fullgraph=True)
    else:
        getattr(compiled, way)(backend="eager", fullgraph=True)
    # Another reference, and none, in between.
    for sizes in (PRIME, [(20, 20)], PRIME):
        call = kontext(model, sizes)
        assert difference(run(compiled, call), run(model, call)) < 1e-5
    with torch._dynamo.config.patch(error_on_recompile=True):
        other = kontext(model, PRIME, reference_seed=3)
        assert difference(run(compiled, other), run(model, other)) < 1e-5


@REGION
@pytest.mark.parametrize(
    "options", [{}, {"schedule": Schedule(select_every=2, weigh_every=2)}], ids=str
)
def test_exported_it_agrees(region: str, options: dict[str, Any]) -> None:
    model = transform(smallest_flux(), skip=(), region=region, **options)
    call = kontext(model, PRIME)
    exported = toma_fx.export(model, call)
    program = (exported["merged"] if options else exported).module()
    other = kontext(model, PRIME, seed=3)
    torch.testing.assert_close(program(**other)[0], run(model, other), rtol=1e-4, atol=1e-4)
    if options:
        later = {**other, "timestep": other["timestep"] * 0.9}
        plan = program(**other)[1]
        reused = exported["reuse"].module()(plan=plan, **later)[0]
        torch.testing.assert_close(reused, run(model, later), rtol=1e-4, atol=1e-4)


@REGION
def test_a_report_speaks_of_the_grids_of_the_last_call(region: str) -> None:
    model = transform(smallest_flux(), skip=(), region=region)
    seen = count_tokens(model)
    call = kontext(model, PRIME)
    run(model, call)
    report = toma_fx.report(model)
    assert {group.tokens_before for group in report.groups} == {499}
    assert {group.tokens_after for group in report.groups} == set(seen.values())
    assert "2 x 499 x 16" in str(report)
    # As one grid, whose tokens nothing divides, it would be cut in another way.
    grids = regions.layout((400, 99), 64, 0.5)
    assert regions.kept(grids) in set(seen.values())


# Sizes that regions do not divide

UNETS = [(30, 34), (34, 38), (36, 42), (46, 34), (34, 34)]
FLUXES = [(17, 19), (17, 17), (19, 23), (31, 13), (18, 16)]


def inputs_of(model: Any, height: int, width: int, batch: int = 2) -> dict[str, Any]:
    make = flux_inputs if isinstance(model, FluxTransformer2DModel) else unet_inputs
    return make(model, batch, height, width)


@pytest.mark.parametrize("family", ["unet", "flux"])
def test_one_dynamic_graph_serves_sizes_that_nothing_divides(family: str) -> None:
    """Regions of 16, of which the smallest of these images holds enough to be padded."""
    model = transform(smallest_unet() if family == "unet" else smallest_flux(), region_tokens=16)
    frames = CompileCounter()
    compiled: Any = torch.compile(
        copy.deepcopy(model), backend=frames, fullgraph=True, dynamic=True
    )
    sizes = UNETS[1:] if family == "unet" else FLUXES[:-1]
    for batch, size in zip((2, 3, 2, 5), sizes, strict=True):
        call = inputs_of(model, *size, batch=batch)
        assert difference(run(compiled, call), run(model, call)) < 1e-5
    assert frames.frame_count == 1


@REGION
@pytest.mark.parametrize(
    ("family", "size"), [("unet", size) for size in UNETS] + [("flux", size) for size in FLUXES]
)
def test_sizes_that_nothing_divides_merge_half(family: str, size: Size, region: str) -> None:
    """And each image as it would be alone, whatever else is in its batch."""
    model: Any = (smallest_unet() if family == "unet" else smallest_flux()).double()
    result = transform(model, region=region, region_tokens=16, skip=())
    call = inputs_of(model, *size)
    together = run(result, call)
    first = {
        name: value[:1] if isinstance(value, Tensor) and value.shape[:1] == (2,) else value
        for name, value in call.items()
    }
    # Plans are made in float32.
    assert difference(together[:1], run(result, first)) < 1e-7
    assert difference(together, run(model, call)) > 1e-3
    plans = planned(result, call)
    for layout in plans.layouts:
        kept, tokens = regions.kept(layout), regions.total_tokens(layout)
        assert kept / tokens == pytest.approx(0.5, abs=0.05)
