"""A result truncated to a rank is the best approximation of that rank, and its reported energy is right."""

import numpy as np
import pytest
import torch

from adaptkit.errors import NonFiniteError
from adaptkit.numerics.lora import LowRank, is_equal
from adaptkit.numerics.stacking._compress import Limit, compress

SHAPES = [(9, 14, 5), (14, 9, 5), (8, 8, 3), (5, 4, 9), (1, 7, 2)]


@pytest.fixture(params=["factors", "matrix"])
def form(request):
    """A result as factors, or as the matrix that an elementwise method returns."""

    def give(change):
        return change.scaling * change.lora_b.double() @ change.lora_a.double() if request.param == "matrix" else change

    return give


def best(matrix, rank):
    u, sigma, vt = np.linalg.svd(matrix, full_matrices=False)
    return u[:, :rank] @ np.diag(sigma[:rank]) @ vt[:rank]


@pytest.mark.parametrize(("out", "into", "rank"), SHAPES)
@pytest.mark.parametrize("wanted", [1, 2, 4, 40])
def test_a_rank_keeps_the_best_approximation_and_its_energy(make, whole, form, out, into, rank, wanted):
    change = make(out, into, rank, -1.7, 3)
    made, matrix = compress(form(change), [change], "sum", Limit(rank=wanted)), whole(change)
    expected = best(matrix, wanted)
    assert made.term.rank == min(wanted, rank, out, into)
    assert made.term.scaling == 1.0
    assert made.term.lora_a.dtype == made.term.lora_b.dtype == torch.float32
    assert np.abs(whole(made.term) - expected).max() < 1e-6 * np.abs(matrix).max()
    assert made.norm == pytest.approx(np.linalg.norm(matrix), rel=1e-12)
    assert made.energy == pytest.approx(np.linalg.norm(expected) ** 2 / np.linalg.norm(matrix) ** 2, rel=1e-12)


@pytest.mark.parametrize("size", [(400, 350), (350, 400)], ids=["tall", "wide"])
@pytest.mark.parametrize("decay", [0.0, 0.02, 0.4], ids=["noise", "slow", "steep"])
def test_a_rank_keeps_the_best_approximation_of_a_large_matrix(size, decay, whole):
    """Whether only its leading singular values are computed, or all of them."""
    generator = torch.Generator().manual_seed(4)
    matrix = torch.randn(size, dtype=torch.float64, generator=generator)
    matrix *= torch.exp(-decay * torch.arange(size[1], dtype=torch.float64))
    term = LowRank.of_tensors(torch.ones(1, size[1]), torch.ones(size[0], 1), 1.0)
    made, expected = compress(matrix, [term], "sum", Limit(rank=4)), best(matrix.numpy(), 4)
    assert np.abs(whole(made.term) - expected).max() < 1e-6 * np.abs(matrix.numpy()).max()
    assert made.energy == pytest.approx(np.linalg.norm(expected) ** 2 / np.linalg.norm(matrix) ** 2, rel=1e-10)


def test_an_energy_keeps_the_smallest_sufficient_rank_of_a_large_matrix():
    generator = torch.Generator().manual_seed(4)
    matrix = torch.randn(400, 350, dtype=torch.float64, generator=generator)
    matrix *= torch.exp(-0.02 * torch.arange(350, dtype=torch.float64))
    made = compress(matrix, [LowRank.of_tensors(torch.ones(1, 350), torch.ones(400, 1), 1.0)], "sum", Limit(energy=0.9))
    shares = np.cumsum(np.linalg.svd(matrix.numpy(), compute_uv=False) ** 2) / float(matrix.square().sum())
    assert made.term.rank == int((shares < 0.9).sum()) + 1
    assert made.energy >= 0.9


