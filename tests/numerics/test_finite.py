"""NaN and infinity are detected in every dtype and position."""

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from adaptkit.errors import NonFiniteError
from adaptkit.formats._format import encoding_of
from adaptkit.numerics.dtypes import BFLOAT16
from adaptkit.numerics.finite import all_finite, check_finite
from adaptkit.numerics.spec import TensorSpec

DTYPES = [BFLOAT16, np.dtype(np.float16), np.dtype(np.float32), np.dtype(np.float64)]


@given(st.sampled_from(DTYPES), st.integers(0, 2**31), st.integers(1, 200))
def test_all_finite_agrees_with_numpy_for_any_bits(dtype, seed, count):
    values = np.frombuffer(np.random.default_rng(seed).bytes(count * dtype.itemsize), dtype)
    with np.errstate(invalid="ignore"):  # numpy converts bfloat16, whose signaling NaN some processors report
        expected = bool(np.isfinite(values).all())
    assert all_finite(values) == expected


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_non_finite_element_is_refused_with_its_index(dtype, bad):
    largest = ml_dtypes.finfo(dtype).max
    values = np.full((3, 4, 5), largest, dtype)
    values[0] = -largest
    check_finite(values)
    values[1, 2, 3] = bad
    with pytest.raises(NonFiniteError, match=r"\[1, 2, 3\]"):
        check_finite(values)


def test_integers_scalars_and_empty_arrays_are_finite():
    assert all_finite(np.full(3, 2**30))
    assert all_finite(np.empty(0))
    assert all_finite(np.array(1.5))


@pytest.mark.parametrize(("ints", "bits", "dtype"), [("uint32", 0x7F800001, "float32"), ("uint16", 0x7C01, "float16")])
def test_a_signaling_nan_is_refused_like_any_other(ints, bits, dtype):
    """numpy warns when it casts one, and in these tests a warning is an error."""
    values = np.array([0, bits, 0], ints).view(dtype)
    with pytest.raises(NonFiniteError, match=r"\[1\] is nan"):
        check_finite(values)
    for name in ("nf4", "int8"):
        weight = TensorSpec("x.weight", "F32", (1, 3))
        with pytest.raises(NonFiniteError, match=r"1\] is nan"):
            encoding_of(name).codec.encode(values, weight, encoding_of(name))
