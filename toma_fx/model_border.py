"""Border of a model: it decides what a call runs, outside every graph, and keeps the results.

Dynamo does not trace the frames that decide (`toma_fx.install_borders` excludes them): with
``torch.compile(model)`` the graph begins at `ModelBorder._run`. If a model is a part of something
larger that is compiled or exported, these frames are traced like all other code, and a policy that
needs values raises an error with the way out.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from toma_fx.border import Border
from toma_fx.calls import Arguments, LastCall, forced_now, is_empty, is_traced, to_meta
from toma_fx.errors import InputError, ModelError
from toma_fx.foreign import Watched
from toma_fx.grids import image_sequence, run_in_order, token_order
from toma_fx.ordering import image_ids, in_token_order, known_order
from toma_fx.policy import Always, Decision, ModelCall, policy_of
from toma_fx.ranks import Ranks, part_of
from toma_fx.recipe import Recipe
from toma_fx.references import kept_plan, reference_grids, refuse_traced, run_on_references
from toma_fx.runtime.memory import Kept, Memories
from toma_fx.runtime.plan import (
    MERGE_AS_BEFORE,
    MERGED,
    RECALL,
    REMEMBER,
    REUSE,
    SCOPE,
    UNTOUCHED,
    WEIGH,
    CallScope,
    InScope,
    current,
    enter,
)
from toma_fx.state import State
from toma_fx.timesteps import TimestepReader


class ModelBorder(Border):
    """Border class of a model."""

    toma_recipe: Recipe
    toma_state: State
    toma_reader: TimestepReader
    toma_last_call: LastCall | None = None
    toma_watched: Watched | None = None
    # A flag, because pipelines add to the registry of hooks between calls of a compiled model.
    toma_ordered_by_hook = False
    toma_ranks: Ranks | None = None
    """Ranks that share the model, if its token grids follow from shapes."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Same as `torch.nn.Module.__call__`, but in a frame that Dynamo does not trace."""
        return nn.Module.__call__(self, *args, **kwargs)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Same as diffusers' ``forward``."""
        if torch.compiler.is_dynamo_compiling():
            call, decision = self.toma_named(args, kwargs), self._decide_traced()
        else:
            call, decision = self._before(args, kwargs)
        keep = decision.keeps and decision.variant not in (*MERGE_AS_BEFORE, UNTOUCHED)
        output, made = self._run(
            call,
            decision.variant,
            decision.grids,
            decision.given,
            decision.kept,
            _ahead(decision, call),
            keep,
        )
        if made is not None:
            self._after(decision, made)
        return output

    def _run(
        self,
        call: Arguments,
        variant: str,
        grids: tuple[int, ...] | None,
        given: tuple[bool, ...] | None,
        kept: Kept | None,
        ahead: Tensor | None,
        keep: bool,
    ) -> tuple[Any, Kept | None]:
        """Call the model in a new scope; this is the part that is compiled.

        Args:
            call: arguments of diffusers' ``forward``.
            variant: variant of the blocks that runs.
            grids: token counts of the grids in the image sequence, if there are several.
            given: whether each frame of a video is given, if the values of the call tell.
            kept: data that an earlier call left.
            ahead: distance from that call, 0-dimensional.
            keep: whether to return the data that this call makes.
        """
        border, config = self.toma_key.grids, self.toma_key.config
        if config.tokens == "references":
            return run_on_references(self.toma_base_forward, call, self, grids, kept, keep)
        # A block that needs no data from the model's call may be run, or exported, on its own.
        alone = config.share == "block" and (variant, grids) == (MERGED, None) and border is None
        unmerged, order = 0, None
        if border is not None:
            sequence = image_sequence(border, config, self, call, given)
            grids, unmerged = sequence.segments, sequence.unmerged
            if self.toma_ranks is not None:
                unmerged, grids = part_of(unmerged, grids, self.toma_ranks, self.toma_recipe)
            like = self.toma_key.family.image(call)
            order = token_order(sequence, like, config, border.given_last)
        elif grids is None and self.toma_key.positions is not None:
            grids = (call[self.toma_key.positions.tokens].shape[1],)
        memories = None
        if variant in (REMEMBER, RECALL):
            memories = Memories({} if kept is None else kept.memory, ahead)
        scope = CallScope(
            variant,
            grids,
            None if kept is None else kept.plans,
            keeps=keep,
            unmerged=unmerged,
            order=order,
            memories=memories,
        )
        name = self.toma_key.family.attention_kwargs
        if not alone and name is not None:
            call = {**call, name: {**(call.get(name) or {}), SCOPE: scope}}
        before = enter(scope)
        try:
            output = self._run_in_order(call, order)
        finally:
            enter(before)
        if not keep:
            return output, None
        return output, Kept(scope.made(), {} if memories is None else memories.made)

    def _run_in_order(self, call: Arguments, order: Tensor | None) -> Any:
        """Run diffusers' forward on tokens in the order that regions need."""
        forward: Callable[..., Any] = self.toma_base_forward
        border, sequence = self.toma_key.grids, self.toma_key.sequence
        if self.toma_ranks is not None:
            forward = _of_rank(forward, self.toma_ranks)
        if border is not None and order is not None:
            with known_order(lambda: order):
                return run_in_order(forward, call, border, order, self.config)  # type: ignore[attr-defined]
        if sequence is None or self.toma_ordered_by_hook:
            return forward(**call)
        return in_token_order(forward, call, sequence)

    def _before(self, args: tuple[Any, ...], kwargs: Arguments) -> tuple[Arguments, Decision]:
        """Return the call with named arguments, and the decision for it."""
        call = self.toma_named(args, kwargs)
        before = forced_now()
        if before is not None:
            return call, before.decision
        if torch.jit.is_tracing():  # type: ignore[attr-defined, no-untyped-call]
            raise ModelError(
                f"TorchScript cannot trace a transformed {type(self).__name__}, whose graphs hold "
                "lists of sizes; export it with torch.export or toma_fx.export, and to ONNX with "
                "torch.onnx.export(toma_fx.export(model, inputs), dynamo=True)"
            )
        if is_traced(call):
            return call, self._decide_traced()
        if any(is_empty(t) for t in pytree.tree_leaves(call) if isinstance(t, Tensor)):
            # Without data there is nothing to decide by.
            return call, Decision(policy_of(self.toma_recipe.config).variants[0])
        call = self._read(call)
        self._check_checkpointing()
        if self.toma_watched is None:
            self.toma_watched = Watched(cast(nn.Module, self), self.toma_recipe)
        self.toma_watched.check_call(call)
        decision = self._decide(call)
        self.toma_last_call = LastCall(to_meta(call), decision.grids, decision.given)
        return call, decision

    def _read(self, call: Arguments) -> Arguments:
        """Add arguments that the call leaves out and that follow from a tensor's values."""
        border = self.toma_key.grids
        reading = None if border is None else border.reading
        tensor = None if reading is None else call.get(reading.argument)
        if reading is None or tensor is None:
            return call
        made = self.toma_state.read((tensor,), lambda: reading.makes(tensor))
        return {**call, **{name: v for name, v in made.items() if call.get(name) is None}}

    def _decide_traced(self) -> Decision:
        """Return the decision for a call whose values are unknown.

        Raises:
            ModelError: when the policy needs values.
        """
        config = self.toma_recipe.config
        if config.tokens == "references":
            refuse_traced(self.toma_key)
        if isinstance(policy_of(config), Always):
            return Decision()
        raise ModelError(
            f"{config.choosing} chooses between graphs by the values of a call, and one graph "
            "cannot hold them all. Compile the model itself, by torch.compile(model), "
            "model.compile() or model.compile_repeated_blocks(), which compile each; export it "
            "with toma_fx.export, which gives a program for each"
        )

    def _decide(self, call: Arguments) -> Decision:
        policy, model = policy_of(self.toma_recipe.config), cast(nn.Module, self)
        given = self._given(call)
        decision = Decision()
        if self.toma_recipe.merges_references:
            grids = reference_grids(self, call)
            kept = None if grids is None else kept_plan(self, call, grids)
            return Decision(kept=kept, grids=grids)
        if not isinstance(policy, Always):
            decision = policy.decide(self._facts(call, given), self.toma_state)
        if decision.variant == REUSE and self.toma_recipe.needs_new_rows(call):
            decision = replace(decision, variant=WEIGH)  # this variant takes all rows again
        return replace(decision, grids=grids_in(model, call), given=given)

    def _given(self, call: Arguments) -> tuple[bool, ...] | None:
        """Return whether each frame of a video is given, according to the values of a call.

        The values are in tensors that are new at every step. So if the pipeline is known, they are
        read at the first call of a run with a prompt, and used for the whole run.
        """
        border, planned = self.toma_key.grids, self.toma_reader.planned
        if border is None or border.reads_given is None:
            return None
        model = cast(nn.Module, self)
        if planned is None:
            return given_in(model, call)
        once = (planned, self._prompt(call))
        shape = self.toma_recipe.family.image(call).shape
        return self.toma_state.read(once, lambda: given_in(model, call), shape)  # type: ignore[no-any-return]

    def _prompt(self, call: Arguments) -> Tensor:
        """Return the prompt's embeddings; an empty tensor if there are none."""
        family = self.toma_recipe.family
        given = pytree.tree_leaves([call.get(name) for name in family.prompt])
        prompt = next((each for each in given if isinstance(each, Tensor)), None)
        return family.image(call).new_empty(0) if prompt is None else prompt

    def _facts(self, call: Arguments, given: tuple[bool, ...] | None) -> ModelCall:
        """Return the properties of a call that a policy may use."""
        family, reader = self.toma_recipe.family, self.toma_reader
        timestep, image, prompt = family.timestep(call), family.image(call), self._prompt(call)
        return ModelCall(
            timesteps=lambda: [
                -each if family.time_rises else each for each in reader.read(timestep)
            ],
            levels=lambda: [
                family.noise_level(each, reader.scheduler) for each in reader.read(timestep)
            ],
            prompt=prompt,
            shape=(image.shape, image.dtype, image.device, prompt.shape, prompt.dtype, given),
        )

    def _after(self, decision: Decision, made: Kept) -> None:
        before, memory = forced_now(), self.toma_recipe.config.memory
        earlier = memory is not None and memory.extrapolate
        if before is not None:
            before.made = made.following(None) if earlier else made
        elif decision.run is not None:
            self.toma_state.keep(decision.run, made, earlier=earlier)

    def _check_checkpointing(self) -> None:
        """Refuse checkpointed blocks that share plans in a compiled model, before Dynamo does."""
        model: Any = self
        compiled = "_run" in vars(self) and torch.is_grad_enabled()
        if (
            compiled
            and self.toma_recipe.merged
            and self.toma_recipe.config.share == "group"
            and model.is_gradient_checkpointing
        ):
            raise InputError(
                "torch.compile cannot take a whole model whose blocks share plans through gradient "
                "checkpointing; compile its blocks instead: model.compile_repeated_blocks()"
            )

    @property
    def _gradient_checkpointing_func(self) -> Any:
        """Diffusers' attribute: the function that runs a block under gradient checkpointing."""
        checkpoint = vars(self).get("_gradient_checkpointing_func")
        scope = current()
        if checkpoint is None or scope is None:
            return checkpoint
        return lambda block, *args, **kwargs: checkpoint(InScope(block, scope), *args, **kwargs)

    @_gradient_checkpointing_func.setter
    def _gradient_checkpointing_func(self, checkpoint: Any) -> None:
        vars(self)["_gradient_checkpointing_func"] = checkpoint

    def compile(self, *args: Any, **kwargs: Any) -> None:
        """Compile the model for its own calls; takes the arguments of `torch.compile`."""
        vars(self).pop("_run", None)
        self._run = torch.compile(self._run, *args, **kwargs)  # type: ignore[method-assign]

    def compile_repeated_blocks(self, *args: Any, **kwargs: Any) -> None:
        """Same as diffusers' method."""
        vars(self).pop("_run", None)  # compile blocks instead of the model
        model: Any = super()
        model.compile_repeated_blocks(*args, **kwargs)

    def _reset_stateful_cache(self, *args: Any, **kwargs: Any) -> None:
        """End the run; every diffusers pipeline calls this when an image is done."""
        reset = getattr(super(), "_reset_stateful_cache", None)
        if reset is not None:
            reset(*args, **kwargs)
        self.toma_state.end()
        self.toma_reader.end()