@pytest.mark.parametrize(("out", "into", "rank"), SHAPES)
@pytest.mark.parametrize("energy", [0.2, 0.8, 0.99, 1.0])
def test_an_energy_keeps_the_smallest_sufficient_rank(make, whole, form, out, into, rank, energy):
    change = make(out, into, rank, 0.4, 5)
    made = compress(form(change), [change], "sum", Limit(energy=energy))
    sigma = np.linalg.svd(whole(change), compute_uv=False)
    shares = np.cumsum(sigma**2) / (sigma**2).sum()
    assert made.energy >= energy - 1e-12
    assert made.term.rank == min(int((shares < energy - 1e-12).sum()) + 1, rank)


@pytest.mark.parametrize(("length", "expected"), [("largest", 4), ("sum", 6)])
def test_without_a_limit_a_result_gets_the_rank_of_its_method(make, form, length, expected):
    terms = [make(20, 30, 2, 1.0, 1), make(20, 30, 4, 1.0, 2)]
    full = make(20, 30, 15, 1.0, 3)
    assert compress(form(full), terms, length, Limit()).term.rank == expected
    assert compress(form(full), terms, length, Limit(rank=9)).term.rank == 9


def test_factors_as_given_are_changed_only_by_a_limit(make):
    change = make(6, 5, 9)
    made = compress(change, [change], "as given", Limit())
    assert is_equal(made.term, change)
    assert made.energy == 1.0
    assert compress(change, [change], "as given", Limit(rank=2)).term.rank == 2


def test_shared_directions_count_once_towards_the_rank(make, form):
    change = make(12, 10, 3)
    twice = LowRank.of_tensors(torch.cat([change.lora_a] * 2), torch.cat([change.lora_b] * 2, dim=1), 1.0)
    made = compress(form(twice), [change, change], "sum", Limit())
    assert made.term.rank == 3
    assert made.energy == pytest.approx(1.0, rel=1e-12)


def test_changes_that_cancel_give_exactly_zero(make, form):
    change = make(12, 10, 3, 0.3)
    both = LowRank.of_tensors(torch.cat([change.lora_a] * 2), torch.cat([change.lora_b, -change.lora_b], dim=1), 0.3)
    for limit in (Limit(), Limit(rank=4), Limit(energy=0.9)):
        made = compress(form(both), [change, change.weighted(-1.0)], "sum", limit)
        assert (made.norm, made.energy, made.term.rank) == (0.0, 1.0, 1)
        assert not made.term.lora_a.any()
        assert not made.term.lora_b.any()


def test_a_result_much_smaller_than_the_changes_is_kept_completely(make, form):
    """Elementwise methods used to lose parts that were small compared with the changes, and too much energy."""
    small = make(20, 30, 5)
    parts = LowRank.of_tensors(small.lora_a, small.lora_b * torch.tensor([1, 0.3, 0.1, 0.05, 0.02]), 1.0)
    large = make(20, 30, 5, 1e6, 2)
    for limit in (Limit(), Limit(rank=5), Limit(energy=0.999999)):
        made = compress(form(parts), [large, large.weighted(-1.0)], "sum", limit)
        assert made.term.rank == 5
        assert made.energy == pytest.approx(1.0, rel=1e-12)


def test_factors_have_equal_norms_and_determined_signs(make, form):
    change = make(12, 10, 3)
    made = compress(form(change), [change], "sum", Limit()).term
    assert torch.allclose(made.lora_b.norm(dim=0), made.lora_a.norm(dim=1), rtol=1e-5)
    again = compress(form(LowRank.of_tensors(-change.lora_a, -change.lora_b, 1.0)), [change], "sum", Limit()).term
    assert torch.allclose(made.lora_b, again.lora_b, atol=1e-5)


@pytest.mark.parametrize("size", [1e39, float("inf"), float("nan")])
def test_values_beyond_float32_are_refused(make, form, size):
    change = make(3, 4, 2)
    huge = LowRank.of_tensors(change.lora_a, torch.full_like(change.lora_b, 1.0).double() * size, 1.0)
    with pytest.raises(NonFiniteError, match="too large for float32"):
        compress(form(huge), [change], "sum", Limit(rank=1))
    with pytest.raises(NonFiniteError, match="too large for float32"):  # before it is written, too
        compress(form(huge), [change], "as given", Limit())
