"""Example values of a captured graph, kept correct while it is rewritten.

Before, in a block that runs on merged tokens, with the number of tokens written into a shape::

    reshape = torch.ops.aten.reshape(transpose, [2, 256, 32])

After::

    reshape = torch.ops.aten.reshape(transpose, [2, 128, 32])

Values come from ``meta["val"]`` or, for Dynamo, from ``meta["example_value"]``, and are computed
again after a change. A shape with literal numbers is rewritten only if the value shows which of the
numbers counts tokens; otherwise it is refused.
"""

import math
import operator
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._subclasses import FakeTensor
from torch.utils import _pytree as pytree

from toma_fx.passes.flat_nodes import operator_name, refused
from toma_fx.passes.pipeline import example_value
from toma_fx.passes.plan_nodes import toma

_VIEWS = ("view", "reshape", "_unsafe_view", "expand")
_CUTS = ("getitem", "slice")


@dataclass(frozen=True)
class TokenCounts:
    """Numbers of tokens of each kind in a block."""

    batch: int
    text: int
    """Number of text tokens, which come first if both kinds are in one sequence."""
    image: int
    kept: int
    """Number of image tokens that are left after merging."""

    @property
    def changes(self) -> list[tuple[int, int]]:
        """Allowed changes of a size: token counts, and the batch of a table shared by samples."""
        joint = (self.text + self.image, self.text + self.kept)
        return [(self.image, self.kept), joint, (1, self.batch)]


class FlatValues:
    """Values of all nodes of a graph."""

    def __init__(self, gm: fx.GraphModule) -> None:
        self._root = gm
        self._written: set[fx.Node] = set()
        for node in gm.graph.nodes:
            node.meta.setdefault("val", node.meta.get("example_value"))
        values = (node.meta["val"] for node in gm.graph.nodes)
        mode: Any = next((v.fake_mode for v in values if isinstance(v, FakeTensor)), None)
        self._mode = nullcontext() if mode is None else mode
        for node in gm.graph.find_nodes(op="get_attr"):
            if node.meta["val"] is None:
                value = operator.attrgetter(str(node.target))(gm)
                to_fake = mode is not None and isinstance(value, Tensor)
                node.meta["val"] = mode.from_tensor(value) if to_fake else value

    def rerun(self, node: fx.Node, changed: dict[fx.Node, Any], counts: TokenCounts) -> bool:
        """Compute the value of ``node`` again, with the token counts in its shape rewritten.

        Args:
            node: a call node.
            changed: nodes with changed values, and their values before; extended by this method.
            counts: token counts that numbers in shapes can stand for.

        Returns:
            True if the shape of the node's value changed.

        Raises:
            CaptureError: when the node cannot run on merged tokens, or not certainly as intended.
        """
        if not any(each in changed for each in node.all_input_nodes):
            return False
        before = node.meta["val"]
        tokens = node.args[0] if node.args else None
        if isinstance(tokens, fx.Node) and isinstance(changed.get(tokens), Tensor):
            _rewrite_literals(node, changed[tokens].shape, tokens.meta["val"].shape, counts)
        value = self.compute(node)
        _check_shapes(node, before, value, counts)
        self.set(node, value)
        if _shapes(value) == _shapes(before):
            return False
        changed[node] = before
        return True

    def refresh(self) -> None:
        """Propagate the strides of rewritten values to all nodes that use them."""
        for node in self._root.graph.nodes:
            if node.op.startswith("call_") and not self._written.isdisjoint(node.all_input_nodes):
                value = self.compute(node)
                if _layouts(node.meta["val"]) != _layouts(value):
                    self.set(node, value)
        self._written.clear()

    def set(self, node: fx.Node, value: Any) -> None:
        """Store the value of a node in all metadata keys that its capture uses."""
        self._written.add(node)
        node.meta["val"] = value
        node.meta.pop("tensor_meta", None)
        if "example_value" in node.meta:
            node.meta["example_value"] = value

    def compute(self, node: fx.Node) -> Any:
        """Return the result of a call node for the values of its arguments.

        Raises:
            CaptureError: when the call fails on them.
        """
        try:
            with torch.no_grad(), self._mode:
                if node.target is toma.select.default:  # same number of picks, without a search
                    tokens, layout, _ = node.args
                    return toma.select(tokens.meta["val"], layout, "grid")  # type: ignore[union-attr]
                return example_value(node, self._root, _leaf_value)
        except Exception as error:
            raise refused(node, str(error)) from error


