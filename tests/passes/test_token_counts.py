"""The sizes in a captured graph that are numbers of tokens, and become smaller."""

from typing import Any

import pytest
import torch
from torch import fx
from torch._subclasses import FakeTensorMode

from toma_fx.errors import CaptureError
from toma_fx.passes.flat_values import FlatValues, TokenCounts

COUNTS = TokenCounts(batch=2, text=6, image=64, kept=32)
JOINT = (2, 6 + 64, 4, 64)


def rerun(shape: tuple[int, ...], merged: tuple[int, ...], target: Any, *args: Any) -> fx.Node:
    """A call of ``target`` on tokens, after there are fewer of them."""
    graph = fx.Graph()
    tokens = graph.placeholder("tokens")
    node = graph.call_function(target, (tokens, *args))
    with FakeTensorMode():
        before, tokens.meta["val"] = torch.empty(shape), torch.empty(merged)
        node.meta["val"] = target(before, *args)
    FlatValues(fx.GraphModule({}, graph)).rerun(node, {tokens: before}, COUNTS)
    return node


aten = torch.ops.aten


@pytest.mark.parametrize(
    ("target", "args", "rewritten"),
    [
        (aten.view.default, ([2, 70, 2, 2, 64],), [2, 38, 2, 2, 64]),
        (aten.reshape.default, ([2, 70, -1, 2],), [2, 38, -1, 2]),
        (aten.reshape.default, ([2, -1, 256],), [2, -1, 256]),
        (aten.expand.default, ([3, 2, 70, 4, 64],), [3, 2, 38, 4, 64]),
        (aten.split_with_sizes.default, ([6, 64], 1), [6, 32]),
    ],
)
def test_the_number_of_tokens_is_rewritten(target: Any, args: Any, rewritten: list[int]) -> None:
    node = rerun(JOINT, (2, 38, 4, 64), target, *args)
    assert node.args[1] == rewritten


def test_a_size_that_only_looks_like_the_number_of_tokens_is_not() -> None:
    node = rerun((2, 64, 64), (2, 32, 64), aten.view.default, [2, 64, 64, 1])
    assert node.args[1] == [2, 32, 64, 1]
    node = rerun((2, 64, 64), (2, 32, 64), torch.Tensor.view, 2, 64, 1, 64)
    assert node.args[1:] == (2, 32, 1, 64)


@pytest.mark.parametrize(
    ("target", "args", "why"),
    [
        (aten.view.default, ([140, 4, 64],), r"none of the dimensions \(140, 4, 64\)"),
        (aten.chunk.default, (2, 1), r"shape goes from \(2, 35, 4, 64\) to \(2, 19, 4, 64\)"),
        (aten.slice.Tensor, (1, 0, 20), "ends at token 20 of 70"),
        (aten.slice.Tensor, (1, 6, -1), "ends at token -1 of 70"),
        (aten.slice.Tensor, (1, 10), "shape goes from"),
        (aten.mean.dim, ([1],), "mixes all tokens into one value"),
        (aten.select.int, (1, 0), "mixes all tokens into one value"),
        (aten.split_with_sizes.default, ([35, 35], 1), "cannot run on merged tokens"),
    ],
)
def test_what_is_not_surely_the_same_on_fewer_tokens_is_refused(
    target: Any, args: Any, why: str
) -> None:
    with pytest.raises(CaptureError, match=why) as refusal:
        rerun(JOINT, (2, 38, 4, 64), target, *args)
    assert f"%{target.__name__.partition('.')[0]}" in str(refusal.value)
