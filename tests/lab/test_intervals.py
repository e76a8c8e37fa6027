"""Intervals that hold the true mean as often as they say."""

import math

import numpy as np
import pytest

from toma_fx.lab.intervals import mean_interval


def test_they_hold_the_true_mean_about_95_times_in_100() -> None:
    generator = np.random.default_rng(0)
    held = 0
    for _ in range(200):
        prompts = generator.normal(3.0, 1.0, size=(40, 1))
        low, high = mean_interval(prompts + generator.normal(size=(40, 2)), draws=400)
        held += low <= 3.0 <= high
    assert 180 <= held <= 199


def test_seeds_of_one_prompt_are_not_independent() -> None:
    prompts = np.random.default_rng(0).normal(size=(30, 1))
    low, high = mean_interval(np.repeat(prompts, 50, axis=1))
    assert high - low == pytest.approx(2 * 1.96 * prompts.std() / math.sqrt(30), rel=0.15)


def test_they_are_the_same_each_time() -> None:
    values = np.random.default_rng(1).normal(size=(5, 3))
    assert mean_interval(values) == mean_interval(values)
    assert mean_interval(values) != mean_interval(values, seed=1)


def test_one_value_has_none_and_infinity_stays() -> None:
    assert all(map(math.isnan, mean_interval([[1.0]])))
    assert mean_interval([[math.inf, math.inf]]) == (math.inf, math.inf)
    assert mean_interval([[2.0, 2.0], [2.0, 2.0]]) == (2.0, 2.0)
