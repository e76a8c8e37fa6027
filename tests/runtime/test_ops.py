"""The operators as nodes of graphs: named before a graph is lowered, gone afterwards."""

from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.fx.experimental.proxy_tensor import make_fx

from tests.runtime.tokens import random_tokens
from toma_fx.runtime import ops
from toma_fx.runtime.regions import layout

toma = torch.ops.toma


TOKENS = random_tokens(2, 64, 6)
LAYOUT = layout([64], 16, 0.5)
DESTINATIONS = toma.select(TOKENS, LAYOUT, "facility_location")
WEIGHTS = toma.weigh(TOKENS, DESTINATIONS, LAYOUT, 0.1, "region", "transpose")
PADDED = layout([40, 24], 9, 0.5)
PADDED_DESTINATIONS = toma.select(TOKENS, PADDED, "facility_location")
PADDED_WEIGHTS = toma.weigh(TOKENS, PADDED_DESTINATIONS, PADDED, 0.1, "region", "transpose")
PADDED_MERGED = toma.merge(TOKENS, PADDED_WEIGHTS[0], PADDED)
IDS = torch.cartesian_prod(torch.zeros(1), torch.arange(8.0), torch.arange(8.0))

HEADS = random_tokens(2, 5, 5, 4)

ARGUMENTS: dict[str, list[tuple[Any, ...]]] = {
    "tile_order": [(TOKENS, 8, 8), (TOKENS, 3, 7)],
    "video_order": [(TOKENS, 5, 3, 4, 1, 4), (TOKENS, 4, 4, 4, 0, 2)],
    "tile_order_of_ids": [(IDS,), (IDS.bfloat16(),)],
    "reorder": [(TOKENS, torch.arange(64).flip(0))],
    "select": [
        (TOKENS, cut, selector)
        for selector in ("facility_location", "random", "grid", "fixed")
        for cut in (LAYOUT, layout([64], 0, 0.5), PADDED)
    ],
    "weigh": [
        (TOKENS, destinations, cut, 0.1, merge_over, unmerge)
        for destinations, cut in ((DESTINATIONS, LAYOUT), (PADDED_DESTINATIONS, PADDED))
        for merge_over in ("region", "image")
        for unmerge in ("transpose", "pinv")
    ],
    "fixed_weights": [(TOKENS, DESTINATIONS, LAYOUT), (TOKENS, PADDED_DESTINATIONS, PADDED)],
    "gather": [(TOKENS, DESTINATIONS), (TOKENS[0], DESTINATIONS)],
    "rows": [
        (random_tokens(3 + 64, 6), DESTINATIONS, 0, 3),
        (random_tokens(1, 3 + 64 + 2, 1, 6), DESTINATIONS, 1, 3, 2),
        (random_tokens(2, 1, 64 + 2) > 0, DESTINATIONS, -1, 0, 2),
        (torch.complex(*random_tokens(2, 2, 64, 6)), DESTINATIONS, 1, 0),
    ],
    "merge": [
        (TOKENS, WEIGHTS[0], LAYOUT),
        (torch.cat([TOKENS[:, :5], TOKENS], dim=1), WEIGHTS[0], LAYOUT),
        (torch.cat([TOKENS[:, :5], TOKENS], dim=1), PADDED_WEIGHTS[0], PADDED),
        (torch.cat([TOKENS, TOKENS[:, :5]], dim=1), WEIGHTS[0], LAYOUT, 5),
        (torch.cat([TOKENS[:, :2], TOKENS, TOKENS[:, :5]], dim=1), WEIGHTS[0], LAYOUT, 5),
    ],
    "unmerge": [
        (TOKENS[:, :32], WEIGHTS[1], LAYOUT),
        (TOKENS[:, :37], WEIGHTS[1], LAYOUT),
        (torch.cat([TOKENS[:, :5], PADDED_MERGED], dim=1), PADDED_WEIGHTS[1], PADDED),
        (TOKENS[:, :37], WEIGHTS[1], LAYOUT, 5),
        (TOKENS[:, :39], WEIGHTS[1], LAYOUT, 5),
    ],
    "log_sizes": [(WEIGHTS[1],), (PADDED_WEIGHTS[1],)],
    "merge_heads": [
        (random_tokens(2, 64, 3, 4), WEIGHTS[0], LAYOUT, 1),
        (random_tokens(2, 3, 5 + 64, 4), WEIGHTS[0], LAYOUT, 2),
        (random_tokens(2, 64 + 5, 3, 4), PADDED_WEIGHTS[0], PADDED, 1, 5),
    ],
    "with_sizes": [
        (HEADS, HEADS, HEADS, random_tokens(2, 5), 0.3, 1),
        (HEADS, HEADS, HEADS, random_tokens(2, 2), 0.3, 2, 1),
    ],
}


