"""A merge rounds each sum once, and can be undone to the last bit."""

import random
from fractions import Fraction

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from adaptkit.errors import NonFiniteError
from adaptkit.numerics import exact, lora, residual
from adaptkit.numerics.dtypes import BFLOAT16
from adaptkit.numerics.lora import LowRank

DTYPES = [BFLOAT16, np.dtype(np.float16), np.dtype(np.float32)]
SHAPE = {"bfloat16": (8, -126), "float16": (11, -14), "float32": (24, -126)}
"""Significant bits, and least exponent of a normal number."""


def problem(dtype, ratio=0.01, out=24, into=40, adapters=2, seed=0):
    """A weight and changes whose size relative to it is about ``ratio``."""
    generator = np.random.default_rng(seed)
    weight = (generator.standard_normal((out, into)) * 0.04).astype(dtype)
    weight.reshape(-1)[:4] = 0.0, -0.0, 1e-6, -1e-6
    terms = []
    for number in range(adapters):
        rank = 2 + number
        a, b = normal(generator, rank, into), normal(generator, out, rank)
        terms.append(LowRank(a, b, 0.04 * ratio / rank**0.5))
    return weight, terms


def normal(generator, *shape):
    return generator.standard_normal(shape, np.float32)


def bits(values):
    return values.view(f"i{values.itemsize}")


def ordinals(values):
    """The number of each float among those of its type, in order; -0 comes just before +0."""
    wide = bits(values).astype(np.int64)
    return np.where(wide >= 0, wide, -(wide + (1 << (8 * values.itemsize - 1))) - 1)


def same_bits(one, other):
    return one.dtype == other.dtype and np.array_equal(bits(one), bits(other))


def rounded(value: Fraction, dtype) -> Fraction:
    """The nearest number of a binary format, ties to even, in rational arithmetic."""
    if value == 0:
        return value
    precision, least = SHAPE[dtype.name]
    exponent = (abs(value.numerator)).bit_length() - value.denominator.bit_length()
    if Fraction(2) ** exponent > abs(value):
        exponent -= 1
    elif Fraction(2) ** (exponent + 1) <= abs(value):
        exponent += 1
    step = Fraction(2) ** (max(exponent, least) - precision + 1)
    return round(value / step) * step  # Fraction's round takes ties to the even integer


def delta_of(terms, shape):
    """The canonical delta in float64, computed by numpy."""
    total = np.zeros(shape)
    for change in terms:
        inner = np.zeros(shape)
        for k in range(change.rank):
            inner += change.b[:, k, None].astype(np.float64) * change.a[None, k, :].astype(np.float64)
        total += inner * change.scaling
    return total


def merge(weight, terms, with_undo=True):
    """Merge all rows at once."""
    return exact.merge_rows(weight, exact.prepare(terms), 0, with_undo)


def unmerge(merged, terms, residual):
    return exact.unmerge_rows(merged, exact.prepare(terms), 0, residual)


@pytest.mark.parametrize("ratio", [1e-4, 0.01, 1.0])
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_element_is_the_sum_rounded_once(dtype, ratio):
    weight, terms = problem(dtype, ratio)
    merged = merge(weight, terms).weight
    delta = delta_of(terms, weight.shape)
    for index in np.ndindex(*weight.shape):
        total = float(weight[index]) + float(delta[index])  # float64, as the definition says
        assert Fraction(float(merged[index])) == rounded(Fraction(total), dtype), index


def test_the_reference_rounding_matches_numpy():
    numbers = random.Random(0)
    for _ in range(500):
        value = numbers.gauss(0, 1) * 10 ** numbers.uniform(-7, 3)
        assert rounded(Fraction(value), np.dtype(np.float16)) == Fraction(float(np.float16(value)))
        assert rounded(Fraction(value), np.dtype(np.float32)) == Fraction(float(np.float32(value)))


@settings(deadline=None, max_examples=60)
@given(st.sampled_from(DTYPES), st.sampled_from([0.0, 1e-5, 1e-3, 0.1, 10.0]), st.integers(1, 3), st.integers(0, 999))
def test_a_merge_is_undone_to_the_last_bit(dtype, ratio, adapters, seed):
    weight, terms = problem(dtype, ratio, adapters=adapters, seed=seed)
    merged = merge(weight, terms)
    restored = unmerge(merged.weight, terms, merged.residual)
    assert same_bits(restored, weight)


def test_without_undo_the_weights_are_the_same_and_the_residual_is_empty():
    weight, terms = problem(BFLOAT16)
    assert np.array_equal(merge(weight, terms, False).weight, merge(weight, terms).weight)
    assert merge(weight, terms, False).residual.size == 0


