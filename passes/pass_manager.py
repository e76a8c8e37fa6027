"""Adapter for running our passes in `torch.fx`'s own pass manager.

The wrapped pass defines before and after; ``PassManager`` expects a `PassResult`::

    PassManager(passes=[FxPass(Merge(...)), FxPass(OnePlan()), others_pass])
"""

from torch import fx
from torch.fx.passes.infra.pass_base import PassBase, PassResult

from toma_fx.passes.pipeline import Pass, run_passes


class FxPass(PassBase):
    """A pass for `torch.fx.passes.infra.pass_manager.PassManager`.

    It rewrites the given graph module in place and leaves correct example values and no dead code,
    as `run_passes` does. Run it once: a graph must not be merged twice.
    """

    def __init__(self, each: Pass) -> None:
        self.each = each

    def call(self, graph_module: fx.GraphModule) -> PassResult:
        """Run the pass."""
        counts: list[int] = []
        run_passes(graph_module, (self.each,), lambda each, gm, changed: counts.append(changed))
        return PassResult(graph_module, counts[0] > 0)
