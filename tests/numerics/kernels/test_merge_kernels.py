"""Merging and unmerging in one pass give the bits of the definition; the float32 filter is never wrong."""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernels_on_tensors import cpu, reference

from adaptkit.numerics import exact
from adaptkit.numerics.kernels import _cpu_factors, _cpu_filter
from adaptkit.numerics.kernels._jit import jit
from adaptkit.numerics.lora import LowRank
from adaptkit.numerics.tensors import as_tensor

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
BITS = {torch.bfloat16: torch.int16, torch.float16: torch.int16, torch.float32: torch.int32, torch.float64: torch.int64}


NARROW = st.integers(1, 70)
WIDE = st.sampled_from([_cpu_factors.TILE + more for more in (-1, 0, 1, 900)])


def same_bits(x, y):
    assert x.dtype == y.dtype
    assert x.shape == y.shape
    assert torch.equal(x.view(BITS[x.dtype]), y.view(BITS[y.dtype]))


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def any_numbers(shape, dtype, generator):
    """Finite numbers whose bits are random: all magnitudes, denormals, both zeros."""
    info = torch.iinfo(BITS[dtype])
    bits = torch.randint(info.min, info.max + 1, shape, generator=generator).to(BITS[dtype])
    return torch.where(torch.isfinite(bits.view(dtype)), bits, 0).view(dtype)


@st.composite
def problems(draw, columns=NARROW):
    """A weight with changes of various kinds and sizes, and its first row's index in the whole weight."""
    dtype, kind = draw(st.sampled_from(DTYPES)), draw(st.sampled_from(["normal", "bits", "sparse", "integers", "tiny"]))
    rows, wide, start = draw(st.integers(1, 9)), draw(columns), draw(st.integers(0, 5))
    generator = seeded(draw(st.integers(0, 2**31)))
    size = {"tiny": 1e-38, "integers": 8.0}.get(kind, 0.05)
    weight = torch.randn(rows, wide, generator=generator) * size
    if kind == "integers":  # whose sums are often exact ties
        weight = weight.round()
    weight = weight.to(dtype)
    if kind == "bits":
        weight = any_numbers(weight.shape, dtype, generator)
    elif kind == "sparse":
        weight[torch.rand(weight.shape, generator=generator) < 0.9] = -0.0
    ranks = draw(st.lists(st.integers(1, 9), min_size=1, max_size=3))
    a = torch.randn(sum(ranks), wide, generator=generator)
    b = torch.randn(start + rows + 3, sum(ranks), generator=generator)
    if kind == "integers":
        a, b = a.round(), b.round()
    if draw(st.booleans()):
        b[start] = 0
    ratio = draw(st.sampled_from([1e-6, 1e-3, 0.01, 0.3, 3.0]))
    scales = [ratio * size * factor for factor in torch.randn(len(ranks), generator=generator).tolist()]
    if kind == "integers":
        scales = [0.5 for _ in ranks]
    return weight, a, b, ranks, scales, start


def check_against_definition(weight, a, b, ranks, scales, start):
    definition, compiled = reference.prepare(a, b, ranks, scales), cpu.prepare(a, b, ranks, scales)
    expected = reference.merge_rows(weight, definition, start, True)
    found = cpu.merge_rows(weight, compiled, start, True)
    assert found.finite == expected.finite
    if not expected.finite:
        return None
    same_bits(found.weight, expected.weight)
    assert torch.equal(found.residual, expected.residual)
    assert found.moved == expected.moved
    assert found.squared_delta == pytest.approx(expected.squared_delta, rel=1e-11, abs=0)
    assert found.squared_weight == pytest.approx(expected.squared_weight, rel=1e-12, abs=0)
    assert found.overlap == pytest.approx(expected.overlap, rel=1e-9, abs=1e-6 * expected.squared_delta)
    without = cpu.merge_rows(weight, compiled, start, False)
    same_bits(without.weight, expected.weight)
    assert without.residual.numel() == 0
    more = torch.cat([found.residual, torch.tensor([7])])
    for kernels, factors in ((reference, definition), (cpu, compiled)):
        restored, used = kernels.unmerge_rows(found.weight, factors, start, more)
        same_bits(restored, weight)
        assert used == found.residual.numel()
    return found


@settings(max_examples=300, deadline=None)
@given(problems())
def test_merging_and_restoring_match_the_definition_bit_for_bit(problem):
    check_against_definition(*problem)


@settings(max_examples=25, deadline=None)
@given(problems(WIDE))
def test_rows_wider_than_a_tile_match_the_definition(problem):
    check_against_definition(*problem)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("share", [2.0**-12, 2.0**-8, 0.4])
