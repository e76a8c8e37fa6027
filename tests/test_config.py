"""Options: their values, the values that they refuse, and the messages."""

import ast
import copy
import dataclasses
import fractions
import json
import math
import pickle
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from toma_fx import Memory, MergeConfig, Schedule, combinations, config, option_values, schedule
from toma_fx.config import PRESETS, matches
from toma_fx.errors import ConfigError
from toma_fx.runtime.regions import kept_tokens

ALL = ("self_attention", "cross_attention", "mlp")
COMPONENT = {"placement": "component"}
NO_COMPONENTS: tuple[Any, ...] = ((), [], None, "mlp", 5)

# Options, and what the message must say: the value, the expectation and the fix.
REFUSED: list[tuple[dict[str, Any], tuple[str, ...]]] = [
    *(
        ({"ratio": value}, (f"ratio={value!r}", "a number in [0, 1)", "such as 0.5"))
        for value in (
            *(1, 1.0, 1.5, -0.1, math.nan, math.inf, 10**400, "0.5", None, True, [0.5]),
            *(
                np.float64(1.5),
                np.float32("nan"),
                np.bool_(True),
                np.array([0.5]),
                np.array("half"),
            ),
            *(torch.tensor(-0.5), torch.tensor(True), torch.tensor([0.5]), 0.5 + 0j),
        )
    ),
    *(
        ({"temperature": value}, (f"temperature={value!r}", "a number above 0", "such as 0.001"))
        for value in (0, -0.001, math.nan, math.inf, 10**400, "0.001", None, True, np.bool_(True))
    ),
    *(
        ({"merge_below": value}, (f"merge_below={value!r}", "a number in (0, 1]", "such as 0.6"))
        for value in (0, 1.5, math.nan, "0.6", None, True, np.float32(-1), torch.tensor(1.01))
    ),
    *(
        ({"region_tokens": value}, (f"region_tokens={value!r}", "whole number of at least 1"))
        for value in (
            *(0, -64, 64.0, "64", None, True, np.int64(0), np.float64(64), np.bool_(True)),
            *(np.array([64]), torch.tensor(64.0), torch.tensor(True)),
        )
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
        for value in ("other", None, choices, np.array(choices))
    ),
    *(
        ({"schedule": value}, (f"schedule={value!r}", "Schedule(select_every=10, weigh_every=5)"))
        for value in (None, 10, (10, 5))
    ),
    (
        {"schedule": {"select_evry": 10, "weigh_every": 5, 3: 4}},
        ("holds 'select_evry', 3, which", "choose from 'select_every', 'weigh_every'"),
    ),
    ({"schedule": {"select_every": 0}}, ("select_every=0 must be a whole number of at least 1",)),
    *(
        (
            {"block_ratios": value},
            (f"block_ratios={value!r} must be a dictionary", 'such as {"up_blocks.1.*": 0.25}'),
        )
        for value in (
            *(None, 0.5, "ab", "", ["ab"], [("a", 0.5, 1)], [("a",)], {("a", 0.5)}),
            *(np.array(0.5), torch.tensor(0.5)),
        )
    ),
    *(
        ({"block_ratios": value}, ("names blocks by 3", "a pattern", 'such as "up_blocks.1.*"'))
        for value in ({"a": 0.5, 3: 0.5}, [(3, 0.5)])
    ),
    *(
        ({"block_ratios": value}, ("names 'a' twice", "leave one of them out"))
        for value in ([("a", 0.5), ("b", 0), ["a", 0.25]], (("a", 0.5), ("a", 0.5)))
    ),
    ({"block_ratios": {"a": 1}}, ("block_ratios['a']=1 must be a number in [0, 1)",)),
    *(
        (
            {**options, "region": region},
            ("too small to merge a token of a region of region_tokens=64", "at least 0.00782,"),
        )
        for options in ({"ratio": 0.0078}, {"block_ratios": {"a": 0.5, "b": 1 / 128}})
        for region in ("tile", "stripe")
    ),
    ({"skip": "mid_block.*"}, ("skip='mid_block.*'", "tuple of patterns", "('mid_block.*',)")),
    ({"skip": 5}, ("skip=5", "tuple of patterns")),
    ({"skip": (5,)}, ("skip=(5,)", "tuple of patterns")),
    ({"skip": b"mid_block"}, ("skip=b'mid_block'", "tuple of patterns")),
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
@pytest.mark.parametrize("value", [0, -1, 1.5, "2", None, True, np.float64(2), np.bool_(True)])
def test_bad_schedule_is_explained(field: str, value: Any) -> None:
    with pytest.raises(ConfigError) as caught:
        Schedule(**{field: value})
    assert f"{field}={value!r} must be a whole number of at least 1, such as" in str(caught.value)


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


# A number, and the float that is stored for it.
REAL: list[tuple[Any, float]] = [
    (0.25, 0.25),
    (0, 0.0),
    (-0.0, 0.0),
    (fractions.Fraction(1, 4), 0.25),
    (np.float64(1 / 3), 1 / 3),
    (np.float32(0.1), 0.1),
    (np.float16(0.1), 0.1),
    (np.longdouble(0.25), 0.25),
    (np.int64(0), 0.0),
    (np.array(0.1, np.float32), 0.1),
    (np.array(1 / 3), 1 / 3),
    (torch.tensor(0.1), 0.1),
    (torch.tensor(0.12345678), 0.12345678),
    (torch.tensor(0.1, dtype=torch.bfloat16), 0.1),
    (torch.tensor(1 / 3, dtype=torch.float64), 1 / 3),
    (torch.tensor(0), 0.0),
]
WHOLE = (16, np.int64(16), np.uint8(16), np.array(16), torch.tensor(16), torch.tensor(16).int())


@pytest.mark.parametrize(("given", "stored"), REAL, ids=[repr(given) for given, _ in REAL])
def test_numbers_are_stored_as_plain_floats(given: Any, stored: float) -> None:
    configs = [MergeConfig(ratio=given), MergeConfig(block_ratios=[("a", given)])]  # type: ignore[arg-type]
    assert repr(configs[0].ratio) == repr(configs[1].ratio_of("a")) == repr(stored)
    if stored > 0:
        level = MergeConfig(temperature=given, merge_below=given)
        assert repr(level.temperature) == repr(level.merge_below) == repr(stored)


@pytest.mark.parametrize("given", WHOLE, ids=repr)
def test_whole_numbers_are_stored_as_plain_ints(given: Any) -> None:
    schedule = Schedule(select_every=given, weigh_every=given)
    stored = (MergeConfig(region_tokens=given).region_tokens, *dataclasses.astuple(schedule))
    assert repr(stored) == "(16, 16, 16)"


def test_the_largest_half_is_a_temperature() -> None:
    assert MergeConfig(temperature=np.float16(65504)).temperature == 65500  # type: ignore[arg-type]
    assert MergeConfig(temperature=torch.tensor(65504).half()).temperature == 65500  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "zeros", [[{"ratio": zero} for zero in (0, 0.0, -0.0)], [{"block_ratios": {"a": 0}}] * 2]
)
def test_equal_numbers_are_one_config(zeros: list[dict[str, Any]]) -> None:
    configs = [MergeConfig(**options) for options in zeros]
    assert len(set(configs)) == len({repr(each) for each in configs}) == 1
    ones: list[dict[str, Any]] = [{"temperature": one, "merge_below": one} for one in (1, 1.0)]
    assert repr(MergeConfig(**ones[0])) == repr(MergeConfig(**ones[1]))


