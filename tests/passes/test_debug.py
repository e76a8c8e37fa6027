"""Graphs as files, counts of operators, and passes inside torch's own pass manager."""

from pathlib import Path

import torch
from torch.fx.passes.infra.pass_manager import PassManager

import toma_fx
from tests.passes.blocks import OPTIONS, block_of, capture, row_of
from tests.tiny import tiny_sdxl_unet, unet_inputs
from toma_fx.passes.debug import dump_each, operator_counts
from toma_fx.passes.merge_captured import CapturedBlock, MergeCaptured
from toma_fx.passes.merge_components import MergeComponents
from toma_fx.passes.pass_manager import FxPass
from toma_fx.passes.pipeline import Pass, run_passes
from toma_fx.passes.sites import FindSites, Site

PASSES: tuple[Pass, ...] = (
    FindSites(sites=row_of(block_of("unet")).sites, components=("self_attention",)),
    MergeComponents(options=OPTIONS),
)


def test_each_pass_leaves_its_graph_and_a_line(tmp_path: Path) -> None:
    gm = capture(block_of("unet"))
    lines: list[str] = []
    run_passes(gm, PASSES, dump_each(gm, tmp_path / "graphs", lines.append))
    files = sorted((tmp_path / "graphs").iterdir())
    assert [f.name for f in files] == [
        "0_captured.py",
        "1_find_sites.py",
        "2_merge_components.py",
    ]
    before, found, after = (f.read_text() for f in files)
    assert before == found
    assert "torch.ops.toma.merge" not in before
    assert "merged = torch.ops.toma.merge(norm1, merge_weight)" in after
    added = "+2 getitem, +1 toma.merge, +1 toma.select, +1 toma.unmerge, +1 toma.weigh"
    assert lines == ["1 find_sites: 1 change\n", f"2 merge_components: 1 change, {added}\n"]


def test_operators_of_every_kind_are_counted() -> None:
    counts = operator_counts(toma_fx.trace(tiny_sdxl_unet()))
    assert counts["conv_in"] == 1
    assert counts["scaled_dot_product_attention"] == 2 * 11
    assert counts["permute"] == 2 * 7


def test_passes_run_in_torchs_pass_manager() -> None:
    gm, expected = capture(block_of("unet")), capture(block_of("unet"))
    run_passes(expected, PASSES)
    manager = PassManager(passes=[FxPass(each) for each in PASSES], run_checks_after_each_pass=True)
    result = manager(gm)
    assert result.modified
    assert result.graph_module.code == expected.code


def test_a_captured_graph_in_torchs_pass_manager() -> None:
    model = tiny_sdxl_unet()
    inputs = unet_inputs(model, height=16, width=16)
    gm = torch.export.export(model, (), inputs, strict=False).module()
    block = CapturedBlock(
        path="mid_block.attentions.0.transformer_blocks.0",
        sites=(Site(components=("mlp",), enter=("ff",), leave="ff"),),
    )
    result = PassManager(passes=[FxPass(MergeCaptured(blocks=(block,)))])(gm)
    assert result.modified
    assert operator_counts(result.graph_module)["toma.merge"] == 1
    with torch.no_grad():
        assert result.graph_module(**inputs).sample.shape == inputs["sample"].shape
