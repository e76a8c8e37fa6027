"""The method written a second time: plain PyTorch, slow and obvious, on real diffusers modules.

Written from the paper alone, sharing no code with ``toma_fx``, so that the two check each other.
Samples and regions are loop turns, tokens stay in raster order, and weights are dense matrices.

Shapes: B batch, N image tokens, M destinations, D width, T text tokens, S = T + N or T + M,
n tokens of a region, m destinations of a region.
"""

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from itertools import chain
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import FluxTransformer2DModel, UNet2DConditionModel
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from diffusers.models.transformers.transformer_flux import (
    FluxSingleTransformerBlock,
    FluxTransformerBlock,
)
from torch import Tensor, nn

Regions = list[list[int]]
Rotary = tuple[Tensor, Tensor]


@dataclass(frozen=True, kw_only=True)
class ReferenceOptions:
    """The options of `toma_fx.config.MergeConfig` that a stateless model has."""

    ratio: float = 0.5
    components: tuple[str, ...] = ("self_attention", "cross_attention", "mlp")
    placement: str = "block"
    residual: str = "keep"
    region: str = "tile"
    region_tokens: int = 64
    merge_over: str = "region"
    unmerge: str = "transpose"
    temperature: float = 0.001
    share: str = "group"
    skip: tuple[str, ...] = ()
    """Module paths, in full, of blocks that are left unmerged."""


def hilbert_index(column: int, row: int) -> int:
    """Place of a cell on the Hilbert curve through the square of side 256."""
    index = 0
    for bit in reversed(range(8)):
        side = 1 << bit
        right, down = int(column & side > 0), int(row & side > 0)
        index += side * side * ((3 * right) ^ down)
        column, row = column % side, row % side
        if not down:
            if right:
                column, row = side - 1 - column, side - 1 - row
            column, row = row, column
    return index


def split_regions(height: int, width: int, options: ReferenceOptions) -> Regions:
    """The regions of a grid, each a list of raster indices in the order that breaks ties."""
    count, size = height * width, options.region_tokens
    if options.region == "image":
        return [list(range(count))]
    if options.region == "stripe":
        assert count % size == 0, f"{count} tokens are not a multiple of {size}"
        return [list(range(start, start + size)) for start in range(0, count, size)]
    side = math.isqrt(size)
    assert side * side == size, f"a tile of {size} tokens is not a square"
    assert height % side == 0 and width % side == 0, f"{side} does not divide {height}x{width}"
    regions = []
    for top in range(0, height, side):
        for left in range(0, width, side):
            cells = [(top + y, left + x) for y in range(side) for x in range(side)]
            cells.sort(key=lambda cell: hilbert_index(cell[1], cell[0]))
            regions.append([row * width + column for row, column in cells])
    return regions


def cosine_similarity(a_nD: Tensor, b_mD: Tensor) -> Tensor:
    """Cosine of every pair, in float32: one bf16 step near 1 is 4 logits at tau = 0.001."""
    return F.normalize(a_nD.float(), dim=-1) @ F.normalize(b_mD.float(), dim=-1).T


def select(x_nD: Tensor, count: int) -> list[int]:
    """Destinations of one region by greedy facility location (Eq. 5, Alg. 2)."""
    similarity_nn = cosine_similarity(x_nD, x_nD)
    covered_n = torch.full_like(similarity_nn[0], -1.0)
    chosen: list[int] = []
    for _ in range(count):
        gain_n = (similarity_nn - covered_n[:, None]).clamp(min=0).sum(dim=0)
        # Gains that differ by rounding noise count as equal, so the first wins everywhere.
        gain_n = (gain_n * 4096).round()
        # In a flat area every gain is 0, and an unmasked maximum would repeat itself.
        gain_n[chosen] = -math.inf
        chosen.append(int(gain_n.argmax()))
        covered_n = torch.maximum(covered_n, similarity_nn[:, chosen[-1]])
    return chosen


@dataclass(frozen=True)
class Plan:
    """Destinations and weights of one batch of images."""

    destinations_BM: Tensor
    merge_BMN: Tensor
    unmerge_BNM: Tensor


