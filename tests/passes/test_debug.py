"""Graphs as files, counts of operators, and passes inside torch's own pass manager."""

from pathlib import Path

import torch
from torch.fx.passes.infra.pass_manager import PassManager

import toma_fx
from tests.passes.blocks import block_of, capture, hand_on_pass, merge_pass, row_of
from tests.tiny import tiny_sdxl_unet, unet_inputs
from toma_fx.passes.cleanup import Cleanup
from toma_fx.passes.debug import dump_each, operator_counts
from toma_fx.passes.merge import Merge
from toma_fx.passes.one_plan import OnePlan
from toma_fx.passes.pass_manager import FxPass
from toma_fx.passes.pipeline import Pass, run_passes
from toma_fx.passes.sites import Site

BLOCK = block_of("unet")
PASSES: tuple[Pass, ...] = (
    merge_pass(BLOCK, components=("self_attention", "mlp")),
    OnePlan(),
    hand_on_pass(BLOCK),
    Cleanup(),
)


def test_each_pass_leaves_its_graph_and_a_line(tmp_path: Path) -> None:
    gm = capture(BLOCK)
    lines: list[str] = []
    run_passes(gm, PASSES, dump_each(gm, tmp_path / "graphs", lines.append))
    files = sorted((tmp_path / "graphs").iterdir())
    assert [f.name for f in files] == [
        "0_captured.py",
        "1_merge.py",
        "2_one_plan.py",
        "3_hand_on.py",
        "4_cleanup.py",
    ]
    before, merged, one, handed, after = (f.read_text() for f in files)
    assert "torch.ops.toma.merge" not in before
    assert "merged_1 = torch.ops.toma.merge(norm3, merge_weight_1, layout_1)" in merged
    assert "merged_1 = torch.ops.toma.merge(norm3, merge_weight, layout)" in one
    assert "plan = share(cross_attention_kwargs, 'blocks', merge_weight, unmerge_weight)" in handed
    assert after == handed
    operators = "+2 toma.merge, +2 toma.select, +2 toma.unmerge, +2 toma.weigh"
    assert lines == [
        f"1 merge: 2 changes, +4 getitem, +2 region_layout, {operators}\n",
        "2 one_plan: 4 changes, -2 getitem, -1 region_layout, -1 toma.select, -1 toma.weigh\n",
        "3 hand_on: 2 changes, +2 getitem, +1 share\n",
        "4 cleanup: 0 changes\n",
    ]


def test_operators_of_every_kind_are_counted() -> None:
    counts = operator_counts(toma_fx.trace(tiny_sdxl_unet()))
    assert counts["conv_in"] == 1
    assert counts["scaled_dot_product_attention"] == 2 * 11
    assert counts["permute"] == 2 * 7


def test_passes_run_in_torchs_pass_manager() -> None:
    gm, expected = capture(BLOCK), capture(BLOCK)
    run_passes(expected, PASSES)
    manager = PassManager(passes=[FxPass(each) for each in PASSES], run_checks_after_each_pass=True)
    result = manager(gm)
    assert result.modified
    assert result.graph_module.code == expected.code


def test_a_captured_graph_in_torchs_pass_manager() -> None:
    model = tiny_sdxl_unet()
    inputs = unet_inputs(model, height=16, width=16)
    gm = torch.export.export(model, (), inputs, strict=False).module()
    merge = Merge(
        flow=row_of(BLOCK).flow,
        sites=(Site(components=("mlp",), enter=("ff",), leave="ff"),),
        block="mid_block.attentions.0.transformer_blocks.0",
        residual="replace",
    )
    manager = PassManager(passes=[FxPass(each) for each in (merge, OnePlan(), Cleanup())])
    result = manager(gm)
    assert result.modified
    assert operator_counts(result.graph_module)["toma.merge"] == 1
    with torch.no_grad():
        assert result.graph_module(**inputs).sample.shape == inputs["sample"].shape
