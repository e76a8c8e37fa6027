"""One table of options: in help, in every command, and in the short form of a setting."""

import argparse
from dataclasses import asdict, fields
from pathlib import Path

import pytest

from toma_fx.config import MergeConfig
from toma_fx.errors import ConfigError
from toma_fx.parser import Parser
from toma_fx.schedule import Memory, Schedule
from toma_fx.setting import OPTIONS, add_setting, config_of, given_in, in_short, read_short

SHORT = (
    "placement=component,components=mlp+self_attention,region=stripe,region_tokens=16,"
    "temperature=0.01,skip=mid_block.*+up_blocks.0.*,block_ratios=up_blocks.1.*=0.25+down*=0,"
    "memory=3,theta=0.5,extrapolate=false,merge_below=0.8,ratio=0.25"
)
LONG = [
    *("--placement", "component", "--components", "mlp", "self_attention", "--region", "stripe"),
    *("--region-tokens", "16", "--temperature", "0.01", "--skip", "mid_block.*", "up_blocks.0.*"),
    *("--block-ratios", "up_blocks.1.*=0.25", "down*=0", "--memory", "3", "--theta", "0.5"),
    *("--no-extrapolate", "--merge-below", "0.8", "--ratio", "0.25"),
]
CONFIG = MergeConfig(
    placement="component",
    components=("self_attention", "mlp"),
    region="stripe",
    region_tokens=16,
    temperature=0.01,
    skip=("mid_block.*", "up_blocks.0.*"),
    block_ratios={"up_blocks.1.*": 0.25, "down*": 0},  # type: ignore[arg-type]
    memory=Memory(every=3, theta=0.5, extrapolate=False),
    merge_below=0.8,
    ratio=0.25,
)


def parsed(words: list[str]) -> argparse.Namespace:
    parser = Parser(prog="toma-fx")
    add_setting(parser)
    return parser.parse_args(words)


def test_every_option_of_transform_has_a_word() -> None:
    of_memory = {each.name for each in fields(Memory)} - {"every"}
    assert {*OPTIONS} == {each.name for each in fields(MergeConfig)} | of_memory | {
        "preset",
        "calibration",
    }


def test_the_short_and_the_long_form_are_one_setting() -> None:
    long = given_in(parsed(LONG))
    assert config_of(long) == config_of(read_short(SHORT)) == CONFIG
    assert config_of(read_short(in_short(long))) == CONFIG
    assert config_of(given_in(parsed([]))) == MergeConfig()
    assert in_short({}) == "default"


@pytest.mark.parametrize("text", ["toma:region=stripe", "preset=toma,region=stripe"])
def test_a_preset_may_stand_first(text: str) -> None:
    assert config_of(read_short(text)) == MergeConfig.preset("toma", region="stripe")
    assert in_short(read_short(text)) == "toma:region=stripe"


def test_dashes_are_underscores_and_empty_lists_are_lists() -> None:
    found = config_of(read_short("merge-below=0.6,skip="))
    assert (found.merge_below, found.skip) == (0.6, ())
    assert config_of(given_in(parsed(["--skip"]))).skip == ()


def test_a_schedule_is_two_numbers() -> None:
    schedule = Schedule(select_every=10, weigh_every=5)
    assert config_of(read_short("schedule=10/5")).schedule == schedule
    assert config_of(given_in(parsed(["--schedule", "10/5"]))).schedule == schedule


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("regoin=tile", "regoin=tile is not an option of a setting; did you mean region?"),
        ("toma:region", "'region' must be NAME=VALUE"),
        ("region_tokens=many", "region_tokens='many' must be a whole number"),
        ("temperature=hot", "temperature='hot' must be a number"),
        ("extrapolate=maybe", "extrapolate='maybe' must be true or false"),
        ("schedule=10", "schedule='10' must be A/B"),
        ("schedule=0/5", "select_every=0 must be a whole number of at least 1"),
        ("block_ratios=0.5", "block_ratios='0.5' must be PATTERN=RATIO"),
    ],
)
def test_mistakes_name_the_word(text: str, said: str) -> None:
    with pytest.raises(ConfigError) as raised:
        read_short(text)
    assert said in str(raised.value)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"theta": 0.5}, "theta needs a memory"),
        ({"region": "stipe"}, "did you mean stripe?"),
        ({"preset": "tomo"}, "did you mean toma?"),
        (
            {"calibration": "none.json"},
            "'none.json' is no calibration that toma_fx saved: there is no such file;",
        ),
        ({"calibration": "x.json", "region": "tile"}, "region cannot be given beside calibration"),
    ],
)
def test_what_does_not_go_together_is_said(given: dict[str, object], said: str) -> None:
    with pytest.raises(ConfigError) as raised:
        config_of(given)
    assert said in str(raised.value)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("", "it is not JSON"),
        ("{}", "it lacks 'base'"),
        ('{"base": {"ratio": 7}}', "it lacks 'parts'"),
        ("[]", "toma_fx saved: "),
    ],
)
def test_a_broken_calibration_is_one_line_without_a_repr(
    tmp_path: Path, content: str, said: str
) -> None:
    file = tmp_path / "broken.json"
    file.write_text(content)
    with pytest.raises(ConfigError) as raised:
        config_of({"calibration": str(file)})
    message = str(raised.value)
    assert said in message and "\n" not in message
    assert "Error(" not in message


def test_values_survive_json() -> None:
    assert MergeConfig(**asdict(CONFIG)) == CONFIG