def _ahead(decision: Decision, call: Arguments) -> Tensor | None:
    """Return the distance from an earlier call as a tensor: a number would be fixed in a graph."""
    if decision.variant != RECALL:
        return None
    if isinstance(decision.ahead, Tensor):  # an argument of a program that is being exported
        return decision.ahead
    like = next(each for each in pytree.tree_leaves(call) if isinstance(each, Tensor))
    return torch.full((), decision.ahead, dtype=torch.float32, device=like.device)


def _of_rank(forward: Callable[..., Any], ranks: Ranks) -> Callable[..., Any]:
    """Wrap diffusers' forward so that it runs on the rows of a rank."""
    return lambda **call: forward(**ranks.split(call))


def grids_in(model: nn.Module, call: Mapping[str, Any]) -> tuple[int, ...] | None:
    """Return the token counts of the grids in a call's image sequence; None if it is one grid.

    Args:
        model: a model, transformed or not.
        call: keyword arguments, with data.
    """
    if not isinstance(model, ModelBorder):
        return None
    if model.toma_recipe.merges_references:
        return reference_grids(model, call)
    border, region = model.toma_key.positions, model.toma_key.config.region
    if border is None or region == "image" or call[border.ids].is_meta:
        return None
    named = [(border.tokens, border.ids)]
    if border.references is not None and call.get(border.references[0]) is not None:
        named.append(border.references)
    found: list[int] = []
    for tokens, name in named:
        ids = image_ids(call, border, tokens, name)
        grids = model.toma_state.grids_of(ids, sort=region == "tile", places=border.places)
        found += grids or (ids.shape[0],)
    return tuple(found) if len(found) > 1 else None


def given_in(model: nn.Module, call: Mapping[str, Any]) -> tuple[bool, ...] | None:
    """Return whether each frame of a video is given; None if the values of the call do not tell.

    Args:
        model: a model, transformed or not.
        call: keyword arguments.
    """
    border = model.toma_key.grids if isinstance(model, ModelBorder) else None
    tensors = [each for each in pytree.tree_leaves(dict(call)) if isinstance(each, Tensor)]
    if border is None or border.reads_given is None or any(map(is_empty, tensors)):
        return None
    return border.reads_given(model, call)