def make_plan(x_BND: Tensor, regions: Regions, options: ReferenceOptions) -> Plan:
    """Selects destinations and weighs every token's share in them (Eq. 6, Eq. 7)."""
    samples = []
    for x_ND in x_BND:
        picks = []
        for region in regions:
            count = max(1, math.floor(len(region) * (1 - options.ratio) + 0.5))
            picks.append([region[i] for i in select(x_ND[region], count)])
        pairs = list(zip(picks, regions, strict=True))
        if options.merge_over == "image":
            pairs = [(list(chain(*picks)), list(chain(*regions)))]
        merge_mN, unmerge_Nm = [], []
        for kept, sources in pairs:
            cosine_mn = cosine_similarity(x_ND[kept], x_ND[sources])
            weight_mn = (cosine_mn / options.temperature).softmax(dim=0)
            mean_mn = weight_mn / weight_mn.sum(dim=1, keepdim=True)
            # Back by A and not by A~, which would shrink a token by the size of its cluster.
            back_nm = torch.linalg.pinv(mean_mn) if options.unmerge == "pinv" else weight_mn.T
            zeros_mN = weight_mn.new_zeros(len(kept), len(x_ND))
            merge_mN.append(zeros_mN.index_copy(1, torch.tensor(sources), mean_mn))
            unmerge_Nm.append(zeros_mN.T.index_copy(0, torch.tensor(sources), back_nm))
        kept_M = torch.tensor(list(chain(*picks)))
        samples.append((kept_M, torch.cat(merge_mN), torch.cat(unmerge_Nm, dim=1)))
    return Plan(*(torch.stack(parts) for parts in zip(*samples, strict=True)))


def merge(plan: Plan | None, x_BSD: Tensor, text: int = 0) -> Tensor:
    """Merges all tokens but the first ``text``; without a plan, returns them as they are."""
    if plan is None:
        return x_BSD
    merged_BMD = plan.merge_BMN.to(x_BSD.dtype) @ x_BSD[:, text:]
    return torch.cat([x_BSD[:, :text], merged_BMD], dim=1)


def unmerge(plan: Plan | None, y_BSD: Tensor, text: int = 0) -> Tensor:
    """Spreads all tokens but the first ``text``; without a plan, returns them as they are."""
    if plan is None:
        return y_BSD
    spread_BND = plan.unmerge_BNM.to(y_BSD.dtype) @ y_BSD[:, text:]
    return torch.cat([y_BSD[:, :text], spread_BND], dim=1)


@dataclass
class Group:
    """The blocks of one ``nn.ModuleList``: they see the same tokens and may share one plan."""

    options: ReferenceOptions
    regions: Regions = field(default_factory=list)
    plan: Plan | None = None

    def enter(self, height: int, width: int) -> None:
        """Starts a forward pass on a grid of tokens."""
        self.regions = split_regions(height, width, self.options)
        self.plan = None

    def plan_for(self, component: str, x_BND: Tensor) -> Plan | None:
        """The plan in force, made of ``x_BND`` if none is; ``None`` to leave it unmerged."""
        if component != "block" and component not in self.options.components:
            return None
        if self.plan is None:
            self.plan = make_plan(x_BND, self.regions, self.options)
        return self.plan

    def install(self, path: str, block: nn.Module, forward: Callable[..., Any]) -> None:
        """Makes ``forward(block, group, ...)`` the forward of a block that is not skipped."""
        if path in self.options.skip:
            return

        def run(*args: Any, **kwargs: Any) -> Any:
            if self.options.share == "block":
                self.plan = None
            return forward(block, self, *args, **kwargs)

        block.forward = run


def add_update(
    group: Group, plan: Plan | None, h_BND: Tensor, before: Tensor, after: Tensor
) -> Tensor:
    """The image tokens a block returns that took ``before`` and gave ``after``, both merged."""
    if group.options.residual == "replace":
        return unmerge(plan, after)
    return h_BND + unmerge(plan, after - before)


def reference_unet(unet: UNet2DConditionModel, options: ReferenceOptions) -> UNet2DConditionModel:
    """A copy of the UNet whose transformer blocks compute on merged tokens."""
    unet = copy.deepcopy(unet)
    if options.ratio == 0:
        return unet  # Nothing is merged away, so nothing is merged.
    forward = unet_components if options.placement == "component" else unet_block
    for path, stage in unet.named_modules():
        if not isinstance(stage, Transformer2DModel):
            continue
        group = Group(options)

        def see_grid(_: nn.Module, args: tuple[Tensor, ...], group: Group = group) -> None:
            height, width = args[0].shape[-2:]
            group.enter(height, width)

        stage.register_forward_pre_hook(see_grid)
        for index, block in enumerate(stage.transformer_blocks):
            assert block.norm_type == "layer_norm" and not block.only_cross_attention
            group.install(f"{path}.transformer_blocks.{index}", block, forward)
    return unet


