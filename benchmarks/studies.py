"""The variants that each study compares, and the paper's own figures for it.

A study is data: variants as `toma_fx.variants` reads them, in groups, at some ratios.
`benchmarks.study` draws, measures and writes it. The paper's figures are copied from its draft and
appendix; the bodies of Tables 2, 3 and 9 are in neither.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import get_args

from toma_fx.config import Selector

Figures = Mapping[tuple[str, float | None], tuple[str, ...]]
"""A text for each column, by variant (``"untouched"`` among them) and ratio."""

NO_BODY = "not in the sources"


@dataclass(frozen=True, kw_only=True)
class Paper:
    """A table of the paper."""

    table: str
    setting: str
    """Model, size and machine of its measurements."""
    columns: tuple[str, ...] = ()
    """None where the body of the table is not in the sources."""
    figures: Figures = field(default_factory=dict)
    says: str = ""
    """The finding of its figures, or of its text where there are none."""


@dataclass(frozen=True, kw_only=True)
class Study:
    """One of our tables."""

    title: str
    groups: tuple[tuple[str, ...], ...]
    """Variants. Differences are taken to the first of a group, at the same ratio."""
    ratios: tuple[float, ...] = (0.5,)
    shares_of_steps: tuple[float, ...] = ()
    """Shares of the steps, for rows with fewer steps and no merging."""
    model: str = "sdxl"
    """The small pipeline to study when no other is named."""
    paper: Paper | None = None
    note: str = ""

    def variants(self, steps: int) -> tuple[tuple[str, ...], ...]:
        """The groups, with rows of fewer steps than this number."""
        counts = dict.fromkeys(round(steps * share) for share in self.shares_of_steps)
        fewer = tuple(f"steps={count}" for count in counts if 1 <= count < steps)
        return (*self.groups, fewer) if fewer else self.groups


def _changed(base: str, *changes: str) -> tuple[str, ...]:
    """A variant, and others that differ from it in one field or a few."""
    comma = "," if ":" in base else ":"
    return (base, *(f"{base}{comma}{change}" for change in changes))


LATE = "default:merge_below=0.6"
"""The default where the noise is low; Flux's schedule is shifted to higher levels."""
FLUX_LATE = "default:merge_below=0.6"
FLUX_SINGLE = "default:skip=transformer_blocks.*"
ALL_RATIOS = (0.25, 0.5, 0.75)
PAPER_EVERY_STEP = "toma:schedule=1/1"
"""The setting of the paper's ablations: weights over the image, a new plan at every step."""
ABLATION = "SDXL base, 1024 x 1024, 50 steps, ratio 0.5"
SELECTORS = tuple(f"selector={name}" for name in get_args(Selector)[1:] if name != "fixed")
"""All selectors but the default, which is the first, and ``fixed``, which looks at no token."""
REGION_SIZES = ("region_tokens=4", "region_tokens=16", "region_tokens=256", "region=image")

TABLE_8 = Paper(
    table="Table 8",
    setting="SDXL base, 1024 x 1024, 50 steps, GEMRec and ImageNet prompts; seconds on an RTX 6000",
    columns=("FID", "CLIP", "DINO", "MSE", "s"),
    figures={
        ("untouched", None): ("25.27", "0.30", "0.00", "0.00", "6.1"),
        ("toma", 0.25): ("25.72", "0.30", "0.05", "1432.56", "6.0"),
        ("toma", 0.5): ("28.88", "0.30", "0.07", "2012.13", "5.0"),
        ("toma", 0.75): ("58.59", "0.28", "0.10", "2785.68", "4.3"),
        ("toma_stripe", 0.25): ("25.17", "0.30", "0.05", "1604.18", "5.6"),
        ("toma_stripe", 0.5): ("29.11", "0.30", "0.07", "2199.76", "4.6"),
        ("toma_stripe", 0.75): ("89.93", "0.27", "0.11", "3185.34", "4.5"),
        ("toma_tile", 0.25): ("25.43", "0.30", "0.05", "1348.64", "6.2"),
        ("toma_tile", 0.5): ("29.19", "0.30", "0.06", "1912.22", "6.3"),
        ("toma_tile", 0.75): ("58.90", "0.28", "0.09", "2802.32", "6.2"),
        ("toma_once", 0.25): ("26.31", "0.30", "0.05", "1866.68", "5.5"),
        ("toma_once", 0.5): ("38.14", "0.29", "0.08", "3451.15", "4.9"),
        ("toma_once", 0.75): ("123.37", "0.25", "0.11", "5440.23", "4.9"),
        ("tomesd", 0.25): ("25.65", "0.30", "0.05", "1716.13", "8.7"),
        ("tomesd", 0.5): ("26.73", "0.30", "0.07", "2279.39", "8.7"),
        ("tomesd", 0.75): ("41.23", "0.29", "0.08", "2344.87", "8.2"),
        ("lower_bound", 0.25): ("", "", "", "", "5.2"),
        ("lower_bound", 0.5): ("", "", "", "", "4.0"),
        ("lower_bound", 0.75): ("", "", "", "", "3.1"),
    },
    says="tiles change the image least, merging once per block most; ToMeSD saves no time",
)

