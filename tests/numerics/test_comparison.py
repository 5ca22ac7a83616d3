"""Factored comparisons match dense matrices in float64; tallies of pieces match whole tensors."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from low_rank import dense, term

from adaptkit.numerics.comparison import (
    SAMPLED_ROWS,
    Tally,
    compare,
    effective_rank_with_tail,
    sampled_rows,
)
from adaptkit.numerics.lora import LowRank, is_equal
from adaptkit.numerics.spectrum import effective_rank
from adaptkit.numerics.tensors import as_array


def thin(matrix):
    """The singular vectors and values of a matrix, without those that are rounding errors."""
    u, sigma, vt = torch.linalg.svd(matrix, full_matrices=False)
    kept = sigma > 1e-10 * max(float(sigma[0]), 1e-300)
    return u[:, kept], sigma[kept], vt[kept]


def interference(one, two):
    """As the paper writes it: ‖(UᵀU − I) Σ (VᵀV − I)‖₁ over both tasks' vectors side by side."""
    (u1, s1, v1), (u2, s2, v2) = thin(one), thin(two)
    u, v = torch.cat([u1, u2], dim=1), torch.cat([v1, v2]).T
    sigma, eye = torch.diag(torch.cat([s1, s2])), torch.eye(u.shape[1], dtype=u.dtype)
    return float(((u.T @ u - eye) @ sigma @ (v.T @ v - eye)).abs().sum())


def subspace_cosines(one, two):
    """Computed from projections instead of bases: the eigenvalues of P₁P₂P₁ are the squared cosines."""
    projections = [basis @ torch.linalg.pinv(basis) for basis in (one, two)]
    squares = torch.linalg.eigvalsh(projections[0] @ projections[1] @ projections[0])
    return squares.clamp(min=0).sqrt().flip(0)[: min(one.shape[1], two.shape[1])]


TERMS = st.builds(
    term,
    st.just(13),
    st.just(9),
    st.integers(1, 7),
    st.sampled_from([1.0, -0.5, 2.0, 1 / 3]),
    st.integers(0, 999),
    st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
)


@settings(deadline=None, max_examples=80)
@given(TERMS, TERMS)
def test_every_figure_matches_the_dense_matrices(first, second):
    found, one, two = compare(first, second), dense(first), dense(second)
    size = float(one.norm() * two.norm())
    assert found.inner == pytest.approx(float((one * two).sum()), abs=1e-12 * size)
    for sigma, matrix in zip((*found.sigmas, found.difference_sigma), (one, two, one - two), strict=True):
        expected = torch.linalg.svdvals(matrix)
        assert torch.allclose(sigma, expected[: sigma.numel()], atol=1e-11 * float(expected[0]) + 1e-11)
        assert float(sigma.norm()) == pytest.approx(float(matrix.norm()), rel=1e-10, abs=1e-10)
    spaces = ((found.columns, one, two, 13), (found.rows, one.T, two.T, 9))
    for overlap, a, b, space in spaces:
        bases = thin(a)[0], thin(b)[0]
        dimensions = bases[0].shape[1], bases[1].shape[1]
        # roots of eigenvalues near 0
        assert overlap.cosines == pytest.approx(subspace_cosines(*bases).tolist(), abs=1e-6)
        expected = float((bases[0].T @ bases[1]).norm()) / math.sqrt(min(dimensions))
        assert overlap.rms == pytest.approx(expected, abs=1e-9)
        assert overlap.random == pytest.approx(math.sqrt(max(dimensions) / space), rel=1e-12)
    scale = float(found.sigmas[0].sum() + found.sigmas[1].sum())
    assert found.interference == pytest.approx(interference(one, two), abs=1e-9 * scale)
    assert found.interference_share == pytest.approx(interference(one, two) / scale, abs=1e-9)
    both = (one != 0) & (two != 0)
    agreeing = (torch.sign(one) == torch.sign(two)) & both  # all 13 rows are sampled
    assert found.sign_agreement == pytest.approx(int(agreeing.sum()) / int(both.sum()), abs=2 / 117)


