"""A merge rounds each sum once, and can be undone to the last bit."""

import random
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from adaptkit.errors import NonFiniteError
from adaptkit.numerics import exact, lora, residual
from adaptkit.numerics.kernels import reference
from adaptkit.numerics.lora import LowRank

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
BITS = {torch.bfloat16: torch.int16, torch.float16: torch.int16, torch.float32: torch.int32}
SHAPE = {  # significant bits, least exponent of a normal number
    torch.bfloat16: (8, -126),
    torch.float16: (11, -14),
    torch.float32: (24, -126),
}


def problem(dtype, ratio=0.01, out=24, into=40, adapters=2, seed=0):
    """A weight and changes whose size relative to it is about ``ratio``."""
    generator = torch.Generator().manual_seed(seed)
    weight = (torch.randn(out, into, generator=generator) * 0.04).to(dtype)
    weight.view(-1)[:4] = torch.tensor([0.0, -0.0, 1e-6, -1e-6]).to(dtype)
    terms = []
    for number in range(adapters):
        rank = 2 + number
        a, b = torch.randn(rank, into, generator=generator), torch.randn(out, rank, generator=generator)
        terms.append(LowRank.of_tensors(a, b, 0.04 * ratio / rank**0.5))
    return weight, terms


def rounded(value: Fraction, dtype) -> Fraction:
    """The nearest number of a binary format, ties to even, in rational arithmetic."""
    if value == 0:
        return value
    precision, least = SHAPE[dtype]
    exponent = (abs(value.numerator)).bit_length() - value.denominator.bit_length()
    if Fraction(2) ** exponent > abs(value):
        exponent -= 1
    elif Fraction(2) ** (exponent + 1) <= abs(value):
        exponent += 1
    step = Fraction(2) ** (max(exponent, least) - precision + 1)
    return round(value / step) * step  # Fraction's round takes ties to the even integer


def delta_of(terms, shape):
    """The canonical delta in float64, computed by numpy."""
    total = np.zeros(shape)
    for change in terms:
        inner = np.zeros(shape)
        for k in range(change.rank):
            inner += change.lora_b[:, k, None].double().numpy() * change.lora_a[None, k, :].double().numpy()
        total += inner * change.scaling
    return total


def merge(weight, terms, with_undo=True):
    """Merge all rows at once."""
    return exact.merge_rows(weight, exact.prepare(terms), 0, with_undo)


def unmerge(merged, terms, residual):
    return exact.unmerge_rows(merged, exact.prepare(terms), 0, residual)


@pytest.mark.parametrize("ratio", [1e-4, 0.01, 1.0])
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_element_is_the_sum_rounded_once(dtype, ratio):
    weight, terms = problem(dtype, ratio)
    merged = merge(weight, terms).weight
    delta = delta_of(terms, weight.shape)
    for index in np.ndindex(*weight.shape):
        total = float(weight[index]) + float(delta[index])  # float64, as the definition says
        assert Fraction(float(merged[index])) == rounded(Fraction(total), dtype), index


def test_the_reference_rounding_matches_numpy():
    numbers = random.Random(0)
    for _ in range(500):
        value = numbers.gauss(0, 1) * 10 ** numbers.uniform(-7, 3)
        assert rounded(Fraction(value), torch.float16) == Fraction(float(np.float16(value)))
        assert rounded(Fraction(value), torch.float32) == Fraction(float(np.float32(value)))


@settings(deadline=None, max_examples=60)
@given(st.sampled_from(DTYPES), st.sampled_from([0.0, 1e-5, 1e-3, 0.1, 10.0]), st.integers(1, 3), st.integers(0, 999))
def test_a_merge_is_undone_to_the_last_bit(dtype, ratio, adapters, seed):
    weight, terms = problem(dtype, ratio, adapters=adapters, seed=seed)
    merged = merge(weight, terms)
    restored = unmerge(merged.weight, terms, merged.residual)
    assert torch.equal(restored.view(BITS[dtype]), weight.view(BITS[dtype]))


def test_subtracting_the_delta_does_not_restore_the_weight():
    """This is why a residual is recorded."""
    weight, terms = problem(torch.bfloat16, 0.3)
    merged = merge(weight, terms).weight
    subtracted = (merged.double() - lora.delta(terms)).to(torch.bfloat16)
    assert not torch.equal(subtracted, weight)


def test_without_undo_the_weights_are_the_same_and_the_residual_is_empty():
    weight, terms = problem(torch.bfloat16)
    assert torch.equal(merge(weight, terms, False).weight, merge(weight, terms).weight)
    assert merge(weight, terms, False).residual.numel() == 0