STUDIES: dict[str, Study] = {
    "selection": Study(
        title="Choice of destinations",
        groups=(
            _changed(
                PAPER_EVERY_STEP,
                "region=stripe",
                "region=image",
                *SELECTORS,
                *(f"{selector},region=image" for selector in SELECTORS),
            ),
            _changed("default", "region=stripe", "region=image", *SELECTORS),
        ),
        paper=Paper(
            table="Table 2",
            setting=ABLATION,
            says="facility location is best, in tiles better than elsewhere",
        ),
    ),
    "regions": Study(
        title="Number of regions",
        groups=(
            _changed(f"{PAPER_EVERY_STEP},region_tokens=64", *REGION_SIZES),
            _changed("default", *REGION_SIZES),
        ),
        paper=Paper(
            table="Table 3",
            setting=f"{ABLATION}, weights over the image, a plan at every step",
            says="64 tiles (64 tokens each at SDXL's 4096) have the best DINO and MSE, 256 (of 16) "
            "the best CLIP and time, with small differences",
        ),
        note="Where a stage has fewer tokens than a region, the stage is one region.",
    ),
    "unmerge": Study(
        title="Unmerging by the transpose and by the pseudo-inverse",
        groups=(
            _changed(PAPER_EVERY_STEP, "unmerge=pinv"),
            _changed("default", "unmerge=pinv"),
        ),
        paper=Paper(
            table="Table 6",
            setting=f"{ABLATION}, weights over the image, a plan at every step",
            columns=("CLIP", "DINO", "MSE", "s"),
            figures={
                (PAPER_EVERY_STEP, 0.5): ("31.0273", "0.0569", "1296.3734", "4.75"),
                (f"{PAPER_EVERY_STEP},unmerge=pinv", 0.5): (
                    "30.9972",
                    "0.0571",
                    "1288.2609",
                    "10.07",
                ),
            },
            says="the same quality, and the transpose takes half the time",
        ),
    ),
    "schedule": Study(
        title="Steps between plans",
        groups=(
            (
                PAPER_EVERY_STEP,
                *(f"toma:schedule={s}" for s in ("5/5", "10/1", "10/5", "10/10", "1000/1000")),
            ),
            _changed(
                "default", *(f"schedule={s}" for s in ("2/2", "5/5", "10/1", "10/5", "1000/1000"))
            ),
        ),
        paper=Paper(
            table="Table 7",
            setting="SDXL base, 1024 x 1024, 50 steps",
            columns=("CLIP", "DINO", "MSE"),
            figures={
                ("toma:schedule=1000/1000", 0.5): ("30.0429", "0.0773", "2488.5682"),
                ("toma:schedule=10/10", 0.5): ("30.8171", "0.0729", "1735.4429"),
                ("toma:schedule=10/5", 0.5): ("30.8652", "0.0699", "1632.3441"),
                ("toma:schedule=10/1", 0.5): ("30.9971", "0.0668", "1524.6436"),
                ("toma:schedule=5/5", 0.5): ("30.8923", "0.0692", "1608.6099"),
                (PAPER_EVERY_STEP, 0.5): ("30.9196", "0.0668", "1551.5814"),
            },
            says="more often is better; destinations every 10 steps and weights every 5 are a good "
            "balance",
        ),
        note="A schedule counts steps, and is coarser the fewer there are; 1000/1000 plans at the "
        "first step alone. Arithmetic counts a step that plans for all.",
    ),
    "variants": Study(
        title="All variants and ratios",
        groups=(
            (
                "default",
                "toma",
                "toma_stripe",
                "toma_tile",
                "toma_once",
                "tomesd",
                "lower_bound",
                "steps",
            ),
        ),
        ratios=ALL_RATIOS,
        paper=TABLE_8,
    ),
    "flux": Study(
        title="Flux",
        groups=(("default", FLUX_LATE, "toma", "toma_tile", "toma_stripe", "toma_once", "steps"),),
        ratios=ALL_RATIOS,
        model="flux",
        paper=Paper(
            table="Table 10",
            setting="Flux.1-dev, 1024 x 1024, 35 steps, the first 10 blocks spared",
            columns=("FID", "CLIP", "DINO", "MSE", "s"),
            figures={
                ("untouched", None): ("31.56", "29.026", "", "", "21.03"),
                ("toma", 0.25): ("30.80", "29.068", "0.043", "1340", "20.14"),
                ("toma", 0.5): ("31.70", "29.091", "0.051", "1579", "18.58"),
                ("toma", 0.75): ("33.39", "28.976", "0.064", "2041", "16.12"),
            },
            says="quality stays; 23 % of the time is saved at ratio 0.75",
        ),
    ),
    "rivals": Study(
        title="Other ways to save",
        groups=(("default", LATE, "toma", "tomesd", "tofu", "todo", "steps"),),
        ratios=ALL_RATIOS,
        paper=Paper(
            table="Table 9",
            setting="SDXL base, 1024 x 1024, 50 steps, ToDo at ratio 0.75",
            says="ToMA is faster and closer than ToFu and ToDo at every ratio; ToMeSD's figures "
            "are in Table 8 (python -m benchmarks.study variants)",
        ),
    ),
    "fewer-steps": Study(
        title="Merging, and fewer steps of equal arithmetic",
        groups=(("default", LATE, "steps"),),
        ratios=ALL_RATIOS,
        shares_of_steps=(0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.25),
        note="Steps can only be left out whole: compare the arithmetic before the quality. The "
        "paper has no such table.",
    ),
    "noise": Study(
        title="Noise level below which tokens merge",
        groups=(_changed("default", *(f"merge_below={n}" for n in (0.9, 0.75, 0.6, 0.4, 0.25))),),
        ratios=(*ALL_RATIOS, 0.9),
        note="The paper merges at every step and has no such table.",
    ),
    "flux-noise": Study(
        title="Noise level below which Flux merges, in all blocks and in single-stream ones",
        groups=(
            _changed("default", *(f"merge_below={n}" for n in (0.95, 0.89, 0.78, 0.6))),
            _changed(FLUX_SINGLE, *(f"merge_below={n}" for n in (0.95, 0.89, 0.78, 0.6))),
        ),
        ratios=(0.5, 0.75),
        model="flux",
        note="Flux's schedule is shifted: at 256 tokens, 92, 80, 68 and 44 % of the steps lie "
        "below 0.95, 0.89, 0.78 and 0.6. The paper merges at every step and has no such table.",
    ),
    "temperature": Study(
        title="Temperature of the weights",
        groups=(_changed("default", *(f"temperature={t}" for t in (1e-4, 0.01, 0.025, 0.1, 0.3))),),
        note="The paper has no such table; its authors' code uses 0.001, and 0.025 or 0.02 before.",
    ),
    "residual": Study(
        title="Place of merging, and treatment of the residual stream",
        groups=(("default", "default:residual=replace", "default:placement=component"),),
        ratios=ALL_RATIOS,
        note="The paper's ToMA_once replaces it (Table 8: python -m benchmarks.study variants).",
    ),
    "components": Study(
        title="Components that run on merged tokens",
        groups=(
            _changed(
                "default:placement=component",
                "components=self_attention",
                "components=cross_attention",
                "components=mlp",
                "components=self_attention+mlp",
            ),
        ),
        note="The paper merges all three and has no such table.",
    ),
    "share": Study(
        title="Blocks that share a plan",
        groups=(_changed("default", "share=block"),),
        note="The paper shares among blocks (section 4.3.2) and has no such table.",
    ),
    "skip": Study(
        title="Blocks left unmerged",
        groups=(
            _changed(
                "default",
                "skip=down_blocks.*",
                "skip=mid_block.*",
                "skip=up_blocks.*",
                "skip=down_blocks.*+up_blocks.*",
                "skip=down_blocks.1.*+up_blocks.1.*",
            ),
        ),
        note="The paper merges all blocks of SDXL.",
    ),
    "flux-skip": Study(
        title="Blocks of Flux left unmerged",
        groups=(
            _changed(
                "default",
                "skip=",
                "skip=transformer_blocks.0",
                "skip=transformer_blocks.*",
                "skip=single_transformer_blocks.*",
                "skip=transformer_blocks.*+single_transformer_blocks.0",
            ),
        ),
        model="flux",
        note="The paper spares the first 10 blocks of 57: the first 5 of 19 and the first 5 of 38. "
        "The default spares as large a share of each list, rounded down.",
    ),
}
