"""Plans that last for several denoising steps (section 4.3.2, Table 7), kept as tensors.

The decision to plan again is made of tensors and a conditional node, so a compiled or exported
model holds one graph for all steps. A plan is used only in the denoising run that made it:

* a timestep that rises, or other conditioning, starts a new run;
* every plan carries the number of its run, and one of another run is made again;
* plans are kept apart by the shape and device of the tokens;
* a call while another is under way, as from two threads, is refused.

What cannot be told apart is two images with the same prompt that take turns, step by step, on one
model, or of which one broke off and the other starts at a lower timestep. Give each its own
``transform`` (the weights are shared, so it costs no memory), or reset the clock.
"""

import contextlib
import operator
import threading
from collections.abc import Iterator

import torch
from torch import Tensor, fx, nn

# What torch.cond calls once it has compiled its branches; called directly, eager mode stays eager.
from torch._higher_order_ops.cond import cond_op

from toma_fx.errors import InputError

_ONE_BY_ONE = threading.Lock()
"""Held only while a call begins."""


class DenoisingClock(nn.Module):
    """Counts denoising steps from the timesteps that it sees; never asks for their number.

    All its buffers are integers, because casting a model to bfloat16 also casts floating buffers:
    the two floating values are kept as the bits of a float64. None is part of the state dict.
    """

    timestep_bits: Tensor
    conditioning_bits: Tensor
    step: Tensor
    run: Tensor

    def __init__(self) -> None:
        super().__init__()
        for name in ("timestep_bits", "conditioning_bits", "step", "run"):
            self.register_buffer(name, torch.tensor(0), persistent=False)
        self.in_call = False

    @contextlib.contextmanager
    def alone(self) -> Iterator[None]:
        """Hold the kept plans for one call of the model.

        Raises:
            InputError: when another call is under way.
        """
        with _ONE_BY_ONE:
            if self.in_call:
                raise InputError(
                    "a model with a schedule keeps its plans between calls and cannot serve two "
                    "calls at the same time; transform once for each thread, which shares the "
                    "weights, or without a schedule"
                )
            self.in_call = True
        try:
            yield
        finally:
            self.in_call = False

    def forward(self, timestep: Tensor | float, conditioning: Tensor) -> tuple[Tensor, Tensor]:
        """Note a call of the model.

        Args:
            timestep: scalar or ``(B,)``; the batch shares one denoising step.
            conditioning: the prompt's hidden states; other values mean another image.

        Returns:
            The step of the run, from 0, and the number of the run, both int64 scalars.
        """
        device = self.step.device
        now = torch.as_tensor(timestep, device=device).flatten()[0].double()
        values = conditioning.flatten().double()
        # Weighted by place, so that two prompts that change places are not the same.
        place = torch.arange(1, values.numel() + 1, device=values.device)
        prompt = (values * place).sum().to(device)
        before = self.timestep_bits.view(torch.float64)
        new_run = (now > before) | (prompt != self.conditioning_bits.view(torch.float64))
        self.run.add_(new_run)
        self.step.copy_(torch.where(new_run, 0, self.step + (now < before)))
        self.timestep_bits.copy_(now.view(torch.int64))
        self.conditioning_bits.copy_(prompt.view(torch.int64))
        return self.step.clone(), self.run.clone()

    def reset(self) -> None:
        """Forget the run, so that the next call makes new plans."""
        self.run.add_(1)
        self.step.zero_()


class PlanSlot(nn.Module):
    """One kept plan: destinations, merge weight, unmerge weight, and the run that made them."""

    destinations: Tensor
    merge_weight: Tensor
    unmerge_weight: Tensor
    run: Tensor

    def __init__(self, destinations: Tensor, merge_weight: Tensor, unmerge_weight: Tensor) -> None:
        super().__init__()
        self.register_buffer("destinations", torch.zeros_like(destinations), persistent=False)
        self.register_buffer("merge_weight", torch.zeros_like(merge_weight), persistent=False)
        self.register_buffer("unmerge_weight", torch.zeros_like(unmerge_weight), persistent=False)
        self.register_buffer(
            "run", torch.full((), -1, device=destinations.device), persistent=False
        )