class AllOperators(nn.Module):
    """One call of each operator."""

    def forward(self, image: Tensor, ids: Tensor) -> tuple[Tensor, ...]:
        order = toma.tile_order(image, 8, 8)
        tokens = toma.reorder(image, order)
        destinations = toma.select(tokens, LAYOUT, "facility_location")
        merging, spreading = toma.weigh(tokens, destinations, LAYOUT, 0.1, "region", "transpose")
        fixed, _ = toma.fixed_weights(tokens, destinations, LAYOUT)
        merged = toma.merge(tokens, merging, LAYOUT)
        sizes = toma.log_sizes(spreading)
        return (
            toma.unmerge(merged, spreading, LAYOUT),
            toma.gather(tokens, destinations),
            toma.rows(ids, destinations, 0, 0),
            toma.tile_order_of_ids(ids),
            toma.video_order(image, 4, 4, 4, 0, 4),
            fixed,
            sizes,
            toma.merge_heads(tokens[:, :, None], merging, LAYOUT, 1),
            *toma.with_sizes(*[merged[:, :, None]] * 3, sizes, 0.3, 1),
        )


def merge_and_back(tokens: Tensor, layout: tuple[int, ...]) -> Tensor:
    destinations = toma.select(tokens, layout, "facility_location")
    merging, spreading = toma.weigh(tokens, destinations, layout, 0.1, "region", "transpose")
    result: Tensor = toma.unmerge(toma.merge(tokens, merging, layout), spreading, layout)
    return result


def called_names(gm: fx.GraphModule) -> Iterator[str]:
    """Names of the operators in a graph and in the bodies of its loops and conditions."""
    for module in gm.modules():
        if isinstance(module, fx.GraphModule):
            for node in module.graph.nodes:
                if isinstance(node.target, torch._ops.OperatorBase):
                    yield node.target.name()


def assert_lowered(gm: fx.GraphModule) -> None:
    names = set(called_names(gm))
    assert "while_loop" in names  # the loop's trip count is no part of the graph
    assert all(name.startswith("aten::") for name in names - {"while_loop"}), names


def assert_same(results: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> None:
    for result, like in zip(results, expected, strict=True):
        torch.testing.assert_close(result, like)


def test_every_operator_is_tested() -> None:
    registered = torch._C._dispatch_get_all_op_names()
    ours = {name for name in registered if name.startswith("toma::")}
    # `test_kernels` tests the kernels' operator, which exists where they were imported.
    assert ours - {"toma::facility_location"} == {f"toma::{name}" for name in ARGUMENTS}
    assert ops.LIBRARY.ns == "toma"


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        pytest.param(name, arguments, id=f"{name} {index}")
        for name, calls in ARGUMENTS.items()
        for index, arguments in enumerate(calls)
    ],
)
def test_opcheck(name: str, arguments: tuple[Any, ...]) -> None:
    torch.library.opcheck(getattr(toma, name).default, arguments)


@pytest.fixture(scope="module")
def exported() -> torch.export.ExportedProgram:
    return torch.export.export(AllOperators(), (TOKENS, IDS), strict=False)


def test_operators_are_named_nodes_of_an_exported_graph(
    exported: torch.export.ExportedProgram,
) -> None:
    named = Counter(called_names(exported.graph_module))
    shaped = {"aten::unsqueeze": named["aten::unsqueeze"]}  # heads of the test's own
    assert named - Counter(shaped) == Counter(f"toma::{name}" for name in ARGUMENTS)


def test_one_exported_graph_serves_every_batch_size() -> None:
    sizes = {0: torch.export.Dim("batch", min=1, max=8)}
    exported = torch.export.export(
        AllOperators(), (TOKENS, IDS), dynamic_shapes=(sizes, None), strict=False
    )
    for batch in (1, 2, 3):
        image = random_tokens(batch, 64, 6, seed=1)
        assert_same(exported.module()(image, IDS), AllOperators()(image, IDS))


def test_a_lowered_graph_needs_nothing_of_ours(exported: torch.export.ExportedProgram) -> None:
    lowered = exported.run_decompositions()
    assert_lowered(lowered.graph_module)
    assert_same(lowered.module()(TOKENS, IDS), AllOperators()(TOKENS, IDS))


def test_a_traced_graph_needs_nothing_of_ours() -> None:
    traced = make_fx(AllOperators())(TOKENS, IDS)
    assert_lowered(traced)
    other = random_tokens(2, 64, 6, seed=1)
    assert_same(traced(other, IDS), AllOperators()(other, IDS))


@pytest.fixture(scope="module")
def compiled_select() -> Any:
    return torch.compile(
        lambda tokens: toma.select(tokens, LAYOUT, "facility_location"), fullgraph=True
    )


@pytest.mark.parametrize("seed", range(20))
def test_compiled_selection_picks_the_same_tokens(compiled_select: Any, seed: int) -> None:
    tokens = random_tokens(2, 64, 6, seed=seed)
    assert torch.equal(compiled_select(tokens), toma.select(tokens, LAYOUT, "facility_location"))


