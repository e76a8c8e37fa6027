"""Borders of models that diffusers' caches know, or whose tokens ranks can split."""

from typing import Any, cast

from torch import nn

from toma_fx.calls import Arguments
from toma_fx.errors import ModelError
from toma_fx.foreign import check_caches
from toma_fx.model_border import ModelBorder
from toma_fx.ordering import TOKEN_ORDER_HOOK, token_order_hook
from toma_fx.ranks import Ranks, check_family, part_of


class CachedModelBorder(ModelBorder):
    """Border class of a model that diffusers' caches know."""

    def enable_cache(self, config: Any) -> None:
        """Same as diffusers' method, but refuse caches that merging would mislead."""
        model: Any = super()
        model.enable_cache(config)
        try:
            check_caches(cast(nn.Module, self), self.toma_recipe)
        except ModelError:
            model.disable_cache()
            raise


class ParallelModelBorder(ModelBorder):
    """Border class of a model whose tokens can be split among ranks."""

    def enable_parallelism(self, *, config: Any, cp_plan: Any = None) -> None:
        """Same as diffusers' method, but ranks of context parallelism get neighbouring tiles.

        Tokens are put in tile order before they are split. So each rank holds a compact part of the
        image; its regions are those of the whole image if the regions divide its tokens.
        """
        from diffusers.hooks import HookRegistry

        if self.toma_key.config.placement == "keys" and _is_context_parallel(config):
            raise ModelError(
                "context parallelism hands keys and values from rank to rank inside the attention "
                "that placement='keys' rewrote; transform with placement='block'"
            )
        model: Any = super()
        if self.toma_recipe.merges_references and _is_context_parallel(config):
            raise ModelError(
                "ranks of context parallelism split the tokens before references are merged; use "
                "tensor parallelism (TensorParallelConfig), or let the ranks share the model "
                "without merging: toma_fx.restore(model)"
            )
        if self.toma_key.grids is not None and _is_context_parallel(config):
            self._split_by_shapes(config, cp_plan)
            return
        model.enable_parallelism(config=config, cp_plan=cp_plan)
        if self.toma_key.sequence is not None and _is_context_parallel(config):
            registry = HookRegistry.check_if_exists_or_initialize(self)
            registry.register_hook(token_order_hook(self.toma_key.sequence), TOKEN_ORDER_HOOK)
            self.toma_ordered_by_hook = True
            parallel: Any = self._parallel_config  # type: ignore[attr-defined]
            self.toma_ranks = Ranks(parallel.context_parallel_config, {})

    def toma_check_ranks(self, call: Arguments) -> None:
        """Refuse a call before it is split, if ranks would get unequal parts of it.

        Raises:
            InputError: when they would.
        """
        sequence = self.toma_key.sequence
        if sequence is None or self.toma_ranks is None or call[sequence.ids].is_meta:
            return
        grids = self.toma_state.grids_of(call[sequence.ids], sort=True)
        part_of(0, grids or (call[sequence.tokens].shape[1],), self.toma_ranks, self.toma_recipe)

    def _split_by_shapes(self, config: Any, cp_plan: Any) -> None:
        """Split a model whose tokens follow from shapes and which is called with whole images."""
        check_family(self.toma_key.family)
        model: Any = super()
        plan = dict((model._cp_plan if cp_plan is None else cp_plan) or {})
        arguments = plan.pop("", {})
        model.enable_parallelism(config=config, cp_plan=plan or None)
        parallel: Any = self._parallel_config  # type: ignore[attr-defined]
        self.toma_ranks = Ranks(parallel.context_parallel_config, arguments)


class CachedParallelModelBorder(CachedModelBorder, ParallelModelBorder):
    """Border class of a model with both properties."""


def _is_context_parallel(config: Any) -> bool:
    parallel = getattr(config, "context_parallel_config", config)
    return parallel is not None and hasattr(parallel, "ulysses_degree")