def test_powers_of_two_and_their_neighbours_match_the_definition_at_any_magnitude(dtype, share):
    info = torch.finfo(dtype)
    exponents = torch.arange(np.log2(info.smallest_normal) + 3, np.log2(info.max))
    powers = (2.0 ** exponents.double()).to(dtype)
    weight = torch.cat([reference.from_ordinal(reference.ordinal(powers) + step, dtype) for step in (-1, 0, 1)])
    weight = torch.stack([weight, -weight])
    changes = (weight[:1].double() * share).float()
    assert check_against_definition(weight, changes, torch.ones(2, 1), [1], [0.9], 0) is not None


def near_middles(dtype, generator, count):
    """Weights and changes whose sums are within a few units of float32 of a tie between two numbers."""
    weight = (torch.randn(1, count, generator=generator) * 0.05).to(dtype)
    below = (weight.float() * (1 + 0.2 * torch.rand(1, count, generator=generator))).to(dtype)
    above = reference.from_ordinal(reference.ordinal(below) + 1, dtype)
    change = ((below.double() + above.double()) / 2 - weight.double()).float()
    steps = torch.randint(-6, 7, (1, count), generator=generator)
    nudged = reference.from_ordinal(reference.ordinal(change) + steps, torch.float32)
    return weight, torch.where(torch.rand(1, count, generator=generator) < 0.8, nudged, change)


@pytest.mark.parametrize("dtype", DTYPES[:2])
@pytest.mark.parametrize("scale", [1.0, 0.75, 1 / 3])
def test_sums_near_ties_are_rounded_as_in_the_definition(dtype, scale):
    """The change has rank 1; float32 cannot distinguish many of the sums from ties."""
    weight, change = near_middles(dtype, seeded(1), 20_000)
    a, b = (change.double() / scale).float(), torch.ones(5, 1)
    assert check_against_definition(weight, a, b, [1], [scale], 2) is not None
    factors = cpu.prepare(a, b, [1], [scale])
    in_float32 = (weight.float() + a * float(factors.scaled(0, 1)[0][0, 0])).to(dtype)
    wrong = in_float32 != reference.merge_rows(weight, reference.prepare(a, b, [1], [scale]), 2, False).weight
    assert int(wrong.sum()) > 100  # so float32 alone would not be enough


@pytest.mark.parametrize("dtype", DTYPES[:2])
def test_unmerge_guesses_near_ties_are_rounded_as_in_the_definition(dtype):
    merged, change = near_middles(dtype, seeded(2), 20_000)
    a, b = -change, torch.ones(1, 1)
    definition, compiled = reference.prepare(a, b, [1], [1.0]), cpu.prepare(a, b, [1], [1.0])
    used = reference.unmerge_rows(merged, definition, 0, torch.zeros(20_000, dtype=torch.int64))[1]
    residual = torch.arange(used) % 3 - 1
    expected = reference.unmerge_rows(merged, definition, 0, residual)
    found = cpu.unmerge_rows(merged, compiled, 0, residual)
    same_bits(found[0], expected[0])
    assert found[1] == expected[1] == used


def are_certain(like, numbers, errors):
    out = np.empty(numbers.size, np.bool_)
    say_which_are_certain(like, numbers, errors, out)
    return out


@jit
def say_which_are_certain(like, numbers, errors, out):
    for i in range(numbers.size):
        least, span = _cpu_filter.trusted_range(like, errors[i])
        out[i] = _cpu_filter._is_certain(like, numbers[i], errors[i], least, span)


