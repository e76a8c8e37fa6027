"""Transformation of models captured as graphs by `torch.export`, Dynamo or `toma_fx.trace`.

The module paths and classes in the nodes' metadata identify the blocks. The recipe and the passes
are the same as for a model; the passes run on the one flat graph, block by block.
"""

import copy
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import fx
from torch.export import ExportedProgram

from toma_fx.config import MergeConfig
from toma_fx.errors import ModelError
from toma_fx.families import all_families, find_family
from toma_fx.families.rows import Family, Stage, TokenSequence
from toma_fx.passes.cleanup import Cleanup
from toma_fx.passes.flat_nodes import module_stack
from toma_fx.passes.merge import Merge
from toma_fx.passes.one_plan import OnePlan
from toma_fx.passes.order_tokens import OrderTokens
from toma_fx.passes.pipeline import FLAT, Pass, run_passes
from toma_fx.policy import Always, policy_of
from toma_fx.recipe import BlockRecipe, FoundBlock, Recipe, make_recipe

Flat = fx.GraphModule | ExportedProgram


def transform_flat(flat: Flat, config: MergeConfig) -> Any:
    """Return a captured model of the same kind with merged tokens; the given one is not changed.

    Args:
        flat: a program of `torch.export.export`, before ``run_decompositions``; or a graph with
            ``nn_module_stack`` and example values on its nodes. Sizes are fixed to those of the
            examples. Its image tokens must be one grid.
        config: the options; it must merge at every step, with a new plan each time.

    Raises:
        ModelError: when there is nothing to merge, or when the graph merges already.
        CaptureError: when the graph contains an operation that merged tokens do not support.
    """
    program = flat if isinstance(flat, ExportedProgram) else None
    gm: Any = flat if program is None else program.graph_module
    _check_config(config)
    if program is not None and program.dialect != "TRAINING":
        raise ModelError(
            f"the layers of this program of dialect {program.dialect} were decomposed; transform "
            "the result of torch.export.export, and call run_decompositions() after that"
        )
    passes = _passes(gm, config)
    gm = copy.deepcopy(gm, {id(t): t for t in [*gm.parameters(), *gm.buffers()]})
    run_passes(gm, passes)
    gm.meta.pop(FLAT, None)
    return gm if program is None else _program(program, gm)


def _check_config(config: MergeConfig) -> None:
    if config.placement == "keys":
        raise ModelError(
            "placement='keys' rewrites the attention of live models; transform the model before it "
            "is captured, as by toma_fx.export, or use placement='block'"
        )
    if config.tokens == "references":
        raise ModelError(
            "tokens='references' merges at the border of a live model, and this is a graph; "
            "transform the model before it is captured: toma_fx.export gives a program"
        )
    if isinstance(policy_of(config), Always):
        return
    raise ModelError(
        f"{config.choosing} takes several graphs, and a captured graph is only one; use "
        "merge_below=1, Schedule() and memory=None, or transform the model before it is captured: "
        "toma_fx.export gives a program for each graph"
    )


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


def _passes(gm: fx.GraphModule, config: MergeConfig) -> tuple[Pass, ...]:
    """Return the passes that merge in a flat graph."""
    if any(getattr(node.target, "namespace", None) == "toma" for node in gm.graph.nodes):
        raise ModelError("this graph merges tokens already; transform the graph it was made from")
    stacks = [module_stack(n) for n in gm.graph.nodes if n.op.startswith("call_")]
    classes = {path: cls for stack in stacks for path, cls in stack.items()}
    family = _family(classes)
    root = next((path for path, cls in classes.items() if cls == family.cls), "")
    recipe = _recipe(classes, family, config, root)
    if not recipe.merged:
        return ()
    merge = tuple(_merge(recipe, block, root) for block in recipe.merged)
    return (*_orders(recipe, classes, root), *merge, OnePlan(), Cleanup())


def _family(classes: Mapping[str, str]) -> Family:
    """Return the family of the model whose blocks are in the graph."""
    family = find_family(classes.values())
    if family is not None:
        return family
    # Dynamo's graph of a bound method does not name the model itself.
    for family in all_families():
        if any(row.cls in classes.values() for row in family.blocks):
            return family
    known = ", ".join(
        row.cls.rpartition(".")[2] for family in all_families() for row in family.blocks
    )
    raise ModelError(
        f"no transformer block found: no node has one of {known} in its nn_module_stack; pass a "
        "graph that torch.export, Dynamo or toma_fx.trace made of a whole model"
    )


def _recipe(classes: Mapping[str, str], family: Family, config: MergeConfig, root: str) -> Recipe:
    rows = {row.cls: row for row in family.blocks}
    found = [
        FoundBlock(module=_inside(path, root), row=rows[cls], submodules=_inner(path, classes))
        for path, cls in classes.items()
        if cls in rows
    ]
    names = {border.cls for border in family.borders if isinstance(border, Stage)}
    stages = [_inside(path, root) for path, cls in classes.items() if cls in names]
    if not stages and names:  # then the stages are the parents of lists of blocks
        stages = sorted({block.module.rsplit(".", 2)[0] for block in found})
    return make_recipe(family, found, stages, config, "graph")


def _merge(recipe: Recipe, block: BlockRecipe, root: str) -> Pass:
    group = block.group
    shared = f"{group.stage}.{group.name}" if recipe.config.share == "group" else block.path
    merge = recipe.merge(block)
    assert isinstance(merge, Merge), "keys are refused before"
    return replace(merge, block=_under(root, block.module), group=shared)


def _orders(recipe: Recipe, classes: Mapping[str, str], root: str) -> tuple[Pass, ...]:
    """Return the passes that do the same as `toma_fx.install_borders` does for a model."""
    if recipe.config.region != "tile":
        return ()
    passes: list[Pass] = []
    for border in recipe.family.borders:
        if isinstance(border, TokenSequence):
            passes.append(_order_of_sequence(border, recipe, classes, root))
            continue
        for stage in dict.fromkeys(block.group.stage for block in recipe.merged):
            inside = [block.module for block in recipe.blocks if block.group.stage == stage]
            passes.append(
                OrderTokens(
                    enter=_under(root, inside[0]),
                    leave=_under(root, inside[-1]),
                    grid=_under(root, stage),
                )
            )
    return tuple(passes)


def _order_of_sequence(
    border: TokenSequence, recipe: Recipe, classes: Mapping[str, str], root: str
) -> OrderTokens:
    paths = [_under(root, path) for path in (border.enter, border.leave, border.positions)]
    missing = [path for path in paths if path not in classes]
    if missing:
        raise ModelError(
            f"the graph holds blocks of {recipe.family.title}, but not {', '.join(missing)}, where "
            "their tokens come into token order; capture the whole model, or use region='stripe'"
        )
    enter, leave, positions = paths
    return OrderTokens(enter=enter, leave=leave, ids=positions)


def _inside(path: str, root: str) -> str:
    return path.removeprefix(f"{root}.") if root else path


def _under(root: str, path: str) -> str:
    return f"{root}.{path}" if root else path


def _inner(path: str, classes: Mapping[str, str]) -> frozenset[str]:
    return frozenset(p.removeprefix(f"{path}.") for p in classes if p.startswith(f"{path}."))
