"""Elementwise methods, against loops over single elements written from the papers."""

import hashlib
from itertools import permutations

import numpy as np
import pytest
import torch
from peft.utils import merge_utils

from adaptkit.errors import UsageError
from adaptkit.numerics.stacking import _elements
from adaptkit.numerics.stacking.della import DellaOptions, probabilities

MODULE = "model.layers.0.mlp.up_proj"
DENSITIES = [0.3, 0.85, 1.0]


def largest(matrix, count):
    """The matrix with all but its ``count`` largest elements zero."""
    flat = matrix.reshape(-1)
    kept = np.zeros_like(flat)
    for index in sorted(range(flat.size), key=lambda i: -abs(flat[i]))[:count]:
        kept[index] = flat[index]
    return kept.reshape(matrix.shape)


def elect_and_average(matrices):
    """Steps 2 and 3 of TIES, one element after the other."""
    result = np.zeros_like(matrices[0])
    for place in np.ndindex(result.shape):
        values = [matrix[place] for matrix in matrices]
        sign = 1 if sum(values) >= 0 else -1
        chosen = [value for value in values if value * sign > 0]
        result[place] = sum(chosen) / len(chosen) if chosen else 0.0
    return result


def drawn(seed, module, adapter, shape):
    """The documented random numbers, one row after the other."""
    key = int.from_bytes(hashlib.sha256(f"{seed}\n{adapter}\n{module}".encode()).digest()[:16], "little")
    counts = (shape[1] + 3) // 4
    rows = [
        np.random.Philox(key=key, counter=row * counts).random_raw(4 * counts)[: shape[1]] for row in range(shape[0])
    ]
    return np.array([[float(number >> np.uint64(11)) / 2**53 for number in row] for row in rows])


@pytest.mark.parametrize("density", DENSITIES)
def test_ties_matches_the_paper(terms, matrices, combine, close, density):
    trimmed = [largest(matrix, int(density * matrix.size)) for matrix in matrices]
    close(combine("ties", terms, density=density), elect_and_average(trimmed))
    close(combine("ties", terms, density=density, lambda_=-2.5), -2.5 * elect_and_average(trimmed))


@pytest.mark.parametrize("density", DENSITIES)
def test_pruning_adds_up_the_largest_elements(terms, matrices, combine, close, density):
    expected = sum(largest(matrix, int(density * matrix.size)) for matrix in matrices)
    close(combine("magnitude_prune", terms, density=density), expected)


@pytest.mark.parametrize(("density", "seed"), [(0.3, 0), (0.85, 7), (1.0, 0)])
def test_dare_drops_by_the_documented_random_numbers_and_rescales(terms, matrices, combine, close, density, seed):
    dropped = [
        np.where(drawn(seed, MODULE, number, matrix.shape) < density, matrix / density, 0.0)
        for number, matrix in enumerate(matrices)
    ]
    close(combine("dare", terms, density=density, seed=seed), sum(dropped))
    close(combine("dare_ties", terms, density=density, seed=seed, lambda_=3.0), 3 * elect_and_average(dropped))


@pytest.mark.parametrize(("density", "epsilon"), [(0.3, 0.29), (0.8, 0.2), (0.6, 0.0)])
def test_della_keeps_an_element_by_the_rank_of_its_magnitude_in_its_row(
    terms, matrices, combine, close, density, epsilon
):
    dropped = []
    for number, matrix in enumerate(matrices):
        numbers, result = drawn(3, MODULE, number, matrix.shape), np.zeros_like(matrix)
        for row in range(matrix.shape[0]):
            ascending = sorted(range(matrix.shape[1]), key=lambda j, row=row, m=matrix: (abs(m[row, j]), j))
            for rank, column in enumerate(ascending):
                share = rank / (len(ascending) - 1) if len(ascending) > 1 else 0.5
                chance = density - epsilon + 2 * epsilon * share
                if numbers[row, column] < chance:
                    result[row, column] = matrix[row, column] / chance
        dropped.append(result)
    found = combine("della", terms, density=density, epsilon=epsilon, seed=3, lambda_=0.5)
    close(found, 0.5 * elect_and_average(dropped))