@pytest.mark.parametrize("dtype", DTYPES)
def test_reported_sums_match_dense_matrices(dtype):
    weight, terms = problem(dtype, 0.003)
    merged = merge(weight, terms)
    delta, before = delta_of(terms, weight.shape), weight.astype(np.float64)
    effect = merged.weight - before
    assert merged.moved == int((merged.weight != weight).sum())
    assert merged.squared_delta == pytest.approx(np.square(delta).sum(), rel=1e-12)
    assert merged.squared_weight == pytest.approx(np.square(before).sum(), rel=1e-12)
    near = {"rel": 1e-9} if dtype == np.float32 else {"abs": 1e-6}  # 16-bit weights: Σ effect · Δ in float32
    share = merged.overlap / merged.squared_delta
    assert share == pytest.approx((effect * delta).sum() / (delta * delta).sum(), **near)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_zero_change_turns_minus_zero_into_zero_and_leaves_all_other_bits(dtype):
    """As an IEEE sum does; the residual keeps the sign for the undo."""
    weight, terms = problem(dtype)
    is_minus_zero = (weight == 0) & np.signbit(weight)
    assert is_minus_zero.any()
    zero = [change.weighted(0.0) for change in terms]
    merged = merge(weight, zero)
    assert np.array_equal(bits(merged.weight), np.where(is_minus_zero, 0, bits(weight)))
    assert (merged.moved, merged.squared_delta, merged.overlap) == (0, 0.0, 0.0)
    assert same_bits(unmerge(merged.weight, zero, merged.residual), weight)


def test_the_delta_is_summed_in_the_order_of_the_adapters():
    """Floating-point addition is not associative, so the order affects the bits."""
    weight, terms = problem(np.dtype(np.float32), 1.0, adapters=3)
    assert np.array_equal(exact.delta(terms), delta_of(terms, weight.shape))
    assert not np.array_equal(exact.delta(terms), exact.delta(terms[::-1]))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("ratio", [0.01, 1.0])
def test_wrong_values_in_a_residual_affect_only_the_ambiguous_weights(dtype, ratio):
    """Only its length is checked here; callers compare hashes. Each value moves one weight by as many neighbours."""
    weight, terms = problem(dtype, ratio)
    merged = merge(weight, terms)
    restored = unmerge(merged.weight, terms, merged.residual + 1)
    steps = ordinals(restored) - ordinals(weight)
    assert 0 < merged.residual.size < weight.size
    assert np.unique(steps).tolist() == [0, 1]
    assert steps.sum() == merged.residual.size


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_sum_that_overflows_is_refused(dtype):
    weight, terms = problem(dtype)
    weight[5, 6] = largest = ml_dtypes.finfo(dtype).max
    huge = LowRank(np.ones((1, 40), np.float32), np.ones((24, 1), np.float32), float(largest))
    with pytest.raises(NonFiniteError, match="overflows"):
        merge(weight, [*terms, huge])


@pytest.mark.parametrize("step", [1, 5, 23])
@pytest.mark.parametrize("dtype", DTYPES)
def test_merging_row_blocks_gives_the_bits_of_the_whole(dtype, step):
    weight, terms = problem(dtype, 0.1)
    whole, prepared = merge(weight, terms), exact.prepare(terms)
    starts = range(0, len(weight), step)
    pieces = [exact.merge_rows(weight[start : start + step], prepared, start, True) for start in starts]
    assert np.array_equal(np.concatenate([piece.weight for piece in pieces]), whole.weight)
    assert np.array_equal(np.concatenate([piece.residual for piece in pieces]), whole.residual)
    assert sum(piece.moved for piece in pieces) == whole.moved
    assert sum(piece.squared_delta for piece in pieces) == pytest.approx(whole.squared_delta, rel=1e-12)
    assert sum(piece.squared_weight for piece in pieces) == pytest.approx(whole.squared_weight, rel=1e-12)
    for start, piece in zip(starts, pieces, strict=True):
        restored = exact.unmerge_rows(piece.weight, prepared, start, piece.residual)
        assert same_bits(restored, weight[start : start + step])


@pytest.mark.parametrize("longer", [True, False])
def test_a_residual_of_the_wrong_length_is_refused_for_a_row_block(longer):
    weight, terms = problem(BFLOAT16, 0.3)
    prepared, rows = exact.prepare(terms), slice(0, 9)
    merged = exact.merge_rows(weight[rows], prepared, 0, True)
    other = np.append(merged.residual, merged.residual[0]) if longer else merged.residual[:-1]
    with pytest.raises(ValueError, match="ambiguous"):
        exact.unmerge_rows(merged.weight, prepared, 0, other)


