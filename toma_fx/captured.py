"""Models that are graphs already: what `torch.export`, Dynamo or `toma_fx.trace` captured.

Their blocks are found by the module paths and classes in the metadata of the nodes, and one pass
rewrites the whole graph; see `toma_fx.passes.merge_captured`.
"""

import copy
from collections.abc import Mapping
from typing import Any, get_args

from torch import fx
from torch.export import ExportedProgram

from toma_fx.config import Component, MergeConfig
from toma_fx.errors import ModelError
from toma_fx.families import FAMILIES, FLUX, Block, Family
from toma_fx.passes.captured import module_stack, qualified_name
from toma_fx.passes.merge_captured import CapturedBlock, MergeCaptured
from toma_fx.passes.order_captured import Border
from toma_fx.passes.sites import Site, choose
from toma_fx.treatment import plan_options, treatments

Captured = fx.GraphModule | ExportedProgram

_WHOLE = Site(components=get_args(Component), enter=("",), leave="")


def transform_captured(captured: Captured, config: MergeConfig) -> Any:
    """A captured model with merged tokens, of the same kind; the given one stays as it was.

    Args:
        captured: a program of `torch.export.export`, before ``run_decompositions``; or a graph with
            ``nn_module_stack`` and example values on its nodes. Its sizes are those of its
            examples, and so are those of the result.
        config: what to do; its schedule must be 1/1, since a graph has no place for a plan that
            outlives a call.

    Raises:
        ModelError: when there is nothing to merge, or merging is in it already.
        CaptureError: when the graph holds something that merged tokens cannot go through.
    """
    program = captured if isinstance(captured, ExportedProgram) else None
    gm: Any = captured if program is None else program.graph_module
    if not config.schedule.stateless:
        raise ModelError(
            f"{config.schedule} keeps plans between calls, and a captured graph has no place for "
            "them; use Schedule(), or transform the model before it is captured"
        )
    if config.merge_below < 1:
        raise ModelError(
            f"merge_below={config.merge_below} needs the merged and the untouched graph, and a "
            "captured graph is only one; use merge_below=1 and choose between the two programs by "
            "timestep, or transform the model before it is captured"
        )
    if program is not None and program.dialect != "TRAINING":
        raise ModelError(
            f"the layers of this program of dialect {program.dialect} were taken apart; transform "
            "what torch.export.export returns, and run_decompositions() after that"
        )
    merging = _pass(gm, config)
    gm = copy.deepcopy(gm, {id(t): t for t in [*gm.parameters(), *gm.buffers()]})
    if merging.blocks:
        merging.apply(gm)
        gm.graph.eliminate_dead_code()
        gm.graph.lint()
        gm.recompile()
    return gm if program is None else _program(program, gm)


def _program(program: ExportedProgram, gm: fx.GraphModule) -> ExportedProgram:
    signature = copy.deepcopy(program.graph_signature)
    outputs = (g.graph.output_node().all_input_nodes for g in (program.graph_module, gm))
    for old, new in zip(*outputs, strict=True):
        signature.replace_all_uses(old.name, new.name)
    return ExportedProgram(
        root=gm,
        graph=gm.graph,
        graph_signature=signature,
        state_dict=copy.copy(program.state_dict),
        range_constraints=copy.deepcopy(program.range_constraints),
        module_call_graph=copy.deepcopy(program.module_call_graph),
        example_inputs=program.example_inputs,
        constants=program.constants,
        verifiers=program.verifiers,
    )


def _pass(gm: fx.GraphModule, config: MergeConfig) -> MergeCaptured:
    if any(getattr(node.target, "namespace", None) == "toma" for node in gm.graph.nodes):
        raise ModelError("this graph merges tokens already; transform the graph it was made from")
    rows = {qualified_name(row.cls): (row, family) for family in FAMILIES for row in family.blocks}
    stacks = [module_stack(n) for n in gm.graph.nodes if n.op.startswith("call_")]
    classes = {path: cls for stack in stacks for path, cls in stack.items()}
    blocks = {path: rows[cls] for path, cls in classes.items() if cls in rows}
    if not blocks:
        raise ModelError(
            f"no transformer block found: no node has one of {', '.join(rows)} in its "
            "nn_module_stack; pass a graph that torch.export, Dynamo or toma_fx.trace made of a "
            "whole model"
        )
    _, family = next(iter(blocks.values()))
    root = next((p for p, cls in classes.items() if cls == qualified_name(family.cls)), "")
    root = f"{root}." if root else ""
    paths = [path.removeprefix(root) for path in blocks]
    treated = treatments(paths, config, family.spared, "graph")
    merging = {path: each for path, each in treated.items() if each.role is not None}
    found = []
    for path, treatment in merging.items():
        row, _ = blocks[root + path]
        found.append(
            CapturedBlock(
                path=root + path,
                sites=_sites(row, root + path, config, classes),
                text=row.text is not None,
                text_first=row.text_first,
                group=treatment.group,
                leads=treatment.role != "follow",
                options=plan_options(config, treatment.ratio),
            )
        )
    tile = config.region == "tile"
    return MergeCaptured(
        blocks=tuple(found),
        borders=_borders(list(blocks), list(merging), root, family, classes) if tile else (),
        residual=config.residual if config.placement == "block" else "replace",
    )


def _parent(path: str) -> str:
    return path.rpartition(".")[0]


def _sites(
    row: Block, path: str, config: MergeConfig, classes: Mapping[str, Any]
) -> tuple[Site, ...]:
    if config.placement == "block":
        return (_WHOLE,)
    inside = {name.removeprefix(f"{path}.") for name in classes if name.startswith(f"{path}.")}
    return tuple(choose(row.sites, config.components, inside))


def _borders(
    blocks: list[str], merging: list[str], root: str, family: Family, classes: Mapping[str, Any]
) -> tuple[Border, ...]:
    """As `toma_fx.models` brings tokens into the order of tiles."""
    if family is FLUX:
        enter, leave, ids = f"{root}x_embedder", f"{root}proj_out", f"{root}pos_embed"
        missing = [path for path in (enter, leave, ids) if path not in classes]
        if missing:
            raise ModelError(
                f"the graph holds blocks of Flux, but not {', '.join(missing)}, where their tokens "
                "come into the order of tiles; capture the whole model, or use region='stripe'"
            )
        return (Border(enter=enter, leave=leave, ids=ids),)
    borders = []
    for group in dict.fromkeys(_parent(root + path) for path in merging):
        inside = [path for path in blocks if _parent(path) == group]
        borders.append(Border(enter=inside[0], leave=inside[-1], grid=_parent(group)))
    return tuple(borders)
