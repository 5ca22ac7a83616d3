"""A sketch made from row blocks is close to a dense decomposition, and reports its loss exactly."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from adaptkit.numerics.randomized import Sketching, sketch_for_energy, sketch_for_rank

DEFAULT = Sketching()


def matrix(sigma, out=90, columns=60, seed=0):
    """A random (out, columns) matrix with the given singular values."""
    generator = torch.Generator().manual_seed(seed)
    u, v = (
        torch.linalg.qr(torch.randn(size, len(sigma), dtype=torch.float64, generator=generator))[0]
        for size in (out, columns)
    )
    return (u * torch.tensor(sigma, dtype=torch.float64)) @ v.T


class Rows:
    """Yields a matrix in row blocks and counts the passes."""

    def __init__(self, dense, rows=7):
        self.dense, self.rows, self.passes = dense, rows, 0

    def __call__(self):
        self.passes += 1
        yield from self.dense.split(self.rows)


def square_norm(dense):
    return float(dense.square().sum())


def by_rank(dense, rank, how=DEFAULT, rows=7):
    return sketch_for_rank(Rows(dense, rows), tuple(dense.shape), square_norm(dense), rank, how)


def by_energy(dense, energy, max_rank=200, how=DEFAULT):
    return sketch_for_energy(Rows(dense), tuple(dense.shape), square_norm(dense), energy, max_rank, how)


def product(term):
    return term.scaling * term.lora_b.double() @ term.lora_a.double()


FALLING = [0.9**k for k in range(60)]


@pytest.mark.parametrize("scale", [1.0, 1e-30, 1e30])
def test_a_low_rank_matrix_is_found_completely(scale):
    sigma = [5.0, 3.0, 1.0, 0.01]
    dense = matrix(sigma) * scale
    sketch = by_rank(dense, 4)
    assert sketch.spectrum.sigma.numel() == 14
    assert torch.allclose(sketch.spectrum.sigma[:4] / scale, torch.tensor(sigma, dtype=torch.float64), rtol=1e-10)
    rebuilt = (sketch.spectrum.u * sketch.spectrum.sigma) @ sketch.spectrum.vt
    assert (rebuilt - dense).norm() < 1e-12 * dense.norm()
    assert sketch.energy_kept(4) == pytest.approx(1, abs=1e-12)
    assert sketch.energy_kept(2) == pytest.approx(34 / 35.0001, abs=1e-12)
    if scale == 1.0:
        assert (product(sketch.spectrum.truncated(4)) - dense).norm() < 2e-7 * dense.norm()  # rounded to float32


@pytest.mark.parametrize("shape", [(90, 60), (60, 90)])
@pytest.mark.parametrize("rank", [1, 8, 30])
def test_a_rank_keeps_nearly_the_energy_of_the_best_approximation(shape, rank):
    dense = matrix(FALLING, *shape)
    sketch = by_rank(dense, rank)
    best = float(torch.linalg.svdvals(dense)[:rank].square().sum()) / square_norm(dense)
    assert 0 <= best - sketch.energy_kept(rank) < 1e-4


@pytest.mark.parametrize("sigma", [FALLING, [1.0] * 60, [1.0] * 3 + [0.3] * 57])
def test_the_reported_loss_is_exact_even_if_the_subspace_is_approximate(sigma):
    dense = matrix(sigma)
    for how in (Sketching(0, 1), Sketching(5, 1), Sketching()):
        sketch = by_rank(dense, 6, how)
        lost = (product(sketch.spectrum.truncated(6)) - dense).norm() / dense.norm()
        assert float(lost) == pytest.approx((1 - sketch.energy_kept(6)) ** 0.5, rel=1e-6)


def test_there_is_one_pass_more_than_iterations():
    rows = Rows(matrix(FALLING))
    sketch_for_rank(rows, (90, 60), square_norm(rows.dense), 8, Sketching(4, 2))
    assert rows.passes == 3


@pytest.mark.parametrize("rank", [50, 60, 500])
def test_a_sketch_as_large_as_the_matrix_equals_a_dense_decomposition(rank):
    dense = torch.randn(90, 60, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    sketch = by_rank(dense, rank)
    assert torch.allclose(sketch.spectrum.sigma, torch.linalg.svdvals(dense), rtol=1e-12)
    assert sketch.energy_kept(60) == pytest.approx(1, abs=1e-12)


@pytest.mark.parametrize("energy", [0.5, 0.9, 0.99, 0.999999])
def test_widening_finds_nearly_the_smallest_rank_that_keeps_an_energy(energy):
    dense = matrix(FALLING)
    sketch, rank = by_energy(dense, energy)
    shares = torch.linalg.svdvals(dense).square().cumsum(0) / square_norm(dense)
    best = int((shares < energy).sum()) + 1
    assert best <= rank <= best + 1
    assert sketch.energy_kept(rank) >= energy
    assert sketch.energy_kept(rank - 1) < energy


def test_the_search_stops_at_the_maximum_rank():
    dense = matrix([1.0] * 60)
    sketch, rank = by_energy(dense, 0.9, max_rank=20)
    assert rank == 20
    assert sketch.rank_for(0.9) is None
    assert sketch.energy_kept(rank) < 0.4
    assert by_energy(dense, 0.9, max_rank=1)[1] == 1


def test_an_energy_of_one_keeps_every_nonzero_singular_value():
    assert by_energy(matrix([3.0, 2.0, 1.0]), 1.0)[1] == 3
    assert by_energy(matrix([1.0] * 60), 1.0)[1] == 60


def test_rank_one_keeps_all_of_a_zero_matrix():
    dense = torch.zeros(40, 30, dtype=torch.float64)
    sketch, rank = by_energy(dense, 0.99)
    assert (rank, sketch.energy_kept(1), sketch.rank_for(0.99)) == (1, 1.0, 1)
    assert torch.equal(product(sketch.spectrum.truncated(1)), dense)


def test_the_same_seed_gives_the_same_bits_and_a_different_seed_does_not():
    dense = matrix(FALLING)
    one, again, other = (by_rank(dense, 8, Sketching(seed=seed)).spectrum for seed in (1, 1, 2))
    assert torch.equal(one.u, again.u)
    assert torch.equal(one.vt, again.vt)
    assert not torch.equal(one.vt, other.vt)


def test_the_block_height_affects_only_rounding():
    dense = matrix(FALLING)
    for rows in (1, 13, 90):
        assert torch.allclose(
            by_rank(dense, 8, rows=rows).spectrum.vt[:8], by_rank(dense, 8).spectrum.vt[:8], atol=1e-8
        )


@settings(deadline=None)
@given(st.integers(1, 40), st.integers(1, 40), st.integers(1, 12), st.integers(0, 4), st.integers(0, 10**6))
def test_singular_values_and_energy_never_exceed_those_of_a_dense_decomposition(out, columns, rank, oversampling, seed):
    dense = torch.randn(out, columns, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    sketch = by_rank(dense, rank, Sketching(oversampling, seed=seed))
    sigma = torch.linalg.svdvals(dense)
    assert sketch.spectrum.sigma.numel() == min(rank + oversampling, out, columns)
    assert (sketch.spectrum.sigma <= sigma[: sketch.spectrum.sigma.numel()] * (1 + 1e-12)).all()
    assert sketch.energy_kept(rank) <= min(1.0, float(sigma[:rank].square().sum()) / square_norm(dense) + 1e-12)