def test_strings_of_numpy_are_stored_as_plain_ones() -> None:
    given: dict[str, Any] = {"region": np.str_("stripe"), "skip": [np.str_("a")]}
    given["block_ratios"] = {np.str_("b"): 0.25}
    assert "np." not in repr(MergeConfig(**given))


def test_a_set_is_stored_in_order() -> None:
    names = {f"transformer_blocks.{i}" for i in range(10)}
    assert MergeConfig(skip=names).skip == tuple(sorted(names))  # type: ignore[arg-type]


VARIED: list[MergeConfig] = [
    *map(MergeConfig.preset, PRESETS),
    MergeConfig(ratio=0.4, block_ratios={"mid_block.*": 0.2, "*": 0}, skip=("down_blocks.*",)),  # type: ignore[arg-type]
    MergeConfig(ratio=0, skip=(), components=("mlp",), placement="component"),
    MergeConfig(temperature=1e-6, merge_below=1 / 3, region="image", unmerge="pinv"),
    MergeConfig(ratio=np.float32(0.1), region_tokens=np.int64(16)),  # type: ignore[arg-type]
]


@pytest.mark.parametrize("given", VARIED, ids=repr)
@pytest.mark.parametrize(
    "way",
    [
        lambda c: MergeConfig(**json.loads(json.dumps(dataclasses.asdict(c)))),
        lambda c: eval(repr(c), {"MergeConfig": MergeConfig, "Schedule": Schedule}),
        lambda c: pickle.loads(pickle.dumps(c)),
        copy.copy,
        copy.deepcopy,
        dataclasses.replace,
    ],
    ids=["json", "repr", "pickle", "copy", "deepcopy", "replace"],
)
def test_a_config_comes_back(given: MergeConfig, way: Callable[[MergeConfig], MergeConfig]) -> None:
    back = way(given)
    assert (back, hash(back), repr(back)) == (given, hash(given), repr(given))
    with pytest.raises(dataclasses.FrozenInstanceError):
        back.ratio = 0.25  # type: ignore[misc]


