"""Debugging aid: write the graph after each pass to a file, and print the operators it changed.

Nothing is rewritten; before and after are the same graph. ``run_passes(gm, passes,
dump_each(gm, "graphs"))`` writes the graph before the first pass and after each pass::

    graphs/0_captured.py
    graphs/1_merge.py
    graphs/2_guard_inputs.py

and prints::

    1 merge: 1 change, +2 getitem, +1 toma.merge, +1 toma.select, +1 toma.unmerge, ...
    2 guard_inputs: 3 changes, +2 pass_on_mask
"""

import sys
from collections import Counter
from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import Any

from torch import fx

from toma_fx.passes.pipeline import Callback, Pass
from toma_fx.passes.readable import readable


def dump_each(
    gm: fx.GraphModule, folder: str | Path, log: Callable[[str], object] = sys.stdout.write
) -> Callback:
    """Return a callback for `run_passes` that writes the graph after each pass to a file.

    Args:
        gm: the graph before the first pass.
        folder: folder for the files; created if missing.
        log: called with one line per pass.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    steps = count(1)
    before = operator_counts(gm)
    _dump(gm, folder / "0_captured.py")

    def after_each(each: Pass, gm: fx.GraphModule, changed: int) -> None:
        nonlocal before
        step, after = next(steps), operator_counts(gm)
        _dump(gm, folder / f"{step}_{each.name}.py")
        parts = [f"{changed} change{'s' * (changed != 1)}", *_difference(before, after)]
        log(f"{step} {each.name}: {', '.join(parts)}\n")
        before = after

    return after_each


def operator_counts(gm: fx.GraphModule) -> Counter[str]:
    """Count the calls of each operator, method and submodule in a graph."""
    return Counter(_name(node) for node in gm.graph.nodes if node.op.startswith("call_"))


def _name(node: fx.Node) -> str:
    target: Any = node.target
    if isinstance(target, str):
        return target
    overload = getattr(target, "overloadpacket", None)
    return target.__name__ if overload is None else str(overload)


def _difference(before: Counter[str], after: Counter[str]) -> list[str]:
    names = sorted({*before, *after})
    return [f"{after[n] - before[n]:+} {n}" for n in names if after[n] != before[n]]


def _dump(gm: fx.GraphModule, path: Path) -> None:
    path.write_text(f"{readable(gm)}\n", encoding="utf-8")
