"""Blocks of published models are captured and rewritten at their real width."""

import pytest

from tests.families.table import SHOWN
from toma_fx import transform
from toma_fx.build import recipe_of_transformed
from toma_fx.checkpoints import FAMILIES, architecture

# Cosmos' forward needs torchvision, but its blocks do not.
NAMES = sorted({*SHOWN, "cosmos-2-2b-text2image", "wan2.2-i2v-a14b", "ltx-2.3", "cogvideox-2b"})


@pytest.mark.filterwarnings("ignore:.FluxPosEmbed. is deprecated:FutureWarning")
@pytest.mark.parametrize("name", NAMES)
def test_a_published_model_is_transformed(name: str) -> None:
    model = architecture(name)
    recipe = recipe_of_transformed(transform(model))
    assert recipe.family is FAMILIES[name]
    assert recipe.merged
    assert len(recipe.merged) >= len(recipe.unmerged)