def test_a_dictionary_is_taken_for_a_schedule() -> None:
    given: dict[str, Any] = {"schedule": {"select_every": 10}}
    assert MergeConfig(**given).schedule == Schedule(select_every=10)
    assert MergeConfig(schedule={}).schedule == Schedule()  # type: ignore[arg-type]


def test_pairs_are_taken_for_a_dictionary() -> None:
    ratios = {"a": 0.25, "b": 0.0}
    for given in (ratios, ratios.items(), list(ratios.items()), map(list, ratios.items())):
        assert MergeConfig(block_ratios=given).block_ratios == (("a", 0.25), ("b", 0.0))  # type: ignore[arg-type]


def test_a_config_prints_what_differs() -> None:
    assert repr(MergeConfig()) == str(MergeConfig()) == "MergeConfig(ratio=0.5)"
    assert repr(MergeConfig.preset("toma_stripe", ratio=0)) == (
        "MergeConfig(ratio=0.0, placement='component', region='stripe', region_tokens=16, "
        "schedule=Schedule(select_every=10, weigh_every=5))"
    )


def test_case_counts_in_patterns() -> None:
    assert matches("up_blocks.1.attentions.0", "up_*.[01].attentions.?")
    assert not matches("up_blocks.1", "Up_blocks.1")
    assert not matches("a/b", "a\\b")
    assert MergeConfig(block_ratios={"A.*": 0.25}).pattern_of("a.0") is None  # type: ignore[arg-type]


