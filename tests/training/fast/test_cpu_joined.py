"""Kernels for the small matrices of joined layers match torch's operations."""

import pytest
import torch

from adaptkit.training.fast.cpu_joined import add_scaled, beside

TYPES = [torch.bfloat16, torch.float16, torch.float32]
SPECIAL = [0.0, -0.0, 1e-8, -6e-8, 1e-40, 65504.0, -3.0, 1 / 3]


def matrix(rows, columns, seed, dtype=torch.float32):
    values = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))
    count = min(len(SPECIAL), values.numel())
    values.view(-1)[:count] = torch.tensor(SPECIAL[:count])
    return values.to(dtype)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize(("ranks", "columns"), [(3, 32), (1, 20), (12, 31), (16, 35)])
def test_beside_concatenates_columns_and_pads_with_zeros(dtype, ranks, columns):
    x, inner = matrix(5, 19, 0, dtype), matrix(5, ranks, 1, dtype)
    found = beside(x, inner, columns)
    assert torch.equal(found, torch.cat((x, inner, torch.zeros(5, columns - 19 - ranks, dtype=dtype)), 1))
    assert torch.equal(beside(x.T.contiguous().T, inner, columns), found)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("view", [lambda x: x, lambda x: x.T.contiguous().T, lambda x: x.repeat(1, 3)[:, 4:15]])
@pytest.mark.parametrize("scale", [1.0, 2.0, -0.3])
def test_a_scaled_matrix_is_added_in_float32(dtype, view, scale):
    x = view(matrix(7, 11, 0, dtype))
    total = matrix(x.shape[0], x.shape[1], 1)
    expected = total.double() + x.double() * float(torch.tensor(scale))
    bound = 2.0**-23 * (expected.abs() + (x.double() * scale).abs()) + 2.0**-148  # errors of product and sum
    add_scaled(total, x, scale)
    assert ((total.double() - expected).abs() <= bound).all()


@pytest.mark.parametrize("dtype", TYPES)
def test_non_finite_values_stay_non_finite(dtype):
    total = torch.zeros(1, 4)
    add_scaled(total, torch.tensor([[float("inf"), float("-inf"), float("nan"), 1.0]]).to(dtype), 2.0)
    assert not total[0, :3].isfinite().any()
    assert total[0, 3] == 2.0


@pytest.mark.parametrize("dtype", [torch.float64, torch.int8, torch.int16, torch.uint16])
def test_other_types_are_refused(dtype):
    """Not read as float16 or bfloat16 without a word."""
    total = torch.zeros(2, 3)
    with pytest.raises(KeyError):
        add_scaled(total, torch.ones(2, 3).to(dtype), 1.0)
    assert not total.any()
