"""The compiled kernels of weights with scales of groups give the bits of their definitions in numpy, and of torch."""

import ml_dtypes
import numpy as np
import pytest
import torch

from adaptkit.numerics.grids import E2M1, E4M3, INT4, INT8, NF4, Grid
from adaptkit.numerics.kernels import cpu, reference

GRIDS = {"int4": INT4, "int8": INT8, "e2m1": E2M1, "e4m3": E4M3, "nf4": NF4}
DTYPES = [ml_dtypes.bfloat16, np.float16, np.float32]


@pytest.mark.parametrize("name", GRIDS)
def test_codes_are_those_of_the_nearest_level(name):
    grid = GRIDS[name]
    generator, levels = np.random.default_rng(0), grid.levels
    scaled = generator.uniform(1.5 * levels[0], 1.5 * levels[-1], 5000).astype(np.float32)
    scaled = np.concatenate([scaled, scaled * np.float32(1e-4), levels, grid.bounds, [-0.0, np.inf, -np.inf, 1e-45]])
    scaled = scaled.astype(np.float32)
    codes = grid.nearest(scaled)
    assert np.array_equal(codes, reference.nearest_codes(scaled, grid.rounding))
    wide = np.clip(scaled.astype(np.float64), levels[0], levels[-1])
    distance = np.abs(wide[:, None] - levels).min(axis=1)
    rounding = 2.0**-24 if name == "nf4" else 0  # its midpoints are no float32
    np.testing.assert_allclose(np.abs(wide - grid.values[codes]), distance, rtol=0, atol=rounding)


def test_values_halfway_between_levels_go_where_each_type_says():
    assert INT8.values[INT8.nearest(np.float32([0.5, 1.5, -2.5]))].tolist() == [0, 2, -2]  # to even
    assert E4M3.values[E4M3.nearest(np.float32([17, 19, -17]))].tolist() == [16, 20, -16]  # to an even mantissa
    assert E2M1.values[E2M1.nearest(np.float32([2.5, 5, -5]))].tolist() == [2, 4, -6]  # to the lower
    assert (
        Grid(E2M1.values).nearest(np.float32([2.5, 5, -5])).tolist() == E2M1.nearest(np.float32([2.5, 5, -5])).tolist()
    )


def test_e4m3_is_rounded_as_torch_rounds_it():
    """Every 997th float32 within the range, beyond which torch gives NaN."""
    numbers = np.arange(0, 1 << 32, 997, dtype=np.uint32).view(np.float32)
    numbers = numbers[np.abs(numbers) <= 448]
    expected = torch.from_numpy(numbers).to(torch.float8_e4m3fn).view(torch.uint8).numpy()
    assert np.array_equal(E4M3.nearest(numbers), expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("size", "height"), [(32, 1), (96, 1), (40, 7), (128, 128)])
def test_extremes_of_groups(dtype, size, height):
    rows = np.random.default_rng(1).standard_normal((20, 96)).astype(dtype)
    low, high = cpu.group_extremes(rows, size, height)
    wide = rows.astype(np.float32)
    for down in range(len(low)):
        for across in range(low.shape[1]):
            group = wide[down * height : (down + 1) * height, across * size : (across + 1) * size]
            assert (low[down, across], high[down, across]) == (group.min(), group.max())
    for bad in (np.nan, -np.nan, np.inf, -np.inf):
        rows[3, 5] = bad
        low, high = cpu.group_extremes(rows, size, height)
        assert not np.isfinite([low[3 // height, 5 // size], high[3 // height, 5 // size]]).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("size", "height"), [(32, 1), (96, 1), (40, 7)])
@pytest.mark.parametrize("has_zeros", [False, True])
@pytest.mark.parametrize("name", GRIDS)
def test_encoding_and_decoding_groups(name, has_zeros, size, height, dtype):
    grid, generator = GRIDS[name], np.random.default_rng(2)
    rows = (generator.standard_normal((20, 96)) * 3).astype(dtype)
    shape = -(-20 // height), -(-96 // size)
    scales = generator.uniform(0.01, 1, shape).astype(np.float32)
    zeros = generator.integers(-8, 8, shape, np.int8) if has_zeros else None
    shared = scales, zeros, size, height, grid.rounding
    for pairs in {False, len(grid.values) == 16}:
        codes, moments = cpu.encode_groups(rows, *shared, pairs, measure=True)
        expected, sums = reference.encode_groups(rows, *shared, pairs, measure=True)
        assert np.array_equal(codes, expected)
        np.testing.assert_allclose(moments, sums, rtol=1e-12)
        assert cpu.encode_groups(rows, *shared, pairs, measure=False)[1] is None
    codes, (lost, squares) = cpu.encode_groups(rows, *shared, False, measure=True)
    if height == 1 and 96 % size == 0:
        decoded, again = np.empty((2, 20, 96), np.float32)
        cpu.decode_groups(codes, grid.values, scales, zeros, decoded)
        reference.decode_groups(codes, grid.values, scales, zeros, again)
        assert np.array_equal(decoded.view(np.uint32), again.view(np.uint32))
        wide = rows.astype(np.float64)
        assert lost == pytest.approx(np.square(decoded - wide).sum(), rel=1e-12)
        assert squares == pytest.approx(np.square(wide).sum(), rel=1e-12)