@pytest.mark.parametrize("dtype", DTYPES)
def test_reported_sums_match_dense_matrices(dtype):
    weight, terms = problem(dtype, 0.003)
    merged = merge(weight, terms)
    delta, before = torch.from_numpy(delta_of(terms, weight.shape)), weight.double()
    effect = merged.weight.double() - before
    assert merged.moved == int((merged.weight != weight).sum())
    assert merged.squared_delta == pytest.approx(float(delta.square().sum()), rel=1e-12)
    assert merged.squared_weight == pytest.approx(float(before.square().sum()), rel=1e-12)
    near = {"rel": 1e-9} if dtype == torch.float32 else {"abs": 1e-6}  # 16-bit weights: Σ effect · Δ in float32
    share = merged.overlap / merged.squared_delta
    assert share == pytest.approx(float((effect * delta).sum() / (delta * delta).sum()), **near)


def bits(values):
    return values.view(BITS[values.dtype])


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_zero_change_turns_minus_zero_into_zero_and_leaves_all_other_bits(dtype):
    """As an IEEE sum does; the residual keeps the sign for the undo."""
    weight, terms = problem(dtype)
    is_minus_zero = bits(weight) == bits(torch.tensor(-0.0, dtype=dtype))
    assert is_minus_zero.any()
    zero = [change.weighted(0.0) for change in terms]
    merged = merge(weight, zero)
    assert torch.equal(bits(merged.weight), bits(weight).masked_fill(is_minus_zero, 0))
    assert (merged.moved, merged.squared_delta, merged.overlap) == (0, 0.0, 0.0)
    assert torch.equal(bits(unmerge(merged.weight, zero, merged.residual)), bits(weight))


def test_the_delta_is_summed_in_the_order_of_the_adapters():
    """Floating-point addition is not associative, so the order affects the bits."""
    weight, terms = problem(torch.float32, 1.0, adapters=3)
    assert torch.equal(lora.delta(terms), torch.from_numpy(delta_of(terms, weight.shape)))
    assert not torch.equal(lora.delta(terms), lora.delta(terms[::-1]))


@pytest.mark.parametrize("change", ["longer", "shorter"])
def test_a_residual_of_the_wrong_length_is_refused(change):
    weight, terms = problem(torch.bfloat16, 0.3)
    merged = merge(weight, terms)
    assert merged.residual.numel() > 0
    residual = merged.residual[:-1] if change == "shorter" else torch.cat([merged.residual, merged.residual[:1]])
    with pytest.raises(ValueError, match="ambiguous"):
        unmerge(merged.weight, terms, residual)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("ratio", [0.01, 1.0])
def test_wrong_values_in_a_residual_affect_only_the_ambiguous_weights(dtype, ratio):
    """Only its length is checked here; callers compare hashes. Each value moves one weight by as many neighbours."""
    weight, terms = problem(dtype, ratio)
    merged = merge(weight, terms)
    restored = unmerge(merged.weight, terms, merged.residual + 1)
    steps = reference.ordinal(restored).long() - reference.ordinal(weight).long()
    assert 0 < merged.residual.numel() < weight.numel()
    assert steps.unique().tolist() == [0, 1]
    assert int(steps.sum()) == merged.residual.numel()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_weight_that_is_not_finite_is_refused(value):
    weight, terms = problem(torch.bfloat16)
    weight[3, 4] = value
    with pytest.raises(NonFiniteError, match="holds NaN or infinity"):
        merge(weight, terms)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_sum_that_overflows_is_refused(dtype):
    weight, terms = problem(dtype)
    weight[5, 6] = torch.finfo(dtype).max
    huge = LowRank.of_tensors(torch.ones(1, 40), torch.ones(24, 1), float(torch.finfo(dtype).max))
    with pytest.raises(NonFiniteError, match="overflows"):
        merge(weight, [*terms, huge])


@pytest.mark.parametrize("step", [1, 5, 23])
@pytest.mark.parametrize("dtype", DTYPES)
def test_merging_row_blocks_gives_the_bits_of_the_whole(dtype, step):
    weight, terms = problem(dtype, 0.1)
    whole, prepared = merge(weight, terms), exact.prepare(terms)
    starts = range(0, len(weight), step)
    pieces = [exact.merge_rows(weight[start : start + step], prepared, start, True) for start in starts]
    assert torch.equal(torch.cat([piece.weight for piece in pieces]), whole.weight)
    assert torch.equal(torch.cat([piece.residual for piece in pieces]), whole.residual)
    assert sum(piece.moved for piece in pieces) == whole.moved
    assert sum(piece.squared_delta for piece in pieces) == pytest.approx(whole.squared_delta, rel=1e-12)
    assert sum(piece.squared_weight for piece in pieces) == pytest.approx(whole.squared_weight, rel=1e-12)
    for start, piece in zip(starts, pieces, strict=True):
        restored = exact.unmerge_rows(piece.weight, prepared, start, piece.residual)
        assert torch.equal(restored.view(BITS[dtype]), weight[start : start + step].view(BITS[dtype]))