@pytest.mark.parametrize("levels", [0, 1, 2, 4])
def test_compiled_selection_breaks_ties_in_the_same_way(compiled_select: Any, levels: int) -> None:
    tokens = (random_tokens(2, 64, 6) * levels / 2).round()
    assert torch.equal(compiled_select(tokens), toma.select(tokens, LAYOUT, "facility_location"))


def test_a_compiled_merge_computes_what_the_eager_one_does() -> None:
    def there_and_back(image: Tensor) -> Tensor:
        tokens = toma.reorder(image, toma.tile_order(image, 8, 8))
        return merge_and_back(tokens, LAYOUT)

    compiled = torch.compile(there_and_back, fullgraph=True)
    torch.testing.assert_close(compiled(TOKENS), there_and_back(TOKENS))


def select_in_16(tokens: Tensor) -> Any:
    return toma.select(tokens, layout([tokens.shape[1]], 16, 0.5), "facility_location")


def test_one_compiled_loop_serves_many_sizes() -> None:
    torch._dynamo.reset()
    compiled = torch.compile(select_in_16, fullgraph=True, dynamic=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for batch, count, width in [(2, 48, 8), (3, 96, 24), (5, 64, 12)]:
            tokens = random_tokens(batch, count, width)
            assert torch.equal(compiled(tokens), select_in_16(tokens))


def test_one_compiled_loop_serves_many_sizes_that_regions_do_not_divide() -> None:
    torch._dynamo.reset()
    compiled = torch.compile(select_in_16, fullgraph=True, dynamic=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for batch, count, width in [(2, 300, 8), (3, 333, 24), (5, 1023, 12)]:
            tokens = random_tokens(batch, count, width)
            assert torch.equal(compiled(tokens), select_in_16(tokens))


class MergeAndBack(nn.Module):
    """Two grids, an image and a reference, as a model would merge them in regions of 64."""

    def forward(self, image: Tensor, reference: Tensor) -> Tensor:
        cut = layout([image.shape[1], reference.shape[1]], 64, 0.5)
        return merge_and_back(torch.cat([image, reference], dim=1), cut)


SIZES = [(1100, 1357), (4087, 1100), (1357, 4087), (2001, 2001)]
"""Tokens of both grids: many regions of 64, none of which divides."""


def grids(image: int, reference: int) -> tuple[Tensor, Tensor]:
    return random_tokens(2, image, 16), random_tokens(2, reference, 16, seed=1)


def test_one_compiled_graph_serves_many_sizes_that_regions_do_not_divide() -> None:
    torch._dynamo.reset()
    graphs = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(MergeAndBack(), fullgraph=True, dynamic=True, backend=graphs)
    for sizes in SIZES:
        assert torch.equal(compiled(*grids(*sizes)), MergeAndBack()(*grids(*sizes)))
    assert graphs.frame_count == 1
    # A grid that regions divide keeps a graph of its own, which copies nothing into places.
    for sizes in [(4096, 2048), (1088, 1152)]:
        assert torch.equal(compiled(*grids(*sizes)), MergeAndBack()(*grids(*sizes)))
    assert graphs.frame_count == 2
    names = [str(node.target) for node in graphs.graphs[1].graph.nodes]
    assert not any("index_select" in name for name in names)


def test_one_compiled_graph_serves_every_size_of_one_region() -> None:
    def forward(tokens: Tensor) -> Tensor:
        return merge_and_back(tokens, layout([tokens.shape[1]], 0, 0.5))

    torch._dynamo.reset()
    graphs = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(forward, fullgraph=True, dynamic=True, backend=graphs)
    for count in (100, 135, 256):
        tokens = random_tokens(2, count, 16)
        torch.testing.assert_close(compiled(tokens), forward(tokens))
    assert graphs.frame_count == 1


def test_one_exported_graph_serves_many_sizes_that_regions_do_not_divide() -> None:
    any_size = {1: torch.export.Dim.AUTO}
    exported = torch.export.export(
        MergeAndBack(), grids(*SIZES[0]), dynamic_shapes=(any_size, any_size), strict=False
    ).run_decompositions()
    assert_lowered(exported.graph_module)
    for sizes in SIZES:
        torch.testing.assert_close(
            exported.module()(*grids(*sizes)), MergeAndBack()(*grids(*sizes))
        )


@pytest.mark.parametrize("cut", [LAYOUT, PADDED], ids=["divides", "padded"])
def test_places_are_copied_only_where_there_is_padding(cut: tuple[int, ...]) -> None:
    traced = make_fx(lambda tokens: merge_and_back(tokens, cut), tracing_mode="fake")(TOKENS)
    copies = [name for name in called_names(traced) if "index_select" in name]
    assert len(copies) == (4 if cut is PADDED else 0)  # one for each operator