@pytest.mark.parametrize("dtype", DTYPES[:2])
def test_a_certain_rounding_is_the_same_anywhere_within_the_error(dtype):
    """Numbers near ties and near powers of two, where the spacing changes, with errors of all sizes."""
    generator, count = seeded(6), 400_000
    exponents = torch.randint(-12, 12, (count,), generator=generator)
    numbers = (1 + torch.randint(0, 256, (count,), generator=generator) / 256).float() * 2.0**exponents
    steps = torch.randint(-2000, 2001, (count,), generator=generator)
    numbers = reference.from_ordinal(reference.ordinal(numbers) + steps, torch.float32)
    errors = (numbers.abs() * 2.0 ** (-25 + 20 * torch.rand(count, generator=generator))).float()
    like = np.zeros(1, np.uint16 if dtype == torch.bfloat16 else np.int16)
    certain = torch.from_numpy(are_certain(like, numbers.numpy(), errors.numpy()))
    reach = errors.double() + 2.0**-24 * numbers.double().abs()
    low, high = (reference.round_to(numbers.double() + sign * reach, dtype) for sign in (-1, 1))
    assert (low == high)[certain].all()
    assert float(certain[low == high].double().mean()) > (0.8 if dtype == torch.bfloat16 else 0.6)
    unusual = torch.tensor([0.0, 1e-45, 1e-30, 3e38, torch.inf, -torch.inf, torch.nan])
    tiny = are_certain(like, unusual.numpy(), np.full(7, 1e-33, np.float32))
    assert not tiny[[0, 1, 3, 4, 5, 6]].any()


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 2**31), st.sampled_from([1e-38, 1e-20, 1.0, 1e15, 1e19]), st.sampled_from([1e-30, 0.3, 1e9]))
def test_the_float32_product_is_within_its_bound(seed, size, scale):
    generator = seeded(seed)
    ranks = [1 + seed % 40, 3]
    a = torch.randn(sum(ranks), 33, generator=generator) * size
    b = torch.randn(6, sum(ranks), generator=generator) * size
    factors = cpu.prepare(a, b, ranks, [scale, -scale])
    scaled, bound = factors.scaled(2, 4)
    found = np.empty((4, _cpu_factors.TILE), np.float32)
    _cpu_factors.multiply(factors.a, scaled, 0, 0, 0, sum(ranks), 33, found)
    found = found[:, :33].astype(np.float64)
    exact = reference.low_rank_delta(a, b[2:], ranks, [scale, -scale]).numpy()
    fine = np.isfinite(found)
    assert (np.abs(found - exact) <= bound[:, None])[fine].all()
    assert not fine.all() or bound.max() < 1e-3 * np.abs(exact).max() + 3e-36  # and the bound is not just large


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan")])
def test_a_non_finite_weight_is_detected_for_any_change(dtype, value):
    for change in (0.0, 1.0, -1e5, 1e5):
        weight = torch.zeros(3, 600, dtype=dtype)
        weight[2, 555] = value
        factors = cpu.prepare(torch.ones(1, 600), torch.ones(3, 1), [1], [change])
        assert not cpu.merge_rows(weight, factors, 0, True).finite
        weight[2, 555] = 1
        assert cpu.merge_rows(weight, factors, 0, True).finite == (dtype != torch.float16 or abs(change) < 65000)


@pytest.mark.parametrize("dtype", DTYPES)
def test_sums_overflow_from_half_a_unit_above_the_largest_number(dtype):
    largest = torch.finfo(dtype).max
    unit = largest - float(reference.from_ordinal(reference.ordinal(torch.tensor(largest, dtype=dtype)) - 1, dtype))
    for sign in (1, -1):
        weight = torch.full((1, 5), sign * largest, dtype=dtype)
        for part, finite in ((0.0, True), (0.499, True), (0.5, False), (0.6, False), (-1.5, True)):
            factors = cpu.prepare(torch.ones(1, 5), torch.ones(1, 1), [1], [sign * part * unit])
            merged = cpu.merge_rows(weight, factors, 0, True)
            assert merged.finite == finite
            if finite:
                same_bits(cpu.unmerge_rows(merged.weight, factors, 0, merged.residual)[0], weight)


def test_threads_and_row_blocks_do_not_affect_the_result():
    generator = seeded(3)
    a, b = torch.randn(24, 700, generator=generator), torch.randn(150, 24, generator=generator)
    weight = (torch.randn(150, 700, generator=generator) * 0.02).to(torch.bfloat16)
    factors = cpu.prepare(a, b, [16, 8], [1e-4, 3e-5])
    whole = cpu.merge_rows(weight, factors, 0, True)
    for step in (1, 7, 50):
        starts = range(0, 150, step)
        with ThreadPoolExecutor(4) as pool:
            pieces = list(pool.map(lambda s, n=step: cpu.merge_rows(weight[s : s + n], factors, s, True), starts))
            backs = pool.map(
                lambda s, piece: cpu.unmerge_rows(piece.weight, factors, s, piece.residual)[0], starts, pieces
            )
            same_bits(torch.cat(list(backs)), weight)
        same_bits(torch.cat([piece.weight for piece in pieces]), whole.weight)
        assert torch.equal(torch.cat([piece.residual for piece in pieces]), whole.residual)
        assert sum(piece.moved for piece in pieces) == whole.moved