@settings(deadline=None, max_examples=40)
@given(TERMS)
def test_a_change_compared_with_itself_does_not_differ(change):
    found = compare(change, LowRank.of_tensors(change.lora_a.clone(), change.lora_b.clone(), change.scaling))
    assert found.difference_sigma.count_nonzero() == 0, "exactly"
    assert torch.equal(*found.sigmas)
    assert found.inner == pytest.approx(float(dense(change).square().sum()), rel=1e-12)
    assert found.columns.rms == pytest.approx(1, abs=1e-12)
    assert found.rows.rms == pytest.approx(1, abs=1e-12)
    assert found.interference_share == pytest.approx(1, rel=1e-9)
    assert found.sign_agreement == 1


def test_a_change_and_its_negative_share_subspaces_but_no_signs():
    change = term(70, 20, 3)
    found = compare(change, change.weighted(-1))
    assert found.inner == pytest.approx(-float(dense(change).square().sum()), rel=1e-12)
    assert found.columns.rms == pytest.approx(1, abs=1e-12)
    assert found.sign_agreement == 0


def test_orthogonal_changes_do_not_interfere():
    eye = torch.eye(8)
    first, second = LowRank.of_tensors(eye[:2], eye[:, 2:4], 3.0), LowRank.of_tensors(eye[4:6], eye[:, 6:8], 0.5)
    found = compare(first, second)
    assert (found.inner, found.interference, found.columns.rms, found.rows.rms) == (0, 0, 0, 0)
    assert found.sign_agreement is None, "where one is not zero the other is"
    assert found.difference_sigma[:4].tolist() == pytest.approx([3, 3, 0.5, 0.5])


def test_the_norm_of_a_tiny_difference_is_accurate():
    """Expanding ‖Δ₁ − Δ₂‖² would lose all digits."""
    first = term(50, 40, 4)
    second = LowRank.of_tensors(first.lora_a, first.lora_b.clone(), first.scaling)
    second.lora_b[7, 2] += 1e-6
    step = float(second.lora_b[7, 2].double() - first.lora_b[7, 2].double())
    found = compare(first, second)
    expected = abs(step) * float(first.lora_a[2].double().norm())
    assert float(found.difference_sigma.norm()) == pytest.approx(expected, rel=1e-6)


def test_figures_are_accurate_for_changes_of_very_different_size():
    small, large = term(50, 40, 4, scaling=1e-9, seed=3), term(50, 40, 4, scaling=1e6, seed=4)
    found = compare(large, small)
    assert torch.allclose(found.sigmas[1], torch.linalg.svdvals(dense(small))[:4], rtol=1e-10)
    assert len(found.columns.cosines) == 4
    assert found.columns.random == math.sqrt(4 / 50)


def test_zero_changes_have_no_directions():
    zero, change = LowRank.of_tensors(torch.ones(2, 9), torch.zeros(13, 2), 1.0), term(13, 9, 3)
    for first, second in ((zero, change), (change, zero), (zero, zero), (change.weighted(0.0), change)):
        found = compare(first, second)
        assert (found.columns, found.rows, found.sign_agreement) == (None, None, None)
        assert (found.inner, found.interference, found.interference_share) == (0, 0, 0)
    assert found.sigmas[1].tolist() == pytest.approx(torch.linalg.svdvals(dense(change))[:3].tolist())


def test_changes_of_different_shapes_are_refused():
    with pytest.raises(ValueError, match="cannot be compared"):
        compare(term(4, 5, 1), term(5, 4, 1))


def test_signs_of_many_rows_are_estimated_from_the_same_rows_each_time():
    first, second = term(4000, 50, 3, seed=1), term(4000, 50, 3, seed=2)
    mixed = LowRank.of_tensors(
        torch.cat([first.lora_a, second.lora_a]), torch.cat([first.lora_b, second.lora_b], dim=1), 1.0
    )
    found = compare(first, mixed).sign_agreement
    rows = sampled_rows(4000)
    assert torch.equal(rows, sampled_rows(4000))
    assert rows.unique().numel() == SAMPLED_ROWS == 64
    one, two = dense(first), dense(mixed)
    assert found == float((torch.sign(one[rows]) == torch.sign(two[rows])).double().mean())
    assert found == pytest.approx(float((torch.sign(one) == torch.sign(two)).double().mean()), abs=0.03)
    assert sampled_rows(64).tolist() == list(range(64))


