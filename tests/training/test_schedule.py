"""Every schedule against its formula, step by step."""

import math
from itertools import pairwise
from types import SimpleNamespace

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from adaptkit.training.config import TrainConfig
from adaptkit.training.preparation import total_steps
from adaptkit.training.schedule import learning_rate, steps_in


def rates(steps, **options):
    config = TrainConfig(base="b", data=("d",), learning_rate=2.0, **options)
    return [learning_rate(config, step, steps) for step in range(steps)]


RISE = [0.2 * (step + 1) for step in range(10)]
"""Warmup to 2.0 over a tenth of 100 steps."""


@pytest.mark.parametrize(
    ("schedule", "formula"),
    [
        ("constant", lambda step: 2.0),
        ("linear", lambda step: 2.0 * (100 - step) / 90),
        ("cosine", lambda step: 1.0 + math.cos(math.pi * (step - 10) / 90)),
        ("wsd", lambda step: 2.0 if step <= 75 else 2.0 * (100 - step) / 25),
    ],
)
def test_a_schedule_follows_its_formula(schedule, formula):
    falling = {"decay": 0.25} if schedule == "wsd" else {}
    expected = RISE + [formula(step) for step in range(10, 100)]
    assert rates(100, schedule=schedule, warmup=0.1, **falling) == pytest.approx(expected)


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine", "wsd"])
@pytest.mark.parametrize("steps", [1, 2, 3, 7])
@pytest.mark.parametrize("warmup", [0.0, 0.5, 0.99])
def test_rates_of_short_runs_are_positive_and_bounded_and_fall_after_warmup(schedule, steps, warmup):
    for part in ({"decay": 0.01}, {"decay": 1.0}) if schedule == "wsd" else ({},):
        found = rates(steps, schedule=schedule, warmup=warmup, **part)
        assert all(0 < rate <= 2.0 for rate in found)
        falling = found[steps_in(warmup, steps) :]
        assert all(later <= earlier for earlier, later in pairwise(falling))


def test_wsd_can_decay_over_the_whole_run():
    assert rates(4, schedule="wsd", warmup=0.0, decay=1.0) == pytest.approx([2.0, 1.5, 1.0, 0.5])


@given(st.integers(0, 10**6), st.integers(0, 6), st.integers(1, 10**6))
@example(11, 1, 50)
@example(7, 2, 100)
def test_a_fraction_of_the_steps_is_rounded_up_from_its_exact_decimal_value(digits, places, steps):
    assert steps_in(float(f"{digits}e-{places}"), steps) == -(-digits * steps // 10**places)


@given(st.integers(1, 99), st.integers(1, 40))
def test_a_fraction_that_gives_a_whole_number_of_steps_is_not_rounded_up(hundredths, count):
    """For example, 1.1 epochs of 50 steps are 55 steps, and 0.07 of 100 steps are 7."""
    steps = 100 * count
    options = {"base": "b", "data": ("d",), "learning_rate": 2.0}
    epochs = TrainConfig(**options, epochs=float(f"1.{hundredths:02}"))
    assert total_steps(epochs, SimpleNamespace(steps_per_epoch=steps)) == steps + hundredths * count
    written, of_them = float(f"0.{hundredths:02}"), hundredths * count
    rises = TrainConfig(**options, warmup=written)
    assert next(step for step in range(steps) if learning_rate(rises, step, steps) == 2.0) == of_them - 1
    falls = TrainConfig(**options, warmup=0.0, schedule="wsd", decay=written)
    assert sum(learning_rate(falls, step, steps) < 2.0 for step in range(steps)) == of_them - 1
