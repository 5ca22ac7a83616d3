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
from adaptkit.numerics.exact import delta
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
@given(TERMS)
def test_the_norm_is_that_of_the_dense_matrix(change):
    assert lora.norm(change) == pytest.approx(float(dense(change).norm()), rel=1e-10)


@pytest.mark.parametrize(("out", "into", "rank"), [(4, 3, 8), (1, 1, 1), (30, 2, 5), (2, 30, 5), (7, 5, 0)])
def test_norms_are_right_for_all_ranks_and_dtypes(out, into, rank):
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        one = term(out, into, rank, -0.5, 1, dtype)
        assert lora.norm(one) == pytest.approx(float(dense(one).norm()), rel=1e-10)