def test_is_equal_compares_scaling_and_all_values():
    change = term(5, 4, 2)
    assert is_equal(change, LowRank.of_tensors(change.lora_a.clone(), change.lora_b.clone(), 1.0))
    assert not is_equal(change, change.weighted(2))
    other = change.lora_b.clone()
    other.view(torch.int32)[3, 1] += 1
    assert not is_equal(change, LowRank.of_tensors(change.lora_a, other, 1.0))


NUMBERS = st.lists(st.floats(-1e6, 1e6, width=32), min_size=1, max_size=40)
DTYPES = st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn])


@settings(deadline=None, max_examples=80)
@given(NUMBERS, DTYPES, DTYPES, st.integers(1, 9), st.randoms(use_true_random=False))
def test_a_tally_of_pieces_matches_whole_tensors(numbers, dtype, other_dtype, piece, random):
    values = torch.tensor(numbers, dtype=torch.float64).clamp(-400, 400)
    first = values.to(dtype)
    second = torch.tensor([v * random.choice([1, 1, 1.5]) for v in values.tolist()]).clamp(-400, 400).to(other_dtype)
    tally = Tally()
    for start in range(0, len(numbers), piece):
        tally.add(*(as_array(values[start : start + piece]) for values in (first, second)))
    one, two = first.double(), second.double()
    for found, expected in zip(tally.norms, (one, two, one - two), strict=True):
        assert found == pytest.approx(float(expected.norm()), rel=1e-12)
    assert tally.compared == len(numbers)
    if dtype != other_dtype:
        assert tally.changed == int((one != two).sum())
    else:
        bits = [values.view(torch.uint8).reshape(len(numbers), -1) for values in (first, second)]
        unlike = [bool((bits[0][i] != bits[1][i]).any()) for i in range(len(numbers))]
        assert tally.changed == sum(unlike)


def test_a_tally_counts_zeros_of_different_sign_as_changed():
    tally = Tally()
    tally.add(np.array([0.0, 1.0]), np.array([-0.0, 1.0]))
    assert (tally.changed, tally.norms) == (1, (1.0, 1.0, 0.0))


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_tally_with_nan_or_infinity_has_no_norms(bad):
    tally = Tally()
    tally.add(np.array([bad, 1.0]), np.array([1.0, 1.0]))
    assert (tally.changed, tally.norms) == (1, None)


def test_a_tally_counts_changed_integers_and_booleans():
    tally = Tally()
    tally.add(np.array([1, 2, 3], np.uint8), np.array([1, 2, 4], np.uint8))
    tally.add(np.array([True, False]), np.array([True, True]))
    assert (tally.changed, tally.compared) == (2, 5)


def test_the_effective_rank_with_a_flat_tail_matches_the_whole_spectrum():
    sigma = torch.cat([torch.tensor([9.0, 5, 2]), torch.full((20,), 0.25)]).double()
    square = float(sigma.square().sum())
    assert effective_rank_with_tail(sigma[:3], square, 23) == pytest.approx(effective_rank(sigma), rel=1e-9)
    assert effective_rank_with_tail(sigma, square, 23) == pytest.approx(effective_rank(sigma), rel=1e-9)


@settings(deadline=None, max_examples=40)
@given(st.lists(st.floats(0.01, 100), min_size=2, max_size=30), st.integers(1, 30))
def test_the_effective_rank_with_an_unknown_tail_is_never_too_low(numbers, known):
    sigma = torch.tensor(sorted(numbers, reverse=True), dtype=torch.float64)
    found = effective_rank_with_tail(sigma[:known], float(sigma.square().sum()), len(numbers))
    assert found >= effective_rank(sigma) * (1 - 1e-9)
