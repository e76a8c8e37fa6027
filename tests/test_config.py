"""Options: what they hold, which values they refuse, and what the refusals say."""

import dataclasses
import math
from typing import Any

import pytest

from toma_fx import MergeConfig, Schedule
from toma_fx.config import PRESETS
from toma_fx.errors import ConfigError

ALL = ("self_attention", "cross_attention", "mlp")
COMPONENT = {"placement": "component"}
NO_COMPONENTS: tuple[Any, ...] = ((), [], None, "mlp", 5)

# Options, and what the message must say: the value, the expectation and the fix.
REFUSED: list[tuple[dict[str, Any], tuple[str, ...]]] = [
    *(
        ({"ratio": value}, (f"ratio={value!r}", "a number in [0, 1)", "such as 0.5"))
        for value in (1, 1.0, 1.5, -0.1, math.nan, math.inf, "0.5", None, True, [0.5])
    ),
    *(
        ({"temperature": value}, (f"temperature={value!r}", "a number above 0", "such as 0.001"))
        for value in (0, -0.001, math.nan, "0.001", None)
    ),
    *(
        ({"region_tokens": value}, (f"region_tokens={value!r}", "whole number of at least 1"))
        for value in (0, -64, 64.0, "64", None, True)
    ),
    *(
        ({**COMPONENT, "components": value}, (f"components={value!r}", "tuple", *map(repr, ALL)))
        for value in NO_COMPONENTS
    ),
    *(
        ({**COMPONENT, "components": (*ALL, value)}, (f"components={value!r}", *map(repr, ALL)))
        for value in ("attention", None, 5)
    ),
    *(
        ({name: value}, (f"{name}={value!r} is unknown", *map(repr, choices)))
        for name, choices in {
            "placement": ("component", "block"),
            "residual": ("keep", "replace"),
            "region": ("tile", "stripe", "image"),
            "merge_over": ("region", "image"),
            "selector": ("facility_location", "random", "grid", "fixed"),
            "unmerge": ("transpose", "pinv"),
            "share": ("group", "block"),
        }.items()
        for value in ("other", None, choices)
    ),
    *(
        ({"schedule": value}, (f"schedule={value!r}", "Schedule(select_every=10, weigh_every=5)"))
        for value in (None, 10, (10, 5))
    ),
    ({"skip": "mid_block.*"}, ("skip='mid_block.*'", "tuple of patterns", "('mid_block.*',)")),
    ({"skip": 5}, ("skip=5", "tuple of patterns")),
    ({"skip": (5,)}, ("skip=(5,)", "tuple of patterns")),
    (
        {"components": ("mlp",)},
        ("components=('mlp',)", "placement='block'", "use placement='component'"),
    ),
    (
        {"share": "block", "schedule": Schedule(select_every=2)},
        ("share='block'", "select_every=2", "use share='group' or Schedule()"),
    ),
    *(
        ({"selector": "fixed", **options}, ("selector='fixed'", "transpose", "region"))
        for options in ({"unmerge": "pinv"}, {"merge_over": "image"})
    ),
]

TILES_OF_16 = {
    "placement": "component",
    "region": "tile",
    "region_tokens": 16,
    "merge_over": "region",
    "selector": "facility_location",
    "schedule": Schedule(select_every=10, weigh_every=5),
}
ONCE = {"placement": "block", "residual": "replace"}
DOCUMENTED: dict[str, dict[str, Any]] = {
    "default": {
        "ratio": 0.5,
        "components": ALL,
        "placement": "block",
        "residual": "keep",
        "region": "tile",
        "region_tokens": 64,
        "merge_over": "region",
        "selector": "facility_location",
        "unmerge": "transpose",
        "temperature": 0.001,
        "share": "group",
        "schedule": Schedule(),
        "skip": None,
    },
    "toma": {**TILES_OF_16, "merge_over": "image"},
    "toma_tile": TILES_OF_16,
    "toma_stripe": {**TILES_OF_16, "region": "stripe"},
    "toma_once": {**TILES_OF_16, **ONCE},
    "lower_bound": {**ONCE, "selector": "fixed", "schedule": Schedule()},
}


