"""Factored methods, against decompositions of whole matrices written from the papers."""

from itertools import permutations

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from adaptkit.discovery import load
from adaptkit.numerics import stacking
from adaptkit.numerics.lora import LowRank
from adaptkit.numerics.stacking._compress import Limit, compress
from adaptkit.numerics.stacking._core import core_of

FACTORED = ["cat", "linear", "svd", "knots", "tsv", "iso"]


def ties(matrices, density):
    """TIES by whole arrays: trim, elect, average."""
    trimmed = []
    for matrix in matrices:
        cut = np.sort(np.abs(matrix), axis=None)[::-1][int(density * matrix.size) - 1]
        trimmed.append(np.where(np.abs(matrix) >= cut, matrix, 0.0))
    stacked = np.stack(trimmed)
    agree = np.where(stacked.sum(0) >= 0, stacked > 0, stacked < 0)
    return (stacked * agree).sum(0) / np.maximum(agree.sum(0), 1)


def full_svd(matrix, most=None):
    """Singular vectors and values of a whole matrix, without those that are zero."""
    u, sigma, vt = np.linalg.svd(matrix, full_matrices=False)
    rank = int((sigma > 1e-10 * max(sigma[0], 1e-300)).sum())
    rank = rank if most is None else min(rank, most)
    return u[:, :rank], sigma[:rank], vt[:rank]


def orthonormalized(columns):
    """X (XᵀX)^(−1/2), the polar factor, by an eigendecomposition; directions in which X is zero stay zero."""
    values, vectors = np.linalg.eigh(columns.T @ columns)
    roots = np.array([value**-0.5 if value > 1e-10 else 0.0 for value in values])
    return columns @ vectors @ np.diag(roots) @ vectors.T


@pytest.mark.parametrize("method", ["linear", "svd"])
def test_sums_are_exact_in_float64(terms, matrices, combine, close, method):
    close(combine(method, terms), sum(matrices), 1e-13)


def test_cat_is_the_sum_up_to_the_rounding_of_b(terms, matrices, combine, close):
    close(combine("cat", terms), sum(matrices), 1e-6)


@pytest.mark.parametrize("density", [0.5, 0.75, 1.0])
def test_knots_is_ties_on_the_aligned_coordinates(terms, matrices, combine, close, density):
    u, sigma, vt = full_svd(np.hstack(matrices))
    parts = np.split(sigma[:, None] * vt, len(matrices), axis=1)
    close(combine("knots", terms, density=density, lambda_=2.0), 2 * u @ ties(parts, density), 1e-9)