@pytest.mark.parametrize("region_tokens", [1, 2, 3, 4, 16, 50, 64, 76, 500, 1000, 4096, 10**6])
@pytest.mark.parametrize("share", [0.999, 0.5, 0.01, 1e-5])
@pytest.mark.parametrize("own", [False, True])
def test_a_ratio_that_merges_nothing_is_led_out(
    region_tokens: int, share: float, own: bool
) -> None:
    ratio = share * 0.5 / region_tokens

    def options(ratio: float) -> dict[str, Any]:
        given = {"block_ratios": {"a": ratio}} if own else {"ratio": ratio}
        return {"region_tokens": region_tokens, **given}

    MergeConfig(**options(ratio), region="image")
    with pytest.raises(ConfigError, match=rf"{ratio} is too small .*, or a ratio of 0$") as caught:
        MergeConfig(**{"ratio": 0, **options(ratio)})
    assert not MergeConfig(**{"ratio": 0, **options(0)}).merges
    said = dict(re.findall(r"(at least |region_tokens=)([\d.e-]+), ", str(caught.value)))
    if tokens := int(said.get("region_tokens=", 0)):
        assert tokens > region_tokens
        assert MergeConfig(**{"ratio": 0, **options(ratio), "region_tokens": tokens}).merges
    if least := float(said.get("at least ", 0)):
        assert MergeConfig(**{"ratio": 0, **options(least)}).merges
        assert kept_tokens(region_tokens, least) == region_tokens - 1
        assert kept_tokens(region_tokens, least * 0.99) == region_tokens
    assert bool(least) == (region_tokens > 1)
    assert bool(tokens) == (ratio > 1e-6)