def unet_components(
    block: BasicTransformerBlock,
    group: Group,
    hidden_states: Tensor,
    attention_mask: Tensor | None = None,
    encoder_hidden_states: Tensor | None = None,
    encoder_attention_mask: Tensor | None = None,
    cross_attention_kwargs: dict[str, Any] | None = None,
    **unused: Any,
) -> Tensor:
    """A block with a merge and an unmerge around each component."""
    assert attention_mask is None and not cross_attention_kwargs
    text = {
        "encoder_hidden_states": encoder_hidden_states,
        "attention_mask": encoder_attention_mask,
    }
    h_BND = hidden_states
    for component, norm, module, kwargs in (
        ("self_attention", block.norm1, block.attn1, {}),
        ("cross_attention", block.norm2, block.attn2, text),
        ("mlp", block.norm3, block.ff, {}),
    ):
        x_BND = norm(h_BND)
        plan = group.plan_for(component, x_BND)
        h_BND = h_BND + unmerge(plan, module(merge(plan, x_BND), **kwargs))
    return h_BND


def unet_block(
    block: BasicTransformerBlock, group: Group, hidden_states: Tensor, **kwargs: Any
) -> Tensor:
    """A block with one merge and one unmerge around all of it."""
    assert kwargs.get("attention_mask") is None
    plan = group.plan_for("block", hidden_states)
    before_BMD = merge(plan, hidden_states)
    after_BMD = type(block).forward(block, before_BMD, **kwargs)
    return add_update(group, plan, hidden_states, before_BMD, after_BMD)