@pytest.mark.parametrize("shape", [(0, 5), (4, 0), (1, 1)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_weights_without_rows_or_columns_are_merged(shape, dtype):
    weight = torch.ones(shape, dtype=dtype)
    factors = cpu.prepare(torch.ones(2, shape[1]), torch.ones(shape[0], 2), [2], [0.25])
    merged = cpu.merge_rows(weight, factors, 0, True)
    assert (merged.weight == 1.5).all()
    same_bits(cpu.unmerge_rows(merged.weight, factors, 0, merged.residual)[0], weight)


@settings(max_examples=60, deadline=None)
@given(problems())
def test_one_pass_merging_equals_adding_the_delta(problem):
    """It gives the bits of ``exact.delta`` and one rounded addition."""
    weight, a, b, ranks, scales, start = problem
    terms = [
        LowRank.of_tensors(*pair, scale)
        for pair, scale in zip(zip(a.split(ranks), b.split(ranks, dim=1), strict=True), scales, strict=True)
    ]
    delta = as_tensor(exact.delta(terms, slice(start, start + len(weight))))
    same_bits(delta, reference.low_rank_delta(a, b, ranks, scales)[start : start + len(weight)])
    merged = cpu.merge_rows(weight, cpu.prepare(a, b, ranks, scales), start, False)
    if merged.finite:
        same_bits(merged.weight, reference.add_rounded(weight, delta))


def test_reported_sums_are_right_for_cancelling_tiny_and_huge_changes():
    generator = seeded(4)
    a, b = torch.randn(8, 40, generator=generator), torch.randn(6, 8, generator=generator)
    weight = torch.randn(6, 40, generator=generator).to(torch.bfloat16)
    opposite = torch.cat([a, a]), torch.cat([b, b], dim=1), [8, 8], [0.3, -0.3], 0
    assert check_against_definition(weight, *opposite).squared_delta == 0
    nearly = torch.cat([a, a]), torch.cat([b, b * (1 + 1e-6)], dim=1), [8, 8], [0.3, -0.3], 0
    check_against_definition(weight, *nearly)
    check_against_definition(weight * 1e-30, a * 1e-20, b * 1e-14, [8], [1.0], 0)
    check_against_definition(weight * 1e20, a * 1e10, b * 1e9, [8], [1.0], 0)


GAINS = [0.0, -0.0, 1.0, -1.0, 0.97, -0.4, 3.7, 1e-8, -1e-30, 1e-300, 5e-324, 1e12, 1e300]


@st.composite
def affine_problems(draw):
    dtype, shape = draw(st.sampled_from(DTYPES)), (draw(st.integers(1, 6)), draw(st.integers(1, 40)))
    generator = seeded(draw(st.integers(0, 2**31)))
    weight = torch.randn(shape, generator=generator) * 0.05
    weight = any_numbers(shape, dtype, generator) if draw(st.booleans()) else weight.to(dtype)
    delta = torch.randn(shape, dtype=torch.float64, generator=generator)
    delta *= draw(st.sampled_from([0.0, -0.0, 1e-12, 1e-4, 0.05, 10.0]))
    form = draw(st.sampled_from([(1, 1), (shape[0], 1), (1, shape[1]), shape]))
    picked = torch.tensor([draw(st.sampled_from(GAINS)) for _ in range(form[0] * form[1])], dtype=torch.float64)
    return weight, delta, picked.view(form)


@settings(max_examples=300, deadline=None)
@given(affine_problems())
def test_a_weight_merged_with_any_gain_is_restored_bit_for_bit(problem):
    weight, delta, gain = problem
    merged = reference.add_rounded(weight, delta, gain)
    found = cpu.add_rounded(weight, delta, gain)
    assert torch.equal(torch.isfinite(found), torch.isfinite(merged))
    fine = torch.isfinite(merged).all(dim=0)
    if not fine.any():
        return
    weight, delta, merged = weight[:, fine], delta[:, fine], merged[:, fine]
    gain = gain[:, fine] if gain.shape[1] > 1 else gain
    same_bits(found[:, fine].contiguous(), merged.contiguous())
    residual = reference.undo_residual(weight, merged, delta, gain)
    assert torch.equal(cpu.undo_residual(weight, merged, delta, gain), residual)
    for kernels in (reference, cpu):
        restored, used = kernels.undo(merged, delta, residual, gain)
        same_bits(restored, weight)
        assert used == residual.numel()


def test_with_a_gain_of_zero_the_residual_is_the_distance_to_the_replacement():
    """So a replacement close to the original takes few bits."""
    generator = seeded(5)
    weight = torch.randn(4, 50, generator=generator).to(torch.bfloat16)
    steps = torch.randint(-3, 4, (4, 50), generator=generator)
    instead = reference.from_ordinal(reference.ordinal(weight) + steps, torch.bfloat16)
    for gain in (torch.zeros(1, 1, dtype=torch.float64), torch.zeros(4, 1, dtype=torch.float64)):
        residual = cpu.undo_residual(weight, instead, instead.double(), gain)
        assert torch.equal(residual, (reference.ordinal(weight) - reference.ordinal(instead)).view(-1).long())


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 512), st.integers(0, 2**31), st.sampled_from([0.0, 0.02, 0.5, 1.0]))
def test_find_nonzero_finds_all_marks(count, seed, share):
    marks = np.random.default_rng(seed).choice(np.array([0, 1, 2], np.uint8), 512, p=[1 - share, share / 2, share / 2])
    expected = np.flatnonzero(marks[:count])
    words, found = np.empty(65, np.int64), np.empty(513, np.int64)
    total = _cpu_filter.find_nonzero(marks, marks.view(np.uint64), count, words, found)
    assert found[:total].tolist() == expected.tolist()