@pytest.mark.parametrize(("rows", "columns", "start"), [(3, 40, 22), (3, 39, 0), (3, 40, -1)])
def test_rows_that_do_not_fit_the_factors_are_refused(rows, columns, start):
    prepared = exact.prepare(problem(BFLOAT16)[1])
    with pytest.raises(ValueError, match="are outside"):
        exact.merge_rows(np.zeros((rows, columns), BFLOAT16), prepared, start, True)


@settings(deadline=None, max_examples=60)
@given(st.sampled_from(DTYPES), st.sampled_from([0.0, 1.0, 0.98, -0.3, 1e-9]), st.booleans(), st.integers(0, 999))
def test_a_merge_with_a_gain_is_undone_to_the_last_bit(dtype, size, columns, seed):
    weight, terms = problem(dtype, 0.05, seed=seed)
    gain = np.random.default_rng(seed).random((1, 40) if columns else (24, 1)) * 0.1 + size
    change = exact.delta(terms)
    merged = exact.merge_affine(weight, change, gain, True)
    total = gain * weight.astype(np.float64) + change
    assert np.allclose(merged.weight.astype(np.float64), total, rtol=2.0 ** -SHAPE[dtype.name][0], atol=1e-7)
    restored = exact.unmerge_affine(merged.weight, change, gain, merged.residual)
    assert same_bits(restored, weight)
    with pytest.raises(ValueError, match="ambiguous"):
        exact.unmerge_affine(merged.weight, change, gain, np.append(merged.residual, 0))


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_gain_of_one_equals_plain_addition(dtype):
    weight, terms = problem(dtype, 0.05)
    change = exact.delta(terms)
    added = exact.merge_rows(weight, exact.prepare(terms), 0, True)
    for gain in (None, np.ones((1, 1)), np.ones((24, 1))):
        merged = exact.merge_affine(weight, change, gain, True)
        assert np.array_equal(merged.weight, added.weight)
        assert np.array_equal(merged.residual, added.residual)
        assert merged.moved == added.moved
        assert merged.squared_delta == pytest.approx(added.squared_delta, rel=1e-9)


def test_sums_reported_with_a_gain_cover_the_whole_change():
    weight, terms = problem(np.dtype(np.float32), 0.05)
    change, gain = exact.delta(terms), np.random.default_rng(0).random((24, 1)) + 0.5
    merged = exact.merge_affine(weight, change, gain, False)
    before, after = weight.astype(np.float64), merged.weight.astype(np.float64)
    whole, effect = gain * before + change - before, after - before
    assert merged.squared_delta == pytest.approx((whole**2).sum(), rel=1e-9)
    assert merged.overlap == pytest.approx((effect * whole).sum(), rel=1e-9)
    assert merged.residual.size == 0


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_rows_with_non_finite_values_or_sums_are_refused(dtype, value):
    weight, terms = problem(dtype)
    weight[3, 4] = value
    change = exact.delta(terms)
    with pytest.raises(NonFiniteError, match="holds NaN or infinity"):
        exact.merge_rows(weight, exact.prepare(terms), 0, True)
    with pytest.raises(NonFiniteError, match="holds NaN or infinity"):
        exact.merge_affine(weight, change, np.zeros((24, 1)), True)
    weight[3, 4], change[3, 4] = 0, 1e39
    with pytest.raises(NonFiniteError, match="overflows"):
        exact.merge_affine(weight, change, None, True)


@pytest.mark.parametrize("dtype", DTYPES)
def test_undoing_a_one_percent_change_costs_at_most_a_tenth_of_a_bit_per_weight(dtype):
    """The design target, for weights of a size that models have."""
    generator = np.random.default_rng(0)
    weight = (generator.standard_normal((256, 1024)) * 0.02).astype(dtype)
    term = LowRank(normal(generator, 16, 1024), normal(generator, 256, 16), 1.0)
    term = term.weighted(0.01 * float(np.linalg.norm(weight.astype(np.float64))) / lora.norm(term))
    merged = exact.merge_rows(weight, exact.prepare([term]), 0, True)
    assert (merged.squared_delta / merged.squared_weight) ** 0.5 == pytest.approx(0.01, rel=1e-3)
    assert 8 * len(residual.encode(merged.residual)) / weight.size <= 0.1