TEN: dict[str, Any] = {"schedule": Schedule(select_every=10)}
TINY: dict[str, Any] = {"ratio": 0.001}
REFERENCES: dict[str, Any] = {"tokens": "references"}
MEMORY = Memory(every=3)
# What is refused, the words that name a way out, and the options of whoever takes it.
WAYS_OUT: list[tuple[dict[str, Any], str, dict[str, Any]]] = [
    ({"ratio": 2}, "such as 0.5", {"ratio": 0.5}),
    ({"block_ratios": {"a": 2}}, "such as 0.5", {"block_ratios": {"a": 0.5}}),
    ({"block_ratios": 5}, '{"up_blocks.1.*": 0.25}', {"block_ratios": {"up_blocks.1.*": 0.25}}),
    ({"block_ratios": {5: 0.5}}, '"up_blocks.1.*"', {"block_ratios": {"up_blocks.1.*": 0.5}}),
    ({"block_ratios": [("a", 0), ("a", 0)]}, "leave one", {"block_ratios": [("a", 0)]}),
    *(
        ({**COMPONENT, "components": bad}, repr(part), {**COMPONENT, "components": (part,)})
        for part in ALL
        for bad in ("mlp", ("attention",))
    ),
    ({"components": ()}, "all of them where placement='block'", {"components": ALL}),
    ({"components": ("mlp",)}, "placement='component'", {**COMPONENT, "components": ("mlp",)}),
    ({"components": ("mlp",)}, "leave components out", {}),
    *(
        ({name: "other"}, repr(choice), {name: choice})
        for name, choices in config._CHOICES.items()
        for choice in choices
    ),
    ({**REFERENCES, "merge_below": 0.6}, "leave merge_below out", REFERENCES),
    (
        {**REFERENCES, "selector": "fixed"},
        "use selector='facility_location'",
        {**REFERENCES, "selector": "facility_location"},
    ),
    ({"region_tokens": 0}, "such as 64", {"region_tokens": 64}),
    ({"temperature": 0}, "such as 0.001", {"temperature": 0.001}),
    ({"merge_below": 0}, "such as 0.6", {"merge_below": 0.6}),
    (
        {"schedule": 10},
        "Schedule(select_every=10, weigh_every=5)",
        {"schedule": Schedule(select_every=10, weigh_every=5)},
    ),
    *(
        ({"schedule": {"every": 10}}, f"{name!r}", {"schedule": {name: 10}})
        for name in ("select_every", "weigh_every")
    ),
    ({"schedule": {"select_every": 0}}, "such as 10", {"schedule": {"select_every": 10}}),
    ({"schedule": {"weigh_every": 0}}, "such as 5", {"schedule": {"weigh_every": 5}}),
    ({"skip": "a.*"}, "skip=('a.*',)", {"skip": ("a.*",)}),
    ({"skip": 5}, "skip=('mid_block.*',)", {"skip": ("mid_block.*",)}),
    ({"share": "block", **TEN}, "use share='group'", {"share": "group", **TEN}),
    ({"share": "block", **TEN}, "or Schedule()", {"share": "block", "schedule": Schedule()}),
    ({"merge_below": 0.6, **TEN}, "use Schedule()", {"merge_below": 0.6, "schedule": Schedule()}),
    ({"merge_below": 0.6, **TEN}, "or merge_below=1", {"merge_below": 1, **TEN}),
    *(
        (
            {"selector": "fixed", **options},
            "use unmerge='transpose' and merge_over='region'",
            {"selector": "fixed", "unmerge": "transpose", "merge_over": "region"},
        )
        for options in ({"unmerge": "pinv"}, {"merge_over": "image"})
    ),
    ({"memory": MEMORY, "share": "block"}, "use share='group'", {"memory": MEMORY}),
    ({"memory": MEMORY, "share": "block"}, "or memory=None", {"memory": None, "share": "block"}),
    (
        {"memory": MEMORY, **TEN},
        "use Schedule()",
        {"memory": MEMORY, "schedule": Schedule()},
    ),
    ({"memory": MEMORY, **TEN}, "or memory=None", {"memory": None, **TEN}),
    (
        {"memory": MEMORY, "residual": "replace"},
        "use residual='keep'",
        {"memory": MEMORY, "residual": "keep"},
    ),
    (
        {"memory": MEMORY, "residual": "replace"},
        "or memory=None",
        {"memory": None, "residual": "replace"},
    ),
    ({"memory": {"theta": 2}}, "such as 0.5", {"memory": {"theta": 0.5}}),
    ({"memory": {"theta": "much"}}, "or None", {"memory": {"theta": None}}),
    ({"memory": {"control": 1}}, "must be True or False", {"memory": {"control": True}}),
    ({"memory": {"every": 0}}, "such as 2", {"memory": {"every": 2}}),
    ({"memory": {"steps": 2}}, "choose from 'every'", {"memory": {"every": 2}}),
    ({"memory": 2}, "such as Memory(every=2)", {"memory": Memory(every=2)}),
    (
        {"placement": "keys", "components": ("mlp",)},
        "leave components out",
        {"placement": "keys"},
    ),
    ({"placement": "keys", "unmerge": "pinv"}, "leave unmerge out", {"placement": "keys"}),
    (TINY, "a ratio of at least 0.00782,", {"ratio": 0.00782}),
    (TINY, "region_tokens=1024,", {**TINY, "region_tokens": 1024}),
    (TINY, "or a ratio of 0", {"ratio": 0}),
    *(({"name": "tomesd"}, repr(name), {"name": name}) for name in PRESETS),
    ({"name": "toma", "rato": 0.25}, "ratio", {"name": "toma", "ratio": 0.25}),
]


def made(options: dict[str, Any]) -> MergeConfig:
    return MergeConfig.preset(**options) if "name" in options else MergeConfig(**options)


@pytest.mark.parametrize(
    ("bad", "way", "good"), WAYS_OUT, ids=[f"{r[0]}: {r[1]}" for r in WAYS_OUT]
)
def test_the_way_out_leads_out(bad: dict[str, Any], way: str, good: dict[str, Any]) -> None:
    with pytest.raises(ConfigError) as caught:
        made(bad)
    assert way in str(caught.value)
    made(good)


def test_every_refusal_has_a_way_out() -> None:
    files = (config.__file__, combinations.__file__, option_values.__file__, schedule.__file__)
    raised = set()
    for bad, _, _ in WAYS_OUT:
        with pytest.raises(ConfigError) as caught:
            made(bad)
        raised.add((str(caught.traceback[-1].path), caught.traceback[-1].lineno + 1))
    assert raised == {
        (str(Path(file).resolve()), node.lineno)
        for file in files
        for node in ast.walk(ast.parse(Path(file).read_text(encoding="utf-8")))
        if isinstance(node, ast.Raise)
    }
