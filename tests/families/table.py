"""The tables in `docs/families.md`, made of what the library says of each family."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from tabulate import tabulate

from toma_fx import report, transform
from toma_fx.checkpoints import FAMILIES, architecture
from toma_fx.families import all_families
from toma_fx.families.rows import Family, TokenGrids

PAGE = Path(__file__).parents[2] / "docs" / "families.md"
RATIO = 0.5

SIZES: dict[str, tuple[dict[str, int], ...]] = {
    "wan2.1-14b": (
        {"height": 480, "width": 832, "frames": 81},
        {"height": 720, "width": 1280, "frames": 81},
    ),
}
"""Sizes of a model that has several; of others, the native one."""

SHOWN = {
    "sdxl", "flux", "flux2-dev", "flux2-klein-4b", "qwen-image", "qwen-image-edit-2511", "z-image",
    "wan2.1-1.3b", "wan2.1-14b", "wan2.1-i2v-14b", "wan2.2-5b", "wan2.1-vace-1.3b", "sd3-medium",
    "sd3.5-large", "chroma", "hunyuan-video", "hunyuan-video-1.5-480p-t2v", "hunyuan-image-2.1",
    "ltx-video", "ltx-2", "cogvideox-5b", "krea-2", "pixart-sigma-1024",
}  # fmt: skip
"""Of the published models, one of each kind."""


def families() -> str:
    """What is known of each family."""
    rows = [
        (
            family.title,
            family.cls.rpartition(".")[2],
            ", ".join(sorted(_components(family))) or "only whole blocks",
            _order(family),
            _spared(family),
        )
        for family in all_families()
    ]
    headers = (
        "family",
        "class in diffusers",
        'with `placement="component"`',
        "token order",
        "spared",
    )
    return tabulate(rows, headers, tablefmt="github")


def _components(family: Family) -> set[str]:
    return {c for block in family.blocks for site in block.sites for c in site.components}


def _order(family: Family) -> str:
    grids = [each for each in family.borders if isinstance(each, TokenGrids)]
    if not any(block.flow.prefix or block.flow.prefix_tokens for block in family.blocks):
        return "tiles"
    assert grids, family.name
    return "tiles through frames"


def _spared(family: Family) -> str:
    shares = {f"{first} of {of}" for first, of in family.unmerged_by_default.values()}
    return " and ".join(sorted(shares)) or "none"


def savings(names: Iterable[str] = tuple(SHOWN)) -> list[tuple[str, ...]]:
    """Tokens and arithmetic of published models, untouched and merged, by `toma_fx.report`."""
    rows = [(name, *_saving(name, size)) for name in names for size in SIZES.get(name, ({},))]
    order = list(FAMILIES)
    return sorted(rows, key=lambda row: order.index(row[0]))


def _saving(name: str, size: dict[str, Any]) -> tuple[str, ...]:
    model = architecture(name)
    found = [report(transform(model, ratio=RATIO, **skip), **size) for skip in _SKIPS]
    merged = next(group for group in found[0].groups if group.merged)
    tokens = f"{merged.tokens_before} -> {merged.tokens_after}"
    image = found[0].image.removeprefix("latents ")
    return image, tokens, *(f"{each.saved:.0%}" for each in found)


_SKIPS: tuple[dict[str, Any], ...] = ({}, {"skip": ()})


def savings_table(rows: list[tuple[str, ...]]) -> str:
    """As Markdown."""
    headers = ("model", "latents", "image tokens", "arithmetic saved", "and with `skip=()`")
    return tabulate(rows, headers, tablefmt="github", disable_numparse=True)
