"""Every schedule against its formula, step by step."""

import math
from itertools import pairwise

import pytest

from adaptkit.training.config import TrainConfig
from adaptkit.training.schedule import learning_rate


def rates(steps, **options):
    config = TrainConfig(base="b", data=("d",), learning_rate=2.0, **options)
    return [learning_rate(config, step, steps) for step in range(steps)]


RISE = [0.2 * (step + 1) for step in range(10)]
"""To 2.0, over a tenth of 100 steps."""


@pytest.mark.parametrize(
    ("schedule", "formula"),
    [
        ("constant", lambda step: 2.0),
        ("linear", lambda step: 2.0 * (100 - step) / 90),
        ("cosine", lambda step: 1.0 + math.cos(math.pi * (step - 10) / 90)),
        ("wsd", lambda step: 2.0 if step <= 75 else 2.0 * (100 - step) / 25),
    ],
)
def test_a_schedule_is_its_formula(schedule, formula):
    expected = RISE + [formula(step) for step in range(10, 100)]
    assert rates(100, schedule=schedule, warmup=0.1, decay=0.25) == pytest.approx(expected)


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine", "wsd"])
@pytest.mark.parametrize("steps", [1, 2, 3, 7])
@pytest.mark.parametrize("warmup", [0.0, 0.5, 0.99])
def test_every_rate_of_a_short_run_is_positive_and_at_most_the_highest(schedule, steps, warmup):
    for decay in (0.01, 1.0):
        found = rates(steps, schedule=schedule, warmup=warmup, decay=decay)
        assert all(0 < rate <= 2.0 for rate in found)
        falling = found[math.ceil(warmup * steps) :]
        assert all(later <= earlier for earlier, later in pairwise(falling))


def test_all_of_a_run_can_fall():
    assert rates(4, schedule="wsd", warmup=0.0, decay=1.0) == pytest.approx([2.0, 1.5, 1.0, 0.5])