def test_tsv_orthogonalizes_the_singular_vectors(terms, matrices, combine, close):
    changing = [matrix for matrix in matrices if matrix.any()]
    most = max(1, min(matrices[0].shape) // len(changing))
    parts = [full_svd(matrix, most) for matrix in changing]
    left = orthonormalized(np.hstack([u for u, _, _ in parts]))
    right = orthonormalized(np.hstack([vt.T for _, _, vt in parts]))
    sigma = np.concatenate([sigma for _, sigma, _ in parts])
    close(combine("tsv", terms, lambda_=0.5), 0.5 * left @ np.diag(sigma) @ right.T, 1e-9)


@pytest.mark.parametrize(("out", "into", "count"), [(6, 6, 2), (6, 9, 3), (12, 8, 4)])
def test_tsv_of_full_rank_matrices_matches_its_authors_code(make, whole, combine, close, out, into, count):
    """Both agree if no singular value is zero and the number of adapters divides that of singular values."""
    changes = [make(out, into, 12, 1.0, seed) for seed in range(count)]
    keep = min(out, into) // count
    u, s, v = zip(*(np.linalg.svd(whole(change), full_matrices=False) for change in changes), strict=True)
    sum_u = np.hstack([part[:, :keep] for part in u])
    sum_v = np.vstack([part[:keep] for part in v])
    u_u, _, v_u = np.linalg.svd(sum_u, full_matrices=False)
    u_v, _, v_v = np.linalg.svd(sum_v, full_matrices=False)
    expected = u_u @ v_u @ np.diag(np.concatenate([part[:keep] for part in s])) @ u_v @ v_v
    close(combine("tsv", changes), expected, 1e-9)


def test_tsv_of_an_adapter_with_itself_is_the_adapter(make, whole, combine, close):
    change = make(10, 9, 3)
    close(combine("tsv", [change, change]), whole(change), 1e-9)
    close(combine("tsv", [change]), whole(change), 1e-9)


@pytest.mark.parametrize(("out", "into", "count"), [(1, 12, 2), (3, 4, 5)])
def test_tsv_of_more_adapters_than_directions_stays_finite(make, combine, out, into, count):
    found = combine("tsv", [make(out, into, 2, 1.0, seed) for seed in range(count)])
    assert np.isfinite(found).all()
    assert found.any()


def test_iso_sets_all_singular_values_of_the_sum_to_their_mean(terms, matrices, combine, close):
    u, sigma, vt = full_svd(sum(matrices))
    close(combine("iso", terms, lambda_=1.5), 1.5 * sigma.mean() * u @ vt, 1e-9)


def test_truncated_iso_keeps_the_directions_of_the_sums_largest_singular_values(make, whole, close):
    """Its own singular values are all equal, so its SVD would keep arbitrary directions."""
    changes = [make(12, 9, 3, scaling, seed) for seed, scaling in enumerate((1.0, 0.1))]
    u, sigma, vt = full_svd(whole(changes[0]) + whole(changes[1]))
    made = stacked("iso", changes, Limit(rank=2))
    close(whole(made.term), sigma.mean() * u[:, :2] @ vt[:2], 1e-6)
    assert made.energy == pytest.approx(2 / 6, rel=1e-12)


@pytest.mark.parametrize("method", FACTORED)
def test_the_order_of_the_adapters_does_not_matter(make, combine, close, method):
    changes = [make(9, 8, rank, scaling, rank) for rank, scaling in ((2, 1.0), (3, -0.7), (1, 2.0))]
    expected = combine(method, changes)
    for order in permutations(changes):
        close(combine(method, order), expected, 1e-6 if method == "cat" else 1e-10)


@pytest.mark.parametrize("method", FACTORED)
def test_a_weight_of_zero_excludes_an_adapter(make, combine, close, method):
    changes = [make(9, 8, 2, 1.0, seed) for seed in range(3)]
    silent = [changes[0], changes[1].weighted(0.0), changes[2]]
    close(combine(method, silent), combine(method, [changes[0], changes[2]]), 1e-9)


@pytest.mark.parametrize("method", FACTORED)
@pytest.mark.parametrize("zero", ["weights", "factors", "ranks"])
def test_changes_of_zero_give_a_result_of_zero(make, combine, method, zero):
    kind = {
        "weights": [make(5, 4, 2).weighted(0.0), make(5, 4, 3, 0.0, 1)],
        "factors": [LowRank.of_tensors(torch.ones(2, 4), torch.zeros(5, 2), 1.0)] * 2,
        "ranks": [make(5, 4, 0), make(5, 4, 0)],
    }
    assert not combine(method, kind[zero]).any()


def test_core_space_reconstructs_all_changes(terms, matrices, close):
    core = core_of(terms)
    for found, expected in zip(core.left @ core.matrices @ core.right.T, matrices, strict=True):
        close(found.numpy(), expected, 1e-13)
    ranks = sum(change.rank for change in terms)
    assert core.matrices.shape[1:] == (min(ranks, terms[0].shape[0]), min(ranks, terms[0].shape[1]))


class Largest(TorchDispatchMode):
    """Records the largest number of elements of a tensor that an operation returns."""

    elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else (result,):
            if isinstance(tensor, torch.Tensor):
                self.elements = max(self.elements, tensor.numel())
        return result


def stacked(name, changes, limit):
    method = load(stacking, name, "METHOD")
    return compress(method.combine(changes, method.options(), "m"), changes, method.length, limit)


@pytest.mark.parametrize("method", FACTORED)
@pytest.mark.parametrize("limit", [Limit(), Limit(rank=3), Limit(energy=0.9)], ids=["", "rank", "energy"])
def test_no_whole_matrix_is_formed(make, method, limit):
    """No tensor is much larger than all A or all B side by side, in or out of Core Space."""
    changes = [make(300, 350, 4, 1.0, seed) for seed in range(3)]
    with Largest() as watch:
        stacked(method, changes, limit)
    assert 0 < watch.elements <= 350 * 12 * 3
    with Largest() as watch:
        stacked("magnitude_prune", changes[:1], limit)
    assert watch.elements >= 300 * 350  # the watch does see whole matrices


@pytest.mark.parametrize("method", FACTORED)
def test_matrices_that_would_take_a_terabyte_are_stacked(make, method):
    changes = [make(400_000, 300_000, 2, 1.0, seed) for seed in range(2)]
    made = stacked(method, changes, Limit(rank=2))
    assert made.term.lora_b.shape == (400_000, 2)
    assert 0.4 < made.energy < 1
