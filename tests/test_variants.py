"""Names on the command line and what they mean."""

import pytest

from toma_fx.config import PRESETS, MergeConfig
from toma_fx.errors import ConfigError
from toma_fx.schedule import Memory, Schedule
from toma_fx.variants import FewerSteps, Merging, check_ratios, configs, parse_variant


def merging(text: str) -> MergeConfig:
    variant = parse_variant(text)
    assert isinstance(variant, Merging) and variant.name == text
    return variant.config(0.25)


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_is_a_variant(preset: str) -> None:
    assert merging(preset) == MergeConfig.preset(preset, ratio=0.25)


def test_changes_take_the_kind_of_their_field() -> None:
    changed = merging(
        "toma:region=stripe,region_tokens=64,temperature=0.01,components=mlp+self_attention,"
        "schedule=4/2,skip=mid_block.*+up_blocks.0.*"
    )
    assert changed == MergeConfig.preset(
        "toma",
        ratio=0.25,
        region="stripe",
        region_tokens=64,
        temperature=0.01,
        components=("mlp", "self_attention"),
        schedule=Schedule(select_every=4, weigh_every=2),
        skip=("mid_block.*", "up_blocks.0.*"),
    )
    assert merging("default:skip=").skip == ()
    assert merging("default:memory=3").memory == Memory(every=3)
    assert merging("default:memory=2,theta=0.5").memory == Memory(every=2, theta=0.5)
    assert merging("merge-below=0.6,skip=") == MergeConfig(ratio=0.25, merge_below=0.6, skip=())


def test_a_ratio_of_its_own_counts() -> None:
    variant = parse_variant("toma:ratio=0.75")
    assert isinstance(variant, Merging)
    assert variant.ratios([0.25, 0.5]) == (0.75,)
    tried = [(each.name, ratio) for each, ratio, _ in configs([variant], [0.25, 0.5])]
    assert tried == [("toma:ratio=0.75", 0.75)]


def test_ratios_are_checked_for_every_merging_variant() -> None:
    variants = [parse_variant("steps"), parse_variant("default")]
    check_ratios(variants, [0.5])
    with pytest.raises(ConfigError, match=r"ratio=1\.5 must be a number in"):
        check_ratios(variants, [0.5, 1.5])


def test_steps() -> None:
    assert parse_variant("steps") == FewerSteps(name="steps")
    assert parse_variant("steps=18") == FewerSteps(name="steps=18", count=18)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("tome", "variant='tome' is unknown; choose from default, toma"),
        ("tome", "did you mean toma?"),
        ("stepsize", "is unknown"),
        ("steps=", "must name a number of steps"),
        ("steps=0", "must name a number of steps"),
        ("toma:region", "'region' must be NAME=VALUE"),
        ("toma:colour=red", "colour=red is not an option of a setting"),
        ("toma:region=circle", "region='circle' is unknown"),
        ("default:memory=often", "memory='often' must be a whole number"),
        ("default:memory=2,theta=3", "memory.theta=3.0 must be a number in [0, 1.5]"),
        ("default:components=mlp", "cannot be combined with placement='block'"),
    ],
)
def test_mistakes_name_the_variant(text: str, expected: str) -> None:
    with pytest.raises(ConfigError) as raised:
        parse_variant(text)
    assert expected in str(raised.value)
