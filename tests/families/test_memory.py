"""Every family with memory: where merging changes nothing, steps between are the untouched ones."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from tests.families.lives import LIVES, quick_first
from tests.families.test_ltx_to_flux3 import CASES
from tests.memory_runs import difference
from tests.tiny import lossless
from tests.tiny_more_families import MORE_FAMILIES
from toma_fx import Memory, transform
from toma_fx.build import captured, recipe_of
from toma_fx.families import family_of
from toma_fx.passes.pipeline import run_passes
from toma_fx.passes.streams import streams

pytestmark = [
    pytest.mark.filterwarnings("ignore:.FluxPosEmbed. is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight:UserWarning"),
]

NAMES = list({**LIVES, **dict.fromkeys(CASES, 0)})
"""Of the families that the table has."""


def built(name: str) -> tuple[Any, dict[str, Any]]:
    """A small model, and a call of it whose grids regions divide."""
    if name in LIVES:
        make, inputs = LIVES[name].build, LIVES[name].exact
    else:
        make, inputs = MORE_FAMILIES[name]
    model = make()
    return model, inputs(model)


def outputs_of(model: Any, call: dict[str, Any]) -> list[Tensor]:
    with torch.no_grad():
        made = model(**call, return_dict=False)
    return [each for each in pytree.tree_leaves(made) if isinstance(each, Tensor)]


def later(model: Any, call: dict[str, Any], step: int) -> dict[str, Any]:
    """The call nearer to the image by some steps, wherever its timestep is passed."""
    rises = family_of(model).time_rises
    name = "t" if "t" in call else "timestep"
    given = call[name]
    time = (given * (1 + step / 8 if rises else 1 - step / 8)).to(given.dtype)
    return {key: time if value is given else value for key, value in call.items()}


@pytest.mark.parametrize("name", quick_first(NAMES))
def test_steps_between_correct_all_of_what_was_expected(name: str) -> None:
    """Every token is kept, so what merged tokens say is all that there is to say."""
    model, call = built(name)
    memory = Memory(every=2, theta=1)
    config = lossless(region_tokens=16, skip=(), memory=memory)
    merged = transform(model, config)
    ran: set[str] = set()  # FLUX.3 has blocks for references, which this call has none of
    for path, module in model.named_modules():
        module.register_forward_hook(lambda *_, path=path: ran.add(path))
    for step in range(4):
        now = later(model, call, step)
        for output, expected in zip(outputs_of(merged, now), outputs_of(model, now), strict=True):
            assert difference(output, expected) < 1e-4, step
    (run,) = merged.toma_state._runs
    assert run.kept is not None
    assert set(run.kept.memory) == ran & {block.path for block in merged.toma_recipe.merged}


@pytest.mark.parametrize("name", quick_first(NAMES))
def test_what_goes_into_each_stream_is_known(name: str) -> None:
    """So that only what a block adds is extrapolated."""
    model, _ = built(name)
    recipe = recipe_of(model, lossless(region_tokens=16, skip=(), memory=Memory()))
    seen = set()
    for block in recipe.merged:
        if block.row.cls in seen:
            continue
        seen.add(block.row.cls)
        gm = captured(model.get_submodule(block.module), recipe.family)
        run_passes(gm, [recipe.merge(block)])
        flow = block.row.flow
        found = streams(gm.graph, flow)
        unknown = [place for place, stream in enumerate(found) if stream.tokens is None]
        assert unknown == list(flow.also_returned), block.path
