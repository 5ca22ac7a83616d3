"""A CPU's norms and gates and their gradients are those of the formulas in float64, rounded as transformers rounds."""

import pytest
import torch
from torch.nn import functional

from adaptkit.training.fast.cpu_layers import gate_backward, gate_forward, norm_backward, norm_forward

UNIT = {torch.float32: 2**-21, torch.bfloat16: 2**-8}
"""A few roundings; of bfloat16 the largest error of one."""


def sides(count, shape, dtype, scale=1.0):
    generator = torch.Generator().manual_seed(3)
    return [(torch.randn(shape, generator=generator) * scale).to(dtype) for _ in range(count)]


def wide(side):
    return side.double().requires_grad_()


@pytest.mark.parametrize("dtype", UNIT)
@pytest.mark.parametrize("plus_one", [False, True])
@pytest.mark.parametrize("shape", [(1, 1), (7, 33), (2, 5, 4, 16), (0, 8)])
def test_norm(shape, plus_one, dtype):
    x, grad = sides(2, shape, dtype, 3.0)
    (weight,) = sides(1, shape[-1:], dtype)
    exact, factor = wide(x), weight.double() + plus_one
    expected = exact * torch.rsqrt(exact.square().mean(-1, keepdim=True) + 1e-5) * factor
    expected.backward(grad.double())
    y, scales = norm_forward(x, weight, 1e-5, plus_one)
    found = norm_backward(x, weight, plus_one, scales, grad)
    assert y.dtype == found.dtype == dtype
    torch.testing.assert_close(y.double(), expected.detach(), rtol=3 * UNIT[dtype], atol=1e-6)
    size = float(exact.grad.abs().max()) if x.numel() else 1.0  # its terms cancel
    torch.testing.assert_close(found.double(), exact.grad, rtol=UNIT[dtype], atol=2e-6 * size + 1e-6)


@pytest.mark.parametrize("dtype", UNIT)
@pytest.mark.parametrize("shape", [(1,), (7, 33), (0, 8)])
def test_gate(shape, dtype):
    gate, up, grad = sides(3, shape, dtype, 6.0)
    exact = wide(gate), wide(up)
    expected = functional.silu(exact[0]) * exact[1]
    expected.backward(grad.double())
    y = gate_forward(gate, up)
    torch.testing.assert_close(y.double(), expected.detach(), rtol=3 * UNIT[dtype], atol=1e-6)
    for one, two in zip(gate_backward(gate, up, grad), exact, strict=True):
        assert one.dtype == dtype
        torch.testing.assert_close(one.double(), two.grad, rtol=UNIT[dtype], atol=1e-5)


@pytest.mark.parametrize("dtype", UNIT)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_what_is_not_finite_makes_the_loss_not_finite(bad, dtype):
    """Otherwise a run would go on with numbers that mean nothing: the exponential hides NaN."""
    x, weight = torch.ones(3, 8, dtype=dtype), torch.ones(8, dtype=dtype)
    x[1, 2] = bad
    for y in (norm_forward(x, weight, 1e-5, False)[0], gate_forward(x, torch.ones_like(x))):
        assert y[1].isfinite().logical_not().any()
        assert y[[0, 2]].isfinite().all()


def test_far_from_zero_the_gate_gives_zero_or_the_product():
    gate, up, one = torch.tensor([-1e4, 1e4, -100.0, 0.0]), torch.full((4,), 2.0), torch.ones(4)
    torch.testing.assert_close(gate_forward(gate, up), torch.tensor([0.0, 2e4, 0.0, 0.0]))
    by_gate, by_up = gate_backward(gate, up, one)
    torch.testing.assert_close(by_gate, torch.tensor([0.0, 2.0, 0.0, 1.0]))
    torch.testing.assert_close(by_up, torch.tensor([0.0, 1e4, 0.0, 0.0]))
