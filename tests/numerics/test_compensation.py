"""The companion adapter is the best one of its rank."""

import pytest
import torch

from adaptkit.errors import UsageError
from adaptkit.numerics import compensation
from adaptkit.numerics.compensation import DAMPING
from adaptkit.numerics.tensors import as_array, as_tensor


def companion_adapter(lost, mean_square, rank):
    """Return the adapter of tensors as tensors, whose linear algebra the tests use."""
    return map(as_tensor, compensation.companion_adapter(as_array(lost), as_array(mean_square), rank))


def problem(rows, columns, seed=0):
    generator = torch.Generator().manual_seed(seed)
    lost = torch.randn(rows, columns, generator=generator)
    inputs = torch.randn(2 * columns, columns, generator=generator, dtype=torch.float64)
    inputs *= torch.exp(torch.randn(columns, generator=generator, dtype=torch.float64))
    inputs @= torch.randn(columns, columns, generator=generator, dtype=torch.float64) / columns**0.5
    return lost, inputs.square().mean(0)


def weighting(mean_square):
    return mean_square + DAMPING * mean_square.mean()


def loss(lost, lora_a, lora_b, weights):
    rest = lost.double() - lora_b.double() @ lora_a.double()
    return float((rest.square() @ weights).sum())


@pytest.mark.parametrize(("rows", "columns"), [(40, 72), (96, 48), (33, 33)])
@pytest.mark.parametrize("rank", [1, 8, 16])
def test_the_loss_matches_that_of_a_dense_decomposition(rows, columns, rank):
    lost, mean_square = problem(rows, columns)
    weights = weighting(mean_square)
    least = float(torch.linalg.svdvals(lost.double() * weights.sqrt())[rank:].square().sum())
    lora_a, lora_b = companion_adapter(lost, mean_square, rank)
    assert lora_a.shape == (rank, columns)
    assert lora_b.shape == (rows, rank)
    assert loss(lost, lora_a, lora_b, weights) == pytest.approx(least, rel=1e-3)


def test_a_low_rank_error_is_restored_completely():
    generator = torch.Generator().manual_seed(0)
    lost = torch.randn(50, 4, generator=generator) @ torch.randn(4, 70, generator=generator)
    lora_a, lora_b = companion_adapter(lost, torch.rand(70, generator=generator), 8)
    assert torch.allclose(lora_b @ lora_a, lost, atol=1e-4)


def test_without_an_error_the_adapter_is_zero():
    lora_a, lora_b = companion_adapter(torch.zeros(20, 30), torch.zeros(30), 4)
    assert not (lora_b @ lora_a).any()
    assert bool(torch.isfinite(lora_a).all())


def test_components_are_balanced_and_reproducible():
    lost, mean_square = problem(30, 40)
    lora_a, lora_b = companion_adapter(lost, mean_square, 5)
    assert torch.allclose(lora_a.norm(dim=1), lora_b.norm(dim=0), rtol=1e-4)
    torch.manual_seed(5)
    again_a, again_b = companion_adapter(lost, mean_square, 5)
    assert torch.equal(again_a, lora_a)
    assert torch.equal(again_b, lora_b)


@pytest.mark.parametrize("rank", [0, 21])
def test_an_impossible_rank_is_refused(rank):
    with pytest.raises(UsageError, match="rank"):
        companion_adapter(torch.ones(20, 30), torch.ones(30), rank)
