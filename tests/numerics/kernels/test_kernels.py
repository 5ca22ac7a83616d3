"""The compiled kernels give the bits of the definition, and the definition gives those of independent formulas."""

from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from adaptkit.numerics.kernels import cpu, reference

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
BITS = {torch.bfloat16: torch.int16, torch.float16: torch.int16, torch.float32: torch.int32}


def same_bits(x, y):
    assert x.dtype == y.dtype
    assert x.shape == y.shape
    if x.is_floating_point() and x.dtype in BITS:
        x, y = x.view(BITS[x.dtype]), y.view(BITS[y.dtype])
    elif x.dtype == torch.float64:
        x, y = x.view(torch.int64), y.view(torch.int64)
    assert torch.equal(x, y)


@st.composite
def weights(draw, shape=None):
    """Finite values of every magnitude: normal draws, zero blocks, denormals, extremes, signed zeros."""
    dtype = draw(st.sampled_from(DTYPES))
    shape = shape or (draw(st.integers(1, 9)), draw(st.integers(1, 150)))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    kind = draw(st.sampled_from(["normal", "bits", "sparse", "tiny"]))
    if kind == "bits":
        ints = BITS[dtype]
        info = torch.iinfo(ints)
        values = torch.randint(info.min, info.max, shape, generator=generator, dtype=torch.int64).to(ints).view(dtype)
        values = torch.where(torch.isfinite(values), values, torch.zeros_like(values))
    else:
        values = torch.randn(shape, generator=generator) * (1e-39 if kind == "tiny" else 0.05)
        if kind == "sparse":
            values[torch.rand(shape, generator=generator) < 0.9] = -0.0
        values = values.to(dtype)
    return values


@settings(max_examples=150, deadline=None)
@given(weights(), st.sampled_from([2, 16, 32, 64, 128]))
def test_nf4_is_the_same_in_both_kernels(weight, block_size):
    expected = reference.nf4_encode(weight, block_size)
    found = cpu.nf4_encode(weight, block_size)
    same_bits(found[0], expected[0])
    same_bits(found[1], expected[1])
    for dtype in DTYPES:
        arguments = (*expected, weight.numel(), block_size, dtype)
        same_bits(cpu.nf4_decode(*arguments), reference.nf4_decode(*arguments))


@settings(max_examples=60, deadline=None)
@given(weights())
def test_nf4_takes_the_nearest_level(weight):
    """Where the reciprocal of a block's absmax is a normal float32; below 1e-38 the format itself gives up."""
    codes, absmax = cpu.nf4_encode(weight, 64)
    flat = weight.double().reshape(-1)
    q = torch.stack([codes >> 4, codes & 15], dim=1).reshape(-1)[: flat.numel()].long()
    scale = absmax.double().repeat_interleave(64)[: flat.numel()]
    levels = torch.tensor(reference.NF4_LEVELS, dtype=torch.float64)
    error = (levels[q] * scale - flat).abs()
    best = (levels[None] * scale[:, None] - flat[:, None]).abs().amin(dim=1)
    usual = (scale > 1e-37) & (scale < 1e37)
    assert (error <= best + 1e-6 * scale)[usual].all()


def exact_rounding(value, dtype):
    """The nearest representable number by rational arithmetic, ties to the even bit pattern."""
    near = torch.tensor([float(value)], dtype=torch.float64).to(dtype)
    around = reference.from_ordinal(reference.ordinal(near) + torch.arange(-2, 3), dtype)
    around = around[torch.isfinite(around)]
    bits = around.view(BITS[dtype])
    distances = [abs(Fraction(float(x)) - Fraction(float(value))) for x in around.double()]
    return float(around[min(range(len(distances)), key=lambda i: (distances[i], int(bits[i]) % 2))])


@settings(max_examples=200, deadline=None)
@given(st.sampled_from(DTYPES), st.floats(-60000, 60000), st.sampled_from([0.0, 2.0**-60, -(2.0**-60), 2.0**-45]))
def test_sums_round_once(dtype, value, nudge):
    """Values just beside a tie are where a second rounding shows."""
    weight = torch.tensor([[value]], dtype=torch.float64).to(dtype)
    half_ulp = float(reference.from_ordinal(reference.ordinal(weight) + 1, dtype).double() - weight.double()) / 2
    delta = torch.tensor([[half_ulp * (1 + nudge)]], dtype=torch.float64)
    total = float(weight.double() + delta)
    if abs(total) > 65000:
        return
    for kernels in (reference, cpu):
        assert float(kernels.add_rounded(weight, delta)) == exact_rounding(total, dtype)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 3), st.integers(1, 5), st.integers(1, 40), st.integers(0, 2**31))
def test_delta_is_the_float64_sum_in_order(adapters, rows, columns, seed):
    generator = torch.Generator().manual_seed(seed)
    ranks = [1 + (seed >> k) % 4 for k in range(adapters)]
    scales = torch.randn(adapters, generator=generator, dtype=torch.float64).tolist()
    a = torch.randn(sum(ranks), columns, generator=generator)
    b = torch.randn(rows, sum(ranks), generator=generator)
    same_bits(cpu.low_rank_delta(a, b, ranks, scales), reference.low_rank_delta(a, b, ranks, scales))
    expected = np.zeros((rows, columns))
    for i in range(rows):
        for j in range(columns):
            start = 0
            for rank, scale in zip(ranks, scales, strict=True):
                inner = 0.0
                for k in range(start, start + rank):
                    inner += float(b[i, k]) * float(a[k, j])
                expected[i, j] += inner * scale
                start += rank
    assert (cpu.low_rank_delta(a, b, ranks, scales).numpy() == expected).all()


@settings(max_examples=200, deadline=None)
@given(st.data(), st.sampled_from([0.0, 1e-4, 1e-2, 0.3, 30.0]))
def test_undo_restores_every_bit(data, ratio):
    weight = data.draw(weights())
    generator = torch.Generator().manual_seed(weight.numel())
    delta = torch.randn(weight.shape, generator=generator, dtype=torch.float64)
    delta *= ratio * weight.double().abs().mean()
    if data.draw(st.booleans()):
        delta[0] = 0.0
        delta[0, ::2] = -0.0
    merged = reference.add_rounded(weight, delta)
    same_bits(cpu.add_rounded(weight, delta), merged)
    finite = torch.isfinite(merged).all()
    if not finite:
        return
    sums = zip(cpu.addition_sums(weight, merged, delta), reference.addition_sums(weight, merged, delta), strict=True)
    assert all(found == pytest.approx(expected, rel=1e-9, nan_ok=True) for found, expected in sums)
    residual = reference.undo_residual(weight, merged, delta)
    same_bits(cpu.undo_residual(weight, merged, delta), residual)
    more = torch.cat([residual, residual.new_tensor([99])])
    for kernels in (reference, cpu):
        restored, used = kernels.undo(merged, delta, more)
        same_bits(restored, weight)
        assert used == residual.numel()


def test_undo_refuses_a_record_of_another_length():
    weight = torch.randn(8, 64).to(torch.bfloat16)
    delta = torch.randn(8, 64, dtype=torch.float64)
    merged = reference.add_rounded(weight, delta)
    residual = reference.undo_residual(weight, merged, delta)
    for kernels in (reference, cpu):
        with pytest.raises(ValueError, match="ambiguous"):
            kernels.undo(merged, delta, residual[:-1])
