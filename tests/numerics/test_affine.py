"""Weighted sums of adapters that may also scale or replace weights, against their definition."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from adaptkit.numerics.affine import Effect, combine, square_sums

ROWS, COLUMNS = 5, 3
WEIGHTS = st.sampled_from([1.0, -1.0, 0.5, 0.3, 0.0, 2.0])


def normal(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape)


@st.composite
def effects(draw):
    """An adapter's E(W), as an ``Effect`` and as a function of W."""
    seed, weight = draw(st.integers(0, 10**6)), draw(WEIGHTS)
    delta = normal(seed, ROWS, COLUMNS) if draw(st.booleans()) else None
    shape = draw(st.sampled_from([None, (ROWS, 1), (1, COLUMNS)]))
    gain = abs(normal(seed + 1, *shape)) if shape else None
    replaced = draw(st.sampled_from(["nothing", "all", "some"]))
    instead = normal(seed + 2, ROWS, COLUMNS) if replaced != "nothing" else None
    where = (normal(seed + 3, ROWS, 1) > 0) if replaced == "some" else True
    plain = gain is None and instead is None

    def apply(weights):
        start = weights if instead is None else np.where(where, instead, weights)
        changed = start + (0 if delta is None else delta)
        return changed * gain if gain is not None else changed

    stored = delta * weight if plain and delta is not None else delta
    return Effect(weight, stored, gain, instead, where), apply


@given(st.lists(effects(), min_size=1, max_size=4), st.integers(0, 100))
def test_the_sum_is_w_plus_the_weighted_differences(found, seed):
    weights = normal(seed, ROWS, COLUMNS)
    expected = weights + sum(effect.weight * (apply(weights) - weights) for effect, apply in found)
    gain, change = combine([effect for effect, _ in found], ROWS, COLUMNS)
    found = (weights if gain is None else gain * weights) + change
    np.testing.assert_allclose(found, expected, rtol=1e-12, atol=1e-12)


def test_additions_alone_need_no_gain():
    gain, change = combine([Effect(2.0, normal(0, ROWS, COLUMNS)), Effect(1.0)], ROWS, COLUMNS)
    assert gain is None
    assert np.array_equal(change, normal(0, ROWS, COLUMNS))


def test_a_fully_replaced_weight_equals_its_replacement_exactly():
    instead = normal(1, ROWS, COLUMNS)
    gain, change = combine([Effect(1.0, instead=instead)], ROWS, COLUMNS)
    assert np.array_equal(gain * normal(2, ROWS, COLUMNS) + change, instead)


def test_squares_are_summed_in_order_along_rows_and_columns_and_across_blocks():
    values = normal(3, 7, 4)

    def in_order(numbers):
        total = np.float64(0.0)
        for number in numbers:
            total = total + np.float64(number) * np.float64(number)
        return total

    rows = np.array([in_order(row) for row in values.tolist()])
    columns = np.array([in_order(column) for column in values.T.tolist()])
    assert np.array_equal(square_sums(values, False), rows)
    assert np.array_equal(square_sums(values, True), columns)
    assert np.array_equal(square_sums(values[3:], True, square_sums(values[:3], True)), columns)