def reference_flux(
    transformer: FluxTransformer2DModel, options: ReferenceOptions
) -> FluxTransformer2DModel:
    """A copy of the transformer whose blocks compute on merged image tokens."""
    transformer = copy.deepcopy(transformer)
    if options.ratio == 0:
        return transformer  # Nothing is merged away, so nothing is merged.
    double, single = Group(options), Group(options)

    def see_grid(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        assert not kwargs.get("joint_attention_kwargs")
        rows_N, columns_N = kwargs["img_ids"].reshape(-1, 3)[:, 1:].long().unbind(dim=1)
        height, width = int(rows_N.max()) + 1, int(columns_N.max()) + 1
        raster_N = torch.arange(height * width)
        assert torch.equal(rows_N * width + columns_N, raster_N), "img_ids are no raster grid"
        double.enter(height, width)
        single.enter(height, width)

    transformer.register_forward_pre_hook(see_grid, with_kwargs=True)
    for stage, group, by_component in (
        ("transformer_blocks", double, flux_double_components),
        ("single_transformer_blocks", single, flux_single_components),
    ):
        forward = by_component if options.placement == "component" else flux_block
        for index, block in enumerate(getattr(transformer, stage)):
            group.install(f"{stage}.{index}", block, forward)
    return transformer


def run_per_sample(
    module: Callable[..., Any], plan: Plan | None, rotary: Rotary, text: int, **batched: Tensor
) -> list[Tensor]:
    """Calls a module with one sample at a time, and with the rotary values of its tokens.

    A rotary table has no batch dimension, and each sample has destinations of its own.
    """
    results = []
    for sample in range(len(batched["hidden_states"])):
        tables = rotary
        if plan is not None:
            rows_S = torch.cat([torch.arange(text), text + plan.destinations_BM[sample]])
            tables = rotary[0][rows_S], rotary[1][rows_S]
        inputs = {name: value[sample : sample + 1] for name, value in batched.items()}
        result = module(image_rotary_emb=tables, **inputs)
        results.append(result if isinstance(result, tuple) else (result,))
    return [torch.cat(parts) for parts in zip(*results, strict=True)]


def clip_float16(x_BSD: Tensor) -> Tensor:
    """What Flux does against an overflow of float16."""
    return x_BSD.clip(-65504, 65504) if x_BSD.dtype == torch.float16 else x_BSD


def flux_double_components(
    block: FluxTransformerBlock,
    group: Group,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor,
    temb: Tensor,
    image_rotary_emb: Rotary,
    **unused: Any,
) -> tuple[Tensor, Tensor]:
    """A double-stream block with a merge around attention and one around the image MLP."""
    h_BND, text_BTD = hidden_states, encoder_hidden_states
    x_BND, *image_modulation = block.norm1(h_BND, emb=temb)
    t_BTD, *text_modulation = block.norm1_context(text_BTD, emb=temb)
    gate, shift_mlp, scale_mlp, gate_mlp = (part[:, None] for part in image_modulation)
    t_gate, t_shift_mlp, t_scale_mlp, t_gate_mlp = (part[:, None] for part in text_modulation)

    plan = group.plan_for("self_attention", x_BND)
    merged = {"hidden_states": merge(plan, x_BND), "encoder_hidden_states": t_BTD}
    attn_BMD, text_attn_BTD = run_per_sample(
        block.attn, plan, image_rotary_emb, text_BTD.shape[1], **merged
    )
    h_BND = h_BND + gate * unmerge(plan, attn_BMD)
    text_BTD = text_BTD + t_gate * text_attn_BTD

    x_BND = block.norm2(h_BND) * (1 + scale_mlp) + shift_mlp
    plan = group.plan_for("mlp", x_BND)
    h_BND = h_BND + gate_mlp * unmerge(plan, block.ff(merge(plan, x_BND)))

    t_BTD = block.norm2_context(text_BTD) * (1 + t_scale_mlp) + t_shift_mlp
    text_BTD = text_BTD + t_gate_mlp * block.ff_context(t_BTD)
    return clip_float16(text_BTD), h_BND


def flux_single_components(
    block: FluxSingleTransformerBlock,
    group: Group,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor,
    temb: Tensor,
    image_rotary_emb: Rotary,
    **unused: Any,
) -> tuple[Tensor, Tensor]:
    """A single-stream block, whose attention and MLP read the same tokens side by side."""
    text = encoder_hidden_states.shape[1]
    h_BSD = torch.cat([encoder_hidden_states, hidden_states], dim=1)
    x_BSD, gate_BD = block.norm(h_BSD, emb=temb)
    attn_plan = group.plan_for("self_attention", x_BSD[:, text:])
    mlp_plan = group.plan_for("mlp", x_BSD[:, text:])

    merged_BSD = merge(attn_plan, x_BSD, text)
    (attn_BSD,) = run_per_sample(
        block.attn, attn_plan, image_rotary_emb, text, hidden_states=merged_BSD
    )
    mlp_BSD = block.act_mlp(block.proj_mlp(merge(mlp_plan, x_BSD, text)))
    if attn_plan is not None and mlp_plan is not None:
        out_BSD = block.proj_out(torch.cat([attn_BSD, mlp_BSD], dim=2))
        out_BSD = unmerge(attn_plan, out_BSD, text)
    else:
        # The branches differ in length until the merged one is spread again.
        attn_BSD, mlp_BSD = unmerge(attn_plan, attn_BSD, text), unmerge(mlp_plan, mlp_BSD, text)
        out_BSD = block.proj_out(torch.cat([attn_BSD, mlp_BSD], dim=2))
    h_BSD = clip_float16(h_BSD + gate_BD[:, None] * out_BSD)
    return h_BSD[:, :text], h_BSD[:, text:]


def flux_block(
    block: nn.Module,
    group: Group,
    image_rotary_emb: Rotary,
    joint_attention_kwargs: None = None,
    **batched: Tensor,
) -> tuple[Tensor, Tensor]:
    """A block of either kind with one merge and one unmerge around all of it."""
    h_BND, text_BTD = batched["hidden_states"], batched["encoder_hidden_states"]
    plan = group.plan_for("block", h_BND)
    before_BMD = merge(plan, h_BND)
    original = partial(type(block).forward, block)
    text_out_BTD, after_BMD = run_per_sample(
        original,
        plan,
        image_rotary_emb,
        text_BTD.shape[1],
        **batched | {"hidden_states": before_BMD},
    )
    return text_out_BTD, add_update(group, plan, h_BND, before_BMD, after_BMD)