@pytest.mark.parametrize("longer", [True, False])
def test_a_residual_of_the_wrong_length_is_refused_for_a_row_block(longer):
    weight, terms = problem(torch.bfloat16, 0.3)
    prepared, rows = exact.prepare(terms), slice(0, 9)
    merged = exact.merge_rows(weight[rows], prepared, 0, True)
    other = torch.cat([merged.residual, merged.residual[:1]]) if longer else merged.residual[:-1]
    with pytest.raises(ValueError, match="ambiguous"):
        exact.unmerge_rows(merged.weight, prepared, 0, other)


@pytest.mark.parametrize(("rows", "columns", "start"), [(3, 40, 22), (3, 39, 0), (3, 40, -1)])
def test_rows_that_do_not_fit_the_factors_are_refused(rows, columns, start):
    prepared = exact.prepare(problem(torch.bfloat16)[1])
    with pytest.raises(ValueError, match="are outside"):
        exact.merge_rows(torch.zeros(rows, columns, dtype=torch.bfloat16), prepared, start, True)


@settings(deadline=None, max_examples=60)
@given(st.sampled_from(DTYPES), st.sampled_from([0.0, 1.0, 0.98, -0.3, 1e-9]), st.booleans(), st.integers(0, 999))
def test_a_merge_with_a_gain_is_undone_to_the_last_bit(dtype, size, columns, seed):
    weight, terms = problem(dtype, 0.05, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    gain = torch.rand((1, 40) if columns else (24, 1), generator=generator, dtype=torch.float64) * 0.1 + size
    change = lora.delta(terms)
    merged = exact.merge_affine(weight, change, gain, True)
    total = gain * weight.double() + change
    assert torch.allclose(merged.weight.double(), total, rtol=2.0 ** -SHAPE[dtype][0], atol=1e-7)
    restored = exact.unmerge_affine(merged.weight, change, gain, merged.residual)
    assert torch.equal(restored.view(BITS[dtype]), weight.view(BITS[dtype]))
    with pytest.raises(ValueError, match="ambiguous"):
        exact.unmerge_affine(merged.weight, change, gain, torch.cat([merged.residual, torch.tensor([0])]))


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_gain_of_one_equals_plain_addition(dtype):
    weight, terms = problem(dtype, 0.05)
    change = lora.delta(terms)
    added = exact.merge_rows(weight, exact.prepare(terms), 0, True)
    for gain in (None, torch.ones(1, 1, dtype=torch.float64), torch.ones(24, 1, dtype=torch.float64)):
        merged = exact.merge_affine(weight, change, gain, True)
        assert torch.equal(merged.weight, added.weight)
        assert torch.equal(merged.residual, added.residual)
        assert merged.moved == added.moved
        assert merged.squared_delta == pytest.approx(added.squared_delta, rel=1e-9)


def test_sums_reported_with_a_gain_cover_the_whole_change():
    weight, terms = problem(torch.float32, 0.05)
    generator = torch.Generator().manual_seed(0)
    change, gain = lora.delta(terms), torch.rand(24, 1, generator=generator, dtype=torch.float64) + 0.5
    merged = exact.merge_affine(weight, change, gain, False)
    whole, effect = gain * weight.double() + change - weight.double(), merged.weight.double() - weight.double()
    assert merged.squared_delta == pytest.approx(float((whole**2).sum()), rel=1e-9)
    assert merged.overlap == pytest.approx(float((effect * whole).sum()), rel=1e-9)
    assert merged.residual.numel() == 0


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_rows_with_non_finite_values_or_sums_are_refused(dtype, value):
    weight, terms = problem(dtype)
    weight[3, 4] = value
    change = lora.delta(terms)
    with pytest.raises(NonFiniteError, match="holds NaN or infinity"):
        exact.merge_rows(weight, exact.prepare(terms), 0, True)
    with pytest.raises(NonFiniteError, match="holds NaN or infinity"):
        exact.merge_affine(weight, change, torch.zeros(24, 1, dtype=torch.float64), True)
    weight[3, 4], change[3, 4] = 0, 1e39
    with pytest.raises(NonFiniteError, match="overflows"):
        exact.merge_affine(weight, change, None, True)


@pytest.mark.parametrize("dtype", DTYPES)
def test_undoing_a_one_percent_change_costs_at_most_a_tenth_of_a_bit_per_weight(dtype):
    """The design target, for weights of a size that models have."""
    generator = torch.Generator().manual_seed(0)
    weight = (torch.randn(256, 1024, generator=generator) * 0.02).to(dtype)
    a, b = torch.randn(16, 1024, generator=generator), torch.randn(256, 16, generator=generator)
    term = LowRank.of_tensors(a, b, 1.0)
    term = term.weighted(0.01 * float(weight.double().norm()) / lora.norm(term))
    merged = exact.merge_rows(weight, exact.prepare([term]), 0, True)
    assert (merged.squared_delta / merged.squared_weight) ** 0.5 == pytest.approx(0.01, rel=1e-3)
    assert 8 * len(residual.encode(merged.residual.numpy())) / weight.numel() <= 0.1
