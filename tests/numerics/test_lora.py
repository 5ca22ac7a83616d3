"""The arithmetic of low-rank changes, against dense float64 matrices."""

import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from low_rank import dense, term

from adaptkit.numerics import lora
from adaptkit.numerics.comparison import difference_norm
from adaptkit.numerics.exact import delta
from adaptkit.numerics.lora import LowRank
from adaptkit.numerics.scaling import scaling

TERMS = st.builds(
    term,
    st.just(13),
    st.just(9),
    st.integers(1, 5),
    st.sampled_from([1.0, -0.5, 2.0, 1 / 3, 0.0]),
    st.integers(0, 999),
    st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
)


@pytest.mark.parametrize(("alpha", "rank", "expected"), [(16, 8, 2.0), (5, 3, 5 / 3), (1, 64, 0.015625)])
def test_scaling_is_alpha_over_rank(alpha, rank, expected):
    assert scaling(alpha, rank) == expected
    assert scaling(alpha, rank, rslora=True) == alpha / math.sqrt(rank)


@settings(deadline=None, max_examples=60)
@given(st.lists(TERMS, min_size=1, max_size=3))
def test_delta_is_the_sum_of_the_dense_changes(terms):
    expected = sum(dense(change) for change in terms)
    assert np.allclose(delta(terms), expected.numpy(), rtol=1e-12, atol=1e-12)


@settings(deadline=None, max_examples=40)
@given(st.lists(TERMS, min_size=1, max_size=3), st.integers(0, 12), st.integers(0, 13))
def test_rows_of_delta_have_the_bits_of_the_whole(terms, start, count):
    """Row blocks save memory and do not affect the result."""
    rows = slice(start, start + count)
    assert np.array_equal(delta(terms, rows), delta(terms)[rows])


def test_an_element_of_delta_matches_rational_arithmetic():
    """Four exact products; three roundings while they are added; one for the scaling."""
    change = term(2, 3, 4, scaling=0.3, seed=5)
    total = 0.0
    for k in range(4):
        exact = Fraction(float(change.lora_b[1, k])) * Fraction(float(change.lora_a[k, 2]))
        assert Fraction(float(exact)) == exact
        total = total + float(exact)
    assert float(delta([change])[1, 2]) == total * 0.3


@given(TERMS)
def test_weighting_scales_a_change_and_a_weight_of_zero_gives_a_delta_of_zero(change):
    assert torch.allclose(dense(change.weighted(-2.5)), -2.5 * dense(change), atol=1e-12)
    assert not delta([change.weighted(0.0)]).any()


@given(TERMS)
def test_the_transposed_change_is_the_change_of_the_transposed_weight(change):
    turned = lora.transposed(change)
    assert turned.shape == change.shape[::-1]
    assert np.array_equal(delta([turned]), delta([change]).T)
    assert np.array_equal(delta([lora.transposed(turned)]), delta([change]))


@settings(deadline=None, max_examples=60)
@given(TERMS, TERMS)
def test_inner_products_and_norms_match_dense_matrices(one, two):
    between, expected = lora.inner_products(one, two)[1], float((dense(one) * dense(two)).sum())
    size = float(dense(one).norm() * dense(two).norm())
    assert between == pytest.approx(expected, abs=1e-12 * size + 1e-300)
    assert between == pytest.approx(lora.inner_products(two, one)[1], abs=1e-12 * size + 1e-300)
    assert lora.norm(one) == pytest.approx(float(dense(one).norm()), rel=1e-10)
    assert difference_norm(one, two) == pytest.approx(float((dense(one) - dense(two)).norm()), rel=1e-10, abs=1e-12)


@pytest.mark.parametrize(
    ("out", "into", "ranks"), [(515, 300, (3, 16)), (129, 1, (1, 2)), (1, 128, (4, 4)), (40, 700, (7, 0))]
)
@pytest.mark.parametrize("dtypes", [("float32", "float32"), ("bfloat16", "float64")])
def test_inner_products_are_right_for_all_sizes_and_dtypes(out, into, ranks, dtypes):
    one, two = (
        term(out, into, rank, scale, seed, getattr(torch, dtype))
        for rank, scale, seed, dtype in zip(ranks, (0.5, -3.0), (1, 2), dtypes, strict=True)
    )
    x, y = dense(one), dense(two)
    expected = (x * x).sum(), (x * y).sum(), (y * y).sum()
    size = float(x.norm()) * max(1.0, float(y.norm()))
    assert lora.inner_products(one, two) == pytest.approx([float(v) for v in expected], rel=1e-12, abs=1e-13 * size)
    turned = lora.inner_products(lora.transposed(two), lora.transposed(one))
    assert turned == pytest.approx([float(v) for v in reversed(expected)], rel=1e-12, abs=1e-13 * size)


@pytest.mark.parametrize("nudge", [1e-3, 1e-6])
def test_the_norm_of_a_small_difference_is_accurate(nudge):
    """Expanding the square would lose the digits: at 1e-6 only noise of about 1e-8 · ‖Δ‖ would remain."""
    one = term(40, 30, 6, 1.0, 1)
    two = LowRank.of_tensors(one.lora_a.clone(), one.lora_b.double() * (1 + nudge), 1.0)
    found = difference_norm(one, two)
    assert found == pytest.approx(nudge * lora.norm(one), rel=1e-7)


@pytest.mark.parametrize(("out", "into", "ranks"), [(4, 3, (8, 8)), (1, 1, (1, 1)), (30, 2, (2, 5)), (2, 30, (5, 1))])
def test_norms_are_right_for_ranks_larger_than_the_matrix(out, into, ranks):
    one, two = term(out, into, ranks[0], 0.5, 1), term(out, into, ranks[1], 2.0, 2)
    assert difference_norm(one, two) == pytest.approx(float((dense(one) - dense(two)).norm()), rel=1e-10)
    assert lora.norm(one) == pytest.approx(float(dense(one).norm()), rel=1e-10)