def _leaf_value(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    device = args[0].device
    tensors = chain(module.named_parameters(), module.named_buffers())
    like = {n: torch.empty(t.shape, dtype=t.dtype, device=device) for n, t in tensors}
    return torch.func.functional_call(module, like, args, kwargs)


def _shapes(value: Any) -> Any:
    return pytree.tree_map_only(Tensor, lambda t: t.shape, value)


def _layouts(value: Any) -> Any:
    return pytree.tree_map_only(Tensor, lambda t: (t.shape, t.stride(), t.dtype), value)


def _check_shapes(node: fx.Node, before: Any, after: Any, counts: TokenCounts) -> None:
    """Refuse a node that computes another kind of value from fewer tokens."""
    for old, new in zip(pytree.tree_leaves(before), pytree.tree_leaves(after), strict=True):
        if not isinstance(new, Tensor):
            continue
        changes = [(a, b) for a, b in zip(old.shape, new.shape, strict=True) if a != b]
        if not all(change in counts.changes for change in changes):
            raise refused(node, f"its shape goes from {tuple(old.shape)} to {tuple(new.shape)}")
        if not changes and isinstance(after, Tensor) and operator_name(node) not in _CUTS:
            raise refused(node, "it mixes all tokens into one value")


def _rewrite_literals(
    node: fx.Node, before: torch.Size, after: torch.Size, counts: TokenCounts
) -> None:
    """Rewrite the numbers in a node's arguments that count tokens of its first argument."""
    name, text = operator_name(node), counts.text
    for dim, (old, new) in enumerate(zip(before, after, strict=True)):
        if old == new:
            continue
        if name in _VIEWS:
            _rewrite_size(node, _place(node, before, dim), new)
        elif name == "split_with_sizes":
            if list(node.args[1]) == [text, old - text]:  # type: ignore[arg-type]
                node.update_arg(1, [text, new - text])
        elif name in _CUTS:
            end = _end(node, dim)
            if isinstance(end, int) and (end < 0 or text < end < 2**62):
                raise refused(node, f"it ends at token {end} of {old}, which may not remain")


def _place(node: fx.Node, before: torch.Size, dim: int) -> int:
    """Return which dimension of a view's value is dimension ``dim`` of the viewed tensor."""
    shape = node.meta["val"].shape
    if operator_name(node) == "expand":
        return dim + len(shape) - len(before)
    for place, size in enumerate(shape):
        # In row-major order, equal dimensions have equal products of the dimensions before them.
        same = isinstance(size, int) and size == before[dim] > 1
        if same and math.prod(shape[:place]) == math.prod(before[:dim]):
            return place
    raise refused(node, f"none of the dimensions {tuple(shape)} is only the {before[dim]} tokens")


def _rewrite_size(node: fx.Node, place: int, size: int) -> None:
    listed = isinstance(node.args[1], list | tuple)
    sizes = list(node.args[1] if listed else node.args[1:])  # type: ignore[arg-type]
    if isinstance(sizes[place], int) and sizes[place] != -1:
        sizes[place] = size
    node.args = (node.args[0], sizes) if listed else (node.args[0], *sizes)


def _end(node: fx.Node, dim: int) -> Any:
    """Return where a slice of dimension ``dim`` ends; None if the node does not slice it."""
    if operator_name(node) == "slice":
        return node.args[3] if len(node.args) > 3 and node.args[1] == dim else None
    index: Any = node.args[1]
    index = index if isinstance(index, tuple) else (index,)
    return index[dim].stop if len(index) > dim and isinstance(index[dim], slice) else None