class PlanMemory(nn.Module):
    """Keeps the plan of a group's first block between calls, one slot for each shape of tokens.

    Args:
        region_tokens, ratio, selector: as in `toma_fx.runtime.selector.select`.
        temperature, merge_over, unmerge: as in `toma_fx.runtime.merging.weigh`.
        select_every, weigh_every: steps between two selections and two computations of weights.
    """

    def __init__(
        self,
        *,
        region_tokens: int,
        ratio: float,
        selector: str,
        temperature: float,
        merge_over: str,
        unmerge: str,
        select_every: int,
        weigh_every: int,
    ) -> None:
        super().__init__()
        self.selection = (region_tokens, ratio, selector)
        self.weighing = (temperature, merge_over, unmerge)
        self.select_every = select_every
        self.weigh_every = weigh_every
        self.slots = nn.ModuleDict()

    def forward(self, tokens: Tensor, step: Tensor, run: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The plan for this step, made again when its time has come.

        Args:
            tokens: ``(B, N, D)``.
            step: int64 scalar, from `DenoisingClock`.
            run: int64 scalar, from `DenoisingClock`.

        Returns:
            destinations ``(B, R, m)``, merge weight and unmerge weight, as `weigh` returns them.
        """
        if tokens.is_meta:  # without data there is no deciding: a step that plans
            destinations = torch.ops.toma.select(tokens, *self.selection)
            return destinations, *torch.ops.toma.weigh(tokens, destinations, *self.weighing)
        if not torch.compiler.is_compiling():
            make_slots(self, tokens)
        slot = self.slots[slot_name(tokens)]
        assert isinstance(slot, PlanSlot)
        selection, weighing = self.selection, self.weighing
        tokens = tokens.detach()

        def select(tokens: Tensor, kept: Tensor) -> tuple[Tensor]:
            return (torch.ops.toma.select(tokens, *selection),)

        def keep(tokens: Tensor, *kept: Tensor) -> tuple[Tensor, ...]:
            return tuple(part.clone() for part in kept)

        def weigh(
            tokens: Tensor, merge: Tensor, unmerge: Tensor, destinations: Tensor
        ) -> tuple[Tensor, ...]:
            weights = torch.ops.toma.weigh(tokens, destinations, *weighing)
            # Neither a view of the other, as a kept one is not: compiled blocks tell them apart.
            return weights[0].to(merge.dtype).contiguous(), weights[1].to(unmerge.dtype).clone()

        def keep_weights(
            tokens: Tensor, merge: Tensor, unmerge: Tensor, destinations: Tensor
        ) -> tuple[Tensor, ...]:
            return merge.clone(), unmerge.clone()

        select_now = (step % self.select_every == 0) | (slot.run != run)
        weigh_now = (step % self.weigh_every == 0) | select_now
        (destinations,) = cond_op(select_now, select, keep, (tokens, slot.destinations))
        merge, unmerge = cond_op(
            weigh_now,
            weigh,
            keep_weights,
            (tokens, slot.merge_weight, slot.unmerge_weight, destinations),
        )
        slot.destinations.copy_(destinations)
        slot.merge_weight.copy_(merge)
        slot.unmerge_weight.copy_(unmerge)
        slot.run.copy_(run)
        return destinations, merge.to(tokens.dtype), unmerge.to(tokens.dtype)

    def blank(self, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """A plan of the right shapes, without a search."""
        destinations = torch.ops.toma.select(tokens, *self.selection[:2], "grid")
        merge, unmerge = torch.ops.toma.weigh(
            tokens, destinations, 1.0, self.weighing[1], "transpose"
        )
        return destinations, merge.contiguous(), unmerge


def slot_name(tokens: Tensor) -> str:
    """Where the plan of ``(B, N, D)`` tokens is kept, among ``PlanMemory.slots``."""
    # An index cannot be symbolic: a slot is for one shape.
    batch, count, width = map(operator.index, tokens.shape)
    return f"{batch}x{count}x{width} {tokens.device}"


# A slot must exist before the first compiled call of a block reads it, or that call would be traced
# twice: once without the slot and once with it. So the borders of a stage or model make it, and
# when they are compiled themselves, this runs while the call is being traced.
@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _make_slots(
    module: nn.Module, key: str, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device
) -> bool:
    with torch.inference_mode(mode=False), torch.no_grad():
        for memory in module.modules():
            if isinstance(memory, PlanMemory) and key not in memory.slots:
                tokens = torch.zeros(shape, dtype=dtype, device=device)
                memory.slots[key] = PlanSlot(*memory.blank(tokens))
    return True


def make_slots(module: nn.Module, tokens: Tensor) -> None:
    """Make room for the plans of all blocks in ``module``, for ``(B, N, D)`` tokens like these."""
    if isinstance(tokens, fx.Proxy):
        return  # a symbolic trace keeps no plan; its graph makes room when it runs
    shape = tuple(map(operator.index, tokens.shape))
    _make_slots(module, slot_name(tokens), shape, tokens.dtype, tokens.device)
