"""Peak memory of a call on the CPU: of one that runs, and of one whose tensors have only shapes."""

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from toma_fx.bench import timing
from toma_fx.calls import forced
from toma_fx.checkpoints import load_model
from toma_fx.config import MergeConfig
from toma_fx.inputs import random_inputs
from toma_fx.policy import Decision, policy_of
from toma_fx.runtime.plan import REUSE
from toma_fx.transform import transform


class _Live(TorchDispatchMode):
    """Follows every storage that operators make, from its first tensor to its last."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.held = self.peak = 0
        self.known: weakref.WeakSet[Any] = weakref.WeakSet()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for given in tree_leaves((args, kwargs)):
            if isinstance(given, Tensor):
                self.known.add(given.untyped_storage())  # there before the call
        output = func(*args, **(kwargs or {}))
        for made in tree_leaves(output):
            if not isinstance(made, Tensor) or made.is_meta:  # which says a shape and holds nothing
                continue
            if (storage := made.untyped_storage()) not in self.known:
                self.known.add(storage)
                self._hold(storage.nbytes())
                weakref.finalize(storage, self._hold, -storage.nbytes())
        return output

    def _hold(self, count: int) -> None:
        self.held += count
        self.peak = max(self.peak, self.held)


def peak_memory(run: Callable[[], object]) -> int:
    """Bytes of tensors that a call holds at its peak, beyond what was there before it.

    On a GPU it is `toma_fx.bench.timing.peak_memory`. On the CPU torch's profiler reports the
    allocations, those of compiled code included, but not the scratch memory inside oneDNN.

    Args:
        run: the call; it is made once.
    """
    if torch.cuda.is_available():
        return timing.peak_memory(run)
    # acc_events only keeps older versions of torch from warning that one cycle is kept.
    how: Any = {"activities": [ProfilerActivity.CPU], "profile_memory": True, "acc_events": True}
    with torch.inference_mode(), profile(**how) as profiler:
        result = run()  # kept, as a caller would
    del result
    held = peak = 0
    inner: Any = profiler.profiler
    events = [e for e in inner.kineto_results.events() if e.name() == "[memory]"]
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


def live_peak(run: Callable[[], object]) -> int:
    """Bytes of tensors that an eager call holds at its peak, beyond what was there before it.

    Scratch memory inside kernels is not in it.

    Args:
        run: the call, which is made once. Its tensors may be without data, as those of torch's
            ``FakeTensorMode``.
    """
    with torch.no_grad(), _Live() as live:
        result = run()  # kept, as a caller would
    del result
    peak: int = live.peak
    return peak


def peak_of_model(
    name: str,
    config: MergeConfig | None = None,
    *,
    dtype: torch.dtype = torch.bfloat16,
    height: int | None = None,
    width: int | None = None,
    frames: int | None = None,
    batch: int = 1,
    **changes: Any,
) -> int:
    """`live_peak` of one eager forward on the CPU, from shapes alone.

    Args:
        name: name of a published model, such as ``"sdxl"`` or ``"flux"``.
        config: how to merge; the model is untouched without it. The call merges, and makes plans.
        dtype: dtype of the model.
        height: height in pixels; the model's own when left out.
        width: width in pixels; like ``height`` when left out.
        frames: frames of a video; the model's own when left out.
        batch: number of images, or videos.
        **changes: changes of the model's configuration, such as ``num_layers=3``.
    """
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        model = load_model(name, dtype=dtype, **changes)
        inputs = random_inputs(model, height=height, width=width, frames=frames, batch=batch)
        if config is None:
            return live_peak(lambda: model(**inputs))
        merged = transform(model, config)
        keeps = REUSE in policy_of(config).variants
        with forced(Decision(keeps=keeps)):  # this holds the plans, as a model's state would
            return live_peak(lambda: merged(**inputs))