def test_config_is_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        MergeConfig().ratio = 0.25  # type: ignore[misc]
    with pytest.raises(dataclasses.FrozenInstanceError):
        Schedule().select_every = 10  # type: ignore[misc]


def test_fields_are_keyword_only() -> None:
    with pytest.raises(TypeError, match="positional"):
        MergeConfig(0.25)  # type: ignore[call-arg]
    with pytest.raises(TypeError, match="positional"):
        Schedule(10, 5)  # type: ignore[call-arg]


def test_equal_configs_are_one_key() -> None:
    configs = {
        MergeConfig(components=["mlp", "self_attention"], skip=["a", "b"], **COMPONENT),  # type: ignore[arg-type]
        MergeConfig(components=("self_attention", "mlp"), skip=("a", "b"), **COMPONENT),  # type: ignore[arg-type]
        MergeConfig(components={"self_attention", "mlp"}, skip=iter("ab"), **COMPONENT),  # type: ignore[arg-type]
    }
    assert len(configs) == 1
    (config,) = configs
    assert config.components == ("self_attention", "mlp")
    assert config.skip == ("a", "b")
    assert config != dataclasses.replace(config, ratio=0.25)


@pytest.mark.parametrize(("options", "said"), REFUSED, ids=[str(row[0]) for row in REFUSED])
def test_bad_value_is_explained(options: dict[str, Any], said: tuple[str, ...]) -> None:
    with pytest.raises(ConfigError) as caught:
        MergeConfig(**options)
    message = str(caught.value)
    assert "\n" not in message
    for words in said:
        assert words in message


@pytest.mark.parametrize("field", ["select_every", "weigh_every"])
@pytest.mark.parametrize("value", [0, -1, 1.5, "2", None, True])
def test_bad_schedule_is_explained(field: str, value: Any) -> None:
    with pytest.raises(ConfigError) as caught:
        Schedule(**{field: value})
    assert str(caught.value) == f"{field}={value!r} must be a whole number of at least 1"


@pytest.mark.parametrize(
    ("schedule", "stateless"),
    [
        (Schedule(), True),
        (Schedule(select_every=2), False),
        (Schedule(weigh_every=2), False),
        (Schedule(select_every=10, weigh_every=5), False),
    ],
)
def test_only_planning_at_every_step_is_stateless(schedule: Schedule, stateless: bool) -> None:
    assert schedule.stateless is stateless


@pytest.mark.parametrize("name", PRESETS)
def test_preset_has_the_documented_fields(name: str) -> None:
    config = MergeConfig.preset(name)
    assert {field: getattr(config, field) for field in DOCUMENTED[name]} == DOCUMENTED[name]


def test_default_preset_is_the_default() -> None:
    assert MergeConfig.preset("default") == MergeConfig()


@pytest.mark.parametrize("name", PRESETS)
def test_preset_takes_changes(name: str) -> None:
    changed = MergeConfig.preset(name, ratio=0.25, skip=("a",))
    assert changed == dataclasses.replace(MergeConfig.preset(name), ratio=0.25, skip=("a",))


def test_unknown_preset_lists_the_presets() -> None:
    with pytest.raises(ConfigError) as caught:
        MergeConfig.preset("tomesd")
    assert "preset='tomesd'" in str(caught.value)
    assert all(repr(name) in str(caught.value) for name in PRESETS)


def test_unknown_option_lists_the_options() -> None:
    with pytest.raises(ConfigError) as caught:
        MergeConfig.preset("default", rato=0.25)
    assert "rato=0.25" in str(caught.value)
    assert all(field.name in str(caught.value) for field in dataclasses.fields(MergeConfig))