@pytest.mark.parametrize("columns", [2, 3, 16, 17, 300])
def test_della_ranks_magnitudes_that_are_equal_or_differ_in_their_last_bits_only(columns):
    generator = np.random.default_rng(5)
    magnitudes = (np.float64(1).view(np.int64) + generator.integers(0, 3 * columns, (2, 20, columns))).view(np.float64)
    magnitudes[:, ::4] = np.round(magnitudes[:, ::4])
    magnitudes[:, 1::4, ::2] = 0.0
    changes = magnitudes * generator.choice([-1.0, 1.0], magnitudes.shape)
    found = probabilities(torch.from_numpy(changes), DellaOptions(density=0.5, epsilon=0.25)).numpy()
    for row, chances in zip(magnitudes.reshape(-1, columns), found.reshape(-1, columns), strict=True):
        ascending = sorted(range(columns), key=lambda j, row=row: (row[j], j))
        assert np.argsort(chances).tolist() == ascending
        assert (chances.min(), chances.max()) == (0.25, 0.75)


@pytest.mark.parametrize(("density", "gamma"), [(0.9, 0.01), (0.3, 0.6), (0.6, 0.4), (0.7, 0.0)])
def test_breadcrumbs_drops_the_largest_and_the_smallest_elements(terms, matrices, combine, close, density, gamma):
    expected = np.zeros_like(matrices[0])
    for matrix in matrices:
        flat = matrix.reshape(-1)
        descending = sorted(range(flat.size), key=lambda i, flat=flat: -abs(flat[i]))
        above = int(gamma * flat.size)
        between = descending[above : above + int(density * flat.size)]
        expected.reshape(-1)[between] += flat[between]
    close(combine("breadcrumbs", terms, density=density, gamma=gamma, lambda_=2.0), 2 * expected)


@pytest.mark.parametrize("density", DENSITIES)
def test_sce_selects_calculates_and_erases(terms, matrices, combine, close, density):
    stacked = np.stack(matrices)
    variance = ((stacked - stacked.mean(0)) ** 2).mean(0)
    if density < 1:
        count = int(density * (variance > 0).sum())
        stacked = stacked * (largest(variance, count) > 0)
    energies = [(matrix**2).sum() for matrix in stacked]
    expected = np.zeros_like(matrices[0])
    for place in np.ndindex(expected.shape):
        values = stacked[(slice(None), *place)]
        sign = 1 if values.sum() >= 0 else -1
        left = [(energy, value) for energy, value in zip(energies, values, strict=True) if value * sign > 0]
        if left:
            expected[place] = sum(energy * value for energy, value in left) / sum(energy for energy, _ in left)
    close(combine("sce", terms, density=density, lambda_=1.5), 1.5 * expected)


@pytest.mark.parametrize("weights", [(1.0, 1.0, 1.0), (0.4, 0.4, 0.4)])
def test_with_equal_weights_ties_matches_peft(make, whole, combine, close, weights):
    changes = [make(9, 8, 2, weight, seed) for seed, weight in enumerate(weights)]
    deltas = [torch.from_numpy(whole(make(9, 8, 2, 1.0, seed))) for seed in range(3)]
    close(
        combine("ties", changes, density=0.4),
        merge_utils.ties(deltas, torch.tensor(weights).double(), 0.4).numpy(),
        1e-7,
    )


@pytest.mark.parametrize("weights", [(1.0, 1.0), (0.4, -1.7)])
def test_with_any_weights_pruning_matches_peft(make, whole, combine, close, weights):
    changes = [make(9, 8, 2, weight, seed) for seed, weight in enumerate(weights)]
    deltas = [torch.from_numpy(whole(make(9, 8, 2, 1.0, seed))) for seed in range(2)]
    expected = merge_utils.magnitude_prune(deltas, torch.tensor(weights).double(), 0.4)
    close(combine("magnitude_prune", changes, density=0.4), expected.numpy(), 1e-7)


def test_signs_are_elected_after_weighting(make, whole, combine):
    """peft elects them before, which gives a different result if a weight is negative."""
    weights, deltas = (1.0, -3.0), [torch.from_numpy(whole(make(9, 8, 2, 1.0, seed))) for seed in range(2)]
    changes = [make(9, 8, 2, weight, seed) for seed, weight in enumerate(weights)]
    found = combine("ties", changes, density=0.99)
    assert np.abs(found - merge_utils.ties(deltas, torch.tensor(weights).double(), 0.99).numpy()).max() > 0.1
    signs = np.sign(sum(weight * delta.numpy() for weight, delta in zip(weights, deltas, strict=True)))
    assert (found * signs >= 0).all()


def test_a_weight_of_zero_excludes_an_adapter_from_election_and_mean(make, combine, close):
    changes = [make(9, 8, 2, 1.0, seed) for seed in range(3)]
    silent = [changes[0], changes[1].weighted(0.0), changes[2]]
    for method, options in [
        ("ties", {}),
        ("magnitude_prune", {}),
        ("breadcrumbs", {}),
        ("sce", {}),
        ("dare_ties", {"density": 1.0}),
    ]:
        close(combine(method, silent, **options), combine(method, [changes[0], changes[2]], **options))


@pytest.mark.parametrize("method", ["ties", "magnitude_prune", "breadcrumbs", "sce"])
def test_the_order_of_the_adapters_does_not_matter(make, combine, close, method):
    changes = [make(9, 8, rank, scaling, rank) for rank, scaling in ((2, 1.0), (3, -0.7), (1, 2.0))]
    expected = combine(method, changes, density=0.6)
    for order in permutations(changes):
        close(combine(method, order, density=0.6), expected)


@pytest.mark.parametrize(("method", "density"), [("dare", 0.3), ("dare", 0.8), ("della", 0.5)])
def test_dropping_keeps_the_expected_value(make, whole, combine, method, density):
    change = make(6, 5, 2, 1.0, 4)
    draws = np.stack([combine(method, [change], density=density, seed=seed) for seed in range(1500)])
    spread = draws.std(0) / len(draws) ** 0.5
    assert (np.abs(draws.mean(0) - whole(change)) <= 5 * spread + 1e-12).all()


@pytest.mark.parametrize("method", ["dare", "dare_ties", "della"])
def test_dropped_elements_depend_on_seed_module_and_position_of_the_adapter(make, combine, method):
    change = make(8, 9, 2, 1.0, 4)
    first = combine(method, [change], seed=0)
    assert (combine(method, [change], seed=0) == first).all()
    assert (combine(method, [change], seed=1) != first).any()
    assert (combine(method, [change], module="another", seed=0) != first).any()
    twice = combine(method, [change, change], seed=0)
    assert ((twice != 0) & (first == 0)).any(), "the second adapter keeps elements that the first drops"


@pytest.mark.parametrize("method", ["ties", "magnitude_prune", "dare", "dare_ties", "della", "breadcrumbs", "sce"])
def test_row_blocks_do_not_affect_the_result(make, combine, monkeypatch, method):
    changes = [make(11, 6, 3, 1.0, seed) for seed in range(3)]
    whole_at_once = combine(method, changes, density=0.55)
    monkeypatch.setattr(_elements, "_BLOCK_ELEMENTS", 2 * 6 * 3)
    assert len(list(_elements.row_blocks(changes))) == 6
    assert (combine(method, changes, density=0.55) == whole_at_once).all()


def test_sce_of_identical_adapters_is_zero(make, combine):
    change = make(5, 6, 2)
    assert not combine("sce", [change, change], density=0.5).any()


@pytest.mark.parametrize("method", ["ties", "magnitude_prune", "breadcrumbs", "sce", "knots"])
def test_a_density_that_keeps_nothing_is_refused_naming_the_module(make, combine, method):
    changes = [make(5, 6, 2, 1.0, seed) for seed in range(2)]
    with pytest.raises(UsageError, match=r"up_proj: density 0\.001 keeps none of \d+ elements"):
        combine(method, changes, density=0.001)


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("ties", {"density": 0.0}),
        ("ties", {"density": float("nan")}),
        ("ties", {"lambda_": 0.0}),
        ("iso", {"lambda_": float("nan")}),
        ("dare", {"seed": -1}),
        ("dare_ties", {"seed": 2**63}),
        ("della", {"density": 0.9}),
        ("della", {"density": 0.2, "epsilon": 0.2}),
        ("breadcrumbs", {"density": 0.9, "gamma": 0.2}),
    ],
)
def test_options_out_of_range_are_refused_with_a_hint(combine, make, method, options):
    with pytest.raises(UsageError) as caught:
        combine(method, [make(3, 3, 1)], **options)
    assert caught.value.hint


def test_options_at_the_end_of_their_range_are_accepted(combine, make):
    combine("della", [make(3, 3, 1)], density=0.9, epsilon=0.1)
    combine("breadcrumbs", [make(3, 3, 1)], density=0.7, gamma=0.3)
